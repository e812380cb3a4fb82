"""From settings to runs, in the order they will be measured, each with its costs and its reason.

Settings are plain dicts (composed at the front door); nothing here knows where they come from.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from implementations import cost
from implementations.config import ModelConfig, build, choose
from implementations.engine import TPUS, Kernels, OptimizerConfig, check_dtype, unsupported
from suites.harness import provenance, tasks, topology, trained
from suites.harness.costs import work_costs
from suites.harness.record import PASSES
from suites.harness.run import DataConfig, Run, Suite, Workload

# Ends that are results: such a run is not run again while its build is current.
FINISHED = ("completed", "unsupported", "out_of_memory", "out_of_memory_predicted", "diverged")
NEW, FINISHED_REASON = "new", "finished"
CUT_OFF = ("preempted", "node_failure", "timed_out", "cancelled")  # ends that may end a sweep
WITH_ITS_BLOCK = "its block was interrupted"
NOT_NEEDED = "not needed"  # such reasons say so: see rounds.py
NOT_OF_QUALITY = ("parity", "compile")  # suites that are not timed either
CONTEXT = 4096  # of the cache that is shown for runs that decode nothing


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a plan: why it would run or not, what it costs, its place in its comparison."""

    run: Run
    build: str
    reason: str
    is_pending: bool  # aerie run would start it
    is_stale: bool
    outcome: str | None  # of the attempt that counts, if any
    costs: dict[str, Any]
    block: str | None
    order: int | None
    attempts: tuple[str, ...] = ()  # that the store had when this was planned
    until_ci: float | None = None  # its block ends where intervals are as narrow: see rounds.py
    measured: tuple[str, ...] = ()  # of an adaptive block: the runs that have records already

    @property
    def is_needless(self) -> bool:
        """Its block needs no further round, or none of its variant."""
        return NOT_NEEDED in self.reason

    def stored(self) -> dict[str, Any]:
        """All of it, for from_stored."""
        return vars(self) | {"run": self.run.to_json()}

    @classmethod
    def from_stored(cls, values: dict[str, Any]) -> "Planned":
        lists = {key: tuple(values.get(key, ())) for key in ("attempts", "measured")}
        return cls(**(values | {"run": Run.from_json(values["run"])} | lists))

    def to_json(self) -> dict[str, Any]:
        run = self.run
        return {
            "run_id": run.run_id,
            "suite": run.suite,
            "family": run.model.family,
            "size": run.model.size,
            "backend": run.backend,
            "dtype": run.dtype,
            "phase": run.workload.phase,
            "op": run.workload.op or None,
            "batch_size": run.workload.batch_size,
            "num_devices": run.workload.num_devices,
            "seq_len": run.workload.seq_len or None,
            "prompt_len": run.workload.prompt_len or None,
            "num_new_tokens": run.workload.num_new_tokens or None,
            "seed": run.seed,
            "round": run.round,
            "until_ci": self.until_ci,
            **self.costs,
            "device_kind": run.device_kind,
            "linear_scan": run.kernels.linear_scan,
            "attention": run.kernels.attention,
            "layers": run.kernels.layers,
            "window_size": run.model.window_size,
            "build": self.build,
            "is_pending": self.is_pending,
            "reason": self.reason,
        }


