"""What language models learned, one by one: beside what knows little, in tokens of another family,
over learning rates, and as they grow."""

from typing import Any

import numpy as np
import pandas as pd

from analysis import derive, pairing, power_law, settings, statistics, style, vocabulary
from analysis.remember import remembered
from analysis.tables import MAX_ROWS, RUNS, Table, run_ids
from analysis.wording import NONE, number

SUITE = "language_modeling"
SEARCHED = settings.TUNED_ALONG
_METRICS = ("loss", "bits_per_byte", "unigram_bits_per_byte", "ngram_bits_per_byte")
_SETTINGS = ("family", "size", "backend", "dtype", "device_kind", "data", "seq_len", "variant")
_ALWAYS = _SETTINGS[:3]


def tables(frame: pd.DataFrame) -> list[Table]:
    """Those that have rows."""
    made = (held_out(frame), tokens_to_baseline(frame), learning_rates(frame), power_laws(frame))
    return [table for table in made if table.rows]


# what was reached


def held_out(frame: pd.DataFrame) -> Table:
    """Of each cell what it reached on held-out text, beside two models that know little."""
    found = _reached(frame)
    shown = _shown(found)
    header = [*shown, "num_params", "num_params_non_embedding", "tokens", "seeds", "loss",
              "bits per byte", "unigram", "order-3 n-grams", "below n-grams"]  # fmt: skip
    texts = [
        [
            *_words(row, shown),
            *(_count(row[name]) for name in ("num_params", "num_params_non_embedding", "tokens")),
            f"{row['num_seeds']:,}",
            *(_value(row, metric) for metric in _METRICS),
            _below(row),
        ]
        for row in found[:MAX_ROWS].to_dict("records")
    ]
    note = (
        "Medians over seeds with 95% intervals. Guessing by frequency alone reaches the unigram "
        "entropy of the held-out text; an order-3 n-gram model (interpolated Kneser-Ney, over "
        "bytes) saw as much of the same training text and no byte twice. Where tokens are not "
        "bytes there is no such model."
    )
    numbers = {METRIC_HEADERS[metric]: metric for metric in _METRICS}
    numbers |= {"tokens": "tokens"}
    return Table("quality", "What was learned", header, texts, found, note, numbers, RUNS)


METRIC_HEADERS = dict(
    zip(_METRICS, ("loss", "bits per byte", "unigram", "order-3 n-grams"), strict=True)
)


