"""What is made beside the rest of a large load or report: in a fork, on another core."""

import gc
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


def aside(function: Callable[[], T], *, is_worth_it: bool = True) -> Callable[[], T]:
    """Begins a function in a fork, which knows all that is known here; what is returned waits for
    its result, which comes through a pipe: a small one. A fork gives all of its memory back as it
    ends. What fails there, or is killed, is done again here, and fails with its own error; what is
    not worth a fork is done here when it is asked for."""
    if not is_worth_it:
        return function
    fork = get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_work, args=(function, sender), daemon=True)
    process.start()
    sender.close()

    def result() -> T:
        try:
            made = receiver.recv()
        except EOFError:
            return function()
        finally:
            process.join()
        return made

    return result


def _work(function: Callable[[], T], sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with who began it
    gc.disable()  # to look for garbage in what is shared would copy it, and this ends soon
    with suppress(Exception):
        sender.send(function())
