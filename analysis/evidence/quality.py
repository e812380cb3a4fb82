"""Evidence on what is learned: figure 1(a), figure 5 within the training length, figure 9."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pandas as pd

from analysis import published, statistics
from analysis.evidence.groups import (
    ABOVE_ZERO,
    ANY,
    BELOW_ZERO,
    INF,
    SEED,
    Finding,
    Group,
    Key,
    Quantity,
    Region,
    any_of,
    groups,
    in_order,
    label_of,
    lack_of_size,
    lacks_of,
    rows_of,
    shape_of,
    shared_but,
)
from analysis.remember import remembered

SIZES = ("100m", "200m", "400m", "1b", "7b", "14b")  # of figure 1(a)
LENGTHS = (2048, 4096, 8192)  # of figure 9
MIN_SIZES = 3  # of figure 1(a), that "every" and "a power" may be said
R_SQUARED = (0.99, INF)
REAL, COMPLEX = "rg_lru", "cg_lru"
RESOLVED = 0.003  # nats/token: the least difference that the paper reports


def _losses(frame: pd.DataFrame, varied: Sequence[str], shared: Sequence[str]) -> list[Group]:
    rows = rows_of(frame, "language_modeling", "loss")
    return groups(rows, varied, ["kernels", "data", "recipe", *shared], SEED)


@cache
def _budgets() -> dict[str, float]:
    table = published.read("table2")
    table = table[table["metric"] == "num_tokens"]
    return dict(zip(table["size"], table["value"], strict=True))


def lacks_of_training(group: Group, keys: Sequence[Key], sizes: Sequence[str] = SIZES) -> list[str]:
    """What trained models lack of the paper's scale: size, window, tokens, first decays."""
    lacks = lacks_of(group, keys, sizes, device=None)
    for fact in (group.facts[key] for key in keys):
        budget = _budgets().get(fact["size"])
        if budget is not None and not 0.9 <= fact["num_tokens"] / budget <= 1.1:
            lacks.append(f"{fact['num_tokens']:.2g} tokens, not {budget:.2g}")
        if fact["lambda_init"] == "code":
            lacks.append("decays that start as in the released code, not as in the paper")
    return list(dict.fromkeys(lacks))


@remembered
def _by_budget(frame: pd.DataFrame) -> list[Group]:
    """The size and the tokens varied."""
    return _losses(frame, ["size", "shared_model", "num_tokens"], ["seq_len"])


def _at_scale(group: Group, *families: str) -> tuple[list[Key], list[Key]]:
    """Sizes with their tokens that all of these families have: the paper's, and the others."""
    found: tuple[list[Key], list[Key]] = [], []
    for budget in dict.fromkeys(key[1:] for key in group.columns):
        keys = [(family, *budget) for family in families]
        if group.has(*keys):
            found[bool(lacks_of_training(group, keys))].append(budget)
    return in_order(found[0]), found[1]


def _lacks_of_sizes(budgets: Sequence[Key]) -> list[str]:
    names = list(dict.fromkeys(str(size) for size, *_ in budgets))
    if len(names) >= MIN_SIZES:
        return []
    return [f"{' and '.join(names)} alone, of the {MIN_SIZES} sizes that show a trend"]


def loss_of_griffin(frame: pd.DataFrame) -> list[Finding]:
    """At the paper's budgets together; at each other one alone."""
    made = []
    for group in _by_budget(frame):
        papers, others = _at_scale(group, "griffin", "mqa")
        for budgets in ([papers] if papers else []) + [[one] for one in others]:
            keys = [(family, *budget) for budget in budgets for family in ("griffin", "mqa")]
            quantities = [
                group.difference(f"loss of Griffin less MQA's at {budget[0]}",
                                 [("griffin", *budget)], [("mqa", *budget)], BELOW_ZERO)
                for budget in budgets
            ]  # fmt: skip
            lacks = lacks_of_training(group, keys) or _lacks_of_sizes(budgets)
            made += group.finding(quantities, keys, lacks, "seed")
    return made


def gap_of_hawk(frame: pd.DataFrame) -> list[Finding]:
    """Between neighbours in size: Hawk's gap in the smaller less that in the larger."""
    made = []
    for group in _by_budget(frame):
        for small, large in pairwise(in_order(sorted({key[1:] for key in group.columns}))):
            keys = [(family, *size) for size in (small, large) for family in ("hawk", "mqa")]
            if small[0] == large[0] or not group.has(*keys):
                continue
            less = [keys[0], keys[3]], [keys[1], keys[2]]
            quantities = [
                group.difference(f"Hawk's gap at {small[0]}", keys[:1], keys[1:2], ANY),
                group.difference(f"at {large[0]}", keys[2:3], keys[3:], ANY),
                group.difference("first less second", *less, ABOVE_ZERO),
            ]
            made += group.finding(quantities, keys, lacks_of_training(group, keys), "seed")
    return made


