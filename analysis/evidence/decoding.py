"""Evidence on decoding: latency (figure 4) and throughput (figure 1b)."""

from collections.abc import Sequence

import pandas as pd

from analysis.evidence.groups import (
    ABOVE_ONE,
    ACCELERATOR,
    ANY,
    Finding,
    Group,
    Key,
    Region,
    ends_of,
    groups,
    label_of,
    lacks_of,
    lacks_of_device,
    rows_of,
    within,
)
from analysis.remember import remembered

SIZES = ("1b",)  # of figures 1(b) and 4
BATCH_SIZE, LONG_PROMPT = 16, 4096
OUTPUTS = (128, 4096)  # new tokens, the ends of figure 4
SAMPLES = (512, 4096)  # of figure 1(b)
MIDDLE = 512  # new tokens before the curves of figure 4 cross


@remembered
def _latency(frame: pd.DataFrame) -> list[Group]:
    rows = rows_of(frame, "decode_latency", "tpot_ms")
    shared = ["size", "shared_model", "kernels", "batch_size"]
    return groups(rows, ["prompt_len", "num_new_tokens"], shared)


def _lacks_of_latency(group: Group, keys: Sequence[Key], n: int, wanted: int) -> list[str]:
    lacks = lacks_of(group, keys, SIZES)
    if group.settings["batch_size"] != BATCH_SIZE:
        lacks.append(f"batch {group.settings['batch_size']}, not {BATCH_SIZE}")
    return lacks if n == wanted else [*lacks, f"{n:,} new tokens, not {wanted:,}"]


def _outputs(group: Group, prompt_lens: Sequence[int], *families: str) -> list[int]:
    """The new tokens that all of these families have after each of these prompts."""
    found = [
        {key[2] for key in group.columns if key[:2] == (family, prompt_len)}
        for family in families
        for prompt_len in prompt_lens
    ]
    return sorted(set.intersection(*found))


def latency_ratio(frame: pd.DataFrame) -> list[Finding]:
    made = []
    for group in _latency(frame):
        prompt_len = min(group.varied())
        for family in ("hawk", "griffin"):
            if not (outputs := _outputs(group, [prompt_len], "mqa", family)):
                continue
            n = outputs[-1]
            keys = [("mqa", prompt_len, n), (family, prompt_len, n)]
            label = f"MQA's TPOT over {label_of(family)}'s, {n:,} tokens after {prompt_len:,}"
            found = group.ratio(label, keys[:1], keys[1:], ABOVE_ONE)
            lacks = _lacks_of_latency(group, keys, n, OUTPUTS[1])
            made += group.finding([found], keys, lacks)
    return made


def latency_by_prompt(frame: pd.DataFrame) -> list[Finding]:
    made = []
    for group in _latency(frame):
        short, long = min(group.varied()), max(group.varied())
        for family in ("hawk", "griffin"):
            outputs = _outputs(group, [short, long], "mqa", family)
            if short == long or not outputs:
                continue
            n = outputs[-1]
            keys = [(one, prompt, n) for prompt in (short, long) for one in ("mqa", family)]
            label = f"MQA's TPOT over {label_of(family)}'s, {n:,} tokens after {short:,}"
            quantities = [
                group.ratio(label, keys[:1], keys[1:2], ANY),
                group.ratio(f"after {long:,}", keys[2:3], keys[3:], ANY),
                group.ratio("second over first", keys[1:3], [keys[0], keys[3]], ABOVE_ONE),
            ]
            lacks = _lacks_of_latency(group, keys, n, OUTPUTS[1])
            if long != LONG_PROMPT:
                lacks.append(f"a prompt of {long:,}, not {LONG_PROMPT:,}")
            made += group.finding(quantities, keys, lacks)
    return made


def latency_growth(frame: pd.DataFrame) -> list[Finding]:
    made = []
    for group in _latency(frame):
        prompt_len = min(group.varied())
        ends = ends_of(_outputs(group, [prompt_len], "hawk", "griffin"), OUTPUTS)
        if ends is None:
            continue
        low, high, lacks = ends
        keys = [(one, prompt_len, n) for one in ("hawk", "griffin") for n in (low, high)]
        quantities = [
            group.ratio(f"TPOT of {label_of(one)} from {low:,} to {high:,} tokens",
                        [(one, prompt_len, high)], [(one, prompt_len, low)], within(1.0, 0.10))
            for one in ("hawk", "griffin")
        ]  # fmt: skip
        lacks = [*_lacks_of_latency(group, keys, OUTPUTS[1], OUTPUTS[1]), *lacks]
        made += group.finding(quantities, keys, lacks)
    return made


