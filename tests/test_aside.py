"""What is made beside the rest, in a fork: its result comes back, its failures are not lost."""

import os
import signal

import pytest

from analysis.aside import aside


def test_it_is_made_in_another_process_where_that_is_worth_it():
    assert aside(os.getpid)() != os.getpid()
    assert aside(os.getpid, is_worth_it=False)() == os.getpid()


def test_what_fails_there_fails_here_with_its_own_error():
    known = {"jax": 1}
    result = aside(lambda: known["torch"])
    with pytest.raises(KeyError, match="torch"):
        result()


def test_what_was_killed_is_done_again_here():
    here = os.getpid()

    def killed() -> str:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    assert aside(killed)() == "done"