def expand(settings: dict[str, Any]) -> Iterator[Run]:
    """Every run of one suite and one model: workloads x rounds x seeds."""
    name = settings["suite"]["name"]
    kind = load_suite(name)
    values = {key: value for key, value in settings["suite"].items() if key != "name"}
    suite = build(kind, values, f"suite={name}")
    model = build(ModelConfig, settings["model"], "model")
    kernels = build(Kernels, settings["kernels"], "kernels")
    data = data_config(settings)
    _check_data(suite, name, data)
    if getattr(kind, "needs_checkpoint", False) and settings.get("checkpoint") is None:
        raise ValueError(f"suite={name} asks a trained model; name its folder: checkpoint=DIR.")
    optimizer = build(OptimizerConfig, settings["optimizer"], "optimizer")
    if model.vocab_size < data.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than data={data.name} needs: "
            f"{data.vocab_size}."
        )
    check_dtype(settings["dtype"])
    device_kind = settings["device_kind"]
    choose("device_kind", device_kind, provenance.DEVICE_KINDS, "settings")
    if kind.is_timing and kernels.interpret:
        raise ValueError(
            f"suite={name} times what it runs, and kernels.interpret=true is for correctness only; "
            "suite=parity takes it."
        )
    if suite.rounds < 1 or not suite.seeds:
        raise ValueError(f"suite={name}: rounds and seeds must not be empty.")
    start = None
    if settings.get("checkpoint") is not None:
        if kind.is_timing or name in NOT_OF_QUALITY:
            raise ValueError(
                f"checkpoint={settings['checkpoint']}: suite={name} measures no quality; a "
                "checkpoint is for suites that do, like language_modeling."
            )
        start = trained.find(str(settings["checkpoint"]), model)
    for workload in suite.workloads():
        if workload.topology is not None:
            device_kind = topology.check(workload.topology, settings, kernels)
        for round_ in range(suite.rounds):
            for seed in suite.seeds[:1] if start else suite.seeds:  # it was trained with one
                run = Run(
                    suite=name,
                    model=model,
                    backend=settings["backend"],
                    dtype=settings["dtype"],
                    workload=workload,
                    kernels=kernels,
                    data=data,
                    optimizer=suite.optimizer(optimizer, workload),
                    device_kind=device_kind,
                    seed=seed,
                    round=round_,
                )
                yield run if start is None else trained.started(run, start)


def _check_data(suite: Suite, name: str, data: DataConfig) -> None:
    if check := getattr(suite, "check_data", None):
        check(data)
    elif tasks.is_task(data) and any(work.num_steps for work in suite.workloads()):
        raise ValueError(f"data={data.name} is a task, for suite=recall; suite={name} reads text.")


def data_config(settings: dict[str, Any]) -> DataConfig:
    return build(DataConfig, settings["data"], "data")


def reads_corpus(settings: dict[str, Any]) -> bool:
    """Whether text is read from the corpus of `data`: not where a suite checks data by itself."""
    return not hasattr(load_suite(settings["suite"]["name"]), "check_data")


def load_suite(name: str) -> type[Suite]:
    return import_module(f"suites.{name}").Suite


def arrange(runs: Iterable[Run]) -> list[tuple[Run, str | None, int | None]]:
    """Runs as they will be measured, each once, with block and order.

    Parity first, then timing, then quality. Timing runs of one comparison are a block: its
    variants change places each round (A B B A), so that drift of the machine hits all alike.
    """
    unique = list({run.run_id: run for run in runs}.values())
    blocks: dict[str, list[Run]] = {}
    for run in unique:
        blocks.setdefault(_comparison(run), []).append(run)
    arranged = []
    for key, members in blocks.items():
        if not load_suite(members[0].suite).is_timing:
            arranged += [(run, None, None) for run in members]
            continue
        variants = {run.cell_id: place for place, run in enumerate(reversed(members))}
        members.sort(key=lambda run: (run.round, run.seed, _place(run, variants)))
        arranged += [(run, key, order) for order, run in enumerate(members)]
    return sorted(arranged, key=lambda item: _rank(item[0].suite))


def plan(
    store: Path, runs: Iterable[Run], python: Callable[[Run], str | None] = lambda run: None
) -> list[Planned]:
    """What each run would cost, and what the store already says of it. `python` names the
    interpreter that will run it, where it is not ours."""
    made = []
    for run, block, order in arrange(runs):
        records = attempts(store, run.run_id)
        found = provenance.versions(python(run))
        device = provenance.device_name(run.device_kind)
        key = provenance.build_key(run.suite, run.backend, device, found)
        reason, is_pending, counted = judge(records, run, device, found)
        made.append(
            Planned(
                run=run,
                build=key,
                reason=reason,
                is_pending=is_pending,
                is_stale=reason.startswith("stale"),
                outcome=counted["outcome"] if counted else None,
                costs=costs(run),
                block=block,
                order=order,
                attempts=tuple(record["attempt"] for record in records),
            )
        )
    return whole(store, made)


