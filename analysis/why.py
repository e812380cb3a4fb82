"""Why two sides differ: what was not asked for and differs between them, likely causes first.

What differs in every pair cannot be told from what else does; what differs in some pairs alone can:
if it is the cause, these pairs differ as the others do not. So causes whose pairs show it come
first, then those that are known to matter (WEIGHTS), by the share of pairs that have them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import settings, statistics
from analysis.derive import processes, runs
from analysis.pairing import pairs
from analysis.remember import remembered
from analysis.vocabulary import HEADLINES, QUALITIES
from suites.harness.record import METRICS

# How much a difference of each kind is known to change: times and memory, then losses.
WEIGHTS = {
    "kernel": (1.0, 0.7), "device": (0.95, 0.4), "threads": (0.9, 0.1), "clock": (0.85, 0.0),
    "load": (0.8, 0.0), "library": (0.75, 0.7), "code": (0.7, 0.65), "node": (0.5, 0.1),
    "checkpoint": (0.4, 0.5), "data": (0.3, 1.0), "start": (0.2, 0.9),
    "compile cache": (0.25, 0.0), "system": (0.2, 0.1),
}  # fmt: skip
PROVEN = 1.0  # is added where the pairs show it
LIBRARIES = {"jax": ("jax", "jaxlib", "libtpu", "optax", "numpy"),
             "torch": ("torch", "triton", "numpy"),
             "transformers": ("torch", "transformers", "numpy")}  # fmt: skip
PACKAGES = tuple(dict.fromkeys(name for names in LIBRARIES.values() for name in names))
# Facts of a run that are compared as they are: column to kind, and what a column is called.
FACTS = {
    "linear_scan": "kernel", "attention": "kernel", "layers": "kernel", "program": "kernel",
    "device_name": "device", "cpu_model": "device", "num_threads": "threads",
    "num_cores": "threads", **dict.fromkeys(PACKAGES, "library"), "engine_build": "code",
    "question_build": "code", "git_commit": "code", "node": "node", "num_segments": "checkpoint",
    "data_digest": "data", "init_digest": "start", "python": "system", "platform": "system",
}  # fmt: skip
NAMES = {"engine_build": "code of the engine", "question_build": "code of suite and harness",
         "num_segments": "processes of a run", "data_digest": "data",
         "init_digest": "initial parameters"}  # fmt: skip
# What two sides of one round share, and other rounds may not.
OF_ROUNDS = {"node": "node", "device_name": "device", "num_threads": "threads", "load": "load",
             **dict.fromkeys(PACKAGES, "library")}  # fmt: skip
PEAK = 0.1  # of the measured peak: two probes of one machine differ as much
COLD = 3.0  # times as long: a compilation beside one whose result was in the cache
LEAST_COMPILE_S = 1.0  # less is the noise of two steps
BUSY = 0.5  # of a core: load beyond the machine's own cores is somebody else's
LEAST = 0.02  # of a ratio: what differs less is not asked after
LEAST_PAIRS = 3  # with something and without, before they are held against each other
# Settings that leave the data of a run as they are, and what others bring along.
_SAME_DATA = ("backend", "family", "size", "dtype", "device_kind")
_ALONG = {"dtype": ("clock",), "device_kind": ("clock", "device_name", "cpu_model")}


@dataclass(frozen=True)
class Cause:
    """One thing that differs, with the evidence; those `along` differ in exactly the same pairs."""

    what: str
    kind: str
    baseline: str | None
    ours: str
    num_pairs: int
    num_differing: int
    weight: float
    evidence: str
    along: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"along": list(self.along)}


@dataclass(frozen=True)
class _Pairs:
    """Pairs of runs, both sides in one row; `ratio` is the log of how much better ours did; pairs
    of one `group` have the same two cells."""

    rows: pd.DataFrame
    ratio: np.ndarray
    group: np.ndarray
    is_quality: np.ndarray


@dataclass(frozen=True)
class _Difference:
    what: str
    kind: str
    mask: np.ndarray  # in which pairs
    before: np.ndarray
    after: np.ndarray


def of_comparison(frame: pd.DataFrame, by: str, ours: str, baseline: str) -> list[Cause]:
    """Over all rounds that cells of two values of a setting share."""
    found, differences = _comparison(frame, by, ours, baseline)
    causes = _causes(found, differences, np.arange(len(found.rows)))
    return _ranked([*causes, *_of_rounds(found)])


def of_cells(
    frame: pd.DataFrame, by: str, ours: str, baseline: str
) -> dict[tuple[str, str], list[Cause]]:
    """The same of each pair of cells."""
    found, differences = _comparison(frame, by, ours, baseline)
    cells = found.rows.groupby(["cell_id", "other"], sort=False).indices
    return {key: _ranked(_causes(found, differences, places)) for key, places in cells.items()}


def of_files(ours: pd.DataFrame, baseline: pd.DataFrame) -> list[Cause]:
    """Of two sets of records: their common cells, process by process."""
    sides = []
    for frame in (ours, baseline):
        facts = _facts(frame).sort_values(["cell_id", "seed", "round"], kind="stable")
        sides.append(facts.assign(place=facts.groupby("cell_id", sort=False).cumcount()))
    both = sides[0].merge(sides[1], on=["cell_id", "place"], suffixes=("_ours", "_baseline"))
    if both.empty:
        return []
    found = _paired(both, np.zeros(len(both), dtype=int))
    return _ranked(_causes(found, _differences(found, set()), np.arange(len(both))))


# Pairs ------------------------------------------------------------------------------------------


@remembered
def _comparison(
    frame: pd.DataFrame, by: str, ours: str, baseline: str
) -> tuple[_Pairs, list[_Difference]]:
    cells = [(a["cell_id"], b["cell_id"]) for a, b in pairs(frame, by, ours, baseline) if a and b]
    ids = pd.DataFrame(cells, columns=["cell_id", "other"], dtype=object)
    facts = _facts(frame)
    both = ids.merge(facts, on="cell_id").merge(
        facts.rename(columns={"cell_id": "other"}),
        on=["other", "seed", "round"],
        suffixes=("_ours", "_baseline"),
    )
    for side in ("ours", "baseline"):
        both[f"seed_{side}"] = both["seed"]
    asked = {by, by.removeprefix("kernels."), *_ALONG.get(by, ())}
    if by in settings.SHOWN and by not in _SAME_DATA:
        asked.add("data_digest")  # another workload
    group = both.groupby(["cell_id", "other"], sort=False).ngroup().to_numpy()
    found = _paired(both, group)
    return found, _differences(found, asked)


def _paired(both: pd.DataFrame, group: np.ndarray) -> _Pairs:
    ratio = both["goodness_ours"] - both["goodness_baseline"]
    return _Pairs(both, ratio.to_numpy(float), group, both["is_quality_ours"].to_numpy(bool))


@remembered
def _facts(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a completed run: what it ran on and with, and how well its suite's first metric did."""
    rows = runs(frame)
    rows = rows[(rows["outcome"] == "completed") & (rows["suite"] != "parity")]
    columns = ["run_id", "cell_id", "seed", "round", "suite", "backend", "family", "size", "model",
               "versions", "build", "load_average"]  # fmt: skip
    made = rows[
        [*columns, *(name for name in FACTS if name in rows and name not in columns)]
    ].copy()
    # a kernel that no layer calls explains nothing
    for name, mixer in (("linear_scan", "rg_lru"), ("attention", "mqa")):
        is_called = made["model"].str.contains(f'"{mixer}"', regex=False).astype(bool)
        made[name] = made[name].where(is_called)
    # "numpy=2.4.6, jax=0.10.2", of which a backend uses its own
    found = [dict(word.split("=", 1) for word in (text or "").split(", ") if "=" in word)
             for text in made["versions"]]  # fmt: skip
    used = [LIBRARIES.get(backend, ("numpy",)) for backend in made["backend"]]
    for name in PACKAGES:
        made[name] = [versions.get(name, "none") if versions and name in names else None
                      for versions, names in zip(found, used, strict=True)]  # fmt: skip
    # not str.partition, which has no columns where no run completed
    made["question_build"] = made["build"].map(lambda b: b.partition(".")[2], na_action="ignore")
    values = processes(frame)
    values = values.loc[values["at"].isna(), ["run_id", "suite", "metric", "value", "field"]]
    values = values.drop_duplicates(["run_id", "metric"]).astype({"suite": object})
    probe = values[(values["metric"] == "peak_flops_per_s") & (values["field"] == "measured")]
    compiling = values[values["metric"] == "compile_time_s"]
    for name, part in (("clock", probe), ("compile_s", compiling)):
        made[name] = made["run_id"].map(part.set_index("run_id")["value"]).astype(float)
    first = {suite: names[0] for suite, names in HEADLINES.items()}
    is_first = values["metric"].astype(object) == values["suite"].map(first)
    own = values[is_first & (values["value"] > 0)]
    sign = [1 if METRICS[metric].better == "higher" else -1 for metric in own["metric"]]
    goodness = pd.Series(sign * np.log(own["value"].to_numpy(float)), own["run_id"], dtype=float)
    made["goodness"] = made["run_id"].map(goodness).astype(float)
    made["is_quality"] = made["suite"].map(first).isin(QUALITIES)
    known = made[list(FACTS)].astype(object)  # every kind of missing becomes None
    return made.assign(**known.where(known.notna(), None)).astype({"cell_id": object})


