"""What people see: tables that never cut a number, and progress with an estimate of the end."""

import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from suites.harness.plan import CONTEXT, Planned, work_text
from suites.harness.record import Record

NONE = "-"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(
    header: list[str], rows: Iterable[Iterable[str]], *, title: str = "", note: str = ""
) -> None:
    """Columns as wide as their longest cell; on a terminal wrapped to fit, elsewhere never."""
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    if title:
        console.print(Text(title, style="bold"))
    console.print(table(header, rows))
    if note:
        console.print(Text(note, style="dim"))


def say(text: str, indent: str = "") -> None:
    """A line; on a terminal as many as it needs there, broken between words."""
    lines = [indent + text]
    if sys.stdout.isatty():
        width = Console().width
        lines = textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent + "  ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    print("\n".join(lines))


def print_beside(header: list[str], rows: list[list[str]], *, title: str = "") -> None:
    """A table of comparisons; where a terminal is too narrow for it two lines or more each: the
    ratio and what it means, then the two values, under what they are of."""
    lengths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    width = Console().width
    if not sys.stdout.isatty() or sum(lengths) + 2 * len(lengths) <= width:
        print_table(header, rows, title=title)
        return
    console = Console()
    console.print(Text(title, style="bold"))
    place = header.index("metric")
    before = None
    for row in rows:
        if (what := ", ".join(text for text in row[:place] if text != NONE)) != before:
            say(before := what)
        metric, ours, baseline, ratio, number, *rest = row[place:]
        told = dict(zip(header[place + 5 :], rest, strict=True))
        marks = [number + " " + header[place + 4]] if number != NONE else []
        marks += [told[name] for name in ("verdict", "parity") if told.get(name, NONE) != NONE]
        found = "; ".join([f"{metric}: {ratio}", *marks])
        say(found, "  ")
        say(f"{header[place + 1]} {ours}, {header[place + 2]} {baseline}", "    ")