def power_law(frame: pd.DataFrame) -> list[Finding]:
    """R2 of a line through the logarithms of loss and FLOPs, seed by seed."""
    made = []
    for group in _by_budget(frame):
        quantities, used = [], []
        for family in ("mqa", "hawk", "griffin"):
            papers, others = _at_scale(group, family)
            budgets = papers if not _lacks_of_sizes(papers) else [*papers, *others]
            keys = [(family, *budget) for budget in budgets]
            if _lacks_of_sizes(budgets) or not (losses := group.rows(keys)).size:
                continue
            flops = [
                group.facts[key]["train_flops_per_token"] * group.facts[key]["num_tokens"]
                for key in keys
            ]
            fits = [np.corrcoef(np.log(flops), np.log(row))[0, 1] ** 2 for row in losses]
            if interval := statistics.student_interval(fits):
                interval = interval[0], min(interval[1], 1.0)
            label = f"R2 of {label_of(family)} over {len(keys)} budgets"
            quantity = Quantity(label, float(np.mean(fits)), interval, R_SQUARED, unit="")
            quantities.append((quantity, len(fits)))
            used += keys
        if quantities:
            made += group.finding(quantities, used, lacks_of_training(group, used), "seed")
    return made


def windows(
    frame: pd.DataFrame, family: str, holds: Region, lengths: Sequence[int] = LENGTHS
) -> list[Finding]:
    """Loss less that of global MQA at each training length, at equal tokens."""
    made = []
    for group in _losses(frame, ["seq_len"], ["size", "shared_model", "num_tokens"]):
        if (window := group.settings["window_size"]) is None:
            continue  # it sees all keys
        found = [t for t in group.varied() if group.has((family, t), ("mqa", t))]
        if not found:
            continue
        keys = [(name, t) for t in found for name in (family, "mqa")]
        first = (
            f"loss of {label_of(family)} with a window of {int(window):,} less global MQA's, "
            f"trained at {found[0]:,}"
        )
        quantities = [
            group.difference(
                first if t == found[0] else f"at {t:,}", [(family, t)], [("mqa", t)], holds
            )
            for t in found
        ]
        lacks = lacks_of_training(group, keys, ("400m",))
        if not set(lengths) <= set(found):
            lacks.append(f"training lengths of {any_of(found)}, not {any_of(lengths)}")
        made += group.finding(quantities, keys, lacks, "seed")
    return made


def longer_training(frame: pd.DataFrame) -> list[Finding]:
    """Loss over the first quarter of the shorter training length: of models that trained on the
    longer sequences less those that did on the shorter, at equal tokens."""
    rows = rows_of(frame, "language_modeling", "loss_by_position")
    # buckets 0, 1, 2-3, 4-7, ...: each as wide as its first position, but the first two
    start = rows["at"].astype("float64")
    rows = rows.assign(start=start, weight=start.clip(lower=1))
    made = []
    for short, long in combinations(sorted(rows["seq_len"].dropna().unique()), 2):
        part = rows[rows["seq_len"].isin([short, long]) & (rows["start"] < short // 4)]
        weighted = (part["value"] * part["weight"]).groupby(part["run_id"], observed=True).sum()
        means = weighted / part["weight"].groupby(part["run_id"], observed=True).sum()
        part = part.drop_duplicates("run_id")
        part = part.assign(value=part["run_id"].map(means))
        shared = ["kernels", "data", "recipe", "size", "shared_model", "num_tokens"]
        for group in groups(part, ["seq_len"], shared, SEED):
            pairs = {family: [(family, long), (family, short)] for family in ("griffin", "hawk")}
            missing = [label_of(family) for family, pair in pairs.items() if not group.has(*pair)]
            pairs = [pair for pair in pairs.values() if group.has(*pair)]
            keys = [key for pair in pairs for key in pair]
            where = (
                f"over the first {short // 4:,} positions, trained at {long:,} less at {short:,}"
            )
            quantities = [
                group.difference(
                    f"loss of {label_of(pair[0][0])} {where}", pair[:1], pair[1:], ABOVE_ZERO
                )
                for pair in pairs
            ]
            lacks = lacks_of_training(group, keys, ("1b",))
            if missing:
                lacks.append(f"nothing of {' and '.join(missing)} at both")
            if (short, long) != (LENGTHS[0], LENGTHS[2]):
                lacks.append(f"training lengths of {short:,} and {long:,}, not 2,048 and 8,192")
            made += group.finding(quantities, keys, lacks, "seed")
    return made


def complex_gates(frame: pd.DataFrame) -> list[Finding]:
    """Loss with the CG-LRU less that with the RG-LRU."""
    rows = rows_of(frame, "language_modeling", "loss")
    shapes = [shape_of(text) for text in rows["model"]]
    lacks = [  # but for its gate a model is of a size of the paper
        lack_of_size(size, {k: v for k, v in shape.items() if k != "gate"})
        for size, shape in zip(rows["size"], shapes, strict=True)
    ]
    rows = rows.assign(
        gate=[shape.get("gate", REAL) for shape in shapes],
        lack_of_size=lacks,
        shared_model=[shared_but(text, "gate") for text in rows["model"]],
    )
    made = []
    shared = ["kernels", "data", "recipe", "size", "num_tokens", "seq_len", "shared_model"]
    for group in groups(rows[rows["gate"].isin([REAL, COMPLEX])], ["gate"], shared, SEED):
        for family in ("hawk", "griffin"):
            keys = [(family, COMPLEX), (family, REAL)]
            if group.has(*keys):
                label = f"loss of {label_of(family)} with complex gates less with real ones"
                quantity = group.difference(label, keys[:1], keys[1:], (-RESOLVED, INF))
                made += group.finding([quantity], keys, lacks_of_training(group, keys), "seed")
    return made
