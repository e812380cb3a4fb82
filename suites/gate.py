"""The gate before every speed: the parity of a proxy, tiny with the architecture of the measured.

The paper's sizes are too large for the float64 equations in NumPy. A proxy shares all that chooses
code and kernels (family, architecture settings, head_dim, backend, dtype, kernels, device kind) and
lacks the sizes alone; its parity verifies the speeds of all that it stands for (analysis.derive).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from implementations.config import ModelConfig
from suites import compose
from suites.harness import plan
from suites.harness.plan import Planned
from suites.harness.run import Run

SIZES = ("size", "d_model", "d_rnn", "d_mlp", "num_gate_blocks", "vocab_size")
RED = "invalid_measurement"  # how a parity run ends that found an error beyond its tolerance


def proxies(runs: Iterable[Run]) -> list[Run]:
    """The parity runs that verify these runs, each once. For a run of size tiny they are those
    that suite=parity plans with its settings."""
    measured = dict.fromkeys(
        (run.model, run.backend, run.dtype, run.kernels, run.device_kind)
        for run in runs
        if run.suite != "parity" and run.workload.topology is None  # what is compiled has no speed
    )
    if not measured:
        return []
    # griffin, because the mqa of tiny has no window
    (settings,) = compose.read(["suite=parity", "size=tiny", "family=griffin"]).settings
    made = [
        replace(
            check,
            model=proxy(model, check.model),
            backend=backend,
            dtype=dtype,
            kernels=kernels,
            device_kind=device_kind,
        )
        for check in plan.expand(settings)
        for model, backend, dtype, kernels, device_kind in measured
    ]
    return list({run.run_id: run for run in made}.values())


def proxy(model: ModelConfig, tiny: ModelConfig) -> ModelConfig:
    """The architecture of `model` at the sizes of `tiny`."""
    num_heads, num_kv_heads = model.num_heads, model.num_kv_heads  # GQA: the groups as they are
    if num_kv_heads == num_heads:
        num_heads = num_kv_heads = tiny.num_heads
    elif num_kv_heads == 1:
        num_heads = tiny.num_heads
    return replace(
        model,
        **{name: getattr(tiny, name) for name in SIZES},
        num_layers=max(tiny.num_layers, min(len(model.pattern), model.num_layers)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        window_size=None if model.window_size is None else tiny.window_size,
    )


def ahead(
    store: Path,
    planned: list[Planned],
    todo: list[Planned],
    python: Callable[[Run], str | None] = lambda run: None,
) -> list[Planned]:
    """The proxies of what was measured and of what is `todo`, beyond the parity runs that the plan
    holds; pending are those that the store lacks, of the present build. A red one is there."""
    current = [item for item in planned if item.outcome == "completed" and not item.is_stale]
    held = {item.run.run_id for item in planned if not item.is_stale}
    held |= {item.run.run_id for item in todo}
    wanted = proxies(item.run for item in (*todo, *current))
    missing = [run for run in wanted if run.run_id not in held]
    return [_judged(store, item) for item in plan.plan(store, missing, python)]


def _judged(store: Path, item: Planned) -> Planned:
    """Unlike other runs: a stale one is run again unasked, and a red one is not."""
    last = plan.attempts(store, item.run.run_id)[-1:]
    if any(one["outcome"] == RED and one["build"] == item.build for one in last):
        return replace(item, is_pending=False, is_stale=False, outcome=RED, reason=f"red: {RED}")
    outcome = None if item.is_stale else item.outcome
    return replace(item, is_pending=item.is_pending or item.is_stale, outcome=outcome)
