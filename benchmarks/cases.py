"""What benchmarks/kernels.py measures: shapes, counted bytes and FLOPs, goals, and their judgement.

Nothing here touches a device. Bytes are those of the kernel files' docstrings, each moved once:
what a kernel moves beyond them counts against it. FLOPs of attention are those of the products
that must be done: two forward and five backward, 2 head_dim each for a visible pair and head; that
a kernel computes scores twice counts against it too.
"""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from implementations import cost
from implementations.config import ModelConfig, build

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
ITEMSIZE = cost.ITEMSIZE

# Bytes an element of bfloat16, forward and backward, and the axes whose product counts elements.
BYTES = {
    **{op: (*(2 * n for n in cost.scan_arrays(op)), "BTR") for op in ("linear_scan", "rg_lru")},
    "causal_conv": (4, 6, "BTR"),
    "rms_norm": (4, 6, "BTD"),
    "add_rms_norm": (8, 8, "BTD"),
    "gated_gelu": (6, 10, "BTF"),
    "rope": (4, 4, "BTNH"),
}
TOLERANCES = {"bfloat16": 2.0**-6, "float32": 2e-5}  # of the largest error over the largest value
TOKENS_PER_STEP = 16384
LENGTHS = (2048, 4096, 8192)  # arXiv:2402.19427, figure 3
VOCAB_SIZE = 32000
NUM_NEW_TOKENS = 32


@dataclass(frozen=True)
class Goal:
    metric: str  # a key of a row
    least: float

    def __str__(self) -> str:
        return f"{self.metric} >= {self.least:g}"


@dataclass(frozen=True)
class Case:
    """One op in one direction at one shape; every contender of it is timed in turn."""

    op: str
    direction: str
    axes: tuple[tuple[str, Any], ...]
    dtype: str = "bfloat16"
    goals: tuple[Goal, ...] = ()
    has_peers: bool = True

    @property
    def shape(self) -> dict[str, Any]:
        return dict(self.axes)

    @property
    def shape_text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.axes)

    @property
    def num_bytes(self) -> int | None:
        """Of all passes of the direction; None where arithmetic, not memory, is the limit."""
        if self.op not in BYTES:
            return None
        forward, backward, axes = BYTES[self.op]
        num_elements = math.prod(self.shape[axis] for axis in axes)
        of_bfloat16 = forward + (backward if self.direction == BOTH else 0)
        return num_elements * of_bfloat16 * ITEMSIZE[self.dtype] // ITEMSIZE["bfloat16"]

    @property
    def flops(self) -> float | None:
        size = self.shape
        if self.op == "attention":
            pairs = size["B"] * visible_pairs(size["T"], size.get("W"))
            return (14 if self.direction == BOTH else 4) * pairs * size["N"] * size["H"]
        if self.op == "mean_cross_entropy":
            num_products = 3 if self.direction == BOTH else 1
            return 2 * num_products * size["B"] * size["T"] * size["D"] * size["V"]
        return None


@dataclass(frozen=True)
class Section:
    limit_s: float
    cases: tuple[Case, ...]


def visible_pairs(T: int, W: int | None) -> int:
    """Of query and key, in one causal sequence, in a window of W keys or none."""
    W = T if W is None else min(W, T)
    return W * (W + 1) // 2 + (T - W) * W


def case(op: str, direction: str, *, goals: tuple[Goal, ...] = (), **axes) -> Case:
    settings = {key: axes.pop(key) for key in ("dtype", "has_peers") if key in axes}
    return Case(op, direction, tuple(axes.items()), goals=goals, **settings)


