"""Evidence on length: figures 5 and 10, beyond the training length, by the mean loss so far."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.evidence.groups import (
    BELOW_ZERO,
    INF,
    SEED,
    Finding,
    Group,
    Key,
    any_of,
    groups,
    label_of,
    rows_of,
    shape_of,
    shared_but,
)
from analysis.evidence.quality import lacks_of_training
from analysis.remember import remembered

SIZE = "1b"  # of figure 5
SHORT, LONG = 2048, 8192  # its training lengths
GAINS, FAILS = 4, 2  # how many training lengths on
LOST = 0.3  # nats/token more, that all counts as lost
RECURRENT = ("griffin", "hawk")
ENCODINGS = ("RoPE", "no positions")


@remembered
def _rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean loss up to each position, of runs that trained at one length; `reach`: the last."""
    rows = rows_of(frame, "length_extrapolation", "loss_up_to")
    rows = rows.assign(at=rows["at"].astype("Int64").astype(object))
    return rows.assign(reach=rows.groupby("run_id", observed=True)["at"].transform("max"))


_SHARED = ("kernels", "data", "recipe", "size", "num_tokens", "reach")


def _lacks(group: Group, keys: Sequence[Key], trained: Sequence[int]) -> list[str]:
    lacks = lacks_of_training(group, keys, (SIZE,))
    wanted = (SHORT, LONG)[: len(trained)]
    if tuple(trained) != wanted:
        found, asked = (" and ".join(f"{n:,}" for n in each) for each in (trained, wanted))
        lacks.append(f"trained at {found} tokens, not {asked}")
    return lacks


def extrapolation(frame: pd.DataFrame) -> list[Finding]:
    """Mean loss up to 4 training lengths less that up to one."""
    made = []
    for group in groups(_rows(frame), ["at"], [*_SHARED, "shared_model", "seq_len"], SEED):
        trained = int(group.settings["seq_len"])
        pairs = {name: [(name, GAINS * trained), (name, trained)] for name in RECURRENT}
        found = {name: pair for name, pair in pairs.items() if group.has(*pair)}
        if not found:
            continue
        keys = [key for pair in found.values() for key in pair]
        quantities = [
            group.difference(
                f"mean loss of {label_of(name)} up to {GAINS * trained:,} less up to {trained:,}",
                pair[:1], pair[1:], BELOW_ZERO,
            )
            for name, pair in found.items()
        ]  # fmt: skip
        lacks = _lacks(group, keys, [trained])
        if len(found) < len(RECURRENT):
            lacks.append(f"{any_of([label_of(name) for name in found])} alone")
        made += group.finding(quantities, keys, lacks, "seed")
    return made


def failure_of_attention(frame: pd.DataFrame) -> list[Finding]:
    """MQA's mean loss up to 2 training lengths less that up to one, with RoPE and without."""
    rows = _rows(frame)
    shapes = [shape_of(text) for text in rows["model"]]
    is_bare = np.array([shape.get("rope_fraction", 1.0) == 0 for shape in shapes], dtype=bool)
    encoding = np.array(ENCODINGS, dtype=object)[is_bare.astype(int)]
    others = [shared_but(text, "rope_fraction") for text in rows["model"]]
    rows = rows.assign(encoding=encoding, shared_model=others)
    made = []
    for group in groups(rows[rows["family"] == "mqa"], ["encoding", "at"],
                        [*_SHARED, "shared_model", "seq_len"], SEED):  # fmt: skip
        trained = int(group.settings["seq_len"])
        pairs = {name: [("mqa", name, FAILS * trained), ("mqa", name, trained)]
                 for name in ENCODINGS}  # fmt: skip
        found = {name: pair for name, pair in pairs.items() if group.has(*pair)}
        if not found:
            continue
        keys = [key for pair in found.values() for key in pair]
        quantities = [
            group.difference(
                f"mean loss of MQA ({name}) up to {FAILS * trained:,} less up to {trained:,}",
                pair[:1], pair[1:], (LOST, INF),
            )
            for name, pair in found.items()
        ]  # fmt: skip
        lacks = _lacks(group, keys, [trained])
        lacks += [f"nothing of MQA with {name}" for name in ENCODINGS if name not in found]
        made += group.finding(quantities, keys, lacks, "seed")
    return made


def gain_of_longer_training(frame: pd.DataFrame) -> list[Finding]:
    """Mean loss after training on longer sequences less that after shorter ones, at equal tokens:
    Griffin's up to the longer length, and both families' up to twice that."""
    rows = _rows(frame)
    made = []
    for short, long in combinations(sorted(rows["seq_len"].dropna().astype(int).unique()), 2):
        part = rows[rows["seq_len"].isin([short, long])]
        for group in groups(part, ["seq_len", "at"], [*_SHARED, "shared_model"], SEED):
            wanted = [("griffin", long), ("griffin", 2 * long), ("hawk", 2 * long)]
            pairs = [[(name, long, at), (name, short, at)] for name, at in wanted]
            found = [pair for pair in pairs if group.has(*pair)]
            if not found:
                continue
            keys = [key for pair in found for key in pair]
            quantities = [
                group.difference(
                    f"mean loss of {label_of(plus[0])} up to {plus[2]:,}, trained at {long:,} less "
                    f"at {short:,}",
                    [plus], [minus], BELOW_ZERO,
                )
                for plus, minus in found
            ]  # fmt: skip
            lacks = _lacks(group, keys, [short, long])
            if len(found) < len(wanted):
                lacks.append(f"{len(found)} of {len(wanted)} differences")
            made += group.finding(quantities, keys, lacks, "seed")
    return made