# Differences ------------------------------------------------------------------------------------


def _differences(found: _Pairs, asked: set[str]) -> list[_Difference]:
    """What differs between the two sides in some pair, and was not asked for."""
    rows = found.rows
    apart = {name: _is_apart(rows, name) for name in FACTS}
    is_same_backend = ~_is_apart(rows, "backend")
    is_same_seed = ~_is_apart(rows, "seed")
    is_same_model = ~(_is_apart(rows, "model") | _is_apart(rows, "family"))
    # a build is made of code, libraries and device: where the others differ it says nothing of code
    is_explained = np.any([apart[name] for name, kind in FACTS.items()
                           if kind in ("library", "device")], axis=0)  # fmt: skip
    is_other_build = apart["engine_build"] | apart["question_build"]
    apart["engine_build"] &= is_same_backend & ~is_explained
    apart["git_commit"] &= is_same_backend & is_explained & is_other_build
    apart["cpu_model"] &= ~apart["device_name"]
    apart["num_cores"] &= ~apart["num_threads"]
    apart["init_digest"] &= is_same_seed & is_same_model
    apart["data_digest"] &= is_same_seed
    made = [
        _Difference(NAMES.get(name, name), kind, apart[name], *_sides(rows, name))
        for name, kind in FACTS.items()
        if name not in asked and apart[name].any()
    ]
    is_same_program = is_same_backend & ~apart["program"] & ~apart["linear_scan"]
    return [*made, *_measured(rows, asked, is_same_program)]