def sections(only: list[str] | None = None, *, quick: bool = False) -> dict[str, Section]:
    """By name, the most important first; `only`: these, and the parity that they stand on. quick:
    the first case of each op and direction alone, and of the models those of 400m."""
    made = {
        "parity": Section(110, tuple(parity_cases())),
        "rg_lru": Section(120, tuple(recurrence_cases())),
        "attention": Section(130, tuple(attention_cases())),
        "models": Section(150, tuple(model_cases())),
        "layers": Section(70, tuple(layer_cases())),
        "linear_scan": Section(30, tuple(scan_cases())),
        "cross_entropy": Section(45, tuple(loss_cases())),
    }
    if quick:
        for name in made.keys() - {"parity"}:
            first = {}
            for one in made[name].cases:
                family = one.shape.get("family")
                if one.shape.get("size") != "1b":
                    first.setdefault((one.op, one.direction, family, "W" in one.shape), one)
            made[name] = Section(made[name].limit_s, tuple(first.values()))
    if not only:
        return made
    chosen = {name: made[name] for name in made if name in only}
    ops = {one.op for section in chosen.values() for one in section.cases}
    ops |= {"model"} if "models" in only else set()
    needed = tuple(one for one in made["parity"].cases if one.op in ops)
    return {"parity": Section(made["parity"].limit_s, needed)} | chosen


def parity_cases() -> list[Case]:
    """Small odd shapes, documents that start within a tile; forward and backward."""
    scans = ({"B": 2, "T": 257, "R": 65, "document": 37},)
    heads = {"B": 2, "T": 333, "N": 6, "H": 128, "document": 101}
    rows = {"B": 3, "T": 67}
    shapes = {
        "rg_lru": scans,
        "linear_scan": scans,
        "causal_conv": scans,
        "rms_norm": ({**rows, "D": 1000},),
        "add_rms_norm": ({**rows, "D": 1000},),
        "gated_gelu": ({**rows, "F": 333},),
        "rope": ({**rows, "N": 3, "H": 80},),
        "attention": ({**heads, "W": 50}, {**heads, "T": 200, "N": 4, "H": 256}),
        "mean_cross_entropy": ({**rows, "D": 128, "V": 1003},),
    }
    made = [
        case(op, BOTH, dtype=dtype, has_peers=False, **shape)
        for op, several in shapes.items()
        for shape in several
        for dtype in ("float32", "bfloat16")
    ]
    return made + [
        case("model", BOTH, size="tiny", family=family, dtype="bfloat16")
        for family in ("griffin", "mqa", "hawk")
    ]


def recurrence_cases() -> list[Case]:
    """R of 2560 is that of 1b; peers there alone, where they are quick to compile."""
    faster = Goal("ratio", 1.5)
    large = [(2048, 2560), (2048, 1024), (4096, 4096), (16384, 1024), (2048, 8192), (16384, 8192)]
    small = [(2048, 2560), (8192, 2560), (16384, 8192)]
    made = []
    for B, shapes, least in ((8, large, (0.9, 0.8)), (1, small, (0.7, 0.7))):
        for (T, R), (direction, bound) in product(shapes, zip(DIRECTIONS, least, strict=True)):
            has_peers = (T, R) == (2048, 2560)
            goals = (Goal("of_copy", bound), *([faster] if has_peers else []))
            made.append(case("rg_lru", direction, B=B, T=T, R=R, goals=goals, has_peers=has_peers))
    return made


def scan_cases() -> list[Case]:
    shapes = ((8, 2048, 2560), (8, 8192, 4096), (1, 16384, 2560))
    return [
        case("linear_scan", direction, B=B, T=T, R=R, has_peers=(B, T) == (8, 2048))
        for (B, T, R), direction in product(shapes, DIRECTIONS)
    ]


