"""Which runs make the ladder: families, settings, backends, dtypes, and every kernel variant."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

from implementations.engine import AUTO, CPU, LANGUAGES, Kernels, auto
from suites import compose
from suites.harness import plan, provenance
from suites.harness.run import Run

PEER = "transformers"  # needs the released code's settings
FAMILIES = "family=mqa,mqa_local,hawk,griffin"
SETTINGS = "settings=paper,released"
BACKENDS = "backend=jax,torch"
DTYPES = "dtype=float64,float32,bfloat16"
DTYPES_OF = {"L1": "float64", "L2": "float32", "L3": "float64,float32", "L7": "bfloat16"}
SEEDS = "suite.seeds=[0,1,2,3,4]"  # of L6
# The mixer that a setting of the kernels is for (None: every model), and a file of its kernels.
CALLED = {
    "linear_scan": ("rg_lru", "linear_scan"),
    "attention": ("mqa", "attention"),
    "layers": (None, "rms_norm"),
}


def gate(overrides: list[str], levels: Iterable[str] = ()) -> list[Run]:
    """The rungs of the gate, or those of `levels`, in all dtypes; with the kernels that `auto`
    stands for, and in float32 with each of the others (interpreted, in bfloat16 too); the peer
    where it can be compared."""
    typed = compose.parse(overrides)
    levels = list(levels)
    dtypes = sorted(
        {d for level in levels for d in DTYPES_OF.get(level, "float64,float32").split(",")}
    )
    made = [FAMILIES, SETTINGS, BACKENDS, DTYPES if not levels else f"dtype={','.join(dtypes)}"]
    base = _expand([*made, *overrides, f"suite.levels=[{','.join(levels)}]"])
    runs = list(base)
    if not any(key.startswith("kernels.") for key in typed):
        others = list(_other_kernels(run for run in base if run.dtype == "float32"))
        runs += others
        if any(run.dtype == "bfloat16" for run in base):  # what they are made for
            runs += [replace(run, dtype="bfloat16") for run in others if _is_shipped(run.kernels)]
    is_comparable = not levels or {"L4", "L7"} & set(levels)
    if "backend" not in typed and provenance.versions()[PEER] and is_comparable:
        runs += peer_runs(base)
    runs.sort(key=_is_fast)
    return list({run.run_id: run for run in runs}.values())


def _is_fast(run: Run) -> tuple[bool, ...]:
    """For a sort that begins with the slowest."""
    return run.backend != "jax", not run.kernels.interpret, run.dtype != "bfloat16"


def long(overrides: list[str], level: str) -> list[Run]:
    """L5: hundreds of steps on text. L6: the same, from several seeds."""
    seeds = [SEEDS] if level == "L6" else []
    made = [FAMILIES, BACKENDS, *seeds, *overrides, f"suite.levels=[{level}]"]
    return _expand(made)


def _other_kernels(runs: Iterable[Run]) -> Iterator[Run]:
    """Each family with each other variant of the kernels that it calls, with the first settings."""
    seen = set()
    for run in runs:
        place = (run.model.family, run.backend, run.seed)
        if place not in seen:
            seen.add(place)
            for chosen, is_interpreted in _choices(run):
                kernels = replace(run.kernels, **chosen, interpret=is_interpreted)
                yield replace(run, kernels=kernels)


def _choices(run: Run) -> Iterator[tuple[dict[str, str], bool]]:
    """({setting: variant}, whether it is interpreted): all variants that `auto` does not stand for.

    Interpreted ones of one name go together, as an interpreter is slow.
    """
    resolved, together = auto(run.backend, run.device_kind), {}
    for setting, (mixer, file) in CALLED.items():
        if mixer is not None and mixer not in run.model.pattern:
            continue
        for name in offered(run.backend, file):
            if name == resolved[setting]:
                continue
            if run.device_kind == CPU and name.startswith(LANGUAGES):
                together.setdefault(name, {})[setting] = name
            else:
                yield {setting: name}, False
    for chosen in together.values():
        yield chosen, True


def _is_shipped(kernels: Kernels) -> bool:
    """Interpreted here, and what `auto` stands for on some other device."""
    somewhere = {name for variants in AUTO.values() for name in variants.values()}
    return kernels.interpret and not somewhere.isdisjoint(kernels.chosen.values())


def need_peer() -> None:
    if provenance.versions()[PEER] is None:
        raise ValueError(f"{PEER} is not installed, and the truth is held to it: aerie[hf].")


def peer_runs(runs: list[Run]) -> Iterator[Run]:
    """The same models in the independent implementation, where that has their settings."""
    for run in runs:
        has_settings = run.model.logit_soft_cap is not None
        if has_settings and run.backend == "torch" and run.dtype != "float64":
            yield replace(run, backend=PEER)


@cache
def offered(backend: str, op: str) -> tuple[str, ...]:
    """The names in VARIANTS of a kernel's file, read from its syntax: no framework is imported."""
    path = provenance.ROOT / "implementations" / f"{backend}_backend" / "kernels" / f"{op}.py"
    if not path.exists():
        return ()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
            return tuple(key.value for key in node.value.keys)
    raise AssertionError(f"{path} has no VARIANTS")


def _expand(overrides: list[str]) -> list[Run]:
    request = compose.read(["suite=parity", "size=tiny", *overrides])
    return [run for settings in request.settings for run in plan.expand(settings)]
