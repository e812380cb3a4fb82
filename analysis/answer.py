"""What a report says first: the answer in two sentences with numbers, and what limits it."""

import pandas as pd

from analysis import (
    checks,
    comparisons,
    derive,
    lengths,
    positions,
    quality,
    recall,
    settings,
    statistics,
    style,
    vocabulary,
)
from analysis.tables import Table

FAR = 16  # times the training length: what the claims of induction heads are about


def answer(frame: pd.DataFrame, beside: list[Table]) -> list[str]:
    """Sentences with numbers: the architectures, what an ablated setting does, the frameworks, each
    where runs compare them. `beside` are the tables of report.comparison_tables."""
    frameworks = [table.frame for table in beside if table.name == "backend_jax_torch"]
    said = [_architectures(frame, beside), _trained_longer(frame), _domains(frame),
            _tasks(frame), _ablated(beside), *map(_frameworks, frameworks)]  # fmt: skip
    return [text for text in said if text] or [
        "No completed run compares the architectures.",
        "No completed run compares the frameworks.",
    ]


def caveats(frame: pd.DataFrame) -> list[str]:
    """What the numbers are too few, too old or too unchecked to say."""
    made = []
    cells = derive.summary(frame)
    timed = cells[cells["metric"].isin(vocabulary.TIMES)]
    few = timed.loc[timed["num_rounds"] < statistics.MIN_ROUNDS, "num_rounds"]
    if len(few):
        low, high = int(few.min()), int(few.max())
        rounds = _count(high, "round") if low == high else f"{low} to {high} rounds"
        some = "Timings" if len(few) == len(timed) else f"{len(few)} of {len(timed)} timings"
        made.append(
            f"{some} have {rounds}: too few for a verdict, which needs "
            f"{statistics.MIN_ROUNDS}; their comparisons are inconclusive."
        )
    runs = derive.runs(frame)
    programs = set(runs.loc[runs["suite"].isin(set(timed["suite"])), "program"].dropna())
    if programs >= {"eager", "compiled"}:
        made.append(
            "JAX ran compiled programs and PyTorch eager code: small models feel the difference "
            "most, in decoding above all. kernels.compile=true compiles PyTorch too."
        )
    if mixed := int((cells.drop_duplicates("cell_id")["num_builds"] > 1).sum()):
        made.append(f"{_count(mixed, 'cell')} mix runs of several builds.")
    if resumed := int((runs["num_segments"] > 1).sum()):
        made.append(
            f"{_count(resumed, 'run')} went on from a checkpoint: seconds, start-up times and peak "
            "memory are those of the last process alone; losses are of all steps."
        )
    learned = cells[cells["suite"] == "language_modeling"]
    if len(learned):
        counts = learned.groupby("cell_id")["num_seeds"].max()
        seeds, few = int(counts.min()), int((counts == 1).sum())
        if seeds == 1:
            who = "Language modeling has" if few == len(counts) else \
                f"{few} of {len(counts)} cells of language modeling have"  # fmt: skip
            made.append(
                f"{who} one seed: no spread between seeds is known, so a small "
                "difference may be chance."
            )
        elif seeds < 3:
            made.append(f"Language modeling has {seeds} seeds; 3 or more are needed for a spread.")
    above = quality.above_ngrams(frame)["is_above"]
    if above.any():
        made.append(
            f"{int(above.sum())} of {_count(len(above), 'language model')} are not below an "
            "order-3 n-gram model of the same text: they have learned too little to be compared."
        )
    made += quality.edges(frame)
    speeds = cells[cells["metric"].isin(vocabulary.SPEEDS)]
    bare = int((speeds["parity"] != checks.GREEN).sum())
    if bare:
        made.append(
            f"{bare} of {len(speeds)} speed numbers are {checks.UNVERIFIED}: no green parity "
            "record of the same kernels, head_dim, dtype, device and build."
        )
    if len(cells) and (odd := int(cells["num_outliers"].sum())):
        made.append(f"{_count(odd, 'repeat')} lie far from their median: flagged, not dropped.")
    if stale := int((runs["is_current"] == False).sum()):  # noqa: E712 - the column knows null
        made.append(f"{_count(stale, 'run')} came from an older build and are marked stale.")
    return made


