"""The border to lm-evaluation-harness (extra: eval): its tasks, asked of an engine of ours.

The only module that imports lm_eval. Task definitions, prompts, few-shot examples and scoring are
its own; tokens, batches and log-likelihoods are ours (likelihood.py). It holds no framework.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies

from implementations.engine import Engine
from suites.harness import likelihood
from suites.harness.run import Run

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")  # that log-likelihoods of continuations answer
HUB = "https://huggingface.co"
PATIENCE_S = 5.0


@dataclass(frozen=True)
class Answers:
    """How the questions of one task were answered."""

    num_questions: int
    num_correct: int
    num_cut: int  # questions of which a beginning did not fit
    num_choices: tuple[int, ...]  # of each question; none where there is no choice


def check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise ValueError("suite=downstream needs lm_eval, which is not installed: "
                         "pip install 'aerie[eval]'.")  # fmt: skip


def check_known(task: str, folder: str | None) -> None:
    """ValueError for what is no task of lm-evaluation-harness, or of a folder of one's own."""
    known = _manager(folder).all_tasks
    if task not in known:
        close = get_close_matches(task, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        where = f", nor one of suite.task_folder={folder}" if folder else ""
        raise ValueError(f"suite.tasks: {task!r} is no task of lm-evaluation-harness{where}.{hint}")


def ask(run: Run, engine: Engine, task: str, metric: str | None) -> Answers:
    """Every question of a task, or of all tasks of a group. `metric` is acc, or acc_norm, which
    divides by the characters of each answer; None: normalised where the task itself is."""
    from lm_eval import evaluator

    work = run.workload
    loaded = _loaded(run, task)
    wants_greedy = any(one.OUTPUT_TYPE == "loglikelihood" for one in loaded["tasks"].values())
    adapter = _adapter()(run, engine, wants_greedy)
    found = evaluator.evaluate(
        adapter, loaded, limit=work.max_questions or None, bootstrap_iters=0, log_samples=True
    )
    num_correct, num_questions, num_choices = 0, 0, []
    for name, one in loaded["tasks"].items():
        answers = found["samples"][name]
        answers = [answer for answer in answers if answer["filter"] == answers[0]["filter"]]
        known = answers[0]["metrics"]
        wanted = metric or ("acc_norm" if "acc_norm" in known else "acc")
        if wanted not in known:
            raise ValueError(f"task {name}: it has no {wanted}; it has {', '.join(known)}.")
        num_correct += sum(round(answer[wanted]) for answer in answers)
        num_questions += len(answers)
        if one.OUTPUT_TYPE == "multiple_choice":
            num_choices += [len(one.doc_to_choice(answer["doc"])) for answer in answers]
    return Answers(num_questions, num_correct, len(adapter.cut), tuple(num_choices))


def requests(run: Run, task: str) -> list[likelihood.Request]:
    """What is asked of the model, in the order of the task."""
    encode = likelihood.encoder(run.data)
    made = []
    for one in _loaded(run, task)["tasks"].values():
        one.build_all_requests(limit=run.workload.max_questions or None, rank=0, world_size=1)
        made += [likelihood.request(*instance.args[:2], encode) for instance in one.instances]
    return made


@lru_cache(maxsize=1)
def _adapter() -> type:
    """The class, whose base is lm_eval's own."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        def __init__(self, run: Run, engine: Engine, wants_greedy: bool) -> None:
            super().__init__()
            self.run, self.engine, self.wants_greedy = run, engine, wants_greedy
            self.cut: set[tuple[str, int]] = set()  # (task, question)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            work, encode = self.run.workload, likelihood.encoder(self.run.data)
            asked = [likelihood.request(*instance.args[:2], encode) for instance in requests]
            for instance, request in zip(requests, asked, strict=True):
                if likelihood.is_too_long(request, work.seq_len):
                    self.cut.add((instance.task_name, instance.doc_id))
            found = likelihood.scores(
                self.engine,
                asked,
                batch_size=work.batch_size,
                seq_len=work.seq_len,
                wants_greedy=self.wants_greedy,
            )
            return [(score.log_likelihood, bool(score.is_greedy)) for score in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    return Adapter


@lru_cache(maxsize=1)  # a run has one task
def _loaded(run: Run, task: str) -> dict[str, Any]:
    """The task with its data, or all tasks of a group, as TaskManager.load gives them."""
    check_installed()
    _go_offline_without_a_hub()
    folder = run.workload.task_folder or None
    check_known(task, folder)
    with _named_where_missing(task):
        loaded = _manager(folder).load([task])
    for name, one in loaded["tasks"].items():
        if one.OUTPUT_TYPE not in OUTPUT_TYPES:
            raise ValueError(
                f"task {name} is one of {one.OUTPUT_TYPE}; suite=downstream asks questions whose "
                f"answers are given: {', '.join(OUTPUT_TYPES)}."
            )
        one.set_config(key="num_fewshot", value=run.workload.num_fewshot)
        one.set_fewshot_seed(seed=run.seed)
    return loaded


@lru_cache(maxsize=2)
def _manager(folder: str | None) -> Any:
    """Reading the definitions of all its tasks takes 7 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@contextmanager
def _named_where_missing(task: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of the hub, and of files
        why = " ".join(str(error).split())
        raise ValueError(
            f"task {task}: its data set is not here ({why}). Fill a folder where the hub is "
            'reached, HF_HOME=DIR python -c "from lm_eval.tasks import TaskManager; '
            f"TaskManager().load(['{task}'])\", and run with the same HF_HOME=DIR here."
        ) from error


def _go_offline_without_a_hub() -> None:
    """Without this, a node that has no way out tries each file for minutes: 11 of them for one
    task. Before the hub's library is imported, which reads the variable once."""
    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    host = os.environ.get("HF_ENDPOINT", HUB).partition("://")[2].partition("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=PATIENCE_S).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
