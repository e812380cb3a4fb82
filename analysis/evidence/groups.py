"""What our records say of a claim: quantities with intervals, grouped by the settings they share.

A quantity is a ratio of times, taken within a round of one block on one node, or a difference of
losses, taken within a seed, and the interval over rounds or seeds. Where workloads differ, blocks
do: a growth over lengths or sizes is unpaired and told without a verdict, but a ratio of two
growths is one of paired ratios, each of one workload, and is judged.

A finding is what one group of settings (backend, dtype, device, size, ...) says; it names what it
lacks of the paper's scale. Families with another pattern than the paper's are no evidence.
"""

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from analysis import checks, derive, published, statistics, style
from analysis.remember import remembered
from analysis.settings import but_tuned

RATIO, NATS = "x", "nats/token"
# what makes two processes a pair
ROUND, SEED = ("node", "device_name", "seed", "round", "block"), ("seed",)
OTHER_NODE, OTHER_BLOCK = "no round of all on one node", "not of one block"  # what makes them none
INF = float("inf")
ABOVE_ONE, ABOVE_ZERO, BELOW_ZERO = (1.0, INF), (0.0, INF), (-INF, 0.0)
ANY = (-INF, INF)  # a number that is told and not judged
ACCELERATOR, TPU = "accelerator", "tpu"  # what a claim about speed is about
TPUS = ("v4", "v5e", "v5p", "v6e")
PATTERNS = {"mqa": ["mqa"], "mqa_local": ["mqa"], "hawk": ["rg_lru"],
            "griffin": ["rg_lru", "rg_lru", "mqa"]}  # fmt: skip
WINDOW = 1024
# what is asked of the processes of a group, beyond what they share
FACTS = ("family", "window_size", "attention", "value", "parity", "run_id", "lack_of_size", "size",
         "d_rnn", "lambda_init", "num_tokens", "train_flops_per_token", "ended_by")  # fmt: skip
PAPER = {"num_gate_blocks": 16, "conv_width": 4, "gate": "rg_lru", "num_kv_heads": 1}
WIDTHS = ("d_model", "d_rnn", "num_layers", "num_heads")

Region = tuple[float, float]
Key = tuple[Hashable, ...]


def within(value: float, share: float) -> Region:
    return value / (1 + share), value * (1 + share)


@dataclass(frozen=True)
class Quantity:
    label: str
    value: float
    interval: Region | None  # None: unknown; of an exact value both its ends
    holds: Region  # where the claim says that it lies
    unit: str = RATIO
    unpaired: str = ""  # why a ratio is of medians alone

    @property
    def does_hold(self) -> bool | None:
        """None where the interval, or its absence, leaves it open."""
        if self.holds == ANY:
            return True
        if self.interval is None:
            return None
        low, high = self.interval
        if self.holds[0] <= low and high <= self.holds[1]:
            return True
        return False if high < self.holds[0] or low > self.holds[1] else None

    def number(self) -> str:
        form = "{:+.4f}" if self.unit == NATS else "{:.3g}"
        text = form.format(self.value) + ("x" if self.unit == RATIO else "")
        if self.interval is not None and self.interval[0] < self.interval[1]:
            text += f" [{', '.join(form.format(edge) for edge in self.interval)}]"
        text += " unpaired" if self.unpaired else ""
        return f"{text} {NATS}" if self.unit == NATS else text


@dataclass(frozen=True)
class Finding:
    """What one group of settings says of a claim."""

    where: str
    quantities: tuple[Quantity, ...]
    lacks: tuple[str, ...] = ()  # of the paper's scale
    count: int = 0  # rounds or seeds, of the judged quantity that has fewest
    unit: str | None = None  # "round" or "seed"; None: exact, nothing is counted
    is_verified: bool = True
    run_ids: tuple[str, ...] = ()

    @property
    def least(self) -> int:
        return {"round": statistics.MIN_ROUNDS, "seed": statistics.MIN_SEEDS, None: 0}[self.unit]

    @property
    def holds(self) -> bool | None:
        """False as soon as one quantity lies elsewhere; None while one is open."""
        found = [quantity.does_hold for quantity in self.quantities]
        return False if False in found else None if None in found else True

    @property
    def is_evidence(self) -> bool:
        return not self.shortcomings()

    def shortcomings(self) -> list[str]:
        made = list(self.lacks)
        judged = [quantity for quantity in self.quantities if quantity.holds != ANY]
        unpaired = dict.fromkeys(f"unpaired: {one.unpaired}" for one in judged if one.unpaired)
        made += unpaired
        if self.unit == "seed" and not self.count:
            made.append("no seed that all have")
        elif not unpaired and self.count < self.least:
            made.append(f"{_count(self.count, self.unit)} of {self.least}")
        if not self.is_verified:
            made.append(checks.UNVERIFIED)
        if self.holds is None and self.count >= self.least:
            made.append("not resolved: the interval holds both")
        return made

    def numbers(self) -> str:
        return "; ".join(f"{one.label}: {one.number()}" for one in self.quantities)

    def text(self) -> str:
        counted = f" ({_count(self.count, self.unit)})" if self.unit else ""
        return f"{self.where}{counted}: {self.numbers()}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


