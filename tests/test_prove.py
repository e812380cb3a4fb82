"""Planted defects: the ladder catches each, at the lowest level that can see it, and no more."""

import signal
from dataclasses import replace

import pytest

from suites.ladder import prove, survey
from suites.ladder.defects import DEFECTS
from suites.ladder.plan import gate
from suites.ladder.survey import Draw, Request

DEFECT = {defect.name: defect for defect in DEFECTS}


@pytest.fixture(scope="module")
def runs():
    return gate(["family=griffin", "kernels.linear_scan=auto"])


def of(runs, **wanted):
    return [r for r in runs if all(getattr(r, key) == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def nursery():
    with survey.nursery([0]) as opened:
        yield opened


def test_a_planted_defect_is_red_at_its_op_and_unplanted_it_is_not(runs, nursery):
    run = of(runs, backend="torch", dtype="float64")[0]
    run = replace(run, workload=replace(run.workload, levels=("L1",)))
    for defect, red in (("torch_rope_base", "L1/rope/y_BTNH"), (None, None)):
        (draw,) = nursery.draws(Request(run=run, seeds=(3,), defect=defect))
        assert draw.failure is None
        assert next(iter(prove._red(run, draw)), None) == red


def test_a_climb_with_a_defect_ends_at_the_first_red_check_of_the_lowest_level(runs, nursery):
    run = of(runs, backend="torch", dtype="float64")[0]
    run = replace(run, workload=replace(run.workload, levels=("L0", "L1", "L3")))
    (draw,) = nursery.draws(Request(run=run, seeds=(3,), defect="torch_rope_base"))
    assert prove._red(run, draw) == ["L1/rope/y_BTNH"]
    assert next(reversed(draw.errors)) == "L1/rope/y_BTNH"


def test_a_process_that_fails_says_why(runs, nursery):
    run = of(runs, backend="torch", dtype="float64")[0]
    run = replace(run, model=replace(run.model, window_size=4096), dtype="float16")
    (draw,) = nursery.draws(Request(run=run, seeds=(0,)))
    assert "float16" in draw.failure
    (draw,) = nursery.draws(Request(run=replace(run, dtype="float32"), seeds=(0,), defect="none"))
    assert draw.failure == "exit code 1: StopIteration"


def test_a_process_that_is_killed_costs_one_draw_alone(runs):
    run = of(runs, backend="torch", dtype="float64")[0]
    run = replace(run, workload=replace(run.workload, levels=("L1",)))
    with survey.nursery([0]) as nursery:
        process = nursery._process(run)
        process.kill()
        process.wait()
        first, second = (nursery.draws(Request(run=run, seeds=(3,)))[0] for _ in range(2))
    assert first.failure == "exit code -9: no output"
    assert second.failure is None
    assert not prove._red(run, second)


@pytest.fixture
def heeds_ctrl_c():
    """Even in the background of a script, where it is ignored, by children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_it_and_starts_no_more(runs, heeds_ctrl_c):
    run = of(runs, backend="torch", dtype="float64")[0]
    begun = []

    def work(number: int, nursery: survey.Nursery) -> None:
        begun.append(number)
        process = nursery._process(run)
        process.send_signal(signal.SIGINT)
        process.wait()
        nursery.draws(Request(run=run, seeds=(0,)))

    with pytest.raises(KeyboardInterrupt):
        list(survey.in_parallel(range(100), work))
    assert len(begun) < 100


def test_a_defect_is_looked_for_in_its_backend_from_the_ops_up(runs):
    parts = list(prove._parts(DEFECT["jax_softmax_in_bfloat16"], runs))
    assert {run.backend for run in parts} == {"jax"}
    assert [(run.dtype, run.workload.levels) for run in parts[:3]] == [
        ("float64", ("L0", "L1", "L3")),
        ("bfloat16", ("L7",)),
        ("bfloat16", ("L7",)),
    ]
    assert len(parts) == 2 * len(prove.PARTS)  # everywhere in the end
    floor = list(prove._parts(DEFECT["truth_exact_gelu"], gate(["family=griffin"])))
    assert [run.backend for run in floor] == ["transformers", "torch", "torch"]


def test_a_false_alarm_names_run_seed_and_field(runs):
    run = of(runs, backend="torch", dtype="float32")[0]
    quiet, loud = ({"L4/logits": (size, size)} for size in (1e-9, 1e-2))
    found = [Draw(100, quiet), Draw(101, loud), Draw(102, {}, "exit code 1: no")]
    alarms = list(prove._alarms(Request(run=run, seeds=(100, 101, 102)), found))
    assert [alarm["seed"] for alarm in alarms] == [101, 102]
    assert "L4/logits" in alarms[0]["why"]


@pytest.mark.slow
def test_every_planted_defect_is_caught_where_it_is_expected_and_nothing_else():
    # the command's 20 seeds of each run take 9 minutes more of two cores
    found = prove.prove(on_end=lambda *_: None, every=5)
    missed = {row["name"]: row["why"] for row in found["defects"] if row["level"] is None}
    assert not missed
    assert found["caught"] == found["planted"] >= 25
    assert not found["alarms"]
    assert found["num_draws"] >= 20
    assert {row["name"]: row["level"] for row in found["defects"]} == {
        defect.name: defect.level for defect in DEFECTS
    }
