"""Runs become jobs: blocks whole, within the site's limits; and what they may cost."""

from dataclasses import replace

import pytest
from stub_suite import stub_run

from suites.harness import pack, plan
from suites.harness.cluster import Cluster
from suites.harness.estimate import NOTHING, History, Seconds
from suites.harness.execute import Task
from suites.harness.plan import Planned
from suites.harness.run import Workload

SLURM = {"executor": "slurm", "time": 60}
MINUTE = Seconds(30.0, 60.0, 120.0)


def item(seed=0, *, block=None, suite="stub", **values) -> Planned:
    run = replace(stub_run(seed=seed, **values), suite=suite)
    return Planned(
        run=run, build="b", reason="new", is_pending=True, is_stale=False, outcome=None,
        costs=plan.costs(run), block=block, order=None,
    )  # fmt: skip


def blocks(number, size, **values):
    return [
        item(seed=size * block + seed, block=f"block{block}", **values)
        for block in range(number)
        for seed in range(size)
    ]


def packed(runs, *, room=None, max_array_size=None, minutes=1.0, **settings):
    cluster = Cluster(name="here", **SLURM | settings)
    done = pack.pack(
        runs, cluster, seconds=lambda one: MINUTE * minutes, room=room,
        max_array_size=max_array_size,
    )  # fmt: skip
    jobs = [[job.num_units for job in array] for array in done.arrays]
    assert sorted(r.run.run_id for r in [*done.runs, *done.left]) == sorted(
        r.run.run_id for r in runs
    )
    return done, jobs


def test_a_block_stays_in_one_job(stub):
    done, jobs = packed(blocks(5, 4), runs_per_job=2)
    assert jobs == [[2, 2, 1]]
    for job in done.arrays[0]:
        names = [one.block for one in job.runs]
        assert [names.count(name) for name in set(names)] == [4] * job.num_units


def test_arrays_are_split_at_the_sites_limit(stub):
    _, jobs = packed(blocks(7, 1), max_array_size=3)
    assert jobs == [[1, 1, 1], [1, 1, 1], [1]]


def test_jobs_hold_more_where_the_queue_takes_few(stub):
    _, jobs = packed(blocks(12, 1), room=4)
    assert jobs == [[3, 3, 3, 3]]


def test_what_has_no_room_and_no_time_is_left(stub):
    done, jobs = packed(blocks(12, 1), room=2, minutes=20)  # two an hour, as 4/5 is filled
    assert jobs == [[2, 2]]
    assert len(done.left) == 8
    done, jobs = packed(blocks(3, 1), room=0)
    assert (jobs, len(done.left)) == ([], 3)


def test_runs_side_by_side_need_less_time(stub):
    settings = {"runs_in_parallel": 4, "num_devices": 4}
    alone, _ = packed(blocks(4, 1), runs_per_job=4, **settings)
    together, _ = packed(blocks(4, 1), runs_per_job=4, is_exclusive=True, **settings)
    (one,), (other,) = alone.arrays[0], together.arrays[0]
    assert one.seconds.likely == 4 * other.seconds.likely == 240
    assert alone.device_seconds.likely == 4 * 240


def test_a_run_of_several_devices_takes_as_many_lanes(stub):
    cluster = Cluster(name="here", num_devices=8, runs_in_parallel=8, is_exclusive=True, **SLURM)
    run = stub_run(device_kind="h100", workload={"num_devices": 4, "batch_size": 4})
    assert pack.num_lanes(cluster, run) == 2


def test_a_run_goes_to_the_first_cluster_that_has_its_device(stub):
    cpu = Cluster(name="cpu", device_kinds=("cpu",), **SLURM)
    gpu = Cluster(name="gpu", device_kinds=("h100",), **SLURM)
    every = Cluster(name="every", device_kinds=("cpu", "h100", "v5e"), **SLURM)
    runs = [item(seed=n, device_kind=kind) for n, kind in enumerate(["cpu", "h100", "v5e"])]
    placed = pack.place(runs, [cpu, gpu, every])
    assert {name: len(members) for name, members in placed.items()} == {
        "cpu": 1, "gpu": 1, "every": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"device_kind=v5e: cluster=cpu,gpu offers cpu, h100"):
        pack.place(runs, [cpu, gpu])
    wide = item(device_kind="h100", workload={"num_devices": 2, "batch_size": 2})
    with pytest.raises(ValueError, match=r"suite.num_devices=2: .* several nodes are not offered"):
        pack.place([wide], [gpu])


def test_an_estimate_is_as_good_as_what_it_is_made_from(stub):
    def record(planned, seconds):
        task = Task(run=planned.run, build="b", attempt=f"{seconds}", parent_pid=0,
                    costs=planned.costs)  # fmt: skip
        made = task.record("completed", provenance={}, started_at="", seconds=seconds)
        return made.to_json()

    own, longer = item(), item(seq_len=16)
    guess = History([]).seconds(own)
    like = History([record(own, 100.0)]).seconds(longer)
    known = History([record(own, 100.0), record(item(seed=1), 110.0)]).seconds(own)
    for one in (guess, like, known):
        assert 0 < one.low < one.likely < one.high
    assert 1.5 < like.likely / known.likely < 2.5  # twice the tokens
    spreads = [one.high / one.low for one in (known, like, guess)]
    assert spreads == sorted(spreads)
    assert known.low < 100 < 110 < known.high
    assert (NOTHING + known * 2).likely == 2 * known.likely


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "slrum"}, "Did you mean 'slurm'?"),
        ({"device_kinds": ("h10",)}, "h100"),
        ({"time": "two hours"}, "hours:minutes:seconds"),
        ({"time": 1}, "stop_warning_s=120"),
        ({"runs_per_job": 0}, "at least 1"),
        ({"max_submit": 0}, "or null"),
        ({"lost_after_s": 0.0}, "must be positive"),
        ({"sbatch": {"nodes": 2}}, "several nodes"),
        ({"sbatch": {"array": "0-3"}}, "it is set here"),
        ({"sbatch": {"cpus-per-task": 3}}, "use cluster.cpus_per_task"),
    ],
)
def test_a_cluster_says_what_is_wrong_with_it(settings, message):
    with pytest.raises(ValueError, match=r".") as caught:
        Cluster(name="here", **SLURM | settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [(90, 5400), ("02:00:00", 7200), ("1-00:00:00", 86400), ("30:00", 1800)],
)
def test_time_is_written_as_for_slurm(time, seconds):
    assert Cluster(name="here", executor="slurm", time=time).time_s == seconds


def test_a_batch_divides_by_its_devices():
    with pytest.raises(ValueError, match="does not divide"):
        Workload(phase="train", batch_size=3, num_devices=2)


def test_kinds_of_devices_share_no_job(stub):
    runs = [item(seed=n, device_kind=kind) for n, kind in enumerate(["cpu", "h100"] * 2)]
    _, jobs = packed(runs, runs_per_job=4, runs_in_parallel=4)
    assert jobs == [[2, 2]]