# Groups of processes ----------------------------------------------------------------------------


@dataclass
class Group:
    """The processes of one group of settings: a column for each key (the family, then what is
    varied), a row for each place in ROUND or SEED. Plain values: there may be thousands of
    groups."""

    settings: dict[str, Any]
    columns: dict[Key, dict[Key, float]] = field(default_factory=dict)
    verified: dict[Key, bool] = field(default_factory=dict)
    ids: dict[Key, tuple[str, ...]] = field(default_factory=dict)
    facts: dict[Key, dict[str, Any]] = field(default_factory=dict)  # one process of each column

    def has(self, *keys: Key) -> bool:
        return all(key in self.columns for key in keys)

    def varied(self, place: int = 1, family: str | None = None) -> list[Any]:
        """What is there at one place of the keys (of a family), in order."""
        return sorted({key[place] for key in self.columns if family in (None, key[0])})

    def rows(self, keys: Sequence[Key]) -> np.ndarray:
        """The values of these columns in the rows that all have."""
        shared = [row for row in self.columns[keys[0]]
                  if all(row in self.columns[key] for key in keys)]  # fmt: skip
        return np.array([[self.columns[key][row] for key in keys] for row in shared], ndmin=2)

    def ratio(
        self, label: str, over: Sequence[Key], under: Sequence[Key], holds: Region
    ) -> tuple[Quantity, int]:
        """The product of some columns over that of others, round by round, each of these over one
        of those of its block; and how many rounds."""
        pairings = [list(zip(over, order, strict=True)) for order in permutations(under)]
        rounds = max(map(self._rounds, pairings), key=len)
        if not rounds:  # the bare ratio of medians
            top, bottom = (np.prod([self._typical(key) for key in keys]) for keys in (over, under))
            nodes = [{row[:-1] for row in self.columns[key]} for key in (*over, *under)]
            why = OTHER_BLOCK if set.intersection(*nodes) else OTHER_NODE
            return Quantity(label, float(top / bottom), None, holds, unpaired=why), 0
        found = statistics.compare(np.ones(len(rounds)), rounds)
        value = float("nan") if found.speedup is None else found.speedup
        return Quantity(label, value, found.interval, holds), len(rounds)

    def _rounds(self, pairs: Sequence[tuple[Key, Key]]) -> list[float]:
        """The product of these ratios in each round of a node that has all: each is of one block,
        two of them may be of two."""
        ratios = []
        for above, below in pairs:
            found: dict[Key, list[float]] = {}
            for row, value in self.columns[above].items():
                if None not in row and (other := self.columns[below].get(row)) is not None:
                    ratio = value / other if other > 0 else 0.0  # of which compare makes nothing
                    found.setdefault(row[:-1], []).append(ratio)
            ratios.append({row: _median(values) for row, values in found.items()})
        first, *others = ratios
        return [
            float(np.prod([one[row] for one in ratios]))
            for row in first
            if all(row in other for other in others)
        ]

    def difference(
        self, label: str, plus: Sequence[Key], minus: Sequence[Key], holds: Region
    ) -> tuple[Quantity, int]:
        rows = self.rows([*plus, *minus])
        if not rows.size:
            value = sum(map(self._typical, plus)) - sum(map(self._typical, minus))
            return Quantity(label, float(value), None, holds, NATS), 0
        found = rows[:, : len(plus)].sum(axis=1) - rows[:, len(plus) :].sum(axis=1)
        interval = statistics.student_interval(found)
        return Quantity(label, float(found.mean()), interval, holds, NATS), len(rows)

    def _typical(self, key: Key) -> float:
        return _median(self.columns[key].values())

    def finding(
        self,
        made: Sequence[tuple[Quantity, int]],
        keys: Sequence[Key],
        lacks: Sequence[str],
        unit: str = "round",
    ) -> Iterator[Finding]:
        """One finding, or none where nothing was found."""
        if made:
            ids = dict.fromkeys(run_id for key in keys for run_id in self.ids[key])
            # a quantity that is told alone needs no rounds
            judged = [count for quantity, count in made if quantity.holds != ANY]
            yield Finding(
                where=where(self.settings),
                quantities=tuple(quantity for quantity, _ in made),
                lacks=tuple(dict.fromkeys(lacks)),
                count=min(judged),
                unit=unit,
                is_verified=all(self.verified[key] for key in keys),
                run_ids=tuple(ids),
            )


