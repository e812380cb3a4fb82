"""Evidence on the speed of training and of the scan: figures 3 and 8, appendix D."""

from collections.abc import Sequence
from itertools import pairwise, product

import pandas as pd

from analysis import derive, published
from analysis.evidence.groups import (
    ABOVE_ONE,
    ACCELERATOR,
    ANY,
    TPU,
    Finding,
    Group,
    Quantity,
    Region,
    any_of,
    ends_of,
    groups,
    in_order,
    lacks_of,
    lacks_of_device,
    rows_of,
    shape_of,
    where,
)
from analysis.remember import remembered

SIZES = ("400m", "1b", "7b")  # of figures 3 and 8(b)
LENGTHS = (2048, 8192)  # the ends of figure 3
LENGTHS_OF_SCANS = (1024, 2048, 4096, 8192, 16384)
HAND_WRITTEN = ("pallas_tpu", "pallas_gpu", "triton", "triton_split")


@remembered
def _steps(frame: pd.DataFrame) -> list[Group]:
    """Steps of equal tokens, the length varied."""
    rows = rows_of(frame, "training_speed", "step_time_ms")
    return groups(rows, ["seq_len"], ["size", "shared_model", "kernels", "num_tokens"])


def _steps_by_size(frame: pd.DataFrame) -> list[Group]:
    """The size and the length varied. Tokens a step may differ: growth is a ratio within a size."""
    rows = rows_of(frame, "training_speed", "step_time_ms")
    rows = rows[rows["lack_of_size"].isna()]
    return groups(rows, ["size", "shared_model", "num_tokens", "seq_len"], ["kernels"])


@remembered
def _steps_by_scan(frame: pd.DataFrame) -> list[Group]:
    rows = rows_of(frame, "training_speed", "step_time_ms")
    rows = rows[rows["family"] == "hawk"]
    shared = ["size", "shared_model", "other_kernels", "num_tokens"]
    return groups(rows, ["linear_scan", "seq_len"], shared)


@remembered
def _scans(frame: pd.DataFrame) -> list[Group]:
    rows = rows_of(frame, "kernel_speed", "op_time_ms")
    rows = rows[(rows["op"] == "linear_scan") & (rows["work_phase"] == "evaluate")]
    return groups(rows, ["linear_scan", "seq_len"], ["shared_model", "other_kernels", "batch_size"])


def step_growth(
    frame: pd.DataFrame,
    *,
    shape: Region | None = None,
    griffin: Region = ANY,
    mqa: Region = ANY,
    sizes: Sequence[str] = SIZES,
) -> list[Finding]:
    made = []
    for group in _steps(frame):
        both = set(group.varied(family="mqa")) & set(group.varied(family="griffin"))
        if (ends := ends_of(both, LENGTHS)) is None:
            continue
        low, high, lacks = ends
        keys = [("mqa", low), ("mqa", high), ("griffin", low), ("griffin", high)]
        quantities = [
            group.ratio(f"MQA's step from {low:,} to {high:,} tokens", keys[1:2], keys[:1], mqa),
            group.ratio("Griffin's", keys[3:], keys[2:3], griffin),
        ]
        if shape is not None:
            label = "MQA's growth over Griffin's"
            quantities.append(group.ratio(label, keys[1:3], [keys[0], keys[3]], shape))
        made += group.finding(quantities, keys, [*lacks_of(group, keys, sizes), *lacks])
    return made


def step_ratio(frame: pd.DataFrame) -> list[Finding]:
    made = []
    for group in _steps(frame):
        lengths = set(group.varied(family="griffin")) & set(group.varied(family="mqa"))
        if not lengths:
            continue
        n = LENGTHS[1] if LENGTHS[1] in lengths else max(lengths)
        keys = [("griffin", n), ("mqa", n)]
        lacks = lacks_of(group, keys, SIZES)
        lacks += [] if n == LENGTHS[1] else [f"{n:,} tokens, not {LENGTHS[1]:,}"]
        label = f"Griffin's step over MQA's at {n:,} tokens"
        found = group.ratio(label, keys[:1], keys[1:], (0.0, 1.0))
        made += group.finding([found], keys, lacks)
    return made