def whole(store: Path, planned: list[Planned], interrupted: Collection[str] = ()) -> list[Planned]:
    """The same runs; those of a block whose last sweep was interrupted are pending (or stale) with
    the others of it: results of two sweeps are not compared. Some `interrupted` blocks are known
    otherwise. What is new in a block leaves what was measured in a sweep that went through."""
    blocks: dict[str, list[Planned]] = {}
    for item in planned:
        if item.block is not None:
            blocks.setdefault(item.block, []).append(item)
    changed = {}
    for block, members in blocks.items():
        is_pending = any(item.is_pending for item in members)
        is_lacking = is_pending or any(item.is_stale for item in members)
        if is_lacking and (block in interrupted or _was_interrupted(store, members)):
            for item in members:
                if not item.is_pending and not item.is_stale:
                    changed[item.run.run_id] = replace(
                        item, is_pending=is_pending, is_stale=not is_pending, reason=WITH_ITS_BLOCK
                    )
    return [changed.get(item.run.run_id, item) for item in planned]


def _was_interrupted(store: Path, members: list[Planned]) -> bool:
    """Whether the last that was measured of a block was cut off."""
    ends = [
        (record["attempt"], record["outcome"])
        for item in members
        for record in attempts(store, item.run.run_id)
        if record["block"] is not None
    ]
    return bool(ends) and max(ends)[1] in CUT_OFF


def attempts(store: Path, run_id: str) -> list[dict[str, Any]]:
    """Records of one run as plain values, oldest first."""
    paths = sorted((store / "runs" / run_id).glob("[!.]*.json"))
    return [read(path) for path in paths]


@dataclass(frozen=True)
class Ends:
    """How the attempts of one run have ended, oldest first."""

    suite: str
    is_search: bool  # for a frontier
    attempts: tuple[str, ...]
    outcomes: tuple[str, ...]
    are_finished: tuple[bool, ...]

    def num_before(self, stamp: str) -> int:
        """How many attempts were there when a submission of this stamp was made."""
        return sum(attempt < stamp for attempt in self.attempts)

    def counted(self, stamp: str = "") -> str:
        """Of the last finished attempt, else of the last; of those since `stamp` if there are."""
        first = self.num_before(stamp)
        first = first if first < len(self.attempts) else 0
        ends = list(zip(self.outcomes, self.are_finished, strict=True))[first:]
        return next((end for end, is_result in reversed(ends) if is_result), ends[-1][0])


def ends(store: Path, wanted: Collection[str] | None = None) -> dict[str, Ends]:
    """Of every run of a store, or of those that are wanted, by run_id."""
    names = sorted(path.name for path in (store / "runs").glob("*")) if wanted is None else wanted
    found = {}
    for name in names:
        paths = sorted((store / "runs" / name).glob("[!.]*.json"))
        if each := [_end(path, *version(path)) for path in paths]:
            found[name] = Ends(
                suite=each[-1].suite,
                is_search=each[-1].is_search,
                attempts=tuple(path.stem for path in paths),
                outcomes=tuple(end.outcome for end in each),
                are_finished=tuple(end.is_finished for end in each),
            )
    return found


class _End(NamedTuple):
    suite: str
    is_search: bool
    outcome: str
    is_finished: bool


@cache
def _end(path: Path, written_ns: int, size: int) -> _End:
    """What counts of a record; who watches a store of thousands parses each once."""
    record = read(path)
    run = record["run"]
    is_search = run["workload"].get("max_batch_size", 0) > 0
    return _End(run["suite"], is_search, record["outcome"], is_finished(record))


