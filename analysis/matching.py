"""The matching certificate: what runs that are compared had in common, and what they had not."""

from dataclasses import dataclass

import pandas as pd

from analysis import derive, settings, vocabulary
from analysis.comparisons import OUR_KERNELS


@dataclass(frozen=True)
class Match:
    """One line of the matching certificate: who is compared, what is equal, what is not."""

    suite: str
    size: str
    scope: str  # "griffin: jax, torch", "jax: griffin, hawk, mqa" or "hawk jax, gate: gru, rg_lru"
    is_matched: bool | None  # None: one side only, or a fact that was not recorded
    differs: tuple[str, ...]
    facts: dict[str, str]
    run_ids: tuple[str, ...]


MATCHED_ACROSS_BACKENDS = ("num_params", "num_params_non_embedding", "train_flops_per_token",
                           "num_tokens", "optimizer", "data_digest", "init_digest",
                           "scan_kernels")  # fmt: skip
MATCHED_ACROSS_MODELS = ("num_tokens", "optimizer", "data_digest", "kernels_used")
FACTS = (*MATCHED_ACROSS_BACKENDS, "kernels_used")


def certificate(frame: pd.DataFrame) -> list[Match]:
    """What the runs compared had in common: per family across backends; per backend across
    families; and per family and backend across the values of each setting of the model that is
    ablated. Runs of one seed and round are held against each other. Backends must both scan with a
    kernel of ours, or neither; models of one backend must run the same kernels."""
    rows = derive.runs(frame)
    rows = rows[(rows["suite"] != "parity") & (rows["outcome"] == "completed")].copy()
    work = [rows[name].astype("float64").fillna(0) for name in
            ("batch_size", "seq_len", "prompt_len", "num_new_tokens", "num_steps")]  # fmt: skip
    batch, seq, prompt, new, steps = work
    rows["num_tokens"] = batch * (seq + prompt + new) * steps.clip(lower=1)
    rows["scan_kernels"] = rows["linear_scan"].map(_kind, na_action="ignore")
    ran = rows[list(settings.RESOLVED)].astype(object)
    ran["layers"] = ran["layers"].fillna("plain")  # old records: there was no other
    used = [name + " " + ran[name] for name in ran]
    rows["kernels_used"] = used[0].str.cat(used[1:], sep=", ")
    rows["one_model"] = rows["family"].astype(str) + " " + rows["backend"].astype(str)
    table = settings.asked(frame)
    ablated = [name for name in settings.varying(frame) if name.startswith("model.")]
    made = []
    for by, held, same in (
        ("backend", "family", MATCHED_ACROSS_BACKENDS),
        ("family", "backend", MATCHED_ACROSS_MODELS),
        *((name, "one_model", MATCHED_ACROSS_MODELS) for name in ablated),
    ):
        if by in ablated:
            rows[by] = rows["cell_id"].map(table[by])
        rows["match"] = rows["cell_id"].map(settings.shared(table, by))
        for (suite, size, who), group in rows.groupby(["suite", "size", held], sort=False):
            if by not in ablated or group[by].nunique() > 1:
                made.append(_match(group, by, same, suite, size, who))
    families = [*vocabulary.FAMILIES, *sorted(set(rows["family"]) - set(vocabulary.FAMILIES))]

    def place(match: Match) -> tuple:
        who = match.scope.split(":")[0].split(" ")[0]
        return (match.suite, match.size, families.index(who) if who in families else 99, who)

    return sorted(made, key=place)


def _match(
    group: pd.DataFrame, by: str, same: tuple[str, ...], suite: str, size: str, who: str
) -> Match:
    names = sorted(group[by].dropna().unique(), key=vocabulary.family_order)
    differs, unknown, compared = [], [], False
    points = group.groupby(["match", "seed", "round"], sort=False)
    together = points[by].transform("nunique") > 1
    compared = bool(together.any())
    for fact in same:
        part = group[together]
        if part.empty:
            continue
        if part[fact].isna().any():
            unknown.append(fact)
        if by == "family" and fact == "optimizer":
            part = part.assign(optimizer=part["optimizer"].map(_but_tuned))
        counts = part.groupby(["match", "seed", "round"], sort=False)[fact].nunique()
        if (counts > 1).any():
            differs.append(fact)
    facts = {fact: _span(group[fact]) for fact in FACTS}
    if not differs and (unknown or not compared):
        verdict = None
        differs = [f"{name} not recorded" for name in unknown] or [f"{names[0]} only"]
    else:
        verdict = not differs
    own = "" if by in ("backend", "family") else f", {by.removeprefix('model.')}"
    scope = f"{who}{own}: {', '.join(names)}"
    return Match(suite, size, scope, verdict, tuple(differs), facts, tuple(group["run_id"]))


def _kind(variant: str) -> str:
    return "hand-written" if variant.startswith(OUR_KERNELS) else "composed"


def _but_tuned(optimizer: str) -> str:
    """Without the values that each family was given as its own best, of equally long searches."""
    words = optimizer.split(", ")
    if f"name={settings.TUNED}" not in words:
        return optimizer
    own = {name.rpartition(".")[2] for name in settings.TUNED_ALONG}
    return ", ".join(word for word in words if word.partition("=")[0] not in own)


def _span(values: pd.Series) -> str:
    """The value, "low to high" of numbers, or how many different texts there are."""
    known = values.dropna().unique()
    if not len(known):
        return "-"
    if isinstance(known[0], str):
        return known[0] if len(known) == 1 else f"{len(known)} values"
    low, high = min(known), max(known)
    return f"{int(low):,}" if low == high else f"{int(low):,} to {int(high):,}"
