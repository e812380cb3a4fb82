"""The paper's experiments: nested names, questions and scales on the command line."""

from pathlib import Path

import pytest

from suites import compose, reports
from suites.__main__ import _complete
from suites.harness import plan

PAPER = [name for name in compose.choices("experiment") if name.startswith("paper/figure")]


def runs_of(*overrides: str) -> list:
    request = compose.read(overrides)
    return [run for settings in request.settings for run in plan.expand(settings)]


def test_every_figure_that_a_suite_can_ask_is_there():
    figures = ["1a", "1b", "3", "4", "5", "6", "8", "9"]
    assert [f"paper/figure{name}" for name in figures] == PAPER


@pytest.mark.parametrize("name", PAPER)
def test_it_asks_at_the_papers_sizes_and_small_on_a_cpu(name):
    request = compose.read([f"experiment={name}"])
    assert request.title == name
    assert request.question.endswith("?")
    large = runs_of(f"experiment={name}")
    if name == "paper/figure6":  # networks of its own, 250K parameters
        sizes, dtype = {"synthetic"}, "float32"
    else:
        sizes, dtype = {"100m", "400m", "1b"}, "bfloat16"
    assert {run.model.size for run in large} <= sizes
    assert {(run.dtype, run.device_kind) for run in large} == {(dtype, "h100")}
    small = runs_of(f"experiment={name}", "scale=cpu")
    assert {(run.dtype, run.device_kind) for run in small} == {("float32", "cpu")}
    assert {run.suite for run in small} == {run.suite for run in large}
    longest = max(max(run.workload.seq_len, run.workload.prompt_len) for run in small)
    assert longest <= 1024


def test_a_scale_lies_over_its_experiment_and_what_is_typed_over_both():
    name = "experiment=paper/figure3"
    assert {run.workload.seq_len for run in runs_of(name)} == {2048, 4096, 8192}
    assert {run.workload.seq_len for run in runs_of(name, "scale=cpu")} == {256, 512, 1024}
    typed = runs_of("suite.seq_lens=[64]", name, "scale=cpu", "size=tiny", "dtype=bfloat16")
    assert {(run.workload.seq_len, run.dtype) for run in typed} == {(64, "bfloat16")}
    assert {run.round for run in typed} == set(range(6))


def test_a_scale_speaks_to_one_suite_alone():
    small = runs_of("experiment=paper/figure8", "scale=cpu")
    sizes = {(run.suite, run.model.size, run.workload.seq_len) for run in small}
    assert sizes == {("kernel_speed", "100m", 256), ("kernel_speed", "100m", 1024),
                     ("training_speed", "tiny", 256)}  # fmt: skip


@pytest.mark.parametrize("scale", ["100m", "200m", "400m"])
def test_figure_1a_trains_on_the_tokens_of_table_2(scale):
    from analysis import published

    table = published.read("table2")
    table = table[(table["size"] == scale) & (table["metric"] == "num_tokens")]
    typed = [] if scale == "100m" else [f"scale={scale}"]
    for run in runs_of("experiment=paper/figure1a", *typed):
        work = run.workload
        num_tokens = work.num_steps * work.batch_size * work.seq_len
        assert run.model.size == scale
        assert abs(num_tokens / table["value"].iloc[0] - 1) < 0.01


@pytest.mark.parametrize("name", ["figure5", "figure9"])
def test_longer_sequences_train_on_as_many_tokens(name):
    scales = ["scale=8k"] if name == "figure5" else ["scale=4k", "scale=8k"]
    works = [runs_of(f"experiment=paper/{name}", *typed)[0].workload
             for typed in ([], *([scale] for scale in scales))]  # fmt: skip
    assert len({work.seq_len for work in works}) == len(scales) + 1
    assert len({work.seq_len * work.batch_size * work.num_steps for work in works}) == 1


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["experiment=figure3"], "Did you mean 'paper/figure3'"),
        (["experiment=paper/figure33"], "Did you mean 'paper/figure3'"),
        (["experiment=paper"], "paper/figure1a"),
        (["experiment=paper/figure3", "scale=gpu"], "known: cpu. Did you mean 'cpu'?"),
        (["experiment=quickstart", "scale=cpu"], "has no scales"),
        (["suite=training_speed", "scale=cpu"], "experiment=paper/figure3 scale=cpu"),
        (["experiment=paper/figure3", "scale=cpu,cpu"], "takes one value"),
        (["experiment=paper/figure3", "scal=cpu"], "Did you mean 'scale'"),
        (["experiment=paper/figure3", "scale.cpu=1"], "has no keys"),
    ],
)
def test_a_wrong_name_is_one_line_with_a_hint(overrides, hint):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        compose.read(overrides)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("suites: {training_speed: []}\nquestions: why?", "Did you mean 'question'?"),
        ("suites: {training_speed: []}\nquestion: [why]", "must be text"),
        ("overrides: [size=tiny]", "needs the key suites"),
        ("suites: {training_speed: []}\nscales: {cpu: {override: []}}", "'overrides'"),
        ("suites: {training_speed: []}\nscales: {cpu: {suites: {parity: []}}}", "training_speed"),
        ("suites: {training_speed: []}\nscales: {cpu: [size=tiny]}", "overrides and suites"),
    ],
)
def test_a_wrong_file_names_its_key(tmp_path, monkeypatch, text, hint):
    folder = tmp_path / "configs"
    (folder / "experiment" / "mine").mkdir(parents=True)
    for path in compose.CONFIGS.iterdir():
        if path.name != "experiment":
            (folder / path.name).symlink_to(path)
    (folder / "experiment" / "mine" / "one.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(compose, "CONFIGS", folder)
    scale = ["scale=cpu"] if "scales" in text else []
    with pytest.raises(ValueError, match=r"configs/experiment/mine/one\.yaml") as error:
        compose.read(["experiment=mine/one", *scale])
    assert hint in str(error.value)


def test_completion_offers_names_in_folders():
    assert "experiment=paper/figure3" in set(_complete("experiment="))
    assert "experiment=quickstart" in set(_complete("experiment="))


def test_the_report_lies_in_a_folder_of_its_own():
    raw = Path("results/raw")
    want = Path("results/reports/paper/figure3/report.html")
    assert reports.report_path(raw, None, "paper/figure3") == want
    assert reports.report_path(raw, None, "/../etc").parts[:3] == ("results", "reports", "__")
    assert reports.report_path(Path("mine"), None, "paper/figure3") == Path(
        "mine/report/report.html"
    )
