"""Records of runs that someone asked for and that never ran, for the tests of commands."""

from dataclasses import replace

from suites import compose
from suites.harness import plan, provenance
from suites.harness.execute import Task
from suites.harness.measure import sample
from suites.harness.record import write


def finished(store, *overrides, outcome="completed", copies=1):
    """Records of what these overrides ask for, as if it had been run; returns the runs."""
    settings = compose.read(overrides).settings
    runs = [run for made in settings for run in plan.expand(made)]
    runs = [replace(run, seed=seed) for seed in range(copies) for run in runs]
    facts = provenance.machine() | {
        "device_name": provenance.cpu_model(),
        "versions": provenance.versions(),
    }
    for order, run in enumerate(runs):
        task = Task(
            run=run,
            build=provenance.build_key(run.suite, run.backend, provenance.cpu_model()),
            attempt=f"20260101T000000-{order}",
            parent_pid=0,
            costs=plan.costs(run),
            block="b",
            order=order,
        )
        times = tuple(sample("step_time_ms", 10 + order % 7, repeat=n) for n in range(5))
        write(
            store,
            task.record(
                outcome,
                reason=None if outcome == "completed" else "as tested",
                phase=None if outcome == "completed" else "measure",
                provenance=facts,
                samples=times if outcome == "completed" else (),
                started_at="2026-01-01T00:00:00+00:00",
                seconds=1.0,
            ),
        )
    return runs
