"""The stopwatch tells a known sleep, waits for the device, finds A as fast as A; memory; peaks."""

import subprocess
import sys
import time

import numpy as np
import pytest

from suites.harness import measure
from suites.harness.measure import InvalidMeasurement, Peak, stopwatch


@pytest.mark.parametrize("seconds", [0.005, 0.05])
def test_a_known_sleep(seconds):
    found = []
    for _ in range(5):
        with stopwatch(lambda: None) as watch:
            time.sleep(seconds)
        found.append(watch.seconds)
    assert min(found) >= seconds
    assert min(found) < seconds + 0.01  # the best of 5, on a machine that others use too


def test_pending_work_belongs_to_the_block_that_started_it():
    """Work before the block is waited for before the clock starts, work in it before it stops."""
    pending = [0.05]

    def synchronize():
        while pending:
            time.sleep(pending.pop())

    with stopwatch(synchronize) as watch:
        assert not pending
        pending.append(0.02)
    assert not pending
    assert 0.02 <= watch.seconds < 0.05


def test_a_against_a():
    """Interleaved repeats of one piece of work: the medians of both halves agree within 25 %."""
    work = np.random.default_rng(0).standard_normal((200, 200))
    halves = ([], [])
    for repeat in range(200):
        with stopwatch(lambda: None) as watch:
            np.sort(work, axis=None)
        halves[repeat % 2].append(watch.seconds)
    ratio = np.median(halves[0]) / np.median(halves[1])
    assert 0.75 < ratio < 1.33


def test_an_error_leaves_no_time():
    with pytest.raises(ZeroDivisionError), stopwatch(lambda: None) as watch:
        _ = 1 / 0
    assert np.isnan(watch.seconds)


def test_eager_code_has_no_negative_compile_time():
    slow, fast = ({s.metric: s.value for s in measure.compile_samples(first, [0.1, 0.2, 0.3])}
                  for first in (2.0, 0.1))  # fmt: skip
    assert slow == {"first_step_time_ms": 2000.0, "compile_time_s": 1.8}
    assert fast["compile_time_s"] == 0.0


def test_phase_and_progress_are_heard():
    heard = []
    measure.progress(1, 3)  # nobody listens
    measure.on_progress(lambda done, total: heard.append((done, total)))
    try:
        measure.phase("compile")
        measure.progress(2, 3)
        assert measure.current_phase() == "compile"
    finally:
        measure.on_progress(None)
        measure.phase("start")
    assert heard == [(2, 3)]


# The names that JAX and PyTorch give these devices.
NAMES = {
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "TPU v5 lite": (197e12, 819e9),
    "TPU v6 lite": (918e12, 1640e9),
    "TPU v5": (459e12, 2765e9),
    "TPU v5p": (459e12, 2765e9),
    "TPU v4": (275e12, 1228e9),
}


class Device:
    num_devices = 1

    def __init__(self, name, counted=None):
        self.device_name, self.counted = name, counted

    def peak_memory_bytes(self):
        return self.counted


@pytest.mark.parametrize("name", NAMES)
def test_peaks_of_known_devices(name):
    peak = measure.peak(Device(name), "bfloat16")
    assert (peak.flops_per_s, peak.bytes_per_s) == NAMES[name]
    assert peak.name != measure.MEASURED


def test_no_peak_is_invented():
    """Neither for a device that no table knows nor for a dtype that nobody states."""
    unknown = measure.peak(Device("NVIDIA RTX 9999"), "bfloat16")
    assert list(unknown.samples()) == []
    assert unknown.mfu(1e12, 1.0) is None
    assert unknown.mbu(1e9, 1.0) is None
    assert measure.peak(Device("TPU v5 lite"), "float32").flops_per_s is None
    assert measure.measured_flops_per_s("bfloat16") is None


def test_a_cpu_is_measured_and_says_so():
    samples = list(measure.peak(Device("cpu"), "float32").samples())
    assert [s.metric for s in samples] == ["peak_flops_per_s", "peak_bytes_per_s"]
    assert {s.field for s in samples} == {measure.MEASURED}
    assert 1e8 < samples[0].value < 1e14
    assert 1e8 < samples[1].value < 1e12


def test_mfu_above_one_is_no_measurement():
    peak = Peak("H100 SXM", 1e12, 1e12)
    assert peak.mfu(5e11, 1.0) == 0.5
    with pytest.raises(InvalidMeasurement, match=r"MFU 2\.00 is above 1"):
        peak.mfu(2e12, 1.0)


GROW = """
import numpy as np
from suites.harness import measure
class Device:
    device_name = "cpu"
    def peak_memory_bytes(self): return None
before = measure.peak_memory_bytes(Device())
block = np.ones(100 * 2**20, np.uint8)
grown = measure.peak_memory_bytes(Device())
del block
print(before, grown, measure.peak_memory_bytes(Device()))
"""


def test_memory_of_a_cpu_process_is_its_high_water_mark():
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    before, grown, after = map(int, done.stdout.split())
    slack = 4 * 2**20  # the kernel counts in batches
    assert before > 20 * 2**20
    assert abs(grown - before - 100 * 2**20) < slack
    assert abs(after - grown) < slack


def test_memory_of_other_devices_is_their_own_count():
    assert measure.peak_memory_bytes(Device("NVIDIA H200", counted=123)) == 123
    assert measure.available_memory_bytes(Device("NVIDIA H200")) == int(141e9)
    assert measure.available_memory_bytes(Device("NVIDIA RTX 9999")) is None
    assert measure.available_memory_bytes(Device("cpu")) > 0


@pytest.mark.parametrize(
    ("error", "is_out"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, is_out):
    assert measure.is_out_of_memory(error) is is_out
