"""How analysis scales: a store of many records loaded, brought up to date, and reported.

    python benchmarks/report_scale.py [--records 100000] [--json] [--out DIR]

Makes a store of records that never ran (values are formulas; tests/synthetic_records.py) in a
temporary folder, and measures each case in a fresh process, imports included. Every case has a
bound; exits with 1 where one is not met. Bounds are those of 100,000 records. Beside wall times
stand the seconds that kept a core busy, which a machine with other work changes less; memory is
VmHWM of the process. A fork counts what it shares with that as its own: the largest is told beside.

read        the store without an index: every record is parsed, once (reported, without a bound)
load        with the index
new         with the index, after 100 further records
report      `aerie report`: tables, figures and pages
unchanged   the tables of that report are those of the same records without an index
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import cycle, islice, product
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from synthetic_records import BACKENDS, FAMILIES, SPEED, record, sample

from suites.harness import provenance
from suites.harness.record import Record, Sample, record_path

NUM_NEW = 100
LOAD_S, REPORT_S, MEMORY_GIB = 5.0, 30.0, 2e9 / 2**30
CHILDREN = {
    "load": "from analysis import load; rows = len(load(store))",
    "report": "from suites import commands; "
    "commands.report([], store, out, title='Scale', names=[]); "
    "rows = (out / 'report.html').stat().st_size",
}
CHILD = """
import json, resource, sys, time
from pathlib import Path
start = time.perf_counter()
store, out = map(Path, sys.argv[1:3])
{code}
wall_s = time.perf_counter() - start
own, of_children = (resource.getrusage(who) for who in
                    (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps({{
    "wall_s": wall_s, "rows": rows, "peak_bytes": 1024 * int(line.split()[1]),
    "cpu_s": own.ru_utime + own.ru_stime + of_children.ru_utime + of_children.ru_stime,
    "child_bytes": 1024 * of_children.ru_maxrss,
}}))
"""


@dataclass(frozen=True)
class Row:
    """One case: what was measured, and what it may be at most."""

    name: str
    value: float
    bound: float | None
    unit: str
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        return self.bound is None or self.value <= self.bound

    def __str__(self) -> str:
        facts = ", ".join(f"{key} {value:,.6g}" for key, value in self.facts.items())
        bound = "" if self.bound is None else f"{self.bound:.3g}"
        verdict = "" if self.bound is None else "met" if self.is_met else "NOT MET"
        return f"| {self.name} | {self.value:.3g} {self.unit} | {bound} | {verdict} | {facts} |"


def measure(store: Path, out: Path) -> Iterator[Row]:
    read = child("load", store, out)
    yield from rows_of("read", read, None)
    yield from rows_of("load", child("load", store, out), LOAD_S)
    yield from rows_of("report", child("report", store, out / "first"), REPORT_S)
    last = sorted((store / "runs").glob("*/*.json"))[-NUM_NEW:]
    for path in last:  # to an index that does not know them so, as good as new
        path.touch()
    yield from rows_of("new", child("load", store, out), LOAD_S)
    (store / "index.parquet").unlink()
    child("report", store, out / "second")
    first, second = (tables_of(out / name) for name in ("first", "second"))
    differ = sum(first.get(name) != second.get(name) for name in first | second)
    yield Row("unchanged", differ, 0, "tables", {"tables": len(first)})


def child(name: str, store: Path, out: Path) -> dict[str, float]:
    code = CHILD.format(code=CHILDREN[name])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(store), str(out)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(name: str, found: dict[str, float], bound: float | None) -> Iterator[Row]:
    facts = {"CPU s": found["cpu_s"], "rows" if name != "report" else "bytes": found["rows"]}
    yield Row(name, found["wall_s"], bound, "s", facts)
    memory = None if bound is None else MEMORY_GIB
    facts = {"largest child GiB": found["child_bytes"] / 2**30}
    yield Row(f"{name}, memory", found["peak_bytes"] / 2**30, memory, "GiB", facts)


def tables_of(report: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (report / "tables").glob("*.csv")}


# --- Records that never ran, in the shapes and numbers of real ones.


def fill(store: Path, num_records: int) -> None:
    """Without the fsync of a real record: nothing here must last."""
    for one in islice(records(), num_records):
        path = record_path(store, one.run_id, one.attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(one.to_json(), indent=1), encoding="utf-8")


def records() -> Iterator[Record]:
    """Blocks of timing and decoding, quality, parity; now and then an attempt that was lost."""
    rng = np.random.default_rng(0)
    for number, one in enumerate(_blocks()):
        stamp = f"2026{1 + number // 28 % 12:02d}{1 + number % 28:02d}T"
        run_id = _digest(one.cell_id, one.run["seed"], one.run["round"])
        one = replace(one, run_id=run_id, cell_id=_digest(one.cell_id))
        if one.outcome == "completed" and rng.random() < 0.03:
            yield replace(one, attempt=f"{stamp}000000-{run_id}", outcome="preempted", samples=())
        yield replace(one, attempt=f"{stamp}120000-{run_id}")


SIZES = {
    "tiny": {"d_model": 64, "num_heads": 4},
    "100m": {"d_model": 768, "num_heads": 6},
    "200m": {"d_model": 1024, "num_heads": 8},
    "400m": {"d_model": 1536, "num_heads": 12},
}
LENGTHS = [2**power for power in range(9, 16)]
TIMED = list(product(LENGTHS, SIZES, ("float32", "bfloat16"), (32, 128, 512, 1024, 2048, 4096),
                     (2, 3, 4)))  # fmt: skip

LEARNED = list(product(SIZES, (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3), (0.0, 0.01, 0.05, 0.1, 0.2),
                       (10, 20, 50, 100), (2, 3, 4)))  # fmt: skip


def _blocks() -> Iterator[Record]:
    timed, decoded, learned = cycle(TIMED), cycle(TIMED[::-1]), cycle(LEARNED)
    for turn in range(10**6):
        for place in range(9):
            yield from _timing("training_speed", 12, f"{turn}-{place}", *next(timed))
        for place in range(4):
            yield from _timing("decode_latency", 6, f"{turn}-d{place}", *next(decoded))
        for place in range(6):
            yield from _quality(turn * 6 + place, *next(learned))
        if turn < 6:
            yield from _parity(*list(product(("float32", "bfloat16"), (2, 3, 4)))[turn])


def _timing(
    suite: str, rounds: int, block: str, length: int, size: str, dtype: str, window: int, conv: int
) -> Iterator[Record]:
    lengths = {"seq_len": length}
    if suite == "decode_latency":
        lengths = {"prompt_len": length, "num_new_tokens": 128}
    turn = int(block.split("-")[0])
    rng = np.random.default_rng([turn, length, window, conv, len(suite)])
    for round, family, backend in product(range(rounds), FAMILIES, BACKENDS):
        base = SPEED[family] * SPEED[backend] * (1 + length / 2048) * SIZES[size]["d_model"] / 64
        is_lost = length == LENGTHS[-1] and family == "mqa" and size == "400m"
        yield record(
            suite, family, backend, round=round, dtype=dtype, **lengths,
            model=SIZES[size] | {"size": size, "conv_width": conv,
                                 "d_mlp": 192 + window,  # hawk has no window to tell blocks apart
                                 "window_size": window if family == "griffin" else None},
            samples=() if is_lost else tuple(_times(suite, base * rng.normal(1, 0.01), rng)),
            outcome="out_of_memory" if is_lost else "completed",
            reason="killed by its memory limit" if is_lost else None,
            host=f"node{turn % 7}", build=_build(suite, backend, is_old=turn % 11 == 10),
            block=f"block{block}", order=6 * round,
            costs={"num_params": 10**6 * SIZES[size]["d_model"] + len(family)},
        )  # fmt: skip


def _times(suite: str, level: float, rng: np.random.Generator) -> Iterator[Sample]:
    times = level * rng.normal(1, 0.01, int(rng.integers(5, 11)))
    if suite == "decode_latency":
        for number, time in enumerate(times):
            yield sample("tpot_ms", time, repeat=number)
            yield sample("decode_time_s", 0.127 * time, repeat=number)
        yield sample("mbu", 0.2)
        yield sample("cache_bytes", 4096 * 64)
        return
    for number, time in enumerate(100 * times):
        yield sample("step_time_ms", time, repeat=number)
        yield sample("tokens_per_s", 2e6 / time, repeat=number)
        yield sample("mfu", 10 / time, repeat=number)
    yield sample("peak_flops_per_s", 1e11, field="measured")
    yield sample("init_time_s", 0.02)
    yield sample("first_step_time_ms", 200 * level)
    yield sample("compile_time_s", 3 * level)
    yield sample("peak_memory_bytes", 4e8 * level)


def _quality(
    number: int, size: str, rate: float, decay: float, warmup: int, conv: int
) -> Iterator[Record]:
    rng = np.random.default_rng(number)
    optimizer = {"name": "adamw", "learning_rate": rate, "weight_decay": decay,
                 "num_warmup_steps": warmup, "num_steps": 200}  # fmt: skip
    for family, backend, seed in product(FAMILIES, BACKENDS, range(3)):
        offset = 0.1 / SPEED[family] + 1e-4 * number + 1e-3 * rng.normal()
        yield record(
            "language_modeling", family, backend, seed=seed, seq_len=128, num_steps=200,
            optimizer=optimizer, model=SIZES[size] | {"size": size, "conv_width": conv},
            host=f"node{number % 7}", block=None,
            build=_build("language_modeling", backend, is_old=number % 13 == 12),
            samples=(
                *(sample("train_loss", 1.6 + offset + 3.9 * np.exp(-step / 8), at=5 * step)
                  for step in range(40)),
                *(sample("loss_by_position", 1.7 + offset + 2 / (1 + place), at=4 * place)
                  for place in range(32)),
                sample("loss", 1.7 + offset), sample("bits_per_byte", 2.45 + 1.4 * offset),
                sample("unigram_bits_per_byte", 4.6),
            ),
        )  # fmt: skip


def _parity(dtype: str, conv: int) -> Iterator[Record]:
    for family, backend, is_old in product(FAMILIES, BACKENDS, (False, True)):
        errors = [f"L{1 + number % 5}/layers.{number}.mixer.linear_x" for number in range(30)]
        yield record(
            "parity", family, backend, dtype=dtype, seq_len=128, block=None,
            seed=int(is_old), model=SIZES["tiny"] | {"size": "tiny", "conv_width": conv},
            build=_build("parity", backend, is_old=is_old),
            samples=tuple(
                sample(metric, value, field=name)
                for number, name in enumerate(errors)
                for metric, value in (("relative_error", 1e-6 / (1 + number)), ("tolerance", 1e-5))
            ),
        )  # fmt: skip


@cache
def _build(suite: str, backend: str, *, is_old: bool) -> str:
    now = provenance.build_key(suite, backend, provenance.device_name("cpu"))
    return f"0{now[1:]}" if is_old else now


def _digest(*values: Any) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=6).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--out", type=Path, help="where store and figures stay")
    asked = parser.parse_args()
    facts = {"machine": provenance.machine(), "git_commit": provenance.git_commit()}
    with tempfile.TemporaryDirectory() as folder:
        out = asked.out or Path(folder)
        start = time.monotonic()
        fill(out / "store", asked.records)
        print(
            f"{asked.records:,} records made in {time.monotonic() - start:.0f} s", file=sys.stderr
        )
        if not asked.json:
            print("| case | measured | bound | | more |\n|---|---|---|---|---|", flush=True)
        rows = []
        for row in measure(out / "store", out / "reports"):
            rows.append(row)
            if not asked.json:
                print(row, flush=True)
    made = facts | {"num_records": asked.records,
                    "rows": [asdict(row) | {"is_met": row.is_met} for row in rows]}  # fmt: skip
    text = json.dumps(made, indent=1)
    if asked.json:
        print(text)
    if asked.out:
        (asked.out / "report_scale.json").write_text(text, encoding="utf-8")
    return int(not all(row.is_met for row in rows))


if __name__ == "__main__":
    sys.exit(main())