def _median(values: Iterable[float]) -> float:
    """Of few values, where NumPy would take ten times as long."""
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(low + high) / 2


@remembered
def rows_of(frame: pd.DataFrame, suite: str, metric: str) -> pd.DataFrame:
    """Processes of one suite and metric, of the paper's patterns, and what their settings say:
    `shared_model` (what families share), `other_kernels` (all but the scan), `recipe` (of the
    optimizer, without its length and what each family was tuned to), `num_tokens` of a step or of
    the training, `lack_of_size`."""
    rows = derive.processes(frame)
    rows = rows[(rows["suite"] == suite) & (rows["metric"] == metric)]
    told = ["family", "size", "model", "kernels", "optimizer"]  # which few differ in
    number = rows.groupby(told, dropna=False, sort=False, observed=True).ngroup()
    first = rows.loc[~number.duplicated(), told]
    models = [shape_of(text) for text in first["model"]]
    is_kept = [
        model["pattern"] == PATTERNS.get(family)
        for model, family in zip(models, first["family"], strict=True)
    ]
    made = {
        "shared_model": [model["shared_model"] for model in models],
        "d_rnn": [model.get("d_rnn") for model in models],
        "lambda_init": [model.get("lambda_init") for model in models],
        "lack_of_size": list(map(lack_of_size, first["size"], models)),
        "other_kernels": [_without_scan(text) for text in first["kernels"]],
        "recipe": [_recipe(text) for text in first["optimizer"]],
    }
    made = {name: pd.Series(values, dtype=object)[number].array for name, values in made.items()}
    num_steps = rows["num_steps"].astype("float64").fillna(1)
    tokens = num_steps * rows["batch_size"].astype(float) * rows["seq_len"].astype(float)
    made["num_tokens"] = tokens.astype(object)
    return rows.assign(**made)[np.array(is_kept, dtype=bool)[number]]


@cache
def shape_of(text: str) -> dict[str, Any]:
    """A model's settings; `shared_model` is what its families share."""
    model = json.loads(text)
    shared = {k: v for k, v in model.items() if k not in ("pattern", "window_size")}
    return model | {"shared_model": json.dumps(shared, sort_keys=True)}


@cache
def shared_but(text: str, setting: str) -> str:
    """What families share of a model's settings, but for one."""
    shared = json.loads(shape_of(text)["shared_model"])
    return json.dumps({k: v for k, v in shared.items() if k != setting}, sort_keys=True)


@cache
def _without_scan(text: str) -> str:
    kernels = json.loads(text)
    return json.dumps({k: v for k, v in kernels.items() if k != "linear_scan"}, sort_keys=True)


@cache
def _recipe(text: str | None) -> str:
    """The optimizer, without the schedule that ends with its run, and the rate and decay that each
    family was tuned to."""
    return but_tuned(re.sub(r"num_(warmup_)?steps=\w+,? ?", "", text or ""))


