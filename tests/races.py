"""Pallas' kernels with a TPU's memories simulated: what is not written is NaN, an access beyond a
buffer raises, and two cores share the parallel axes of a grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from implementations.jax_backend.kernels.interpreter import interpreting

MODE = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


@contextmanager
def watched() -> Iterator[list[interpreter.RaceDetectionState]]:
    """What is found of each kernel that is interpreted within: `races_found` says whether two
    cores, or a core and a copy, met."""
    found, make = [], interpreter.RaceDetectionState

    def record(**arguments) -> interpreter.RaceDetectionState:
        found.append(make(**arguments))
        return found[-1]

    with mock.patch.object(interpreter, "RaceDetectionState", record), interpreting(MODE):
        yield found
