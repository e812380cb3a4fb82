"""What was asked of each cell, setting by setting: which vary, and what two cells share.

A setting is named as it is typed (model.window_size, kernels.attention), those of a workload by
their last name alone (seq_len). Values are texts, spelled as in YAML.
"""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd

from analysis.derive import outcomes
from analysis.remember import remembered
from analysis.vocabulary import family_order

RESOLVED = ("linear_scan", "attention", "layers")  # kernels: by the name of what ran
OUR_KERNELS = ("triton", "pallas")  # the variants that are hand-written begin with it
BASELINE = {"backend": "torch", "family": "mqa", "linear_scan": "sequential",
            "attention": "plain", "layers": "plain"}  # fmt: skip
# What changes with a setting and is no difference of its own.
ALONG = {
    "family": ("model.pattern", "model.window_size"),
    "size": ("model.d_model", "model.d_rnn", "model.d_mlp", "model.num_layers", "model.num_heads",
             "model.head_dim", "model.num_gate_blocks", "model.window_size"),
    "data": ("data.source", "data.paths", "data.tokenizer", "data.vocab_size", "data.field",
             "data.token_dtype", "data.held_out_fraction", "model.vocab_size"),
    "num_steps": ("optimizer.num_steps", "optimizer.num_warmup_steps"),
    "backend": ("kernels.linear_scan", "kernels.attention", "kernels.layers", "kernels.interpret",
                "kernels.compile"),
} | {name: (f"kernels.{name}",) for name in RESOLVED}  # fmt: skip
TUNED = "tuned"  # the name of an optimizer whose values were searched for each family alike, and
TUNED_ALONG = ("optimizer.learning_rate", "optimizer.weight_decay")  # what differs by that
# Settings that tables show in columns of their own; the others tell variants apart.
SHOWN = ("suite", "family", "size", "backend", "dtype", "device_kind", "data", "op", "work_phase",
         "seq_len", "batch_size", "prompt_len", "num_new_tokens", "num_steps", "num_devices",
         "optimizer.num_steps", "optimizer.num_warmup_steps", "model.pattern",
         "repeats", "task", "task_digest", "checkpoint.path")  # fmt: skip
_OWN_NAMES = ("backend", "family", "size", "dtype", "device_kind", "data", "suite",
              *RESOLVED)  # fmt: skip
_ABSENT = {
    "kernels.layers": "auto",
    "num_devices": "1",
    "model.decay_exponent": "8.0",
    "model.normalize_input": "true",
}  # what a run leaves out
_SHORT = {"model.family": "family", "model.size": "size", "data.name": "data",
          "workload.phase": "work_phase"}  # fmt: skip


