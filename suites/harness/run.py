"""A run: every setting that affects its result, frozen, and the id that is their content."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

from implementations.config import ModelConfig, build, choose
from implementations.engine import Kernels, OptimizerConfig

PHASES = ("train", "prefill", "decode", "evaluate", "kernel")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How much work one run does. Counts that its phase does not use stay 0."""

    phase: str
    batch_size: int
    seq_len: int = 0  # tokens per training or evaluation sequence
    prompt_len: int = 0
    num_new_tokens: int = 0
    eval_seq_len: int = 0  # tokens per evaluation sequence, where training has others
    chunk_len: int = 0  # tokens evaluated at once; 0: all
    length_buckets: tuple[int, ...] = ()  # ends of buckets; training is in the one up to seq_len
    num_steps: int = 0  # optimizer steps of a quality run
    num_held_out_batches: int = 0  # batches that a quality run is evaluated on
    evaluated_seq_lens: tuple[int, ...] = ()  # lengths that a task is asked at
    num_examples: int = 0  # of each of them
    stops_when_learned: bool = False  # training on a task
    repeats: int = 0  # timed repetitions within the process
    max_batch_size: int = 0  # where a search for the largest batch ends
    activation_checkpointing: bool = False
    levels: tuple[str, ...] = ()  # of the parity ladder; empty: those of the gate
    topology: str | None = None  # of TPUs that are not here: compiled for, and not run
    op: str = ""  # that is timed alone; in the phase train with its gradients
    num_devices: int = 1  # of one node, that share each batch's rows
    task: str = ""  # of questions with given answers
    task_folder: str = ""  # where a task of one's own is defined
    task_digest: str = ""  # of the files there
    num_fewshot: int = 0  # answered questions before each
    max_questions: int = 0  # of each task; 0: all

    def __post_init__(self) -> None:
        choose("phase", self.phase, PHASES, "workload")
        if self.batch_size < 1:
            raise ValueError(f"workload: batch_size={self.batch_size}; must be at least 1.")
        for name in ("seq_len", "prompt_len", "num_new_tokens", "num_steps", "repeats"):
            if getattr(self, name) < 0:
                raise ValueError(f"workload: {name}={getattr(self, name)}; must not be negative.")
        if self.num_devices < 1:
            raise ValueError(f"workload: num_devices={self.num_devices}; must be at least 1.")
        if self.batch_size % self.num_devices:
            raise ValueError(
                f"workload: batch_size={self.batch_size} does not divide by "
                f"num_devices={self.num_devices}; every device takes as many sequences."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from. `source` is stdlib, docstrings, random, text, jsonl or tokens."""

    name: str
    source: str
    paths: tuple[str, ...] = ()  # files, folders or globs of the user's own data
    tokenizer: str | None = None  # a `tokenizers` JSON file; null: bytes
    vocab_size: int = 256
    field: str = "text"  # the key of a .jsonl line that holds the text
    token_dtype: str = "uint16"  # of a .bin file
    held_out_fraction: float = 0.05
    num_items: int = 0  # of a task: what an example asks for; 0 where there is no such count


@dataclass(frozen=True)
class Start:
    """Trained parameters that a run evaluates: where they lie, and what they hold."""

    path: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell, one seed, one round: one process. run_id hashes all of it."""

    suite: str
    model: ModelConfig
    backend: str
    dtype: str
    workload: Workload
    kernels: Kernels = field(default_factory=Kernels)
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    device_kind: str = "cpu"
    seed: int = 0
    round: int = 0
    checkpoint: Start | None = None  # the run starts from its parameters, and does not train

    @cached_property
    def run_id(self) -> str:
        """12 hexadecimal digits: the same settings, the same id, on every machine."""
        return _digest(self._identity())

    @cached_property
    def cell_id(self) -> str:
        """The id of everything but seed and round."""
        values = self._identity()
        return _digest({k: v for k, v in values.items() if k not in ("seed", "round")})

    def _identity(self) -> dict[str, Any]:
        """A checkpoint is what it holds, wherever it lies."""
        values = self.to_json()
        return values | ({"checkpoint": self.checkpoint.digest} if self.checkpoint else {})

    def to_json(self) -> dict[str, Any]:
        values = json.loads(json.dumps(asdict(self)))
        for name in ("levels", "topology", "op", "eval_seq_len", "chunk_len", "length_buckets"):
            if not getattr(self.workload, name):  # a question of few: others keep their ids
                del values["workload"][name]
        if self.checkpoint is None:
            del values["checkpoint"]
        if self.workload.num_devices == 1:
            del values["workload"]["num_devices"]
        if not self.workload.num_examples:  # a question of tasks alone
            for name in ("evaluated_seq_lens", "num_examples", "stops_when_learned"):
                del values["workload"][name]
        if not self.data.num_items:
            del values["data"]["num_items"]
        if self.kernels.layers == "auto":  # runs from before this setting keep their ids
            del values["kernels"]["layers"]
        if not self.workload.task:  # a question of downstream tasks alone
            for name in ("task", "task_folder", "task_digest", "num_fewshot", "max_questions"):
                del values["workload"][name]
        for key in ("decay_exponent", "normalize_input"):  # and those of before the gates' settings
            if values["model"][key] == getattr(ModelConfig, key):
                del values["model"][key]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Run":
        nested = {
            "model": ModelConfig,
            "workload": Workload,
            "kernels": Kernels,
            "data": DataConfig,
            "optimizer": OptimizerConfig,
        }
        if values.get("checkpoint") is not None:
            nested["checkpoint"] = Start
        parts = {key: build(kind, values[key], key) for key, kind in nested.items()}
        return cls(**(values | parts))


class Suite(Protocol):
    """A question: it lists its work without touching a device. Beside it in the suite's module,
    `measure(run, engine)` yields samples as they come."""

    rounds: int  # times that each cell is measured, each in a process of its own
    seeds: tuple[int, ...]
    is_timing: ClassVar[bool]  # its runs are interleaved, and compared as ratios
    # Where it asks a trained model alone: `needs_checkpoint: ClassVar[bool] = True`.
    # Where not every data set will do, as `check_data(data)`, a ValueError for those that do not.
    # Where it is timed only, as `until_ci: float | None`, which ends rounds early (see rounds.py):
    headline: ClassVar[str]  # the metric by which variants are compared

    def workloads(self) -> Iterator[Workload]: ...

    def optimizer(self, base: OptimizerConfig, workload: Workload) -> OptimizerConfig:
        """The optimizer settings of one workload: the user's, with the suite's own schedule."""


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