def version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no record ({error}); remove it, or put it right.") from None


def judge(
    records: list[dict[str, Any]], run: Run, device: str, versions: dict[str, str | None]
) -> tuple[str, bool, dict[str, Any] | None]:
    """(reason, whether it is pending, the record that counts) for a run and its attempts.

    What a job of Slurm ran is judged on the device that it found: it is not this machine's.
    """
    if not records:
        return NEW, True, None
    finished = [record for record in records if is_finished(record)]
    current = [
        record
        for record in finished
        if record["build"]
        == provenance.build_key(run.suite, run.backend, device_of(record, device), versions)
    ]
    if current:
        outcome = current[-1]["outcome"]
        reason = FINISHED_REASON if outcome == "completed" else f"{FINISHED_REASON}: {outcome}"
        return reason, False, current[-1]
    if finished:
        last = finished[-1]
        change = _change(last, run, device_of(last, device), versions)
        return f"stale: {change}", False, last
    outcome = records[-1]["outcome"]
    return f"failed: {outcome}" if outcome != "failed" else "failed", True, records[-1]


def fits_nowhere(run: Run) -> str | None:
    """Why no device of the kind asked for can run this: known before anything is started."""
    if run.workload.topology is not None:
        return None
    kernels = run.kernels
    return unsupported(run.backend, run.device_kind, kernels.chosen, kernels.interpret)


def outcomes_of_build(store: Path, item: Planned) -> list[str]:
    """Outcomes of the attempts that the present code has made of a run, oldest first."""
    run = item.run
    found = []
    for record in attempts(store, run.run_id):
        device = device_of(record, provenance.device_name(run.device_kind))
        versions = record["provenance"].get("versions")
        if record["build"] == provenance.build_key(run.suite, run.backend, device, versions):
            found.append(record["outcome"])
    return found


def ended_as_planned(outcome: str | None, *, is_search: bool) -> bool:
    """Completed, unsupported, or out of memory where the search for a frontier is the question."""
    return outcome in ("completed", "unsupported", "out_of_memory_predicted") or (
        outcome == "out_of_memory" and is_search
    )


def costs(run: Run) -> dict[str, Any]:
    """Exact counts and predictions, by the names that records and `aerie plan` use.

    cache_bytes is that of the run's own batch and positions where it decodes, else that of one
    sequence of CONTEXT positions.
    """
    return dict(_costs(run.model, run.workload, run.dtype))


@cache
def _costs(model: ModelConfig, work: Workload, dtype: str) -> dict[str, Any]:
    positions = work.prompt_len + work.num_new_tokens
    length = work.seq_len or positions
    if work.phase in ("prefill", "decode"):
        cache = {"batch_size": work.batch_size, "capacity": positions}
        memory = cost.inference_memory_bytes(
            model, prompt_len=work.prompt_len, dtype=dtype, **cache
        )
    elif work.task:  # forward alone, and no cache
        cache = {"batch_size": 1, "capacity": CONTEXT}
        size = {"batch_size": work.batch_size, "prompt_len": work.seq_len, "capacity": 1}
        memory = cost.inference_memory_bytes(model, dtype=dtype, **size)
    elif work.op:
        cache = {"batch_size": 1, "capacity": CONTEXT}
        memory = cost.scan_memory_bytes(
            model,
            work.op,
            batch_size=work.batch_size,
            seq_len=work.seq_len,
            dtype=dtype,
            has_backward=work.phase == "train",
        )
    else:
        cache = {"batch_size": 1, "capacity": CONTEXT}
        memory = cost.train_memory_bytes(
            model,
            batch_size=work.batch_size // work.num_devices,  # of one device
            seq_len=length,
            dtype=dtype,
            activation_checkpointing=work.activation_checkpointing,
        )
    return {
        "num_params": cost.num_params(model),
        "num_params_non_embedding": cost.num_params_non_embedding(model),
        "train_flops_per_token": cost.train_flops_per_token(model, length),
        "cache_bytes": cost.cache_bytes(model, dtype=dtype, **cache),
        "predicted_peak_memory_bytes": memory,
        **work_costs(model, work, dtype),
        **(topology.costs(model, work, dtype) if work.topology else {}),
    }


