"""Stopping when told to: SIGUSR2 sets a flag, and the loops of runs read it at every step.

A handler runs between two bytecodes of Python, so a long compilation delays it; whoever sends the
signal waits for a while, then kills. What must not be lost is saved from time to time, unasked.
"""

import signal

SIGNAL = signal.SIGUSR2

_is_told = False


class Stopped(Exception):
    """The run ended because it was told to; the message is one line."""


def listen() -> None:
    """From now on the signal sets the flag; before, it ends the process."""
    signal.signal(SIGNAL, _hear)


def ignore() -> None:
    """Of a timing run, which has nothing to save: who started it ends it, and knows why."""
    signal.signal(SIGNAL, signal.SIG_IGN)


def is_told() -> bool:
    return _is_told


def check() -> None:
    """Ends a run that has nothing to save."""
    if _is_told:
        raise Stopped(f"told to stop ({SIGNAL.name})")


def _hear(*_: object) -> None:
    global _is_told
    _is_told = True
