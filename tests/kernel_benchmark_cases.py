"""A case of benchmarks/kernels.py measured in the interpreter: all but the device's own times.

Called in a process with TRITON_INTERPRET=1 (tests/interpreted.py).
"""

import tempfile
from pathlib import Path
from unittest import mock

from benchmarks import contenders, kernels, timing
from benchmarks.cases import BOTH, case

SHAPES = {
    "rg_lru": {"B": 2, "T": 70, "R": 20},
    "attention": {"B": 1, "T": 70, "N": 2, "H": 16, "W": 20},
    "causal_conv": {"B": 2, "T": 70, "R": 20},
    "mean_cross_entropy": {"B": 2, "T": 10, "D": 16, "V": 50},
}
ONLY_ON_A_GPU = ("sdpa", "flex")


def measured(op: str) -> list[dict]:
    """The rows of the contenders that a CPU has; compiled ones are not compiled."""
    limits = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1.0}

    def device_ms(calls: dict, seconds: float) -> dict:
        for call in calls.values():
            call()
        return {name: [1.0] for name in calls}

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(kernels, "machine", return_value=limits),
        mock.patch.object(kernels, "DEVICE", "cpu"),
        mock.patch.object(timing, "device_ms", device_ms),
        mock.patch.object(timing, "peak_bytes", return_value=0),
        mock.patch.object(contenders, "compiled", lambda function: function),
    ):
        report = kernels.Report(Path(folder), resumed=False)
        kernels.measure_op("case", [case(op, BOTH, **SHAPES[op])], report)
        return [r for r in report.rows if not r["contender"].startswith(ONLY_ON_A_GPU)]
