"""Kernels run in their interpreter, in a process of their own.

Triton decides at its import whether kernels are compiled or interpreted, so one process cannot do
both. `interpreted("scan_cases", "scan_case", T=7)` calls scan_case(T=7) of tests/scan_cases.py in
the worker and returns what it returns, or raises what it raises. A worker starts at its first call
and serves the whole session.
"""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest

# One thread: the tiles are small, and a machine's cores are shared with other workers.
ENVIRONMENTS = {
    "triton": {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    "pallas": {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiling is nearly all of its work
    },
}
TIMEOUT_S = 300


@pytest.fixture(scope="session")
def interpreted():
    workers: dict[str, Worker] = {}

    def call(module: str, function: str, *, backend="triton", timeout_s=TIMEOUT_S, **arguments):
        if backend not in workers or workers[backend].process.poll() is not None:
            workers[backend] = Worker(ENVIRONMENTS[backend])
        return workers[backend].call(module, function, arguments, timeout_s)

    yield call
    for worker in workers.values():
        worker.kill()


class Worker:
    def __init__(self, environment: dict[str, str]):
        root = Path(__file__).parent.parent
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.pipe, theirs = Pipe()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed with the worker
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=root,
            pass_fds=[theirs.fileno()],
            stdout=self.stderr,
            stderr=self.stderr,
        )
        theirs.close()  # so that its death is our end of file

    def call(self, module: str, function: str, arguments: dict, timeout_s: float):
        # Pickled here: a Connection's own pickler would send torch's tensors by shared memory.
        self.pipe.send_bytes(pickle.dumps((module, function, arguments)))
        if not self.pipe.poll(timeout_s):
            self.kill()
            raise TimeoutError(f"{module}.{function}({arguments}) took more than {timeout_s} s.")
        try:
            result, error, text = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.wait()
            self.stderr.seek(0)
            said = self.stderr.read().decode(errors="replace")[-2000:]
            raise RuntimeError(
                f"{module}.{function}({arguments}) ended its worker "
                f"(exit code {self.process.returncode}):\n{said}"
            ) from None
        if error is not None:
            error.add_note(f"In the worker:\n{text}")
            raise error
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.stderr.close()


def serve(pipe: Connection) -> None:
    """Answers calls until the other end is gone."""
    if os.environ.get("TRITON_INTERPRET"):
        from implementations.torch_backend.kernels.interpreter import mend

        mend()
    while True:
        try:
            module, function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result = getattr(importlib.import_module(module), function)(**arguments)
            answer = pickle.dumps((result, None, ""))
        except BaseException as error:  # a skip of pytest's is one too
            answer = _failure(error)
        pipe.send_bytes(answer)


def _failure(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        answer = pickle.dumps((None, error, text))
        pickle.loads(answer)
    except Exception:  # of a type that does not survive the way
        answer = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), text))
    return answer


@contextmanager
def poisoned() -> Iterator[None]:
    """New uninitialized tensors hold NaN: an element that a kernel forgets to write is seen."""
    import torch

    def filled(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)
            return tensor

        return allocate_nan

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", filled(torch.empty_strided)),
        mock.patch.object(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty)),
        mock.patch.object(
            torch.Tensor, "new_empty_strided", filled(torch.Tensor.new_empty_strided)
        ),
    ):
        yield


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
