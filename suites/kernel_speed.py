"""Kernel speed: time of the recurrence alone, as sequences grow, by kernel variant.

Question: how fast is the scan, and how near to what its bytes allow? The paper's training speed
rests on it (arXiv:2402.19427, figure 8(a): 8 sequences, d_rnn 1024 as in size=100m, 1K to 16K
steps). Variants are swept: kernels.linear_scan=sequential,associative,analytic. The inputs are on
the device before the clock starts, and the results stay there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from implementations import cost
from implementations.config import GATES, ModelConfig, choose
from implementations.engine import TIMED_OPS, Engine, OptimizerConfig, Unsupported
from suites.harness.measure import (
    bounds,
    compile_samples,
    peak,
    peak_memory_bytes,
    phase,
    progress,
    sample,
    stopwatch,
)
from suites.harness.record import PASSES, Sample
from suites.harness.run import Run, Workload

NUM_WARMUP_CALLS = 2  # after the first; discarded


@dataclass(frozen=True, kw_only=True)
class Suite:
    ops: tuple[str, ...]
    phases: tuple[str, ...]
    batch_size: int
    seq_lens: tuple[int, ...]
    repeats: int
    rounds: int
    until_ci: float | None
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = True
    headline: ClassVar[str] = "op_time_ms"

    def __post_init__(self) -> None:
        for op in self.ops:
            choose("suite.ops", op, TIMED_OPS, "suite=kernel_speed")
        for name in self.phases:
            choose("suite.phases", name, tuple(PASSES), "suite=kernel_speed")
        for seq_len in self.seq_lens:
            if seq_len < 1:
                raise ValueError(f"suite.seq_lens={list(self.seq_lens)}; must be at least 1.")
        if self.repeats < 1:
            raise ValueError(f"suite.repeats={self.repeats}; must be at least 1.")

    def workloads(self) -> Iterator[Workload]:
        for op, name, seq_len in product(self.ops, self.phases, self.seq_lens):
            yield Workload(
                phase=name,
                op=op,
                batch_size=self.batch_size,
                seq_len=seq_len,
                repeats=self.repeats,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    work = run.workload
    if "rg_lru" not in run.model.layer_mixers:
        raise Unsupported(f"family={run.model.family} has no recurrence: suite=kernel_speed.")
    if not hasattr(engine, "prepare_op"):
        raise Unsupported(f"backend={run.backend} has no op that can be timed alone.")
    inputs, doutputs = draw(work, run.model, run.seed)
    call = engine.prepare_op(work.op, inputs, doutputs if work.phase == "train" else None)
    del inputs, doutputs

    phase("compile")
    first_s = _timed(engine, call)
    phase("measure")
    seconds = []
    for repeat in range(-NUM_WARMUP_CALLS, work.repeats):
        call_s = _timed(engine, call)
        if repeat >= 0:
            seconds.append(call_s)
            progress(repeat + 1, work.repeats)

    yield from compile_samples(first_s, seconds)
    if (memory := peak_memory_bytes(engine)) is not None:
        yield sample("peak_memory_bytes", memory)
    num_bytes = cost.scan_bytes(
        run.model,
        work.op,
        batch_size=work.batch_size,
        seq_len=work.seq_len,
        dtype=run.dtype,
        has_backward=work.phase == "train",
    )
    yield sample("op_bytes", num_bytes)
    yield from bounds(num_bytes)
    limit = peak(engine, run.dtype)
    yield from limit.samples()
    for repeat, call_s in enumerate(seconds):
        yield sample("op_time_ms", call_s * 1e3, repeat=repeat)
    for repeat, call_s in enumerate(seconds):
        if (mbu := limit.mbu(num_bytes, call_s)) is not None:
            yield sample("mbu", mbu, repeat=repeat)


def draw(
    work: Workload, model: ModelConfig, seed: int
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The op's inputs by name, and gradients of every state and of the last one; decays as a model
    has them when its training starts."""
    rng, gate = np.random.default_rng(seed), GATES[model.gate]
    B, T, R, own = work.batch_size, work.seq_len, model.d_rnn, model.d_gate

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    if work.op == "linear_scan":
        a_BTR = np.float32(0.9) + np.float32(0.099) * rng.random((B, T, R), np.float32)
        inputs = {"a_BTR": a_BTR, "x_BTR": normal(B, T, R)}
    else:
        inputs = {"x_BTR": normal(B, T, R)}
        if gate.has_recurrence_gate:  # a time step is 0.001 to 0.1
            inputs["a_gate_BTR"] = normal(B, T, own) - np.float32(5 * gate.has_time_step)
        if gate.has_input_gate:
            inputs["input_gate_BTR"] = normal(B, T, own)
        if gate.has_a_param:
            low, high = (0, 1) if gate.has_time_step else (-9, -4.3)  # a^8 in 0.9 to 0.999
            inputs["a_param_R"] = rng.uniform(low, high, own).astype(np.float32)
        if gate.is_complex:
            inputs["theta_R"] = rng.uniform(0, 0.1 * np.pi, own).astype(np.float32)
        inputs["position_BT"] = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    inputs["h0_BR"] = normal(B, R)
    return inputs, (normal(B, T, R), normal(B, R))


def _timed(engine: Engine, call: Callable[[], object]) -> float:
    """Seconds of one call; its results are freed after the clock has stopped."""
    with stopwatch(engine.synchronize) as watch:
        found = call()
    del found
    return watch.seconds