def _architectures(frame: pd.DataFrame, beside: list[Table]) -> str:
    """The family of least held-out loss, and what its training step and its tokens cost."""
    cells = derive.summary(frame)
    bits = cells[cells["metric"] == "bits_per_byte"].sort_values("value", kind="stable")
    parts = []
    leader = None
    if len(bits):
        first = bits.iloc[0]
        group = bits["cell_id"].map(settings.shared(settings.asked(frame), "family"))
        same = bits[(group == group.iloc[0]) & (bits["family"] != first["family"])]
        same = same.drop_duplicates("family")
        others = [
            f"{row['value']:.3f} for {style.family_label(row['family'])}"
            f"{'' if _is_resolved(frame, first, row) else ' (not resolved)'}"
            for row in same.to_dict("records")
        ]
        against = f", against {' and '.join(others)}" if others else ""
        seeds = _count(int(first["num_seeds"]), "seed")
        leader = first["family"]
        verb = "reaches the fewest" if others else "reaches"
        variant = f" with {first['variant']}" if first["variant"] else ""
        parts.append(
            f"{style.family_label(leader)}{variant} {verb} held-out bits per byte at size "
            f"{first['size']}, {first['value']:.3f}{against} "
            f"({style.backend_label(first['backend'])}, {seeds})"
        )
    for table in (table for table in beside if table.name.startswith("family_")):
        found = table.frame
        family = table.name.removeprefix("family_").removesuffix("_mqa")
        if leader not in (None, "mqa", family):
            continue
        for metric, what in (("step_time_ms", "a training step"), ("tpot_ms", "a decoded token")):
            name = style.family_label(family)
            for where, part in _by_device(found, found["metric"] == metric):
                kept = part[part["verdict"] != statistics.UNPAIRED]
                costs = f"takes {_range(1 / kept['speedup'].astype(float))} of" if len(kept) else \
                    "has no verdict beside"  # fmt: skip
                parts.append(f"{what} of {name} {costs} MQA's time{where} {_over(part)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if parts else ""


def _trained_longer(frame: pd.DataFrame) -> str:
    """What longer training sequences do to the loss at positions where none was trained."""
    found, said = positions.longer(frame), []
    for (short, long, start), part in found.groupby(["short", "long", "start"]):
        told = ["family", "variant", *(n for n in ("size", "backend") if part[n].nunique() > 1)]
        words = []
        for row in part.sort_values("family", key=_in_order).to_dict("records"):
            family, *rest = (row[name] for name in told)
            who = " ".join(filter(None, (style.family_label(family), *rest)))
            words.append(f"{who} {_change(row['value'], row['interval'])} {row['verdict']}")
        said.append(
            f"Nats per token at positions from {start:,} on, after training on {long:,} tokens at "
            f"a time instead of {short:,}, as many in all: {'; '.join(words)}."
        )
    return " ".join(said)


def _domains(frame: pd.DataFrame) -> str:
    """What documents of other lengths than were trained cost each family."""
    found = lengths.domains(frame)
    found = found[found["penalty"].notna()]
    parts = []
    for name, is_it in (("shorter", found["trained"] < found["evaluated"]),
                        ("longer", found["trained"] > found["evaluated"])):  # fmt: skip
        words = []
        for family, part in found[is_it].groupby("family", sort=False):
            low, high = part["penalty"].min(), part["penalty"].max()
            span = f"{low:+.3f}" if low == high else f"{low:+.3f} to {high:+.3f}"
            ends = (f"{n} {verdict}" for verdict, n in part["verdict"].value_counts().items())
            words.append(f"{style.family_label(family)} {span} ({', '.join(ends)})")
        if words:
            parts.append(f"trained on {name} documents {', '.join(words)}")
    text = "; ".join(parts)
    return text and (
        "Nats per token beside the model of the family that was trained in the evaluated bucket of "
        f"lengths: {text}."
    )


def _tasks(frame: pd.DataFrame) -> str:
    """How soon each family learned each task, and what it holds of it at the longest examples that
    are at most FAR times those of training."""
    runs = recall.steps_to_accuracy(frame)
    if runs.empty:
        return ""
    held = recall.accuracies(frame, "accuracy_by_length").set_index(["cell_id", "at"])["value"]
    said = []
    for (task, seq_len, backend), part in runs.groupby(["data", "seq_len", "backend"]):
        cells = set(part["cell_id"])
        asked = [at for cell, at in held.index if cell in cells]
        far = max((at for at in asked if at <= FAR * seq_len), default=seq_len)
        words = []
        by_family = sorted(part.groupby("family"), key=lambda one: vocabulary.family_order(one[0]))
        for family, same in by_family:
            steps = float(same[recall.LEVELS[0]].median())
            soon = f"in {steps:,.0f} steps" if steps < recall.INF else "not in its steps"
            values = [held.get((cell, far)) for cell in same["cell_id"].unique()]
            share = ", ".join(f"{value:.2f}" for value in values if pd.notna(value))
            words.append(f"{style.family_label(family)} {soon}, {share or 'nothing'} at {far:,.0f}")
        counts = part.groupby("cell_id")["seed"].nunique()
        least, most = int(counts.min()), int(counts.max())
        seeds = _count(most, "seed") if least == most else f"{least} to {most} seeds"
        said.append(
            f"{recall.LEVELS[0]}% of {task} at {seq_len:,} tokens "
            f"({style.backend_label(backend)}, {seeds}): {'; '.join(words)}."
        )
    return " ".join(said)


def _in_order(families: pd.Series) -> pd.Series:
    return families.map(vocabulary.family_order)


def _change(value: float, interval: statistics.Interval | None) -> str:
    return f"{value:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")


