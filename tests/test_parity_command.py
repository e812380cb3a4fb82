"""aerie parity as a user types it: what it runs, says, and returns."""

import json

import pytest

from suites.__main__ import main

HAWK = ("family=hawk", "backend=torch", "settings=paper", "dtype=float64")
LEVELS = ("--level", "L1", "--level", "L0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One real run of two levels; its line of progress goes to stderr."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.raises(SystemExit) as end:
        main(["parity", *HAWK, *LEVELS, "--results", str(folder)])
    assert end.value.code == 0
    return folder


@pytest.fixture
def aerie(store, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["parity", *arguments, "--results", str(store)])
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


def test_a_table_has_a_row_a_tensor_of_the_levels_asked_for(aerie):
    code, out, err = aerie(*HAWK, *LEVELS)
    assert code == 0
    assert "nothing to run" in err  # whatever the order of the levels
    assert "linear_scan/h_BTR" in out
    assert "L1     torch    float64" in out
    assert "L4" not in out


def test_json_has_every_check_with_both_errors_and_tolerances(aerie):
    code, out, _ = aerie(*HAWK, *LEVELS, "--json")
    found = json.loads(out)
    assert code == 0
    assert {row["level"] for row in found["checks"]} == {"L0", "L1"}
    for row in found["checks"]:
        assert row["largest"] <= row["tolerance"]
        assert row["rms"] <= row["rms_tolerance"]
    assert not found["first_divergences"]
    assert not found["is_red"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "jax"), "nothing of jax to compare with"),
        (("dtype=float32", "kernels.linear_scan=auto", "--level", "L1"), "nothing was compared"),
        (("kernels.linear_scan=triton",), "has no float64"),
        (("kernels.linear_scan=pallas_gpu",), "not offered"),
    ],
)
def test_where_nothing_was_compared_nothing_is_green(aerie, arguments, message):
    named = [] if "--level" in arguments else LEVELS
    code, out, _ = aerie(*HAWK, *named, *arguments)
    assert code == 1
    assert message in out


def test_a_red_check_is_shown_with_the_way_to_it(aerie, store):
    (path,) = [p for p in store.glob("runs/*/*.json") if "h_BTR" in p.read_text()]
    text = path.read_text()
    record = json.loads(text)
    for sample in record["samples"]:
        if (sample["metric"], sample["field"]) == ("relative_error", "L1/rg_lru/h_BTR"):
            sample["value"] = 0.25
    path.write_text(json.dumps(record))
    try:
        code, out, _ = aerie(*HAWK, *LEVELS)
    finally:
        path.write_text(text)
    assert code == 1
    assert "RED (1)" in out
    assert "hawk paper torch float64: first divergence at L1/rg_lru/h_BTR; 1 of" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--level", "L9"), "L9"),
        (("--against", "nowhere"), "--against nowhere"),
        (("suite=training_speed",), "aerie run"),
        (("--prove", "family=hawk"), "stand alone"),
        (("--calibrate", "--level", "L1"), "stand alone"),
        (("--prove", "--calibrate"), "stand alone"),
    ],
)
def test_a_wrong_request_is_one_line(aerie, arguments, message):
    code, _, err = aerie(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