def is_larger(run: Run, proven: Run) -> bool:
    """Whether a run is the proven one with more work: no size smaller, and one larger."""
    sizes = ("batch_size", "seq_len", "prompt_len", "num_new_tokens")
    if _without(run, sizes) != _without(proven, sizes):
        return False
    pairs = [(getattr(run.workload, s), getattr(proven.workload, s)) for s in sizes]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _without(run: Run, sizes: tuple[str, ...]) -> dict[str, Any]:
    values = run.to_json()
    work = {key: value for key, value in values["workload"].items() if key not in sizes}
    return {k: v for k, v in values.items() if k not in ("seed", "round")} | {"workload": work}


def _comparison(run: Run) -> str:
    """The id of all that variants share: suite, workload and what does not tell them apart."""
    shared = [run.suite, vars(run.workload), vars(run.data), run.model.size, run.dtype]
    text = json.dumps([*shared, run.device_kind], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _place(run: Run, variants: dict[str, int]) -> int:
    """Place of a variant in its round: in turn forward and backward."""
    place = variants[run.cell_id]
    return place if run.round % 2 else -place


def _rank(suite: str) -> int:
    if suite == "parity":
        return 0
    return 1 if load_suite(suite).is_timing else 2


def is_finished(record: dict[str, Any]) -> bool:
    """Whether an attempt is a result. What a compiler refuses of a program that is compiled alone,
    for a device that is not here, it refuses again."""
    is_compiled_alone = record["run"]["workload"].get("topology") is not None
    outcome = record["outcome"]
    return outcome in FINISHED or (is_compiled_alone and outcome == "compile_error")


def device_of(record: dict[str, Any], device: str) -> str:
    """The device of a record that its build is compared on: our own, but for jobs of Slurm."""
    seen = record["provenance"]
    name = seen.get("build_device") if seen.get("job") else None
    return name or device


def _change(record: dict[str, Any], run: Run, device: str, now: dict[str, str | None]) -> str:
    """What differs between a finished record's build and ours, in words."""
    then = record["provenance"].get("versions", {})
    libraries = provenance.libraries(run.backend, device)
    for name in (*libraries, *provenance.QUESTIONS.get(run.suite, ())):
        if then.get(name) != now.get(name):
            return f"{name} {then.get(name)} -> {now.get(name)}"
    was = record["provenance"].get("device_name")
    if was != device and device not in TPUS:  # one that is here: a TPU is known by its kind
        return f"device {was} -> {device}"
    return "code changed"


def work_text(run: Run) -> str:
    """A run's workload in a few words; of a task with its name."""
    text = workload_text(run.workload)
    return f"{run.data.name} {text}" if tasks.is_task(run.data) else text


def workload_text(work: Workload) -> str:
    """A workload in a few words, for tables."""
    if work.task:
        examples = f", {work.num_fewshot} examples" if work.num_fewshot else ""
        return f"{work.task}{examples}"
    if work.op:
        return f"{work.op} {PASSES[work.phase]} {work.batch_size} x {work.seq_len}"
    if work.phase in ("prefill", "decode"):
        text = f"prompt_len {work.prompt_len}"
        text += f" + {work.num_new_tokens}" if work.num_new_tokens else ""
    else:
        text = f"{work.batch_size} x {work.seq_len}" if work.seq_len else f"batch {work.batch_size}"
        text += f" on {work.num_devices} devices" if work.num_devices > 1 else ""
    return text if work.topology is None else f"{work.phase} {text} on {work.topology}"