def _measured(
    rows: pd.DataFrame, asked: set[str], is_same_program: np.ndarray
) -> Iterator[_Difference]:
    """What runs measured of their machine, where half of the pairs differ by more than it varies;
    and compilations that were cold on one side."""
    before, after = _sides(rows, "clock")
    mask = np.abs(_log(after) - _log(before)) > np.log1p(PEAK)
    if "clock" not in asked and mask.mean() > 0.5:
        texts = (_texts(side / 1e9, "{:.0f} GFLOP/s") for side in (before, after))
        yield _Difference("measured peak", "clock", mask, *texts)
    before, after = (side.astype(float) for side in _sides(rows, "load_average"))
    mask = np.abs(after - before) > 1
    if mask.mean() > 0.5:
        texts = (_texts(side, "{:.0f}") for side in (before, after))
        yield _Difference("load average", "load", mask, *texts)
    before, after = _sides(rows, "compile_s")
    mask = np.abs(_log(after) - _log(before)) > np.log(COLD)
    mask &= (np.fmax(before, after) > LEAST_COMPILE_S) & is_same_program
    if mask.any():
        texts = (np.where(side > other, "cold", "warm") for side, other in
                 ((before, after), (after, before)))  # fmt: skip
        yield _Difference("compile cache", "compile cache", mask, *texts)