def _ablated(beside: list[Table]) -> str:
    """What the values of a setting that was varied do to the loss, each beside its baseline: the
    difference where it is one of one pair of cells, else how many were found to differ."""
    parts: dict[str, list[str]] = {}
    for table in beside:
        value, _, baseline = table.title.partition(" beside ")
        found = table.frame
        found = found[(found["metric"] == "bits_per_byte") & found["difference"].notna()]
        if table.name.startswith(("backend_", "family_")) or found.empty:
            continue
        words = ", ".join(
            f"{n} {verdict}" for verdict, n in found["verdict"].value_counts().items()
        )
        if len(found) == 1:
            row = found.iloc[0]
            ends = row["difference_low"], row["difference_high"]
            interval = None if pd.isna(ends[0]) else ends
            words = f"{_change(row['difference'], interval)} {row['verdict']}"
        parts.setdefault(baseline, []).append(f"{value} {words}")
    return " ".join(
        f"Held-out bits per byte beside {baseline}, each for itself: {'; '.join(words)}."
        for baseline, words in parts.items()
    )


def _frameworks(found: pd.DataFrame) -> str:
    """How far the same model differs between JAX and PyTorch."""
    parts = []
    compared = [
        ("training", found["metric"] == "step_time_ms"),
        ("decoding", found["metric"] == "tpot_ms"),
    ]
    is_scan = found["metric"] == "op_time_ms"
    kernels = ["linear_scan_ours", "linear_scan_baseline"]
    for names in found.loc[is_scan, kernels].dropna().drop_duplicates().sort_values(kernels).values:
        variants = " beside ".join(dict.fromkeys(names))
        is_it = is_scan & (found[kernels] == names).all(axis=1)
        compared.append((f"the recurrence alone ({variants})", is_it))
    for what, is_wanted in compared:
        for where, part in _by_device(found, is_wanted):
            kept = part[part["verdict"] != statistics.UNPAIRED]
            ratio = f"is {_range(kept['speedup'].astype(float))} as fast as" if len(kept) else \
                "has no verdict beside"  # fmt: skip
            parts.append(f"in {what} JAX {ratio} PyTorch{where} {_over(part)}")
    quality = found[(found["metric"] == "bits_per_byte") & found["difference"].notna()]
    if len(quality):
        apart = quality["difference"].astype(float).abs().max()
        most = f"{apart:.4f} at most" if apart >= 5e-5 else "less than 0.0001"
        parts.append(f"held-out bits per byte differ between them by {most}")
    return f"The same model in both frameworks: {'; '.join(parts)}." if parts else ""


def _is_resolved(frame: pd.DataFrame, ours: pd.Series, other: dict) -> bool:
    """Whether seeds tell the bits per byte of two cells of two families apart."""
    rows = comparisons.comparisons(
        frame, "family", ours["family"], other["family"], metrics=("bits_per_byte",)
    )
    is_pair = (rows["cell_id_ours"] == ours["cell_id"]) & (
        rows["cell_id_baseline"] == other["cell_id"]
    )
    return bool(rows.loc[is_pair, "verdict"].isin(["better", "worse"]).any())


def _by_device(found: pd.DataFrame, is_wanted: pd.Series) -> list[tuple[str, pd.DataFrame]]:
    """The ratios of each kind of device, which no range spans, with its name where there are
    several."""
    part = found[is_wanted & found["speedup"].notna()]
    is_one = found["device_kind"].nunique() < 2
    return [("" if is_one else f" on {kind}", rows) for kind, rows in part.groupby("device_kind")]


def _over(part: pd.DataFrame) -> str:
    """Of how many cells a range is, with their verdicts; unpaired ones are no part of it."""
    is_paired = part["verdict"] != statistics.UNPAIRED
    kept, num_unpaired = part[is_paired], int((~is_paired).sum())
    words = [f"{n} {name}" for name, n in kept["verdict"].value_counts().items()]
    if num_unpaired:
        words.append(f"{num_unpaired} {statistics.UNPAIRED}, left out")
    mark = "" if _verified(kept) else f" [{checks.UNVERIFIED}]"
    return f"over {_count(len(kept), 'matched cell')} ({', '.join(words)}){mark}"


def _verified(part: pd.DataFrame) -> bool:
    return bool(
        (part["parity_ours"] == checks.GREEN).all()
        and (part["parity_baseline"] == checks.GREEN).all()
    )


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}x", f"{values.max():.2f}x"
    return low if low == high else f"{low} to {high}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
