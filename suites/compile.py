"""Ahead of time: the programs of a model compiled for TPUs that are not here. Nothing runs.

Question: does this model compile for that chip, and does it fit? Answered by the chip's own
compiler, libtpu, for one device of a topology: memory, collectives, and what it refuses. A phase is
one program of the engine: a whole optimizer step, the prefill of a prompt, the decoding of
num_new_tokens, and `kernel`, the RG-LRU of one layer alone, forward and backward.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from implementations import cost
from implementations.config import choose
from implementations.engine import Compiled, Compiler, OptimizerConfig, tpu_of
from suites.harness import topology
from suites.harness.measure import bound, find_device, phase, sample
from suites.harness.record import Sample
from suites.harness.run import Run, Workload

COMPILED_PHASES = ("train", "prefill", "decode", "kernel")


@dataclass(frozen=True, kw_only=True)
class Suite:
    topology: str  # v5e:2x2: a kind of TPU and its chips
    phases: tuple[str, ...]
    batch_size: int
    seq_len: int  # of train and kernel
    prompt_len: int
    num_new_tokens: int
    activation_checkpointing: bool
    rounds: int
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        tpu_of(self.topology)
        for name in self.phases:
            choose("suite.phases", name, COMPILED_PHASES, "suite=compile")
        least = {"batch_size": 1, "seq_len": 2, "prompt_len": 1, "num_new_tokens": 2}
        for key, low in least.items():
            if getattr(self, key) < low:
                raise ValueError(f"suite.{key}={getattr(self, key)}; must be at least {low}.")

    def workloads(self) -> Iterator[Workload]:
        training = {"seq_len": self.seq_len}
        inference = {"prompt_len": self.prompt_len, "num_new_tokens": self.num_new_tokens}
        work = {
            "train": training | {"activation_checkpointing": self.activation_checkpointing},
            "prefill": inference,
            "decode": inference,
            "kernel": training,
        }
        for name in self.phases:
            yield Workload(
                phase=name, batch_size=self.batch_size, topology=self.topology, **work[name]
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base


def measure(run: Run, engine: Compiler) -> Iterator[Sample]:
    phase("compile")
    made = compile_phase(run, engine)
    phase("measure")  # from here on a fault is ours, and not the compiler's
    yield sample("aot_compile_time_s", made.seconds)
    yield sample("peak_memory_bytes", made.peak_memory_bytes)
    yield sample("collectives", sum(made.collectives.values()))
    for kind, count in made.collectives.items():
        yield sample("collectives", count, field=kind)
    if run.workload.phase == "kernel":
        yield from kernel_samples(run, engine, made)


def compile_phase(run: Run, engine: Compiler) -> Compiled:
    work = run.workload
    capacity = work.prompt_len + work.num_new_tokens
    if work.phase == "train":
        return engine.train(
            run.optimizer,
            batch_size=work.batch_size,
            seq_len=work.seq_len,
            activation_checkpointing=work.activation_checkpointing,
        )
    if work.phase == "prefill":
        return engine.prefill(
            batch_size=work.batch_size, prompt_len=work.prompt_len, capacity=capacity
        )
    if work.phase == "decode":
        return engine.decode(
            batch_size=work.batch_size, capacity=capacity, num_tokens=work.num_new_tokens - 1
        )
    return engine.recurrence(batch_size=work.batch_size, seq_len=work.seq_len)


def kernel_samples(run: Run, engine: Compiler, made: Compiled) -> Iterator[Sample]:
    """The bound by bytes, and of the hand-written kernels, where there are any, their code."""
    if (device := find_device(engine.device_name)) is not None:
        work = run.workload
        shape = {"batch_size": work.batch_size, "seq_len": work.seq_len, "dtype": run.dtype}
        num_bytes = cost.scan_bytes(run.model, "rg_lru", has_backward=True, **shape)
        yield bound(device, num_bytes)
    code = topology.read_dumps(Path(os.environ[topology.DUMPS_VARIABLE]), made.kernels)
    for name, kernel in code.items():
        yield sample("num_bundles", kernel.num_bundles, field=name)
        yield sample("num_spills", kernel.num_spills, field=name)