def table(header: list[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table to be printed; columns of numbers to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    rows = [list(row) for row in rows]
    for place, name in enumerate(header):
        is_number = all(_is_number(row[place]) for row in rows) and rows
        made.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def number(value: float | None) -> str:
    """Counts exactly, with separators."""
    return NONE if value is None else f"{value:,.0f}"


def count(number: int, word: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def hours(value: float) -> str:
    """Hours with as many digits as an estimate is worth."""
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def size(num_bytes: float | None) -> str:
    """Bytes in the binary unit that reads best."""
    if num_bytes is None:
        return NONE
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def plan_row(item: Planned) -> list[str]:
    run, costs = item.run, item.costs
    return [
        run.run_id,
        run.suite,
        f"{run.model.family}_{run.model.size}",
        run.backend,
        run.dtype,
        work_text(run),
        str(run.seed),
        str(run.round),
        number(costs["num_params"]),
        number(costs["num_params_non_embedding"]),
        number(costs["train_flops_per_token"]),
        number(costs["cache_bytes"]),
        size(costs["predicted_peak_memory_bytes"]),
        item.reason,
    ]


def print_card(item: Planned) -> None:
    run, costs, work = item.run, item.costs, item.run.workload
    length = work.seq_len or work.prompt_len + work.num_new_tokens
    if work.phase in ("prefill", "decode"):
        cache = f"{length} positions, batch {work.batch_size}, {run.dtype}"
    else:
        cache = f"{CONTEXT} positions, batch 1, {run.dtype}"
    flops = f"{number(costs['train_flops_per_token'])} FLOPs"
    memory = costs["predicted_peak_memory_bytes"]
    rows = [
        ["run_id", run.run_id],
        ["suite", f"{run.suite}, {work_text(run)}, {run.dtype}, {run.backend}"],
        ["model", f"{run.model.family}_{run.model.size}"],
        ["num_params", f"{number(costs['num_params'])} parameters"],
        ["num_params_non_embedding",
         f"{number(costs['num_params_non_embedding'])} non-embedding parameters"],
        ["train_flops_per_token", f"{flops} per token for training at seq_len {length}"],
        ["cache_bytes", f"{number(costs['cache_bytes'])} bytes of cache ({cache})"],
        ["predicted_peak_memory_bytes", f"{number(memory)} bytes ({size(memory)})"],
        ["reason", item.reason],
    ]  # fmt: skip
    width = max(len(row[0]) for row in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")


def count_up(title: str) -> Callable[[int, int, str], None]:
    """Tells how many of a known number have ended, and when the rest may have."""
    start = time.perf_counter()

    def ended(done: int, total: int, what: str) -> None:
        left = (time.perf_counter() - start) / done * (total - done)
        estimate = f"; about {duration(left)} left" if done < total else ""
        is_terminal = sys.stderr.isatty()
        end = "\r" if is_terminal and done < total else "\n"
        line = f"[{done}/{total}] {title} {what}{estimate}"
        print(f"{line:<100}" if is_terminal else line, end=end, file=sys.stderr, flush=True)

    return ended


class SweepProgress:
    """A bar on a terminal, a line for each run elsewhere; the estimate is from runs that ended."""

    def __init__(self, num_runs: int) -> None:
        self.num_runs = num_runs
        self.num_ended = 0
        self.start = time.perf_counter()
        self.seconds: dict[tuple, list[float]] = {}
        self.left: dict[tuple, int] = {}
        self.is_at_most = False  # some may not be needed
        self.bar: Progress | None = None
        self.task: Any = None

    def __enter__(self) -> "SweepProgress":
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.num_runs, left="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def expect(self, todo: list[Planned]) -> None:
        for planned in todo:
            kind = _kind(planned)
            self.left[kind] = self.left.get(kind, 0) + 1
            self.is_at_most |= planned.until_ci is not None

    def started(self, planned: Planned) -> None:
        if self.bar:
            self.bar.update(self.task, description=_label(planned))

    def ended(self, planned: Planned, record: Record) -> None:
        kind = _kind(planned)
        self.num_ended += 1
        self.left[kind] = self.left.get(kind, 1) - 1
        self.seconds.setdefault(kind, []).append(record.seconds)
        why = f" ({record.reason})" if record.reason else ""
        line = f"{_label(planned)}: {record.outcome} in {record.seconds:.1f} s{why}"
        about = "at most" if self.is_at_most else "about"
        left = f"{about} {duration(self.estimate())} left" if self.num_ended < self.num_runs else ""
        if self.bar:
            if record.outcome != "completed":
                self.bar.console.print(Text(line), style="yellow")
            self.bar.update(self.task, completed=self.num_ended, left=left)
            return
        place = f"[{self.num_ended}/{self.num_runs}]"
        print(f"{place} {line}{'; ' + left if left else ''}", file=sys.stderr, flush=True)

    def spared(self, spared: list[tuple[Planned, str]]) -> None:
        """Runs of one block that are not needed: they are not waited for."""
        for planned, _ in spared:
            self.left[_kind(planned)] -= 1
        self.num_runs -= len(spared)
        for why, number in Counter(why for _, why in spared).items():
            run = spared[0][0].run
            line = f"{run.suite} {work_text(run)}: {count(number, 'run')} {why}"
            if self.bar:
                self.bar.update(self.task, total=self.num_runs)
                self.bar.console.print(Text(line), style="dim")
            else:
                print(line, file=sys.stderr, flush=True)

    def estimate(self) -> float:
        """Seconds left: each kind of run as long as those of its kind took, else the mean."""
        known = [s for values in self.seconds.values() for s in values]
        mean = sum(known) / len(known) if known else 0.0
        total = 0.0
        for kind, count in self.left.items():
            values = self.seconds.get(kind)
            total += count * (sum(values) / len(values) if values else mean)
        return total


def _kind(planned: Planned) -> tuple:
    return planned.run.suite, planned.run.backend, planned.run.model.family


def _label(planned: Planned) -> str:
    run = planned.run
    rounds = f" round {run.round}" if planned.block else f" seed {run.seed}"
    name = f"{run.model.family}_{run.model.size}"
    return f"{run.suite} {name} {run.backend} {run.dtype} {work_text(run)}{rounds}"


def _is_number(text: str) -> bool:
    return text == NONE or text[:1].isdigit() or (text[:1] in "+-" and text[1:2].isdigit())
