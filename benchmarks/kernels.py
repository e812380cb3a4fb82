"""How close the Triton kernels come to what a GPU can do: one command, one table.

    python benchmarks/kernels.py [--json] [--out DIR] [--only NAME ...] [--quick] [--dry-run]

Parity comes first: every kernel against float64 at small odd shapes, in float32 and bfloat16, then
every contender at the very shape that is timed, on a part of its outputs. What fails is marked
UNVERIFIED and meets no goal. Speeds are set against what this very device does in the same process:
bytes counted in the kernel files over a copy's bandwidth, FLOPs over a large product's rate; MFU
and MBU against the data sheet, where the card is known. Contenders run in turn (A B, B A, ...), the
L2 cache is flushed before each, times are those of CUDA events: median, and p10 to p90. Whole
models are timed by the clock on the wall, launches included.

Rows are written as they come, to DIR/kernels.json, and at the end DIR/kernels.md. Each section has
a time limit, so that all fit in --budget seconds; what did not is listed as not measured. An error
is a row; after one that leaves the device unusable the command goes on in a fresh process.

Memory and races, where NVIDIA's tool is: compute-sanitizer --tool memcheck (then racecheck)
python benchmarks/kernels.py --only parity --budget 3600.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import cases as plans
from benchmarks import timing
from benchmarks.cases import BOTH, TOLERANCES, Case, Section
from suites.harness.measure import find_device

LEAST_COPY = 0.85  # of the data sheet's bandwidth
DEVICE = "cuda"
SECONDS_A_CASE = 0.8  # of timing, over all its contenders
COLUMNS = ("op", "direction", "shape", "dtype", "contender", "ms", "p10 - p90", "GB/s", "of copy",
           "TFLOP/s", "of matmul", "MFU/MBU", "ratio to best peer", "goal", "met", "error",
           "tolerance", "parity", "peak GiB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, default=Path("results/raw/kernels"))
    parser.add_argument("--only", nargs="+", choices=plans.sections(), help="sections to run")
    parser.add_argument("--quick", action="store_true", help="the first case of each op")
    parser.add_argument("--dry-run", action="store_true", help="list the cases, run nothing")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--resume-from", type=float, help=argparse.SUPPRESS)  # when it started
    arguments = parser.parse_args()
    chosen = plans.sections(arguments.only, quick=arguments.quick)
    if arguments.dry_run:
        print("\n".join(listing(chosen)))
        return
    if not has_gpu():
        print(
            "benchmarks/kernels.py needs a CUDA device and a PyTorch that finds it; "
            "--dry-run lists what it would measure.",
            file=sys.stderr,
        )
        sys.exit(2)
    report = Report(arguments.out, resumed=arguments.resume_from is not None)
    started = arguments.resume_from or time.time()
    run(chosen, report, timing.Budget(started + arguments.budget - time.time()), started)
    report.finish()
    if arguments.json:
        print(json.dumps(report.content, indent=1))
    else:
        print((arguments.out / "kernels.md").read_text())


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def listing(chosen: dict[str, Section]) -> Iterator[str]:
    for name, section in chosen.items():
        yield f"{name} (at most {section.limit_s:g} s)"
        for case in section.cases:
            work = [f"{case.num_bytes / 1e6:.1f} MB"] if case.num_bytes else []
            work += [f"{case.flops / 1e12:.3f} TFLOP"] if case.flops else []
            goals = ", ".join(map(str, case.goals)) or "no goal"
            yield (
                f"  {case.op:18} {case.direction:16} {case.dtype:8} {case.shape_text:44} "
                f"{' '.join(work) or '-':16} {goals}"
            )


class Report:
    """What is known so far, in a file at every moment."""

    def __init__(self, folder: Path, *, resumed: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / "kernels.json"
        if resumed:
            self.content = json.loads(self._path.read_text())
        else:
            self.content = {"machine": machine(), "rows": [], "goals": []}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def of_case(self, section: str, case: Case) -> list[dict[str, Any]]:
        key = (section, case.op, case.direction, case.dtype, case.shape)
        names = ("section", "op", "direction", "dtype", "shape")
        return [row for row in self.rows if tuple(row[name] for name in names) == key]

    def add(self, section: str, case: Case, contender: str, is_ours: bool, **values) -> dict:
        row = {
            "section": section, "op": case.op, "direction": case.direction, "shape": case.shape,
            "dtype": case.dtype, "contender": contender, "is_ours": is_ours,
            "goals": [{"metric": g.metric, "least": g.least} for g in case.goals],
            "tolerance": TOLERANCES[case.dtype], "parity": "none",
        } | values  # fmt: skip
        self.rows.append(row)
        self.write()
        shown = f"{row['ms']:.3f} ms" if row.get("ms") else row.get("note", "")
        label = f"{case.op} {case.direction} {case.shape_text} {case.dtype} {contender}"
        print(f"{label}: {shown} parity {row['parity']}", file=sys.stderr)
        return row

    def write(self) -> None:
        self._path.write_text(json.dumps(self.content, indent=1))

    def finish(self) -> None:
        self.content["goals"] = plans.cross_goals(self.rows)
        self.write()
        (self._folder / "kernels.md").write_text("\n".join(table(self.content)) + "\n")


def machine() -> dict[str, Any]:
    """Versions, the device, and its measured peaks."""
    import torch
    import triton

    name = torch.cuda.get_device_name()
    sheet = find_device(name)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
             "--format=csv,noheader"]  # fmt: skip
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "no nvidia-smi"
    copy = timing.copy_bytes_per_s()
    return {
        "device": name,
        "driver, clocks, power": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(sys.argv),
        "copy_bytes_per_s": copy,
        "matmul_flops_per_s": timing.matmul_flops_per_s(),
        "sheet": sheet.name if sheet else f"unknown: no data sheet of {name!r} here",
        "sheet_bytes_per_s": sheet and sheet.bytes_per_s,
        "sheet_flops_per_s": sheet and sheet.flops_per_s["bfloat16"],
        "copy_of_sheet": sheet and copy / sheet.bytes_per_s,
    }


def run(chosen: dict[str, Section], report: Report, budget: timing.Budget, started: float) -> None:
    """Every section, in turn; a device that an error left unusable ends the process for another."""
    for name, section in chosen.items():
        budget.open_section(section.limit_s)
        groups: dict[Any, list[Case]] = {}
        for case in section.cases:
            of_model = name == "models" and (case.shape["size"], case.shape["family"])
            groups.setdefault(of_model or case, []).append(case)
        for group in groups.values():
            try:
                with timing.time_limit(budget.left_s()):
                    measure = measure_models if name == "models" else measure_op
                    measure(name, group, report)
            except Exception as error:
                for case in [] if hasattr(error, "contender") else group:
                    if not any("ms" in row for row in report.of_case(name, case)):
                        report.add(name, case, "all", False, note=first_line(error))
                resume_if_unusable(error, started)
            release()


def measure_op(section: str, group: list[Case], report: Report) -> None:
    """Verdicts of all contenders at this very shape, then their times in turn."""
    from benchmarks import contenders, models

    [case] = group
    done = {row["contender"]: row for row in report.of_case(section, case)}
    if "all" in done or any("ms" in row for row in done.values()):
        return  # before this process took over
    if case.op == "model":
        error = models.parity(case, device_kind())
        report.add(section, case, "triton", True, **verdict(case, error))
        return
    problem = contenders.problem(case, DEVICE, is_check=True)
    names = [*problem.ours, *(problem.peers if case.has_peers else ())]
    is_ours = {name: name in problem.ours for name in names}
    truth = contenders.true_values(problem, case.direction)
    verdicts = {}
    for name in names:
        if name in done:
            continue
        try:
            error = contenders.relative_error(problem, name, case.direction, truth)
            verdicts[name] = verdict(case, error)
        except TimeoutError:
            raise
        except Exception as error:
            report.add(section, case, name, is_ours[name], note=first_line(error))
            if is_unusable(error):
                error.contender = name  # the others are measured in the next process
                raise
    del problem, truth
    if section == "parity":
        for name, found in verdicts.items():
            report.add(section, case, name, is_ours[name], **found)
        return
    problem = contenders.problem(case, DEVICE, is_check=False)
    calls = {name: contenders.work(problem, name, case.direction) for name in verdicts}
    memory = {name: timing.peak_bytes(call) for name, call in calls.items()}
    rows = []
    for name, samples in timing.device_ms(calls, SECONDS_A_CASE).items():
        found = speeds(samples, case.num_bytes, case.flops, report.content["machine"])
        found |= verdicts[name] | {"peak_memory_bytes": memory[name]}
        if is_ours[name] and is_broken(report.rows, case, name):
            found["parity"] = "UNVERIFIED"
        rows.append((name, found))
    made = [report.add(section, case, name, is_ours[name], **found) for name, found in rows]
    plans.judge(made)
    report.write()


def measure_models(section: str, group: list[Case], report: Report) -> None:
    from benchmarks import models

    left = [case for case in group if not report.of_case(section, case)]
    if not left:
        return
    tiny = plans.case("model", BOTH, size="tiny", family=left[0].shape["family"])
    known = [row for row in report.of_case("parity", tiny) if "error" in row]
    found = {k: known[0][k] for k in ("error", "parity")} if known else {"parity": "UNVERIFIED"}
    limits = report.content["machine"]
    for case, values in models.measured(left, device_kind()):
        if isinstance(values, Exception):
            report.add(section, case, "triton", True, note=first_line(values))
            if is_unusable(values):
                values.contender = "triton"
                raise values
            continue
        row = speeds(values["samples"], values.get("bytes"), values.get("flops"), limits)
        seconds = row["ms"] / 1e3
        if "flops" in values:
            peak = limits["sheet_flops_per_s"] or limits["matmul_flops_per_s"]
            row["mfu"] = values["flops"] / seconds / peak
        else:
            peak = limits["sheet_bytes_per_s"] or limits["copy_bytes_per_s"]
            row["mbu"] = values["bytes"] / seconds / peak
        memory = {"peak_memory_bytes": values["peak_memory_bytes"]}
        plans.judge([report.add(section, case, "triton", True, **row | memory | found)])
        report.write()


def speeds(
    samples: list[float], num_bytes: float | None, flops: float | None, limits: dict[str, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = timing.quantiles(samples)
    seconds = row["ms"] / 1e3
    if num_bytes:
        rate = num_bytes / seconds
        row |= {"bytes": num_bytes, "gb_per_s": rate / 1e9}
        row["of_copy"] = rate / limits["copy_bytes_per_s"]
    if flops:
        rate = flops / seconds
        row |= {"flops": flops, "tflop_per_s": rate / 1e12}
        row["of_matmul"] = rate / limits["matmul_flops_per_s"]
    return row


def verdict(case: Case, error: float) -> dict[str, Any]:
    is_ok = error <= TOLERANCES[case.dtype]  # false for NaN
    return {"error": error, "parity": "ok" if is_ok else "FAILED"}


def is_broken(rows: list[dict[str, Any]], case: Case, contender: str) -> bool:
    """Whether this kernel failed in this dtype, at some small shape."""
    return any(
        row["section"] == "parity" and row["op"] == case.op and row["dtype"] == case.dtype
        and row["contender"] in (contender, "all") and row["parity"] != "ok"
        for row in rows
    )  # fmt: skip


def device_kind() -> str:
    import torch

    return torch.cuda.get_device_name()


def release() -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    # Triton's compiler says first where, and last what.
    said = f"{lines[0]} {lines[-1]}" if lines[0].startswith("at ") else lines[0]
    return f"{type(error).__name__}: {said}"[:300].replace("|", "/")


def is_unusable(error: BaseException) -> bool:
    """After an illegal access every later call fails; memory that ran out is no such error."""
    text = str(error)
    of_device = "CUDA error" in text or "Triton Error [CUDA]" in text
    return of_device and "out of memory" not in text


def resume_if_unusable(error: BaseException, started: float) -> None:
    if not is_unusable(error):
        return
    at = sys.argv.index("--resume-from") if "--resume-from" in sys.argv else len(sys.argv)
    command = [sys.executable, *sys.argv[:at], "--resume-from", str(started)]
    sys.stderr.flush()
    os.execv(sys.executable, command)


def table(content: dict[str, Any]) -> Iterator[str]:
    """The result as Markdown: machine, goals between cases, and one row a contender."""
    yield "# Kernels on this device\n"
    for key, value in content["machine"].items():
        yield f"- {key}: {f'{value:.4g}' if isinstance(value, float) else value}"
    share = content["machine"]["copy_of_sheet"]
    if share is not None:
        is_met = "met" if share >= LEAST_COPY else "MISSED"
        yield f"- the copy reaches {share:.0%} of the data sheet, goal {LEAST_COPY:.0%}: {is_met}"
    yield ""
    for goal in content["goals"]:
        is_met = "met" if goal["met"] else "MISSED"
        yield f"- {goal['goal']}: {goal['value']:.3f}, at most {goal['most']:g}: {is_met}"
    yield f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    for row in content["rows"]:
        yield f"| {' | '.join(cells(row))} |"


def cells(row: dict[str, Any]) -> list[str]:
    def text(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row.get(key) is None else format(row[key] * scale, form)

    goals = ", ".join(f"{g['metric']} >= {g['least']:g}" for g in row["goals"])
    met = {True: "yes", False: "NO", None: ""}[row.get("met")]
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    spread = f"{text('p10_ms', '.3f')} - {text('p90_ms', '.3f')}" if row.get("ms") else ""
    return [
        row["op"], row["direction"], shape, row["dtype"], row["contender"],
        text("ms", ".3f") or row.get("note", "not measured"), spread,
        text("gb_per_s", ".0f"), text("of_copy", ".2f"), text("tflop_per_s", ".0f"),
        text("of_matmul", ".2f"), text("mfu", ".2f") or text("mbu", ".2f"), text("ratio", ".2f"),
        goals if row["is_ours"] else "", met, text("error", ".1e"), f"{row['tolerance']:.1e}",
        row["parity"], text("peak_memory_bytes", ".2f", 2**-30),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
