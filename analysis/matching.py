"""The matching certificate: what runs that are compared had in common, and what they had not."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import derive, settings, vocabulary


@dataclass(frozen=True)
class Match:
    """One line of the matching certificate: who is compared, what is equal, what is not."""

    suite: str
    size: str
    scope: str  # "griffin: jax, torch", "jax: griffin, hawk, mqa" or "hawk jax, gate: gru, rg_lru"
    has_both: bool  # whether anything is compared
    is_matched: bool | None  # None: one side only, or a fact that was not recorded
    differs: tuple[str, ...]
    facts: dict[str, str]
    run_ids: tuple[str, ...]


MATCHED_ACROSS_BACKENDS = ("num_params", "num_params_non_embedding", "train_flops_per_token",
                           "num_tokens", "optimizer", "data_digest", "init_digest",
                           "scan_kernels")  # fmt: skip
MATCHED_ACROSS_MODELS = ("num_tokens", "optimizer", "data_digest", "kernels_used")
FACTS = (*MATCHED_ACROSS_BACKENDS, "kernels_used")
_WHO = ("run_id", "cell_id", "suite", "size", "family", "backend", "seed", "round")
_COUNTS = ("batch_size", "seq_len", "prompt_len", "num_new_tokens", "num_steps")


def certificate(frame: pd.DataFrame) -> list[Match]:
    """What the runs compared had in common: per family across backends; per backend across
    families; and per family and backend across the values of each setting of the model that is
    ablated. Runs of one seed and round are held against each other. Backends must both scan with a
    kernel of ours, or neither; models of one backend must run the same kernels. What has one side
    alone is told where its runs are in no comparison."""
    rows, table = _completed(frame), settings.asked(frame)
    facts = {name: _Codes(rows[name]) for name in FACTS}
    comparisons = [("backend", "family", MATCHED_ACROSS_BACKENDS),
                   ("family", "backend", MATCHED_ACROSS_MODELS)]  # fmt: skip
    for name in settings.varying(frame):
        if name.startswith("model."):
            rows[name] = rows["cell_id"].map(table[name])
            comparisons.append((name, "one_model", MATCHED_ACROSS_MODELS))
    made = []
    for by, held, same in comparisons:
        rows["match"] = rows["cell_id"].map(settings.shared(table, by))
        made += _matches(rows, facts, by, held, same)
    compared = {run_id for match in made if match.has_both for run_id in match.run_ids}
    made = [match for match in made if match.has_both or not compared.issuperset(match.run_ids)]
    families = [*vocabulary.FAMILIES, *sorted(set(rows["family"]) - set(vocabulary.FAMILIES))]

    def place(match: Match) -> tuple:
        who = match.scope.split(":")[0].split(" ")[0]
        return (match.suite, match.size, families.index(who) if who in families else 99, who)

    return sorted(made, key=place)


def _completed(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a run that completed, parity aside: who it is, and its facts."""
    rows = derive.runs(frame)
    kept = {*_WHO, *_COUNTS, *FACTS, *settings.RESOLVED}
    is_done = (rows["suite"] != "parity") & (rows["outcome"] == "completed")
    rows = rows.loc[is_done, [name for name in rows if name in kept]].copy()
    batch, seq, prompt, new, steps = (rows[name].astype("float64").fillna(0) for name in _COUNTS)
    rows["num_tokens"] = batch * (seq + prompt + new) * steps.clip(lower=1)
    rows["scan_kernels"] = rows["linear_scan"].map(_kind, na_action="ignore")
    ran = rows[list(settings.RESOLVED)].astype(object)
    ran["layers"] = ran["layers"].fillna("plain")  # old records: there was no other
    used = [name + " " + ran[name] for name in ran]
    rows["kernels_used"] = used[0].str.cat(used[1:], sep=", ")
    rows["one_model"] = rows["family"].astype(str) + " " + rows["backend"].astype(str)
    return rows


def _matches(
    rows: pd.DataFrame, facts: dict[str, "_Codes"], by: str, held: str, same: tuple[str, ...]
) -> Iterator[Match]:
    """Of each suite, size and `held` the values of `by`, with what must be the same of them."""
    is_ablated = by not in ("backend", "family")
    whose, side, equal = ["suite", "size", held], _Codes(rows[by]), {n: facts[n] for n in same}
    if by == "family":
        equal["optimizer"] = _Codes(rows["optimizer"].map(settings.but_tuned, na_action="ignore"))
    points = _numbers(rows, [*whose, "match", "seed", "round"])
    together = side.differ(points)
    differing = {name: codes.differ(points) for name, codes in equal.items()}
    for group in _split(_numbers(rows, whose)):
        names = sorted(side.known(group), key=vocabulary.family_order)
        if is_ablated and len(names) < 2:
            continue
        both = group[together[group]]
        differs = [name for name, is_other in differing.items() if is_other[both].any()]
        unknown = [name for name in same if (facts[name].codes[both] < 0).any()]
        is_matched = not differs
        if not differs and (unknown or not len(both)):
            is_matched = None
            differs = [f"{name} not recorded" for name in unknown] or [f"{names[0]} only"]
        suite, size, who = (rows[name].iloc[group[0]] for name in whose)
        own = f", {by.removeprefix('model.')}" if is_ablated else ""
        yield Match(
            suite=suite,
            size=size,
            scope=f"{who}{own}: {', '.join(names)}",
            has_both=bool(len(both)),
            is_matched=is_matched,
            differs=tuple(differs),
            facts={name: _span(facts[name].known(group)) for name in FACTS},
            run_ids=tuple(rows["run_id"].iloc[group]),
        )


class _Codes:
    """A column as numbers of its values, -1 where one is missing: there are many groups."""

    def __init__(self, column: pd.Series) -> None:
        self.codes, values = pd.factorize(column)
        self.values = np.asarray(values, dtype=object)

    def known(self, rows: np.ndarray) -> list:
        """The values that these rows have."""
        codes = np.unique(self.codes[rows])
        return self.values[codes[codes >= 0]].tolist()

    def differ(self, points: np.ndarray) -> np.ndarray:
        """Of each row whether its point, a number that is -1 for none, has several values."""
        is_known = (self.codes >= 0) & (points >= 0)
        count = points.max(initial=-1) + 2
        low, high = np.full(count, len(self.values)), np.full(count, -1)
        np.minimum.at(low, points[is_known], self.codes[is_known])
        np.maximum.at(high, points[is_known], self.codes[is_known])
        return (low < high)[points]  # the last one is that of -1


def _numbers(rows: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Of the group of each row, as they come; -1 where a value is missing."""
    numbers = rows.groupby(names, sort=False, observed=True).ngroup()
    return numbers.fillna(-1).to_numpy(dtype=int)


def _split(number: np.ndarray) -> list[np.ndarray]:
    """The places of each number from 0 on."""
    order = np.argsort(number, kind="stable")
    order = order[number[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(order) else []


def _kind(variant: str) -> str:
    return "hand-written" if variant.startswith(settings.OUR_KERNELS) else "composed"


def _span(known: list) -> str:
    """The value, "low to high" of numbers, or how many different texts there are."""
    if not known:
        return "-"
    if isinstance(known[0], str):
        return known[0] if len(known) == 1 else f"{len(known)} values"
    low, high = min(known), max(known)
    return f"{int(low):,}" if low == high else f"{int(low):,} to {int(high):,}"