@cache
def widths() -> dict[str, dict[str, float]]:
    """Of table 2, by size, the smallest first."""
    table = published.read("table2")
    table = table[table["metric"].isin(WIDTHS)]
    return {
        size: dict(zip(rows["metric"], rows["value"], strict=True))
        for size, rows in table.groupby("size", sort=False)
    }


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Keys that begin with a size of table 2, the smallest first."""
    order = list(widths())
    return sorted((key for key in keys if key[0] in order), key=lambda key: order.index(key[0]))


def lack_of_size(size: str, model: dict[str, Any]) -> str | None:
    """Why a model is none of table 2."""
    if size not in widths():
        return f"size {size}, which the paper does not have"
    wanted = widths()[size]
    wanted = {name: wanted[name] for name in WIDTHS} | {"d_mlp": 3 * wanted["d_model"]} | PAPER
    changed = [name for name, value in wanted.items() if model.get(name, value) != value]
    return f"size {size} with another {changed[0]}" if changed else None


def groups(
    rows: pd.DataFrame, varied: Sequence[str], shared: Sequence[str], pairs: Sequence[str] = ROUND
) -> list[Group]:
    """Groups of processes that share the machine and these settings; their columns are the family
    and `varied`, their rows what `pairs` says. Of several windows each has a group, with the models
    beside it that have none."""
    shared = ["backend", "dtype", "device_kind", "device_name", "num_devices", *shared]
    kept = [name for name in dict.fromkeys((*shared, *varied, *pairs, *FACTS)) if name in rows]
    texts = rows[kept].astype(object).where(rows[kept].notna(), None)
    values = {name: texts[name].tolist() for name in kept}  # a dict of each row takes far longer
    number, column = (
        rows.groupby(list(names), sort=False, dropna=False, observed=True).ngroup().to_numpy()
        for names in (shared, ("family", *varied))
    )
    table = _Processes(
        values,
        column=column.tolist(),
        place=list(zip(*(values[name] for name in pairs), strict=True)),
        is_green=[parity == checks.GREEN for parity in values["parity"]],
    )
    order = np.argsort(number, kind="stable")
    ends = np.flatnonzero(np.diff(number[order])) + 1
    made = []
    for part in np.split(order, ends) if len(order) else ():
        part = part.tolist()
        windows = {values["window_size"][row] for row in part} - {None}
        for window in sorted(windows) or [None]:
            here = [row for row in part if values["window_size"][row] in (None, window)]
            settings = {name: values[name][part[0]] for name in shared} | {"window_size": window}
            made.append(_group(table, here, varied, settings))
    return made


@dataclass
class _Processes:
    """A list a fact, with a value of each process."""

    values: dict[str, list]
    column: list[int]  # equal where family and what is varied are
    place: list[Key]  # in ROUND or SEED
    is_green: list[bool]


def _group(
    table: _Processes, rows: list[int], varied: Sequence[str], settings: dict[str, Any]
) -> Group:
    values = table.values
    group = Group(settings | {"attention": _attention(values, rows)})
    columns: dict[int, list[int]] = {}
    for row in rows:
        columns.setdefault(table.column[row], []).append(row)
    for column in columns.values():
        first = column[0]
        key = tuple(values[name][first] for name in ("family", *varied))
        found = {table.place[row]: values["value"][row] for row in column}
        if len(found) < len(column):
            several: dict[Key, list[float]] = {}
            for row in column:
                several.setdefault(table.place[row], []).append(values["value"][row])
            found = {place: _median(each) for place, each in several.items()}
        group.columns[key] = found
        group.verified[key] = all(table.is_green[row] for row in column)
        group.ids[key] = tuple(dict.fromkeys(values["run_id"][row] for row in column))
        group.facts[key] = {name: known[first] for name, known in values.items()}
    return group


def _attention(values: dict[str, list], rows: list[int]) -> str | None:
    """Which attention MQA ran, where it is there: fused or not decides how it grows."""
    found = {values["attention"][row] for row in rows if values["family"][row] == "mqa"} - {None}
    return "/".join(sorted(found)) or None


def where(settings: dict[str, Any]) -> str:
    words = [str(settings[name]) for name in ("size", "backend", "dtype") if settings.get(name)]
    words.append(str(settings.get("device_name") or settings.get("device_kind")))
    if settings.get("attention"):
        words.append(f"{settings['attention']} attention")
    return ", ".join(words)


def lacks_of(
    group: Group, keys: Sequence[Key], sizes: Sequence[str], device: str | None = ACCELERATOR
) -> list[str]:
    """What a group lacks of the paper's scale: its size, and the kind of device it speaks of."""
    made = []
    for fact in (group.facts[key] for key in keys):
        if fact["lack_of_size"]:
            made.append(fact["lack_of_size"])
        elif fact["size"] not in sizes:
            made.append(f"size {fact['size']}, not {any_of(sizes)}")
    window = group.settings["window_size"]
    if not made and window not in (None, WINDOW):
        made.append(f"a window of {window:,}, not {WINDOW:,}")
    if device is not None:
        made += lacks_of_device(group.settings["device_kind"], device)
    return list(dict.fromkeys(made))


def lacks_of_device(kind: str, device: str) -> list[str]:
    if kind == "cpu":
        return ["on a CPU"]
    return [f"on a {kind}, not a TPU"] if device == TPU and kind not in TPUS else []


def any_of(words: Sequence[Any]) -> str:
    texts = [word if isinstance(word, str) else f"{word:,}" for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def ends_of(found: Iterable[int], wanted: tuple[int, int]) -> tuple[int, int, list[str]] | None:
    """The two lengths to compare: the paper's, where both are there, else the ends; what lacks."""
    found = sorted(set(found))
    if set(wanted) <= set(found):
        return (*wanted, [])
    if len(found) < 2:
        return None
    low, high = found[0], found[-1]
    return low, high, [f"{low:,} and {high:,} tokens, not {wanted[0]:,} and {wanted[1]:,}"]


def label_of(family: str) -> str:
    return "MQA" if family == "mqa" else style.family_label(family)