def latency_at_512(frame: pd.DataFrame) -> list[Finding]:
    made = []
    for group in _latency(frame):
        prompt_len = min(group.varied())
        if not (outputs := _outputs(group, [prompt_len], "mqa", "hawk")):
            continue
        n = MIDDLE if MIDDLE in outputs else outputs[0]
        keys = [("mqa", prompt_len, n), ("hawk", prompt_len, n)]
        label = f"MQA's TPOT over Hawk's, {n:,} tokens after {prompt_len:,}"
        found = group.ratio(label, keys[:1], keys[1:], within(1.0, 0.10))
        made += group.finding([found], keys, _lacks_of_latency(group, keys, n, MIDDLE))
    return made


@remembered
def _throughput(frame: pd.DataFrame) -> list[Group]:
    """The best batch of each process, and what ended its search."""
    rows = rows_of(frame, "decode_throughput", "tokens_per_s")
    best = rows.groupby("run_id", sort=False, observed=True)["value"].transform("max")
    rows = rows[rows["value"] == best].drop_duplicates("run_id")
    searched = rows_of(frame, "decode_throughput", "max_batch_size")
    ended_by = dict(zip(searched["run_id"], searched["field"], strict=True))
    rows = rows.assign(ended_by=rows["run_id"].map(ended_by))
    shared = ["size", "shared_model", "kernels", "prompt_len"]
    return groups(rows, ["num_new_tokens"], shared)


def _lacks_of_throughput(
    group: Group, keys: Sequence[Key], is_recurrentgemma: bool = False
) -> list[str]:
    if is_recurrentgemma:
        lacks = lacks_of_device(group.settings["device_kind"], ACCELERATOR)
    else:
        lacks = lacks_of(group, keys, SIZES)
    if any(group.facts[key]["ended_by"] == "bound" for key in keys):
        lacks.append("the search ended at max_batch_size, not at memory")
    return lacks


def throughput_growth(frame: pd.DataFrame, *, is_recurrentgemma: bool = False) -> list[Finding]:
    families = ("griffin",) if is_recurrentgemma else ("hawk", "griffin")
    made = []
    for group in _throughput(frame):
        if (group.settings["size"] == "recurrentgemma_2b") != is_recurrentgemma:
            continue
        lengths = set.intersection(*(set(group.varied(family=one)) for one in families))
        if (ends := ends_of(lengths, SAMPLES)) is None:
            continue
        low, high, lacks = ends
        keys = [(one, n) for one in families for n in (low, high)]
        quantities = [
            group.ratio(f"tokens/s of {label_of(one)} from {low:,} to {high:,} tokens",
                        [(one, high)], [(one, low)], within(1.0, 0.05))
            for one in families
        ]  # fmt: skip
        lacks = [*_lacks_of_throughput(group, keys, is_recurrentgemma), *lacks]
        made += group.finding(quantities, keys, lacks)
    return made


def throughput_of_mqa(frame: pd.DataFrame) -> list[Finding]:
    made = []
    for group in _throughput(frame):
        if (ends := ends_of(group.varied(family="mqa"), SAMPLES)) is None:
            continue
        low, high, lacks = ends
        keys = [("mqa", low), ("mqa", high)]
        label = f"tokens/s of MQA at {low:,} over {high:,} tokens"
        found = group.ratio(label, keys[:1], keys[1:], ABOVE_ONE)
        made += group.finding([found], keys, [*_lacks_of_throughput(group, keys), *lacks])
    return made


def throughput_ratio(frame: pd.DataFrame, ours: str, other: str, holds: Region) -> list[Finding]:
    made = []
    for group in _throughput(frame):
        lengths = set(group.varied(family=ours)) & set(group.varied(family=other))
        if not lengths:
            continue
        n = SAMPLES[1] if SAMPLES[1] in lengths else max(lengths)
        keys = [(ours, n), (other, n)]
        lacks = _lacks_of_throughput(group, keys)
        lacks += [] if n == SAMPLES[1] else [f"{n:,} new tokens, not {SAMPLES[1]:,}"]
        label = f"tokens/s of {label_of(ours)} over {label_of(other)}'s at {n:,} tokens"
        made += group.finding([group.ratio(label, keys[:1], keys[1:], holds)], keys, lacks)
    return made