@remembered
def asked(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a cell (parity aside), a column a setting; None where its workload has no such."""
    cells = outcomes(frame)
    cells = cells[cells["suite"] != "parity"]
    rows = [flat(text) for text in cells["settings"]]
    table = pd.DataFrame(rows, index=pd.Index(cells["cell_id"], name="cell_id"), dtype=object)
    absent = [name for name in (*SHOWN, *_ABSENT) if name not in table]
    table = table.reindex(columns=[*table, *dict.fromkeys(absent)]).astype(object)
    for name, value in _ABSENT.items():
        table[name] = table[name].where(table[name].notna(), value)
    table = table.where(table.notna(), None)
    for name in RESOLVED:
        found = cells[name].astype(object).to_numpy()
        table[name] = pd.Series(found, index=table.index).where(pd.notna(found), None)
    return table


def flat(settings: str) -> dict[str, str | None]:
    """Name to value of the settings of one cell, as they are in its record."""
    made: dict[str, str | None] = {}
    for key, value in json.loads(settings).items():
        for name, item in value.items() if isinstance(value, dict) else ((None, value),):
            path = key if name is None else f"{key}.{name}"
            is_work = path.startswith("workload.")
            path = _SHORT.get(path, path.removeprefix("workload."))
            made[path] = None if is_work and item in (0, "", []) else text(item)
    return made


def text(value: Any) -> str:
    """As YAML spells it: true, null, 0.003, and words without quotes."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return json.dumps(value)
    return str(value)


def name_of(name: str, known: Iterable[str]) -> str:
    """The setting that was meant: by its whole name, or by its last alone where that is one."""
    known = list(known)
    if name in known:
        return name
    short = [path for path in known if path.rpartition(".")[2] == name]
    if len(short) == 1:
        return short[0]
    if short:
        raise ValueError(f"{name!r} may be {' or '.join(short)}; name one of them.")
    words = {path: path for path in known} | {path.rpartition(".")[2]: path for path in known}
    close = get_close_matches(name, words, n=1)
    hint = f" Did you mean {words[close[0]]!r}?" if close else ""
    raise ValueError(f"{name!r} is no setting of these runs.{hint}")


def value_of(typed: str, measured: Iterable[str]) -> str:
    """The measured value that was typed: 3e-3 is 0.003."""
    measured = list(measured)
    number = _number(typed)
    for value in measured:
        if value == typed or (number is not None and _number(value) == number):
            return value
    close = get_close_matches(typed, measured, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{typed!r} is not known; known: {', '.join(measured)}.{hint}")


def shared(table: pd.DataFrame, by: str) -> pd.Series:
    """A number for each cell: equal where two cells differ in this setting at most, and in what
    changes along with it."""
    free = {by, *RESOLVED, *ALONG.get(by, ()), "checkpoint.path"}
    if by in ("family", "size") or by.startswith("model."):
        free.add("checkpoint.digest")  # another model has one of its own
    numbers = _numbered(table)
    kept = numbers[[name for name in numbers if name not in free]]
    is_step = np.array([is_shrinking(by, suite) for suite in table["suite"]], dtype=bool)
    if is_step.any():
        tokens = table["batch_size"].astype(float) * table["seq_len"].astype(float)
        kept = kept.assign(batch_size=table["batch_size"].mask(is_step, tokens.astype(str)))
    if by == "family" and "optimizer.name" in table:  # each at its own best
        is_tuned = table["optimizer.name"] == TUNED
        own = [name for name in TUNED_ALONG if name in kept]
        kept = kept.assign(**{name: kept[name].mask(is_tuned, -2) for name in own})  # no value's
    if kept.columns.empty:
        return pd.Series(0, index=table.index)
    return kept.groupby(list(kept), dropna=False, sort=False).ngroup()


def but_tuned(optimizer: str) -> str:
    """An optimizer without the values that each family was given as its own best, of equally long
    searches."""
    words = optimizer.split(", ")
    if f"name={TUNED}" not in words:
        return optimizer
    own = {name.rpartition(".")[2] for name in TUNED_ALONG}
    return ", ".join(word for word in words if word.partition("=")[0] not in own)


@remembered
def _numbered(table: pd.DataFrame) -> pd.DataFrame:
    """A number for each value, of settings that vary: many are grouped by most of them."""
    numbers = {name: pd.factorize(table[name])[0] for name in table}
    varying = {name: found for name, found in numbers.items() if len(np.unique(found)) > 1}
    return pd.DataFrame(varying, index=table.index)


def is_shrinking(by: str, suite: str) -> bool:
    """Whether batches shrink as this setting grows: a training step has always as many tokens."""
    suites = ("training_speed", "language_modeling", "length_extrapolation", "length_domains")
    return by == "seq_len" and suite in suites


@remembered
def varying(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Settings in which some two cells differ while they share all others, with the values of such
    cells; a kernel by what ran, where that differs too."""
    return varying_among(frame, asked(frame))


def varying_among(frame: pd.DataFrame, table: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """varying(), of some of the cells that were asked alone."""
    made = {}
    for name in table:
        if table[name].nunique() > 1:
            counts = table[name].groupby(shared(table, name)).transform("nunique")
            if (counts > 1).any():
                compared = set(table.loc[counts > 1, name].dropna())
                made[name] = tuple(v for v in values_of(frame, name) if v in compared)
    for name in RESOLVED:
        if name in made:
            made.pop(f"kernels.{name}", None)
    return made


def values_of(frame: pd.DataFrame, by: str) -> tuple[str, ...]:
    """The measured values of a setting, in the order in which people think of them."""
    column = asked(frame)[by]
    values = column[column.notna()].unique()
    if by == "family":
        return tuple(sorted(values, key=family_order))
    if by == "size":
        cells = outcomes(frame)
        params = cells.groupby("size")["num_params"].min().astype("float64").fillna(0.0)
        return tuple(sorted(values, key=lambda value: (params.get(value, 0.0), value)))

    def place(value: str) -> tuple:
        number = _number(value)
        return (number is None, number or 0.0, value)

    return tuple(sorted(values, key=place))


def baseline_of(
    by: str, values: Iterable[str], defaults: Mapping[str, Iterable[str]] | None = None
) -> str | None:
    """What the others stand beside: by convention, else what configs/ have, else the first; of
    several it is one of them, and a single one stands beside the conventional one."""
    values = tuple(values)
    for name in (BASELINE.get(by), *(defaults or {}).get(by, ())):
        if name in values:
            return name
    if len(values) > 1:
        return values[0]
    return BASELINE.get(by) or next(iter(values), None)


def label(by: str, value: str) -> str:
    """A value that stands alone says its name too: window_size=32."""
    return value if by in _OWN_NAMES else f"{by.rpartition('.')[2]}={value}"


def variants(table: pd.DataFrame, but: str) -> pd.Series:
    """What sets a cell apart from others of its suite, data, family and size, beside what tables
    show and the setting `but` that is compared: "lambda_init=code"."""
    hidden = {*SHOWN, *RESOLVED, but, *ALONG.get(but, ())} - {*ALONG["backend"]}
    made = np.full(len(table), "", dtype=object)
    for name, (is_told, words) in _told(table).items():
        if name not in hidden:
            is_first = (made == "") & is_told
            made[is_told & ~is_first] += ", "
            made[is_told] += words
    return pd.Series(made, index=table.index)


@remembered
def _told(table: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By setting which cells it sets apart from others of their suite, data, family and size, and
    what is said of it there."""
    groups = table.groupby(["suite", "data", "family", "size"], dropna=False, sort=False).ngroup()
    made = {}
    for name, numbers in _numbered(table).items():
        is_told = (numbers.groupby(groups).transform("nunique") > 1).to_numpy()
        values = table[name][is_told].fillna("null").astype(str).to_numpy(dtype=object)
        made[name] = is_told, f"{name.rpartition('.')[2]}=" + values
    return made


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