def attention_cases() -> list[Case]:
    heads = {"N": 16, "H": 128}
    window = [
        case("attention", direction, B=2, T=8192, **heads, W=1024, goals=(Goal("ratio", 1.0),))
        for direction in DIRECTIONS
    ]
    every_key = [
        case("attention", direction, B=32768 // T, T=T, **heads, goals=(Goal("ratio", 0.95),))
        for T, direction in product((2048, 8192, 16384, 4096), DIRECTIONS)
    ]
    lengths = [
        case("attention", direction, B=2, T=T, **heads, W=1024, has_peers=False)
        for T, direction in product((4096, 16384), DIRECTIONS)
    ]
    return window + lengths + every_key


def layer_cases() -> list[Case]:
    """At the widths of 1b."""
    rows = {"B": 8, "T": 2048}
    shapes = {
        "rms_norm": {**rows, "D": 2048},
        "add_rms_norm": {**rows, "D": 2048},
        "gated_gelu": {**rows, "F": 6144},
        "causal_conv": {**rows, "R": 2560},
        "rope": {**rows, "N": 16, "H": 128},
    }
    goals = (Goal("ratio", 1.0),)
    return [
        case(op, direction, goals=goals, **shape)
        for (op, shape), direction in product(shapes.items(), DIRECTIONS)
    ]


def loss_cases() -> list[Case]:
    return [
        case("mean_cross_entropy", BOTH, B=4, T=2048, D=2048, V=V, goals=(Goal("ratio", 1.0),))
        for V in (32000, 256000)
    ]


def model_cases() -> list[Case]:
    """Cases of one model follow each other: they share its engine."""
    made = []
    for size, family in product(("1b", "400m"), ("griffin", "mqa", "hawk")):
        model = {"size": size, "family": family}
        for T in LENGTHS:
            goals = (Goal("mfu", 0.5),) if size == "1b" else ()
            made.append(case("train", BOTH, **model, B=TOKENS_PER_STEP // T, T=T, goals=goals))
        if size == "1b":
            goals = (Goal("mbu", 0.8),)
            made.append(case("decode", FORWARD, **model, B=16, context=4096, goals=goals))
    return made


def model_config(size: str, family: str) -> ModelConfig:
    """That of the files in configs/, in the order in which config.yaml composes them."""
    import yaml

    def read(name: str) -> dict[str, Any]:
        return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))

    values = read("config")["model"] | read("settings/paper")
    values |= read(f"size/{size}") | read(f"family/{family}")
    vocab_size = 256 if size == "tiny" else VOCAB_SIZE
    return build(ModelConfig, values | {"vocab_size": vocab_size}, f"{family} {size}")


def judge(rows: list[dict[str, Any]]) -> None:
    """Adds to the rows of one case, in place: the ratio to the fastest peer that computes the same,
    and whether our goals are met. A speed without a green parity verdict meets none."""
    peers = [r["ms"] for r in rows if not r["is_ours"] and r.get("ms") and r["parity"] == "ok"]
    for row in rows:
        if not row["is_ours"] or not row.get("ms"):
            continue
        row["ratio"] = min(peers) / row["ms"] if peers else None
        values = [(row.get(goal["metric"]), goal["least"]) for goal in row["goals"]]
        known = all(value is not None for value, _ in values)
        if values:
            is_met = known and all(value >= least for value, least in values)
            row["met"] = None if not known else is_met and row["parity"] == "ok"


def cross_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Goals between cases that were measured: growth with length, one family beside another."""
    ours: dict[tuple, float] = {}
    for row in rows:
        if row.get("is_ours") and row.get("ms") and row["parity"] == "ok":
            shape = row["shape"]
            key = (row["op"], row["direction"], shape.get("size"), shape.get("family"),
                   shape.get("W"), shape.get("B") if row["op"] == "attention" else None,
                   shape.get("T"))  # fmt: skip
            ours[key] = min(row["ms"], ours.get(key, math.inf))
    made = []

    def compare(name: str, above: tuple, below: tuple, most: float, scale: float = 1.0) -> None:
        """above / below / scale must be at most `most`; left out where either is not there."""
        if above in ours and below in ours:
            value = ours[above] / ours[below] / scale
            made.append({"goal": name, "value": value, "most": most, "met": value <= most})

    for direction in DIRECTIONS:
        short, long = (("attention", direction, None, None, 1024, 2, T) for T in (4096, 16384))
        name = f"local attention, {direction}: time a token at T=16384 over T=4096"
        compare(name, long, short, 1.1, scale=4)
    for size in ("400m", "1b"):
        griffin = {T: ("train", BOTH, size, "griffin", None, None, T) for T in LENGTHS}
        mqa = ("train", BOTH, size, "mqa", None, None, 2048)
        compare(f"griffin {size}: step at 8192 over 2048", griffin[8192], griffin[2048], 1.1)
        compare(f"{size} at 2048: griffin over mqa", griffin[2048], mqa, 1.0)
    return made
