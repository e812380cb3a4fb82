"""Evidence on synthetic tasks: figure 6(a) and (b)."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from analysis import derive, recall, statistics
from analysis.evidence.groups import (
    ABOVE_ONE,
    ANY,
    INF,
    SEED,
    Finding,
    Group,
    Key,
    Quantity,
    any_of,
    groups,
    label_of,
    rows_of,
)

SIZE = "synthetic"  # the networks of figure 6(a, b)
HELD = 0.9  # of the answers right: the task is held
COPYING, COPYING_LENGTH, COPYING_ITEMS = "selective_copying", 1024, 16
INDUCTION, INDUCTION_LENGTH, TIMES = "induction_heads", 256, (2, 16)
SHARED = ("kernels", "data", "recipe", "size", "shared_model", "num_tokens", "num_steps",
          "seq_len", "num_items")  # fmt: skip


def selective_copying(frame: pd.DataFrame) -> list[Finding]:
    """Steps of Hawk to an accuracy of 0.9 over those of MQA and Griffin, seed by seed. A run that
    did not get there counts as one at its last step: of Hawk that is a lower bound of the ratio,
    of the others it is none."""
    rows = _rows(frame, "accuracy", COPYING)
    rows = rows.drop_duplicates("run_id")
    steps = recall.steps_to_accuracy(frame).set_index("run_id")[90]
    value = rows["run_id"].astype(object).map(steps).astype(float)
    num_steps = rows["num_steps"].astype(float)
    rows = rows.assign(value=value.clip(upper=num_steps), is_short=np.isinf(value))
    missed = rows.groupby("run_id", observed=True)["is_short"].any()
    made = []
    for group in groups(rows, [], SHARED, SEED):
        if not group.has(("hawk",)):
            continue
        others = [(name,) for name in ("mqa", "griffin") if group.has((name,))]
        short = {key: sum(bool(missed[run]) for run in ids) for key, ids in group.ids.items()}
        quantities = [_steps_ratio(group, key, short[("hawk",)]) for key in others]
        keys = [("hawk",), *others]
        lacks = _lacks(group, keys, COPYING_LENGTH)
        if group.settings["num_items"] != COPYING_ITEMS:
            lacks.append(f"{group.settings['num_items']} tokens to copy, not {COPYING_ITEMS}")
        lacks += [_not_learned(group, key, short[key]) for key in others if short[key]]
        made += group.finding(quantities, keys, lacks, "seed")
    return made


def _steps_ratio(group: Group, key: Key, num_short: int) -> tuple[Quantity, int]:
    found = group.rows([("hawk",), key])
    least = " at least" if num_short else ""
    label = f"steps to {HELD} of Hawk over those of {label_of(key[0])}{least}"
    if not found.size:
        return Quantity(label, float("nan"), None, ABOVE_ONE), 0
    logs = np.log(found[:, 0] / found[:, 1])
    interval = statistics.student_interval(logs)
    interval = None if interval is None else tuple(float(np.exp(end)) for end in interval)
    return Quantity(label, float(np.exp(logs.mean())), interval, ABOVE_ONE), len(logs)


def induction_heads(frame: pd.DataFrame) -> list[Finding]:
    """Accuracy of Hawk and Griffin at 16 times the training length, of MQA at twice; told only of
    models that hold the task where they were trained."""
    rows = _rows(frame, "accuracy_by_length", INDUCTION)
    counts = derive.processes(frame)
    counts = counts[counts["metric"] == "num_examples"]
    counts = pd.Series(counts["value"].to_numpy(float), counts["run_id"].astype(object))
    rows = rows.assign(length=rows["at"].astype(int),
                       num_examples=rows["run_id"].astype(object).map(counts))  # fmt: skip
    made = []
    for group in groups(rows, ["length"], [*SHARED, "num_examples"], SEED):
        trained, n = int(group.settings["seq_len"]), group.settings["num_examples"]
        twice, far = (trained * times for times in TIMES)
        wanted = [("hawk", far, (HELD, INF)), ("griffin", far, (HELD, INF)),
                  ("mqa", twice, (-INF, HELD))]  # fmt: skip
        quantities, keys, lacks = [], [], []
        for family, length, holds in wanted:
            if not group.has((family, trained), (family, length)):
                lacks.append(f"nothing of {label_of(family)} at {length:,}")
                continue
            values = group.columns[family, trained].values()
            if short := sum(value < HELD for value in values):
                lacks.append(_not_learned(group, (family, trained), short))
                holds = ANY
            label = f"accuracy of {label_of(family)} at {length:,}"
            quantities.append(_accuracy(group, (family, length), label, n, holds))
            keys += [(family, trained), (family, length)]
        if keys and any(quantity.holds != ANY for quantity, _ in quantities):
            lacks = _lacks(group, keys, INDUCTION_LENGTH) + lacks
            made += group.finding(quantities, keys, lacks, "seed")
    return made


def _accuracy(
    group: Group, key: Key, label: str, num_examples: float, holds: tuple[float, float]
) -> tuple[Quantity, int]:
    """The mean over seeds, with the wider of the intervals over examples and over seeds."""
    values = np.array(list(group.columns[key].values()))
    n = int(num_examples) * len(values)
    low, high = statistics.accuracy_interval(round(values.mean() * n), n)
    if (seeds := statistics.student_interval(values)) is not None:
        low, high = max(0.0, min(low, seeds[0])), min(1.0, max(high, seeds[1]))
    return Quantity(label, float(values.mean()), (low, high), holds, unit=""), len(values)


def _rows(frame: pd.DataFrame, metric: str, data: str) -> pd.DataFrame:
    rows = rows_of(frame, recall.SUITE, metric)
    rows = rows[rows["data"] == data]
    runs = derive.runs(frame).set_index("run_id")["settings"]
    items = [json.loads(text)["data"].get("num_items", 0) for text in runs.reindex(rows["run_id"])]
    return rows.assign(num_items=items)


def _lacks(group: Group, keys: Sequence[Key], seq_len: int) -> list[str]:
    return list(_each_lack(group, keys, seq_len))


def _each_lack(group: Group, keys: Sequence[Key], seq_len: int) -> Iterator[str]:
    sizes = {group.facts[key]["size"] for key in keys}
    if sizes != {SIZE}:
        yield f"size {any_of(sorted(sizes))}, not {SIZE}"
    if group.settings["seq_len"] != seq_len:
        yield f"trained at {int(group.settings['seq_len']):,} tokens, not {seq_len:,}"
    if any(group.facts[key]["lambda_init"] == "code" for key in keys):
        yield "decays that start as in the released code, not as in the paper"
    missing = {"mqa", "hawk", "griffin"} - {key[0] for key in keys}
    if missing:
        yield f"nothing of {' and '.join(label_of(name) for name in sorted(missing))}"


def _not_learned(group: Group, key: Key, number: int) -> str:
    steps = int(group.settings["num_steps"])
    seeds = len(group.columns[key])
    return f"{label_of(key[0])} did not learn it in {steps:,} steps ({number} of {seeds} seeds)"
