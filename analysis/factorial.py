"""Factorial ablation: what each setting does to a metric, and whether two do it together.

value = seed + main effects + two-way interactions + noise, by least squares. Seeds are blocks: all
cells of one seed share what it decides. Where a cell is missing, or a seed of one, the same holds;
only what the design cannot tell apart is said to be so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from analysis import positions, settings, statistics
from analysis.derive import processes
from analysis.remember import remembered
from analysis.vocabulary import HEADLINES, TIMES
from suites.harness.record import METRICS

NOT_ESTIMABLE, NOT_RESOLVED = "not estimable", "not resolved"
ROUNDING = 1e-12  # of the largest value: what is smaller float64 makes of no difference at all
_EFFECT_COLUMNS = ["effect", "levels", "difference", "low", "high", "p", "p_holm", "verdict",
                   "detectable", "reason"]  # fmt: skip
_VARIANCE_COLUMNS = ["effect", "freedom", "sum_of_squares", "mean_square", "F", "p"]


@dataclass(frozen=True)
class Ablation:
    """`effects`: a row a level beside the baseline's, and a row a pair of levels of two factors.
    `variance`: the analysis of variance, a row an effect, and the residual."""

    effects: pd.DataFrame
    variance: pd.DataFrame
    baseline: Mapping[str, Any]
    num_seeds: int
    num_cells: int
    num_missing: int  # cells of the whole grid without a run
    start: int | None = None  # the position from which losses are compared, where lengths vary
    run_ids: str = ""  # behind all of it, with spaces between


def ablations(
    frame: pd.DataFrame,
    suite: str,
    metric: str | None = None,
    baseline: Mapping[str, str] | None = None,
) -> dict[str, Ablation]:
    """What the settings that vary in a suite do to a metric (its first headline), by backend; those
    of a backend where nothing varies are left out. `baseline` names levels, as settings are typed;
    else they are those of settings.baseline_of.

    Of times the logarithm is taken and rounds are the blocks: a difference of 0.05 is 5% more.
    Losses beyond several training lengths are compared at the same positions (analysis/positions).
    """
    metric = metric or HEADLINES[suite][0]
    better = METRICS[metric].better
    if better is None:
        raise ValueError(f"metric={metric}: neither way is better; choose another.")
    varying = factors(frame, suite)
    baseline = baseline or {}
    for name, level in baseline.items():
        if level not in varying.get(name, ()):
            known = ", ".join(varying.get(name, ())) or "none, it is no factor"
            raise ValueError(f"baseline {name}={level}: not varied in {suite}; known: {known}.")
    made = {}
    for backend in sorted(_cells(frame, suite)["backend"].unique()):
        rows = _design(frame, suite, backend, metric)
        names = [name for name in varying if name in rows and rows[name].nunique() > 1]
        if names:
            levels = {name: [v for v in settings.values_of(frame, name) if v in set(rows[name])]
                      for name in names}  # fmt: skip
            first = {name: settings.baseline_of(name, known) for name, known in levels.items()}
            first |= {n: level for n, level in baseline.items() if level in levels.get(n, ())}
            found = effects(rows, names, baseline=first, better=better)
            ids = " ".join(dict.fromkeys(rows["run_id"]))
            start = int(rows["start"].max()) if "start" in rows else None
            made[backend] = replace(found, run_ids=ids, start=start)
    return made


@remembered
def factors(frame: pd.DataFrame, suite: str) -> dict[str, tuple[str, ...]]:
    """The settings in which some two cells of a suite differ while they share all others, with the
    values of such cells; but for the backend, by which results are kept apart."""
    found = settings.varying_among(frame, _cells(frame, suite))
    return {name: levels for name, levels in found.items() if name != "backend"}


def _cells(frame: pd.DataFrame, suite: str, backend: str | None = None) -> pd.DataFrame:
    """What was asked of the cells of a suite (and a backend): those of its settings that they
    have."""
    cells = settings.asked(frame)
    cells = cells[(cells["suite"] == suite) & (backend is None or cells["backend"] == backend)]
    return cells[[name for name in cells if name in settings.SHOWN or cells[name].notna().any()]]


def _design(frame: pd.DataFrame, suite: str, backend: str, metric: str) -> pd.DataFrame:
    """A row a cell and seed: the levels of all factors, and the value. Cells of a level that is
    compared with no other, as the window of a family without one, are no part of it."""
    cells, is_done = _cells(frame, suite, backend), False
    levels = settings.varying_among(frame, cells)
    is_apart = metric == positions.BEYOND and "seq_len" in levels
    rows = positions.unseen(frame) if is_apart else processes(frame)
    rows = rows[(rows["suite"] == suite) & (rows["backend"] == backend)]
    rows = rows[(rows["metric"] == metric) & rows["at"].isna()]
    while not is_done:  # without the cells of one factor another may no longer vary
        for name, known in levels.items():
            cells = cells[cells[name].isin(known)]
        kept = {name: known for name, known in levels.items() if cells[name].nunique() > 1}
        levels, is_done = kept, len(kept) == len(levels)
    cells = cells[[*levels]]
    rows = rows[rows["cell_id"].isin(cells.index)]
    design = cells.loc[rows["cell_id"]].reset_index(drop=True)
    is_time = metric in TIMES
    value = rows["value"].to_numpy(dtype=float)
    start = {"start": rows["start"].to_numpy()} if is_apart else {}
    return design.assign(
        **start,
        run_id=rows["run_id"].to_numpy(),
        seed=rows["round" if is_time else "seed"].to_numpy(),
        value=np.log(value) if is_time else value,
    )


def effects(
    design: pd.DataFrame,
    factors: Sequence[str] | None = None,
    *,
    baseline: Mapping[str, Any] | None = None,
    better: str = "lower",
) -> Ablation:
    """`design` has a column a factor, `seed` and `value`; several values of one cell and seed are
    averaged. `baseline` names a level of each factor, by default the first that comes.

    A main effect is the difference that a level makes beside the baseline's, averaged over all
    levels of the other factors; an interaction, how much larger the difference of one factor is at
    a level of another than at its baseline. Intervals have level 95% each; p_holm is adjusted for
    all rows, and the verdict is by it: better or worse than the sum of the parts, for an
    interaction. `detectable` is the least difference found four times in five.

    An interaction is left out of the model where no run has some combination of its levels, or
    where it cannot be told from other effects.
    """
    factors = [name for name in design if name not in ("seed", "value")] \
        if factors is None else list(factors)  # fmt: skip
    lacking = [name for name in (*factors, "seed", "value") if name not in design]
    if lacking:
        raise ValueError(f"a factorial design needs the columns {', '.join(lacking)}.")
    rows = design[[*factors, "seed", "value"]]
    rows = rows.groupby([*factors, "seed"], sort=False, observed=True, dropna=False)["value"]
    rows = rows.mean().reset_index()
    levels = {name: list(dict.fromkeys(rows[name])) for name in factors}
    for name in [name for name in factors if len(levels[name]) < 2]:
        raise ValueError(f"{name!r} is no factor: all runs have {levels[name]}.")
    for name, level in (baseline or {}).items():
        if level not in levels.get(name, ()):
            known = ", ".join(map(str, levels.get(name, ()))) or "none, it is no factor"
            raise ValueError(f"baseline {name}={level}: no run has it; known: {known}.")
        levels[name].sort(key=lambda value: value != level)  # stable: the others as they came
    model = _Model(rows, levels)
    grid = 1
    for known in levels.values():
        grid *= len(known)
    num_cells = len(rows[factors].drop_duplicates())
    return Ablation(
        effects=_effects(model, better),
        variance=_variance(model),
        baseline={name: known[0] for name, known in levels.items()},
        num_seeds=rows["seed"].nunique(),
        num_cells=num_cells,
        num_missing=grid - num_cells,
    )


class _Model:
    """Least squares with effects that sum to zero over the levels of a factor, so that a main
    effect is averaged over all levels of the others, however many runs each has.

    Many runs are as many rows as there are columns: those of R, where QR is the design with its
    values, have the same inner products, hence the same ranks, solutions and residuals."""

    def __init__(self, rows: pd.DataFrame, levels: Mapping[str, list]) -> None:
        self.levels, self.num_seeds = levels, rows["seed"].nunique()
        self.codes = {name: _sum_to_zero(len(known)) for name, known in levels.items()}
        value = rows["value"].to_numpy(dtype=float)
        self.rounding = ROUNDING * float(np.abs(value).max())
        self.num_rows = len(rows)
        seeds = pd.get_dummies(rows["seed"]).to_numpy(dtype=float)
        mains = {
            (name,): self.codes[name][pd.Index(known).get_indexer(rows[name])]
            for name, known in levels.items()
        }
        pairs = {(a, b): _products(mains[a,], mains[b,]) for a, b in combinations(levels, 2)}
        seeds, *made, value = _triangle(seeds, *mains.values(), *pairs.values(), value)
        self.value = value[:, 0]
        made = dict(zip([*mains, *pairs], made, strict=True))
        mains, pairs = ({term: made[term] for term in terms} for terms in (mains, pairs))
        self.left_out: dict[tuple[str, ...], str] = {}
        parts: dict[tuple[str, ...], np.ndarray] = {}
        for term, columns in mains.items():
            others = [part for other, part in mains.items() if other != term]
            if _rank(seeds, *others, columns) < _rank(seeds, *others) + columns.shape[1]:
                self.left_out[term] = "changes with other factors"
            else:
                parts[term] = columns
        for (a, b), columns in pairs.items():
            seen = set(zip(rows[a], rows[b], strict=True))
            empty = [pair for pair in product(levels[a], levels[b]) if pair not in seen]
            if empty:
                self.left_out[a, b] = f"no run with {a}={empty[0][0]}, {b}={empty[0][1]}"
            elif _rank(seeds, *parts.values(), columns) < (
                _rank(seeds, *parts.values()) + columns.shape[1]
            ):
                self.left_out[a, b] = "changes with other effects"
            else:
                parts[a, b] = columns
        self.terms = list(parts)
        self.everything = [*mains, *pairs]
        self.seeds, self.parts = seeds, parts
        matrix = np.hstack([seeds, *parts.values()])
        self.freedom = self.num_rows - _rank(matrix)
        self.solution, *_ = np.linalg.lstsq(matrix, self.value, rcond=None)
        self.residual = self._residual(matrix, self.solution)
        self.inverse = np.linalg.pinv(matrix.T @ matrix)
        starts = np.cumsum([seeds.shape[1], *(part.shape[1] for part in parts.values())])
        self.start = dict(zip(self.terms, starts, strict=False))

    @property
    def mean_square(self) -> float | None:
        """The variance of noise; unknown of a single seed, whose noise no other one shows."""
        return self.residual / self.freedom if self.freedom and self.num_seeds > 1 else None

    def contrast(self, term: tuple[str, ...], places: tuple[int, ...]) -> tuple[float, float]:
        """What these levels differ by from the baseline's (place 0), and its variance by that of
        the noise."""
        steps = [self.codes[name][place] - self.codes[name][0]
                 for name, place in zip(term, places, strict=True)]  # fmt: skip
        columns = steps[0] if len(steps) == 1 else np.outer(*steps).ravel()
        weights = np.zeros(len(self.solution))
        weights[self.start[term] : self.start[term] + len(columns)] = columns
        value = float(weights @ self.solution)
        value = 0.0 if abs(value) < self.rounding else value
        return value, float(weights @ self.inverse @ weights)

    def without(self, term: tuple[str, ...]) -> float:
        """The residual sum of squares of the model without one term."""
        rest = [part for other, part in self.parts.items() if other != term]
        matrix = np.hstack([self.seeds, *rest])
        solution, *_ = np.linalg.lstsq(matrix, self.value, rcond=None)
        return self._residual(matrix, solution)

    def _residual(self, matrix: np.ndarray, solution: np.ndarray) -> float:
        squares = float(((self.value - matrix @ solution) ** 2).sum())
        return 0.0 if squares < self.num_rows * self.rounding**2 else squares


def _effects(model: _Model, better: str) -> pd.DataFrame:
    made = []
    for term in model.everything:
        if reason := model.left_out.get(term):
            made.append({"effect": _name(term), "verdict": NOT_ESTIMABLE, "reason": reason})
            continue
        for places in product(*(range(1, len(model.levels[name])) for name in term)):
            value, variance = model.contrast(term, places)
            row = {"effect": _name(term), "levels": _levels(model, term, places),
                   "difference": value, "verdict": NOT_RESOLVED}  # fmt: skip
            if model.mean_square is None:
                row["reason"] = "1 seed" if model.num_seeds < 2 else "no run left to tell the noise"
            else:
                error = np.sqrt(variance * model.mean_square)
                p, half, least = statistics.student_test(value, error, model.freedom)
                row |= {"low": value - half, "high": value + half, "p": float(p),
                        "detectable": float(least)}  # fmt: skip
            made.append(row)
    rows = pd.DataFrame(made, columns=_EFFECT_COLUMNS)
    numbers = ["difference", "low", "high", "p", "p_holm", "detectable"]
    rows = rows.astype(dict.fromkeys(numbers, "float64"))
    tested = rows["p"].notna().to_numpy()
    rows.loc[tested, "p_holm"] = statistics.holm(rows.loc[tested, "p"])
    is_resolved = rows["p_holm"] < 1 - statistics.LEVEL
    is_better = (rows["difference"] < 0) == (better == "lower")
    rows.loc[is_resolved, "verdict"] = np.where(is_better[is_resolved], "better", "worse")
    return rows


def _variance(model: _Model) -> pd.DataFrame:
    """Of each effect what the model without it explains less (type III)."""
    made = []
    for term in model.terms:
        freedom = model.parts[term].shape[1]
        total = max(0.0, model.without(term) - model.residual)
        row = {"effect": _name(term), "freedom": freedom, "sum_of_squares": total,
               "mean_square": total / freedom}  # fmt: skip
        if model.mean_square:
            row["F"] = total / freedom / model.mean_square
            row["p"] = float(fdtrc(freedom, model.freedom, row["F"]))
        made.append(row)
    made.append({"effect": "residual", "freedom": model.freedom, "sum_of_squares": model.residual,
                 "mean_square": model.mean_square})  # fmt: skip
    rows = pd.DataFrame(made, columns=_VARIANCE_COLUMNS)
    return rows.astype(dict.fromkeys(["mean_square", "F", "p"], "float64"))


def _sum_to_zero(count: int) -> np.ndarray:
    """A row a level; the last is minus all others."""
    return np.vstack([np.eye(count - 1), -np.ones(count - 1)])


def _products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)


def _triangle(*parts: np.ndarray) -> list[np.ndarray]:
    """The columns of R, where QR is these parts side by side."""
    parts = [part.reshape(len(part), -1) for part in parts]
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    return np.split(np.linalg.qr(np.hstack(parts), mode="r"), ends, axis=1)


def _rank(*parts: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(np.hstack(parts)))


def _name(term: tuple[str, ...]) -> str:
    return " x ".join(term)


def _levels(model: _Model, term: tuple[str, ...], places: tuple[int, ...]) -> str:
    return ", ".join(
        f"{name.rpartition('.')[2]}={model.levels[name][place]} beside {model.levels[name][0]}"
        for name, place in zip(term, places, strict=True)
    )