@remembered
def _reached(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a cell of the suite: what it is, what its runs reached, and of how many runs the
    n-gram model is known and not beaten."""
    cells = derive.summary(frame)
    cells = cells[(cells["suite"] == SUITE) & cells["metric"].isin(_METRICS) & cells["at"].isna()]
    columns = [*_SETTINGS, "num_params", "num_params_non_embedding"]
    made = cells.groupby("cell_id", sort=False)[columns].first()
    counts = cells.groupby("cell_id", sort=False)[["batch_size", "seq_len", "num_steps"]].first()
    made["tokens"] = counts.astype("float64").prod(axis=1)
    made["num_seeds"] = cells.groupby("cell_id", sort=False)["num_seeds"].max()
    for metric in _METRICS:
        rows = cells[cells["metric"] == metric].set_index("cell_id")
        made[metric] = rows["value"]
        made[f"{metric}_low"], made[f"{metric}_high"] = rows["low"], rows["high"]
    above = above_ngrams(frame)
    made["num_judged"] = above.groupby("cell_id").size()
    made["num_above"] = above[above["is_above"]].groupby("cell_id").size()
    made["run_ids"] = run_ids(frame).reindex(made.index)  # else an empty frame would grow
    made[["num_judged", "num_above"]] = made[["num_judged", "num_above"]].fillna(0).astype(int)
    return _ordered(made.reset_index())


@remembered
def above_ngrams(frame: pd.DataFrame) -> pd.DataFrame:
    """Every run whose n-gram model is known, and whether it does not beat it."""
    rows = derive.processes(frame)
    rows = rows[(rows["suite"] == SUITE) & rows["at"].isna()]
    by_run = {
        metric: rows[rows["metric"] == metric].set_index("run_id")["value"]
        for metric in ("bits_per_byte", "ngram_bits_per_byte")
    }
    cells = rows.drop_duplicates("run_id").set_index("run_id")["cell_id"]
    made = pd.DataFrame(by_run | {"cell_id": cells}).dropna()
    return made.assign(is_above=made["bits_per_byte"] >= made["ngram_bits_per_byte"])


def _below(row: dict[str, Any]) -> str:
    if not row["num_judged"]:
        return NONE
    if row["num_above"]:
        return f"NO ({row['num_above']} of {row['num_judged']} runs)"
    return "yes"


# tokens of one family, loss of another


def tokens_to_baseline(frame: pd.DataFrame, baseline: str = "mqa") -> Table:
    """After how many tokens a family reaches the held-out loss that the baseline ends at."""
    found = _tokens(frame, baseline)
    shown = _shown(found)
    name = style.family_label(baseline)
    header = [*shown, f"final loss of {name}", "tokens to reach it", f"tokens of {name}",
              "share", "seeds", "verdict"]  # fmt: skip
    texts = [
        [
            *_words(row, shown),
            number(row["target"], "loss"),
            _count(row["tokens_to_baseline_loss"]),
            _count(row["tokens"]),
            _share(row),
            f"{row['num_reached']} of {row['num_seeds']}",
            row["verdict"],
        ]
        for row in found[:MAX_ROWS].to_dict("records")
    ]
    note = (
        f"tokens_to_baseline_loss: the tokens after which a family's held-out loss first is what "
        f"{name}'s is at the end of training, of the same seed, text and schedule; between two "
        "points of the curve by a straight line. The share is of all tokens, the geometric mean "
        "over seeds with its 95% interval. The learning rate had not decayed to its end by then: "
        "a run whose schedule ends there would need fewer."
    )
    numbers = {"tokens to reach it": "tokens_to_baseline_loss", "share": "share",
               f"tokens of {name}": "tokens"}  # fmt: skip
    title = f"Tokens to the loss of {name}"
    return Table("tokens_to_baseline_loss", title, header, texts, found, note, numbers, RUNS)


@remembered
def _tokens(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    rows = derive.processes(frame)
    rows = rows[(rows["suite"] == SUITE) & (rows["metric"] == "held_out_loss")]
    curves: dict[str, dict[int, pd.Series]] = {}
    for (cell, seed), part in rows.groupby(["cell_id", "seed"], sort=False, observed=True):
        curves.setdefault(str(cell), {})[int(seed)] = part.set_index("at")["value"].sort_index()
    ids = run_ids(frame)
    made = []
    families = [f for f in settings.values_of(frame, "family") if f != baseline] if curves else []
    for family in families:
        for ours, other in pairing.pairs(frame, "family", family, baseline):
            if ours is None or other is None or ours["suite"] != SUITE:
                continue
            pair = [curves.get(cell["cell_id"], {}) for cell in (ours, other)]
            seeds = sorted(pair[0].keys() & pair[1].keys())
            if not seeds:
                continue
            row = {name: ours[name] for name in _SETTINGS}
            steps = float(ours["num_steps"])
            row["tokens"] = float(ours["batch_size"]) * float(ours["seq_len"]) * steps
            targets = [float(pair[1][seed].iloc[-1]) for seed in seeds]
            reached = [steps_to(pair[0][s], t) for s, t in zip(seeds, targets, strict=True)]
            row["target"] = float(np.mean(targets))
            row |= _shares([None if step is None else step / steps for step in reached])
            row["tokens_to_baseline_loss"] = row["tokens"] * row["share"]
            row["run_ids"] = " ".join(ids.reindex([ours["cell_id"], other["cell_id"]]).dropna())
            made.append(row)
    columns = [*_SETTINGS, "target", "tokens_to_baseline_loss", "tokens", "share", "low", "high",
               "num_reached", "num_seeds", "verdict", "run_ids"]  # fmt: skip
    return _ordered(pd.DataFrame(made, columns=columns))


def steps_to(curve: pd.Series, target: float) -> float | None:
    """The step at which a curve of losses, by step, first is at the target; None: never. Before its
    first point nothing is known: that is the earliest that can be said."""
    steps, losses = curve.index.to_numpy(dtype=float), curve.to_numpy(dtype=float)
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    place = int(below[0])
    if place == 0:
        return float(steps[0])
    left = (losses[place - 1] - target) / (losses[place - 1] - losses[place])
    return float(steps[place - 1] + left * (steps[place] - steps[place - 1]))


def _shares(shares: list[float | None]) -> dict[str, Any]:
    """Of all seeds together; where one of them never came there, nothing but how many did."""
    known = [share for share in shares if share is not None]
    row = {"num_reached": len(known), "num_seeds": len(shares),
           "share": np.nan, "low": np.nan, "high": np.nan}  # fmt: skip
    if len(known) < len(shares):
        return row | {"verdict": f"not reached by {len(shares) - len(known)} of {len(shares)}"}
    row["share"] = float(np.exp(np.mean(np.log(known))))
    if len(known) < statistics.MIN_SEEDS:
        reason = f"{len(known)} of {statistics.MIN_SEEDS} seeds"
        return row | {"verdict": f"not resolved ({reason})"}
    row["low"], row["high"] = np.exp(statistics.student_interval(np.log(known)))
    return row | {"verdict": "fewer" if row["high"] < 1 else "not resolved"}


def _share(row: dict[str, Any]) -> str:
    if pd.isna(row["share"]):
        return NONE
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['share']:.2f}{interval}"


# learning rates


def learning_rates(frame: pd.DataFrame) -> Table:
    """Every point of a search over learning rates (and weight decays), each family's best first."""
    found = searched(frame)
    shown = _shown(found)
    rates = [name for name in SEARCHED if len(found) and found[name].nunique() > 1]
    short = [name.rpartition(".")[2] for name in rates]
    header = [*shown, *short, "tokens", "loss", "seeds", "above the best", "what it is"]
    texts = [
        [
            *_words(row, shown),
            *(f"{row[name]:g}" for name in rates),
            _count(row["tokens"]),
            _value(row, "loss") if row["num_runs"] else f"{NONE} ({row['status']})",
            f"{row['num_seeds']:,}",
            NONE if pd.isna(row["above"]) else f"{row['above']:+.4f}",
            row["what"],
        ]
        for row in found[:MAX_ROWS].to_dict("records")
    ]
    note = (
        "The same search for every family: equally many runs, of as many tokens. At the edge of "
        "the grid a better value may lie beyond it. With one seed the order of neighbours is noise."
    )
    numbers = {"loss": "loss", "above the best": "above", "tokens": "tokens"}
    return Table("learning_rates", "Learning rates", header, texts, found, note, numbers, RUNS)


@remembered
def searched(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a cell whose learning rate or weight decay was searched, by family and loss; `what`
    says of the best one where it lies, and whether families had as many runs."""
    columns = ["cell_id", *_SETTINGS, *SEARCHED, "tokens", "loss", "loss_low", "loss_high",
               "num_seeds", "num_runs", "status", "above", "what", "run_ids"]  # fmt: skip
    cells = derive.outcomes(frame)
    cells = cells[cells["suite"] == SUITE].set_index("cell_id")
    if cells.empty:
        return pd.DataFrame(columns=columns)
    asked = settings.asked(frame).reindex(cells.index)
    lacking = [name for name in SEARCHED if name not in asked]
    varied = [name for name in SEARCHED if name not in lacking and asked[name].nunique() > 1]
    rows = cells[[name for name in _SETTINGS if name in cells]].copy()
    for name in SEARCHED:
        rows[name] = np.nan if name in lacking else asked[name].astype("float64")
    counts = cells[["batch_size", "seq_len", "num_steps"]].astype("float64")
    rows["tokens"] = counts.prod(axis=1)
    reached = _reached(frame).set_index("cell_id")
    for name in ("loss", "loss_low", "loss_high", "num_seeds"):
        rows[name] = reached[name]
    rows["num_seeds"] = rows["num_seeds"].fillna(0).astype(int)
    rows["num_runs"], rows["status"] = cells["num_completed"], cells["status"]
    rows["run_ids"] = run_ids(frame).reindex(rows.index)
    group = asked[[name for name in asked if name not in SEARCHED and not _is_name(name)]]
    group = group.groupby(list(group), dropna=False, sort=False).ngroup()
    sizes = group.map(group.value_counts())
    if not varied or not (sizes > 1).any():
        return pd.DataFrame(columns=columns)
    rows = rows.assign(group=pd.factorize(group)[0])[sizes > 1]
    family = [vocabulary.family_order(name) for name in rows["family"]]
    family, _ = pd.factorize(pd.Series(family, dtype=object), sort=True)
    rows = rows.iloc[np.lexsort((rows["loss"], rows["group"], family))].copy()
    groups = rows.groupby("group", sort=False)
    rows["above"] = rows["loss"] - groups["loss"].transform("min")
    is_best = ~rows["group"].duplicated() & rows["loss"].notna()
    counts = groups["loss"].transform("size")
    most = counts.groupby([rows["size"], rows["backend"]]).transform("max")
    ends = {name: (groups[name].transform("min"), groups[name].transform("max"))
            for name in SEARCHED}  # fmt: skip
    rows["what"] = ""
    for place in np.flatnonzero(is_best):
        words = ["best"]
        for name, (low, high) in ends.items():
            words += _edge(name, rows[name].iloc[place], low.iloc[place], high.iloc[place])
        if most.iloc[place] > counts.iloc[place]:
            words.append(f"of {counts.iloc[place]} settings, others had {most.iloc[place]}")
        rows.iloc[place, rows.columns.get_loc("what")] = ", ".join(words)
    return rows.reset_index()[columns]


def _is_name(name: str) -> bool:
    """optimizer.name says of which file the values are; kernels by what ran are no setting."""
    return name in ("optimizer.name", *settings.RESOLVED)


def _edge(name: str, value: float, low: float, high: float) -> list[str]:
    """At which end of the grid the best value lies; of two values each is one."""
    if not low < high or value not in (low, high):
        return []
    end = "smallest" if value == low else "largest"
    return [f"AT THE EDGE: the {end} {name.rpartition('.')[2]} of the grid"]


def edges(frame: pd.DataFrame) -> list[str]:
    """Sentences on searches whose best value lies at the edge of what was searched."""
    rows = searched(frame)
    return [
        f"The best learning rate of {style.family_label(row['family'])} at size {row['size']} lies "
        f"at the edge of the grid ({row[SEARCHED[0]]:g}, weight decay {row[SEARCHED[1]]:g}): a "
        "better one may lie beyond it."
        for row in rows.to_dict("records")
        if "EDGE" in row["what"]
    ]


# as they grow


def power_laws(frame: pd.DataFrame) -> Table:
    """How fast loss falls, and how little the fit spans."""
    made = []
    for against, what in power_law.AGAINST.items():
        for key, law in power_law.fits(frame, against):
            low, high = law.interval or (np.nan, np.nan)
            made.append(
                {"family": key["family"], "size": None}
                | {name: key[name] for name in _SETTINGS if name in key}
                | {"against": what, "exponent": -law.exponent, "low": -high, "high": -low}
                | {"num_sizes": law.num_sizes, "num_seeds": law.num_seeds,
                   "most_seeds": law.most_seeds, "least": law.least,
                   "most": law.most, "decades": law.span_decades, "sentence": law.sentence}
            )  # fmt: skip
    columns = [*_SETTINGS, "against", "exponent", "low", "high", "num_sizes", "num_seeds",
               "most_seeds", "least", "most", "decades", "sentence", "run_ids"]  # fmt: skip
    found = pd.DataFrame(made, columns=columns)
    rows = derive.runs(frame)
    rows = rows[(rows["suite"] == SUITE) & (rows["outcome"] == "completed")]
    ids = rows.groupby(["family", "backend"])["run_id"].agg(" ".join)
    found["run_ids"] = [ids.get(key, "") for key in zip(found["family"], found["backend"],
                                                         strict=True)]  # fmt: skip
    shown = [name for name in _shown(found) if name != "size"]
    header = [*shown, "loss falls with", "exponent", "sizes", "seeds", "from", "to",
              "decades"]  # fmt: skip
    texts = [
        [
            *_words(row, shown),
            row["against"],
            f"{row['exponent']:.3f}"
            + ("" if pd.isna(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"),
            f"{row['num_sizes']}",
            " to ".join(dict.fromkeys(f"{row[name]}" for name in ("num_seeds", "most_seeds"))),
            *(f"{row[name]:.2g}" for name in ("least", "most")),
            f"{row['decades']:.1f}",
        ]
        for row in found[:MAX_ROWS].to_dict("records")
    ]
    spans = f"{found['decades'].min():.1f} to {found['decades'].max():.1f}" if len(found) else NONE
    note = (
        f"Lines through logarithms; they span {spans} decades and say nothing of what lies beyond. "
        f"The interval holds what seeds leave open: none below {power_law.MIN_SIZES} sizes, or "
        "of too few seeds."
    )
    numbers = {"exponent": "exponent", "from": "least", "to": "most"}
    return Table("power_laws", "Power laws", header, texts, found, note, numbers, RUNS)


# texts


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    place = [vocabulary.family_order(family)[0] for family in rows["family"]]
    rows = rows.assign(_place=place)
    size = "num_params_non_embedding" if "num_params_non_embedding" in rows else "tokens"
    keys = ["data", size, "tokens", "_place", "backend", "seq_len", "variant"]
    rows = rows.sort_values([key for key in keys if key in rows], kind="stable")
    return rows.drop(columns="_place").reset_index(drop=True)


def _shown(rows: pd.DataFrame) -> list[str]:
    """Family, size, backend, and whatever else differs."""
    return [*_ALWAYS, *(name for name in _SETTINGS[3:] if rows[name].nunique() > 1)]


def _words(row: dict[str, Any], names: list[str]) -> list[str]:
    return [NONE if pd.isna(row[name]) or row[name] == "" else str(row[name]) for name in names]


def _count(value: Any) -> str:
    return NONE if value is None or pd.isna(value) else f"{value:,.0f}"


def _value(row: dict[str, Any], metric: str) -> str:
    text = number(row[metric], metric)
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    if text != NONE and not pd.isna(low) and high > low:
        text += f" [{number(low, metric)}, {number(high, metric)}]"
    return text
