"""Downstream tasks: questions with given answers, asked of a trained model through the tasks of
lm-evaluation-harness (extra: eval).

Question: does what a model has learned from text answer questions that it was not trained for? Of
each question the most likely answer counts. The six tasks and the scoring are those of
arXiv:2402.19427, table 1: likelihood divided by the characters of the answer, and on WinoGrande
partial scoring, undivided. How many answered examples stood before a question is not reported
there: here none, unless suite.num_fewshot says so.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from implementations.engine import Batch, Engine, OptimizerConfig
from suites.harness import likelihood, lm_harness, trained
from suites.harness.measure import phase, sample
from suites.harness.record import Sample
from suites.harness.run import DataConfig, Run, Workload


class Asked(NamedTuple):
    """A task by its name in lm-evaluation-harness, and the score that counts."""

    name: str
    metric: str | None


# Dividing by characters does nothing to answers A, B, C and D: that the paper divides on MMLU says
# that it scored the texts of the answers.
TASKS = {
    "mmlu": Asked("mmlu_continuation", "acc_norm"),
    "hellaswag": Asked("hellaswag", "acc_norm"),
    "piqa": Asked("piqa", "acc_norm"),
    "winogrande": Asked("winogrande", "acc"),
    "arc_easy": Asked("arc_easy", "acc_norm"),
    "arc_challenge": Asked("arc_challenge", "acc_norm"),
    "mmlu_letters": Asked("mmlu", "acc"),
}


@dataclass(frozen=True, kw_only=True)
class Suite:
    tasks: tuple[str, ...]
    task_folder: str | None
    num_fewshot: int
    max_questions: int | None
    batch_size: int
    seq_len: int
    rounds: int
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool] = False
    needs_checkpoint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"suite.tasks is empty; known: {', '.join(TASKS)}.")
        least = {"num_fewshot": 0, "seq_len": 2, "max_questions": 1}
        for key, low in least.items():
            if (value := getattr(self, key)) is not None and value < low:
                raise ValueError(f"suite.{key}={value}; must be at least {low}.")
        if self.task_folder is not None and not Path(self.task_folder).expanduser().is_dir():
            raise ValueError(f"suite.task_folder={self.task_folder} is no folder.")

    def check_data(self, data: DataConfig) -> None:
        """Of `data` the tokenizer alone is used; the questions come from lm_eval."""
        likelihood.check_data(data)
        lm_harness.check_installed()
        for task in self.tasks:
            if task not in TASKS:
                lm_harness.check_known(task, self._folder)

    def workloads(self) -> Iterator[Workload]:
        for task in self.tasks:
            yield Workload(
                phase="evaluate",
                task=task,
                task_folder=self._folder or "",
                task_digest="" if self._folder is None else folder_digest(Path(self._folder)),
                num_fewshot=self.num_fewshot,
                max_questions=self.max_questions or 0,
                batch_size=self.batch_size,
                seq_len=self.seq_len,
            )

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        return base

    @property
    def _folder(self) -> str | None:
        """As every process finds it, wherever it is started."""
        return (
            None if self.task_folder is None else str(Path(self.task_folder).expanduser().resolve())
        )


def measure(run: Run, engine: Engine) -> Iterator[Sample]:
    if run.checkpoint is not None:
        trained.load(run, engine)
    phase("evaluate")
    task, metric = asked(run)
    answers = lm_harness.ask(run, engine, task, metric)
    yield sample("accuracy", answers.num_correct / answers.num_questions)
    yield sample("num_examples", answers.num_questions)
    yield sample("num_cut_examples", answers.num_cut)
    if answers.num_choices:
        yield sample("chance_accuracy", np.mean(1 / np.array(answers.num_choices)))


def batches(run: Run) -> Iterator[Batch]:
    """All that is asked, in one: what the digest of a run's data is made of."""
    yield likelihood.packed(lm_harness.requests(run, asked(run).name))


def asked(run: Run) -> Asked:
    return TASKS.get(run.workload.task, Asked(run.workload.task, None))


def folder_digest(folder: Path) -> str:
    """Of the names and the content of all files: what was asked is part of a run's id."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
