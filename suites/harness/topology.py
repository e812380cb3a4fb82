"""Devices that are not here: what may be compiled for one, in which environment, at which costs.

libtpu compiles for a whole TPU topology on any CPU. Where it is asked to, it dumps for every kernel
a row a bundle (the instructions that start in one cycle) of how many units each slot uses.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from implementations import cost
from implementations.config import ModelConfig
from implementations.engine import COMPILERS, CPU, Kernels, tpu_of
from suites.harness.run import Workload

DUMPS_VARIABLE = "AERIE_DUMPS"  # names the folder where libtpu leaves what read_dumps reads
DUMP = "final_hlo-static-per-bundle-utilization"
SPILL = "VSTORE:SPILL"  # the slot: a vector register stored because there are too few

# libtpu asks a cloud's metadata server for what it is part of, locks the one TPU of a machine, and
# says much; here it is part of nothing.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "LIBTPU_INIT_ARGS": "",  # not the user's own: they would change the result
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is read from a cache takes no time
}


def check(topology: str, settings: dict[str, Any], kernels: Kernels) -> str:
    """The device kind of a topology; ValueError where these settings cannot be compiled for it."""
    kind, backend, asked = tpu_of(topology), settings["backend"], settings["device_kind"]
    if backend not in COMPILERS:
        raise ValueError(
            f"backend={backend} compiles for no TPU; suite=compile takes {', '.join(COMPILERS)}."
        )
    if asked not in (CPU, kind):
        raise ValueError(f"device_kind={asked} is not that of topology={topology}; leave it out.")
    if kernels.interpret:
        raise ValueError("kernels.interpret=true compiles no kernel; suite=parity takes it.")
    if settings["dtype"] == "float64":
        raise ValueError("dtype=float64: a TPU has none; use bfloat16 or float32.")
    if find_spec("libtpu") is None:
        raise ValueError("libtpu, which compiles for TPUs, is missing: pip install 'aerie[tpu]'.")
    return kind


def environment(dumps: str | None) -> dict[str, str]:
    """Of a child that compiles; libtpu reads it when it is loaded."""
    if dumps is None:
        return ENVIRONMENT
    flags = {"dump_to": dumps, "dump_llo_text": "true", "dump_llo_pass_label_regex": DUMP}
    arguments = " ".join(f"--xla_jf_{name}={value}" for name, value in flags.items())
    return ENVIRONMENT | {"LIBTPU_INIT_ARGS": arguments, DUMPS_VARIABLE: dumps}


@dataclass(frozen=True)
class KernelCode:
    """The static code of one kernel: not its cycles, as loops stand in it once."""

    num_bundles: int
    num_spills: int


def read_dumps(folder: Path, kernels: Iterable[str]) -> dict[str, KernelCode]:
    """Code by kernel, of those that were dumped: equal ones are compiled once."""
    found, dumps = {}, sorted(folder.glob(f"*-{DUMP}.txt"))  # TIME-NAME-NN-DUMP.txt
    for name in kernels:
        if paths := [path for path in dumps if f"-{name}-" in path.name]:
            found[name] = read_dump(paths[-1].read_text(encoding="utf-8"))
    return found


def read_dump(text: str) -> KernelCode:
    head, _, body = text.partition("== UTILIZATION:\n")
    slots = head.splitlines()[1].split(", ")
    rows = [line.split() for line in body.splitlines() if line.strip()]
    return KernelCode(len(rows), sum(int(row[slots.index(SPILL)]) for row in rows))


def costs(model: ModelConfig, work: Workload, dtype: str) -> dict[str, float]:
    """What one program must hold, by our own model: without the engine around it."""
    batch = {"batch_size": work.batch_size, "dtype": dtype}
    capacity = work.prompt_len + work.num_new_tokens
    if work.phase == "train":
        memory = cost.train_memory_bytes(
            model,
            seq_len=work.seq_len,
            activation_checkpointing=work.activation_checkpointing,
            **batch,
        )
    elif work.phase == "kernel":
        memory = cost.scan_memory_bytes(
            model, "rg_lru", seq_len=work.seq_len, has_backward=True, **batch
        )
    else:
        prompt_len = work.prompt_len if work.phase == "prefill" else 1
        memory = cost.inference_memory_bytes(
            model, prompt_len=prompt_len, capacity=capacity, keeps_master=False, **batch
        )
    return {"predicted_peak_memory_bytes": memory}
