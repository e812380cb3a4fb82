"""Faults that a real Slurm does not show on demand: commands of Slurm that stand in front of the
real ones on PATH, answer as a test says, and count how often they were called."""

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo", "srun")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call does; by default what the real command does."""

    stdout: str | None = None  # None: the real command runs
    stderr: str = ""
    returncode: int | None = None  # None: 0, or that of the real command
    is_silent: bool = False  # the real command runs, and what it says is lost
    is_stale: bool = False  # what the real command said to the first call with these arguments
    then: str = ""  # instead of an exit: hang, kill
    after_s: float = 0.0  # before anything else

    def __post_init__(self) -> None:
        if self.then not in ("", "hang", "kill"):
            raise ValueError(f"then={self.then!r}; known: '', 'hang', 'kill'.")


# What Slurm 22.05 says, word for word.
UNREACHABLE = Answer(
    stdout="",
    stderr="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
    returncode=1,
)
# of sacct
NO_ACCOUNTING = Answer(stdout="", stderr="Slurm accounting storage is disabled\n", returncode=1)
OVER_SUBMIT_LIMIT = Answer(
    stdout="",
    stderr="sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)\n",
    returncode=1,
)
# of sbatch: Slurm has the job, and its id is lost
SUBMITTED_THEN_HANGS = Answer(is_silent=True, then="hang")
SUBMITTED_THEN_KILLED = Answer(is_silent=True, then="kill")
STALE = Answer(is_stale=True)


class SlurmShims:
    """Fake commands in a folder. Until answers() says otherwise they pass calls on."""

    def __init__(self, folder: Path, path: str | None = None):
        path = os.environ["PATH"] if path is None else path
        self._folder = folder
        self.path = f"{folder / 'bin'}:{path}"  # for PATH
        self._real = {name: shutil.which(name, path=path) for name in COMMANDS}
        (folder / "bin").mkdir(parents=True)
        for name in COMMANDS:
            (folder / name).mkdir()
            self.answers(name, Answer())
            script = folder / "bin" / name
            script.write_text(_SCRIPT.format(folder=shlex.quote(str(folder / name))))
            script.chmod(0o755)

    def answers(self, command: str, *answers: Answer) -> None:
        """To the next calls in turn; the last answer is given again and again."""
        if command not in COMMANDS or not answers:
            raise ValueError(f"answers({command!r}, {answers}): one of {COMMANDS}, and an answer.")
        folder = self._folder / command
        for old in folder.glob("answer-*"):
            old.unlink()
        first = len(self.calls(command))
        for index, answer in enumerate(answers):
            body = self._bash(command, answer)
            (folder / f"answer-{first + index}").write_text(body)
        (folder / "answer-last").write_text(body)

    def calls(self, command: str) -> list[list[str]]:
        """The arguments of every call so far."""
        log = self._folder / command / "calls"
        if not log.exists():
            return []
        lines = log.read_text(encoding="utf-8").replace("\x1d", "\n").split("\x1e")[:-1]
        return [line.split("\x1f")[:-1] for line in lines]

    def num_calls(self, *commands: str) -> int:
        return sum(len(self.calls(command)) for command in commands or COMMANDS)

    def forget_calls(self) -> None:
        """Answers given in turn begin anew."""
        for command in COMMANDS:
            (self._folder / command / "calls").unlink(missing_ok=True)

    def _bash(self, command: str, answer: Answer) -> str:
        real = self._real[command]
        run = f'{shlex.quote(real)} "$@"' if real else f"echo '{command}: not installed' >&2; false"
        lines = [f"sleep {answer.after_s}"] if answer.after_s else []
        if answer.stdout is not None:
            lines.append(f"printf %s {shlex.quote(answer.stdout)}; code=0")
        elif answer.is_stale:
            lines.append(
                'old=$here/said-$(printf "%s\\n" "$@" | cksum | cut -d" " -f1)\n'
                f'[ -e "$old" ] || {{ {run}; }} >"$old"; cat "$old"; code=0'
            )
        elif answer.is_silent:
            lines.append(f"{{ {run}; }} >/dev/null 2>&1; code=$?")
        else:
            lines.append(f"{run}; code=$?")
        if answer.stderr:
            lines.append(f"printf %s {shlex.quote(answer.stderr)} >&2")
        if answer.then == "hang":
            lines.append("exec sleep 3600")
        if answer.then == "kill":
            lines.append("kill -KILL $$")
        lines.append("exit " + ("$code" if answer.returncode is None else str(answer.returncode)))
        return "\n".join(lines) + "\n"


_SCRIPT = """#!/bin/bash
here={folder}
printf -v call '%s\\x1f' "$@"
[ $# -gt 0 ] || call=
call=${{call//$'\\n'/$'\\x1d'}} # bash writes line by line: in one write calls do not mix
printf '%s\\x1e' "$call" >>"$here/calls"
number=$(($(tr -cd '\\036' <"$here/calls" | wc -c) - 1))
[ -e "$here/answer-$number" ] || number=last
. "$here/answer-$number"
"""