def _sides(rows: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    return rows[f"{name}_baseline"].to_numpy(), rows[f"{name}_ours"].to_numpy()


def _is_apart(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Where both sides know it and differ."""
    before, after = (rows[f"{name}_{side}"].astype(object) for side in ("baseline", "ours"))
    is_known = (before.notna() & after.notna()).to_numpy(dtype=bool)
    return is_known & (before.to_numpy() != after.to_numpy())


def _log(values: np.ndarray) -> np.ndarray:
    values = values.astype(float)
    return np.log(np.where(values > 0, values, np.nan))


def _texts(values: np.ndarray, form: str) -> np.ndarray:
    return np.array([form.format(value) for value in values], dtype=object)


# Causes -----------------------------------------------------------------------------------------


def _causes(found: _Pairs, differences: list[_Difference], places: np.ndarray) -> list[Cause]:
    """Of some of the pairs."""
    here = [(one, one.mask[places]) for one in differences]
    here = [(one, mask) for one, mask in here if mask.any()]
    made = []
    for one, mask in here:
        weight = _weight(one.kind, found.is_quality[places][mask])
        if weight == 0:
            continue
        changes = Counter(zip(one.before[places][mask], one.after[places][mask], strict=True))
        ((before, after), _), *others = changes.most_common()
        n, total = int(mask.sum()), len(places)
        where = f"{n:,} of {total:,} pairs of runs"
        if n == total:
            where = f"every pair of runs ({n:,})" if n > 1 else "the one pair of runs"
        split = _split(found, places, mask)
        if split is not None:
            is_shown, there, elsewhere = split
            where += f"; the ratio is {_times(there)} there and {_times(elsewhere)} in the others"
            weight = weight + PROVEN if is_shown else weight * n / total / 2
        else:
            weight *= n / total
        more = f" (most often; {len(others)} more)" if others else ""
        before, after = (_short(text) for text in (before, after))
        along = tuple(other.what for other, same in here if other is not one and
                      np.array_equal(same, mask))  # fmt: skip
        evidence = f"{one.what}: {before} -> {after}{more} in {where}"
        made.append(Cause(one.what, one.kind, before, after, total, n, weight, evidence, along))
    return made


def _split(found: _Pairs, places: np.ndarray, mask: np.ndarray) -> tuple[bool, float, float] | None:
    """Whether pairs with a difference do otherwise than those without, and the mean log ratio of
    both; None where they are too few to tell. Each is held against others of its two cells."""
    ratio, group = found.ratio[places], found.group[places]
    counts = [np.bincount(group[part], minlength=group.max() + 1) for part in (mask, ~mask)]
    kept = (np.minimum(*counts) > 0)[group] & ~np.isnan(ratio)
    if min((kept & mask).sum(), (kept & ~mask).sum()) < LEAST_PAIRS:
        return None
    ratio, group, mask = ratio[kept], group[kept], mask[kept]
    means = np.bincount(group, ratio) / np.maximum(np.bincount(group), 1)
    centred = ratio - means[group]
    apart, interval = statistics.welch(centred[mask], centred[~mask])
    is_shown = (interval[0] > 0 or interval[1] < 0) and abs(apart) > np.log1p(LEAST)
    return is_shown, float(ratio[mask].mean()), float(ratio[~mask].mean())


def _times(log_ratio: float) -> str:
    ratio = np.exp(log_ratio)
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.3g}x"


def _of_rounds(found: _Pairs) -> Iterator[Cause]:
    """What both sides of a round share and other rounds do not, where the ratio goes with it, as
    where rounds of one node differ from those of another: of each fact the clearest."""
    rows = found.rows
    loads, cores = (
        np.fmax(*(side.astype(float) for side in _sides(rows, name)))
        for name in ("load_average", "num_cores")
    )
    beyond = np.where(loads - cores > BUSY, "beyond the cores", None)
    for name, kind in OF_ROUNDS.items():
        values = beyond
        if name != "load":
            values = np.where(_is_apart(rows, name), None, rows[f"{name}_ours"].to_numpy(object))
        best: tuple[float, Cause] | None = None
        for value in pd.unique(values[pd.notna(values)]):
            if (values == value).all():
                continue
            for number in np.unique(found.group[values == value]):
                places = np.flatnonzero(found.group == number)
                mask = values[places] == value
                split = _split(found, places, mask)
                weight = _weight(kind, found.is_quality[places])
                if split is None or not split[0] or weight == 0:
                    continue
                first, n, total = rows.iloc[places[0]], int(mask.sum()), len(places)
                evidence = (
                    f"{name} {value} in {n:,} of {total:,} rounds of {first['suite_ours']}, "
                    f"{first['family_ours']}: the ratio is {_times(split[1])} there and "
                    f"{_times(split[2])} in the others"
                )
                size = abs(split[1] - split[2])
                cause = Cause(name, kind, None, str(value), total, n, weight + PROVEN, evidence)
                if best is None or size > best[0]:
                    best = (size, cause)
        if best is not None:
            yield best[1]


def _weight(kind: str, is_quality: np.ndarray) -> float:
    of_times, of_losses = WEIGHTS[kind]
    return max(0.0 if is_quality.all() else of_times, of_losses if is_quality.any() else 0.0)


def _ranked(causes: list[Cause]) -> list[Cause]:
    return sorted(causes, key=lambda cause: (-cause.weight, cause.what))


def _short(value: Any) -> str:
    """Digests and commits by their beginning."""
    text = str(value)
    return text[:8] if len(text) >= 12 and all(c in "0123456789abcdef" for c in text) else text