def step_growth_by_size(frame: pd.DataFrame) -> list[Finding]:
    """Between neighbours in size: MQA's growth in the smaller over that in the larger."""
    made = []
    for group in _steps_by_size(frame):
        lengths: dict[tuple, set[int]] = {}
        for family, *size, length in group.columns:
            if family == "mqa":
                lengths.setdefault(tuple(size), set()).add(length)
        for small, large in pairwise(in_order(lengths)):
            ends = ends_of(lengths[small] & lengths[large], LENGTHS)
            if ends is None or small[0] == large[0]:
                continue
            low, high, lacks = ends
            keys = [("mqa", *size, length) for size in (small, large) for length in (low, high)]
            over = f"from {low:,} to {high:,} tokens"
            quantities = [
                group.ratio(f"MQA's step {over} at {small[0]}", keys[1:2], keys[:1], ANY),
                group.ratio(f"at {large[0]}", keys[3:], keys[2:3], ANY),
                group.ratio("first over second", keys[1:3], [keys[0], keys[3]], ABOVE_ONE),
            ]
            made += group.finding(quantities, keys, [*lacks_of(group, keys, SIZES), *lacks])
    return made


def scan_in_step(frame: pd.DataFrame, variant: str, holds: Region) -> list[Finding]:
    """Hawk's step with a variant of the scan over that with the native loop, of a TPU. Other
    devices' own kernels are told in the place of a TPU's."""
    own = HAND_WRITTEN if variant in HAND_WRITTEN else (variant,)
    made = []
    for group in _steps_by_scan(frame):
        for name, length in product(own, group.varied(2)):
            keys = [("hawk", name, length), ("hawk", "sequential", length)]
            if group.has(*keys):
                label = f"Hawk's step with {name} over sequential at {length:,} tokens"
                found = group.ratio(label, keys[:1], keys[1:], holds)
                made += group.finding([found], keys, lacks_of(group, keys, SIZES, TPU))
    return made


def scans(
    frame: pd.DataFrame, slow: str, fast: str | None, holds: Region, device: str
) -> list[Finding]:
    """The time of one variant of the scan over that of another, at every length that both have;
    fast=None stands for each hand-written kernel."""
    made = []
    for group in _scans(frame):
        names = (fast,) if fast else HAND_WRITTEN
        for family, name in product(sorted({key[0] for key in group.columns}), names):
            lengths = [
                t for t in group.varied(2) if group.has((family, slow, t), (family, name, t))
            ]
            if not lengths:
                continue
            keys = [(family, one, t) for t in lengths for one in (slow, name)]
            lacks = lacks_of_device(group.settings["device_kind"], device)
            if not set(LENGTHS_OF_SCANS) <= set(lengths):
                lacks.append(f"{any_of(lengths)} steps, not {any_of(LENGTHS_OF_SCANS)}")
            shape = (group.settings["batch_size"], group.facts[keys[0]]["d_rnn"])
            if shape != (8, 1024):
                lacks.append(f"batch {shape[0]} of d_rnn {shape[1]}, not 8 of 1024")
            first = f"{slow} over {name} at {lengths[0]:,} steps"
            quantities = [
                group.ratio(first if t == lengths[0] else f"at {t:,}", keys[place : place + 1],
                            keys[place + 1 : place + 2], holds)
                for place, t in zip(range(0, len(keys), 2), lengths, strict=True)
            ]  # fmt: skip
            made += group.finding(quantities, keys, lacks)
    return made


def scan_intensity(frame: pd.DataFrame) -> list[Finding]:
    """FLOPs a byte of equation 4, by the bytes that it must move, over the device's ridge."""
    rows = derive.processes(frame)
    rows = rows[
        (rows["suite"] == "kernel_speed")
        & (rows["op"] == "rg_lru")
        & (rows["work_phase"] == "evaluate")
        & rows["metric"].isin(["op_bytes", "peak_flops_per_s", "peak_bytes_per_s"])
    ]
    flops = published.read("table3").set_index("metric")["value"]["flops_per_element"]
    key = ["backend", "dtype", "device_kind", "device_name"]
    made = []
    for settings, part in rows.groupby(key, sort=False, dropna=False, observed=True):
        values = part.pivot_table(
            index="run_id", columns="metric", values="value", observed=True
        ).dropna()
        if values.shape[1] < 3 or values.empty:
            continue
        runs = part.drop_duplicates("run_id").set_index("run_id").loc[values.index]
        d_rnn = runs["model"].map(lambda text: shape_of(text)["d_rnn"]).astype(float)
        elements = runs["batch_size"].astype(float) * runs["seq_len"].astype(float) * d_rnn
        intensity = float((flops * elements / values["op_bytes"]).median())
        ridge = float((values["peak_flops_per_s"] / values["peak_bytes_per_s"]).median())
        share = intensity / ridge
        label = f"{intensity:.2f} FLOP a byte over a ridge of {ridge:.1f}"
        made.append(
            Finding(
                where=where(dict(zip(key, settings, strict=True))),
                quantities=(Quantity(label, share, (share, share), (0.0, 1.0)),),
                lacks=tuple(lacks_of_device(settings[2], ACCELERATOR)),
                run_ids=tuple(values.index),
            )
        )
    return made
