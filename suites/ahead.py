"""aerie compile: a row a phase, with what the compiler says beside our own model of the cost.

Exit codes as in suites/commands.py; a phase that does not compile, or does not fit, is 1.
"""

import json
from pathlib import Path
from typing import Any

from suites import compose, display
from suites.commands import counted, exit_code, one_line, run_pending
from suites.harness import plan
from suites.harness.measure import find_device
from suites.harness.plan import Planned

BARE = ("suite=compile", "dtype=bfloat16")
MEASURED = ("peak_memory_bytes", "collectives", "aot_compile_time_s", "bound_ms")
OF_KERNELS = ("num_bundles", "num_spills")
HEADER = ["phase", "status", "peak memory", "predicted", "collectives", "compile s", "model FLOPs",
          "model bytes", "bound by bytes", "bundles", "spills"]  # fmt: skip


def compile_(overrides: list[str], store: Path, *, as_json: bool = False) -> int:
    """Compiles what the present code has not compiled yet, each phase in a process of its own."""
    with one_line():
        overrides = [_placed(text) for text in overrides if text != "suite=compile"]
        typed = compose.parse(overrides)
        if "suite" in typed or "experiment" in typed:
            raise ValueError("aerie compile runs suite=compile; for others use aerie run.")
        request = compose.read(overrides, bare=BARE)
        runs = [run for settings in request.settings for run in plan.expand(settings)]
        planned = plan.plan(store, runs)
    request = compose.Request("compile", request.clusters, [], command="compile")
    # all that is stale, and what others of the same kind did not fit: a compiler says why
    result, planned = run_pending(request, planned, store, overrides, True, True)
    rows = [row(item, counted(store, item)) for item in planned]
    if as_json:
        for one in rows:
            print(json.dumps(one, allow_nan=False))
    else:
        _print(rows)
    return exit_code(planned, result)


def _placed(text: str) -> str:
    """`topology` may be typed as a setting of its own."""
    return f"suite.{text}" if text.startswith("topology=") else text


def row(item: Planned, record: dict[str, Any] | None) -> dict[str, Any]:
    """One phase; what was not found is null. Bundles and spills are those of all kernels."""
    run, work = item.run, item.run.workload
    found = record or {"outcome": "not run", "reason": None, "samples": (), "provenance": {}}
    samples = found["samples"]
    kernels: dict[str, dict[str, int]] = {}
    for sample in samples:
        if sample["metric"] in OF_KERNELS:
            kernels.setdefault(sample["field"], {})[sample["metric"]] = int(sample["value"])
    resolved = found["provenance"].get("resolved_kernels") or {}
    return {
        "run_id": run.run_id,
        "family": run.model.family,
        "size": run.model.size,
        "dtype": run.dtype,
        "topology": work.topology,
        "device_name": found["provenance"].get("device_name"),
        "phase": work.phase,
        "batch_size": work.batch_size,
        "seq_len": work.seq_len or None,
        "prompt_len": work.prompt_len or None,
        "num_new_tokens": work.num_new_tokens or None,
        "linear_scan": resolved.get("linear_scan"),
        "attention": resolved.get("attention"),
        "layers": resolved.get("layers"),
        "status": found["outcome"],
        "reason": found["reason"],
        **{name: _value(samples, name) for name in MEASURED},
        **{
            name: sum(code[name] for code in kernels.values()) if kernels else None
            for name in OF_KERNELS
        },
        "kernels": kernels,
        **{name: item.costs[name] for name in ("model_flops", "model_bytes")},
        "predicted_peak_memory_bytes": item.costs["predicted_peak_memory_bytes"],
    }


def _value(samples: list[dict[str, Any]], metric: str) -> float | int | None:
    """The first sample: of collectives the sum of all kinds. Counts are whole."""
    value = next((sample["value"] for sample in samples if sample["metric"] == metric), None)
    return int(value) if value is not None and value == int(value) else value


def _print(rows: list[dict[str, Any]]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(_title(one), []).append(one)
    for title, members in groups.items():
        display.print_table(HEADER, map(_cells, members), title=title)
    for one in rows:
        if one["reason"]:
            print(f"{one['phase']} on {one['topology']}: {one['status']}: {one['reason']}")


def _title(one: dict[str, Any]) -> str:
    title = f"{one['family']}_{one['size']}, {one['dtype']}, one device of {one['topology']}"
    device = find_device(one["device_name"] or "")
    memory = f", {display.size(device.memory_bytes)}" if device else ""
    return f"{title}{memory}"


def _cells(one: dict[str, Any]) -> list[str]:
    seconds, bound = one["aot_compile_time_s"], one["bound_ms"]
    return [
        _work(one),
        one["status"],
        display.size(one["peak_memory_bytes"]),
        display.size(one["predicted_peak_memory_bytes"]),
        display.number(one["collectives"]),
        display.NONE if seconds is None else f"{seconds:.1f}",
        f"{one['model_flops']:.3g}",
        display.size(one["model_bytes"]),
        display.NONE if bound is None else f"{bound:.3g} ms",
        display.number(one["num_bundles"]),
        display.number(one["num_spills"]),
    ]


def _work(one: dict[str, Any]) -> str:
    lengths = f"{one['seq_len']}" if one["seq_len"] else f"{one['prompt_len']}"
    if one["phase"] == "decode":
        lengths += f" + {one['num_new_tokens']}"
    return f"{one['phase']} {one['batch_size']} x {lengths}"
