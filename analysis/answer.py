"""What a report says first: the answer in two sentences with numbers, and what limits it."""

import pandas as pd

from analysis import checks, derive, settings, statistics, style, vocabulary
from analysis.tables import Table


def answer(frame: pd.DataFrame, beside: list[Table]) -> list[str]:
    """Two sentences with numbers: the architectures, then the frameworks. `beside` are the tables
    of tables.comparisons."""
    return [_architectures(frame, beside), _frameworks(beside[0].frame)]


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
    quality = cells[cells["suite"] == "language_modeling"]
    if len(quality):
        seeds = int(quality["num_seeds"].min())
        if seeds == 1:
            made.append(
                "Language modeling has one seed: no spread between seeds is known, so a small "
                "difference may be chance."
            )
        elif seeds < 3:
            made.append(f"Language modeling has {seeds} seeds; 3 or more are needed for a spread.")
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
        others = [f"{v:.3f} for {style.family_label(f)}" for f, v in
                  zip(same["family"], same["value"], strict=True)]  # fmt: skip
        against = f", against {' and '.join(others)}" if others else ""
        seeds = _count(int(first["num_seeds"]), "seed")
        leader = first["family"]
        verb = "reaches the fewest" if others else "reaches"
        parts.append(
            f"{style.family_label(leader)} {verb} held-out bits per byte at size "
            f"{first['size']}, {first['value']:.3f}{against} "
            f"({style.backend_label(first['backend'])}, {seeds})"
        )
    for table in (table for table in beside if table.name.startswith("family_")):
        found = table.frame
        family = table.name.removeprefix("family_").removesuffix("_mqa")
        if leader not in (None, "mqa", family):
            continue
        for metric, what in (("step_time_ms", "a training step"), ("tpot_ms", "a decoded token")):
            part = found[(found["metric"] == metric) & found["speedup"].notna()]
            if len(part):
                costs = 1 / part["speedup"].astype(float)
                mark = "" if _verified(part) else f" [{checks.UNVERIFIED}]"
                name = style.family_label(family)
                parts.append(f"{what} of {name} takes {_range(costs)} of MQA's time{mark}")
    if not parts:
        return "No completed run compares the architectures."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _frameworks(found: pd.DataFrame) -> str:
    """How far the same model differs between JAX and PyTorch."""
    parts = []
    ratios = found[found["speedup"].notna()]
    compared = [
        ("training", ratios[ratios["metric"] == "step_time_ms"]),
        ("decoding", ratios[ratios["metric"] == "tpot_ms"]),
    ]
    scans = ratios[ratios["metric"] == "op_time_ms"]
    for names, part in scans.groupby(["linear_scan_ours", "linear_scan_baseline"]):
        variants = " beside ".join(dict.fromkeys(names))
        compared.append((f"the recurrence alone ({variants})", part))
    for what, part in compared:
        if len(part):
            mark = "" if _verified(part) else f" [{checks.UNVERIFIED}]"
            verdicts = part["verdict"].value_counts()
            words = ", ".join(f"{count} {name}" for name, count in verdicts.items())
            parts.append(
                f"in {what} JAX is {_range(part['speedup'].astype(float))} as fast as PyTorch over "
                f"{_count(len(part), 'matched cell')} ({words}){mark}"
            )
    quality = found[(found["metric"] == "bits_per_byte") & found["difference"].notna()]
    if len(quality):
        apart = quality["difference"].astype(float).abs().max()
        most = f"{apart:.4f} at most" if apart >= 5e-5 else "less than 0.0001"
        parts.append(f"held-out bits per byte differ between them by {most}")
    if not parts:
        return "No completed run compares the frameworks."
    text = "; ".join(parts)
    return f"The same model in both frameworks: {text}."


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
