"""From what the user typed to plain settings: Hydra's override grammar, files and groups.

Hydra composes every choice of a request once, all in one composition (one for each combination
would cost 50 ms apiece); swept values are crossed here, into plain dicts that the planner checks.
Every mistake is a ValueError of one line.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from implementations.config import build, choose
from suites.harness.cluster import Cluster
from suites.harness.rounds import MOST_ROUNDS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODEL_GROUPS = ("settings", "size", "family", "gate")  # together they make a model; later ones win
GROUPS = ("suite", *MODEL_GROUPS, "backend", "data", "optimizer", "cluster")
SECTIONS = ("model", "kernels")
VALUES = ("dtype", "device_kind", "checkpoint")
UNTIL, ROUNDS = "suite.until_ci", "suite.rounds"
WINDOW = "model.window_size"  # which global attention has not
EXPERIMENT = ("experiment", "scale")  # which one, and at which of its scales
# `aerie plan family=griffin size=7b`: one training step at the paper's sequence length.
BARE_PLAN = ("suite=training_speed", "suite.seq_lens=[2048]",
             "suite.tokens_per_step=2048", "suite.rounds=1", "dtype=bfloat16")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What was asked: a title, where to run, and the settings of every suite and model."""

    title: str
    clusters: tuple[Cluster, ...]  # a run goes to the first that offers its device kind
    settings: list[dict[str, Any]]
    command: str = "run"  # that asked for it
    question: str | None = None  # of the experiment's own, that its report answers

    @property
    def cluster(self) -> Cluster:
        """The one that runs here; ValueError where it does not, or where several are named."""
        names = ",".join(cluster.name for cluster in self.clusters)
        if len(self.clusters) > 1 or self.clusters[0].executor != "local":
            raise ValueError(
                f"cluster={names}: aerie {self.command} runs on this machine; use aerie submit."
            )
        return self.clusters[0]


def read(overrides: Iterable[str], *, bare: Iterable[str] = ()) -> Request:
    """The request in a list of overrides; `bare` stands before them where no suite is named."""
    typed = parse(overrides)
    experiment, scale = typed.pop("experiment", None), typed.pop("scale", None)
    question, along = None, []
    if experiment is None:
        below: dict[str, list[Any]] = {}
        if scale is not None:
            raise ValueError(
                f"scale={scale[0]} belongs to an experiment: experiment=paper/figure3 scale=cpu."
            )
        if "suite" not in typed:
            if not bare:
                raise ValueError(
                    "nothing to run: name a suite (suite=training_speed) or an experiment "
                    "(experiment=quickstart). "
                    f"Suites: {', '.join(choices('suite'))}."
                )
            below = parse(bare)
        suites = typed.pop("suite", None) or below.pop("suite")
        parts = [(name, _layered(name, below, typed)) for name in _known("suite", suites)]
        title = ", ".join(name for name, _ in parts)
    else:
        title = str(_single("experiment", experiment))
        values, where = _experiment(title)
        question = values.get("question")
        parts = _experiment_parts(values, where, _scale(values, where, scale), typed)
        along = _along(values.get("along") or {}, where, typed)
    wanted = [_groups(part) for _, part in parts]
    together = {group: list(dict.fromkeys(n for part in wanted for n in part[group]))
                for group in defaults()}  # fmt: skip
    suites = list(dict.fromkeys(suite for suite, _ in parts))
    files = Files(together | {"suite": suites})
    _check_suite_keys(suites, typed, files)
    settings = [made for suite, part in parts for made in _cross(suite, part, files, along)]
    clusters = [
        build(Cluster, values, f"cluster={name}")
        for name, values in _clusters(parts[0][1], files).items()
    ]
    return Request(title, tuple(clusters), settings, question=question)


def _clusters(overrides: dict[str, list[Any]], files: "Files") -> dict[str, dict[str, Any]]:
    """Name to settings of the clusters of a request: all it names, each with what was typed of
    clusters. They are not swept: every run goes to one of them."""
    typed = {
        key.removeprefix("cluster."): _single(key, values)
        for key, values in overrides.items()
        if key.startswith("cluster.")
    }
    made = {}
    for name in _groups(overrides)["cluster"]:
        made[name] = copy.deepcopy(files.choice("cluster", name))
        _set(made[name], typed)
    return made


def parse(overrides: Iterable[str]) -> dict[str, list[Any]]:
    """Key to its values (more than one: a sweep); a later override of a key replaces it."""
    found: dict[str, list[Any]] = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            hint = "" if "=" in text else " Overrides look like key=value."
            raise ValueError(f"{_unreadable(text, error)}{hint}") from None
        if override.is_delete():
            raise ValueError(f"{text!r}: settings cannot be removed; set the key to null.")
        if override.package:
            raise ValueError(f"{text!r}: a group has one place; write {override.key_or_group}=...")
        key = override.key_or_group
        _check_root(key)
        try:
            found[key] = _values(key, override)
        except HydraException as error:
            raise ValueError(_unreadable(text, error)) from None
        if not found[key]:
            raise ValueError(f"{text!r} sweeps over nothing.")
    return found


def _unreadable(text: str, error: HydraException) -> str:
    return f"cannot read override {text!r}: {str(error).splitlines()[0]}."


def choices(group: str) -> list[str]:
    """The files of a group; those in a folder of it are named with it: paper/figure3."""
    folder = CONFIGS / group
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found)


def _values(key: str, override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    if isinstance(override.value(), Glob):
        names = override.value().filter(choices(key)) if key in GROUPS else []
        if not names:
            raise ValueError(f"{override.input_line!r} matches nothing in configs/{key}.")
        return names
    return [Override._convert_value(value) for value in override.sweep_iterator()]


def _check_root(key: str) -> None:
    root, _, rest = key.partition(".")
    known = [*GROUPS, *SECTIONS, *VALUES, *EXPERIMENT]
    if root not in known:
        close = get_close_matches(root, known, n=1)
        where = f"{close[0]}.{rest}" if close and rest else (close or [""])[0]
        hint = f"Did you mean {where!r}?" if close else _owner(root, known)
        raise ValueError(f"unknown key {key!r}. {hint}")
    if not rest and root in SECTIONS:
        raise ValueError(f"{key!r} is a section; set one of its keys, like {key}.window_size=512.")
    if rest and root in (*VALUES, *MODEL_GROUPS, "backend", *EXPERIMENT):
        raise ValueError(f"unknown key {key!r}: {root!r} has no keys. Architecture is model.{rest}")


def _owner(name: str, known: list[str]) -> str:
    """Where a bare key lives, if some section has it: window_size is model.window_size."""
    files = Files({group: [choice] for group, choice in defaults().items()})
    sections = {"model": files.model(*(defaults()[group] for group in MODEL_GROUPS))}
    sections |= {group: files.choice(group, defaults()[group]) for group in ("data", "optimizer")}
    for section, values in sections.items():
        if close := get_close_matches(name, list(values), n=1, cutoff=0.8):
            return f"Did you mean '{section}.{close[0]}'?"
    return f"Known keys: {', '.join(known)}."


def _known(group: str, names: list[Any]) -> list[str]:
    for name in names:
        choose(group, str(name), tuple(choices(group)), f"configs/{group}")
    return [str(name) for name in names]


def _single(key: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise ValueError(f"{key} takes one value, not {len(values)}.")
    return values[0]


def _experiment(name: str) -> tuple[dict[str, Any], str]:
    """What the file of an experiment says, and where that stands."""
    choose("experiment", name, tuple(choices("experiment")), "configs/experiment")
    where = f"configs/experiment/{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "experiment" / f"{name}.yaml"))
    known = ("question", "overrides", "suites", "scales", "along")
    for key in values:
        choose("key", key, known, where)
    if not values.get("suites"):
        raise ValueError(f"{where}: needs the key suites.")
    if not isinstance(values.get("question", ""), str):
        raise ValueError(f"{where}: question={values['question']!r}; must be text.")
    return values, where


def _scale(values: dict[str, Any], where: str, typed: list[Any] | None) -> dict[str, Any]:
    """What the scale that was typed lays over the experiment: overrides and suites, as it has."""
    if typed is None:
        return {}
    name = str(_single("scale", typed))
    scales = values.get("scales") or {}
    if not scales:
        raise ValueError(f"scale={name}: {where} has no scales; leave it out.")
    found = scales[choose("scale", name, tuple(map(str, scales)), where)]
    if not isinstance(found, dict):
        raise ValueError(
            f"{where}, scale {name}: has the keys overrides and suites, not {found!r}."
        )
    for key in found:
        choose("key", key, ("overrides", "suites"), f"{where}, scale {name}")
    for suite in found.get("suites") or ():
        choose("suite", suite, tuple(values["suites"]), f"{where}, scale {name}")
        own = values["suites"][suite]
        if isinstance(own, dict):
            for data in found["suites"][suite]:
                choose("data", str(data), tuple(own), f"{where}, scale {name}, suite {suite}")
    return found


def _along(
    values: dict[str, list[str]], where: str, typed: dict[str, list[Any]]
) -> list[tuple[str, Any, dict[str, Any]]]:
    """(key, its value, what goes along with it): `size=cpu_50k: [suite.num_steps=500]`. What was
    typed wins over that too."""
    made = []
    for choice, overrides in values.items():
        ((key, value),) = parse([choice]).items()
        found = {name: _single(name, swept) for name, swept in parse(overrides).items()}
        for name in found:
            if name in GROUPS:
                raise ValueError(f"{where}, along {choice}: {name!r} is a group; name settings.")
        kept = {name: value for name, value in found.items() if name not in typed}
        made.append((key, _single(key, value), kept))
    return made


def _experiment_parts(
    values: dict[str, Any], where: str, scale: dict[str, Any], typed: dict[str, list[Any]]
) -> list[tuple[str, dict[str, list[Any]]]]:
    """Suites with their overrides: the experiment's, the suite's own, the same two of the scale,
    and what was typed. A suite whose own are told by data set comes once for each of those that
    the experiment has and that were typed, if any were."""
    suites = _known("suite", list(values["suites"]))
    if wanted := typed.pop("suite", None):
        for suite in _known("suite", wanted):
            choose("suite", suite, tuple(suites), where)
        suites = [suite for suite in suites if suite in wanted]

    def layers(suite: str, data: str | None) -> Iterator[dict[str, list[Any]]]:
        for layer in (values, scale):
            yield parse(layer.get("overrides") or ())
            own = (layer.get("suites") or {}).get(suite) or ()
            yield parse(own if data is None else dict(own).get(data) or ())
        yield typed if data is None else typed | {"data": [data]}

    parts: list[tuple[str, str | None]] = []
    for suite in suites:
        own = values["suites"][suite]
        if not isinstance(own, dict):
            parts.append((suite, None))
            continue
        names = _known("data", typed.get("data") or list(own))
        for name in names:
            choose("data", name, tuple(own), f"{where}, suite {suite}")
        parts += [(suite, name) for name in names]
    made = [(suite, _layered(suite, *layers(suite, data))) for suite, data in parts]
    if typed.get("family") == ["mqa"] and WINDOW not in typed:
        for _, part in made:
            part.pop(WINDOW, None)  # it is that of the experiment's other families
    return made


def _layered(suite: str, *layers: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """All of them; later ones win. One that asks for an interval, and names no number of rounds,
    allows as many as that may take."""
    made: dict[str, list[Any]] = {}
    for layer in layers:
        made |= layer
        if layer.get(UNTIL, [None]) != [None] and ROUNDS not in layer and _has_until(suite):
            made[ROUNDS] = [MOST_ROUNDS]
    return made


def _has_until(suite: str) -> bool:
    return UNTIL.partition(".")[2] in OmegaConf.load(CONFIGS / "suite" / f"{suite}.yaml")


def _check_suite_keys(suites: list[str], typed: dict[str, Any], files: "Files") -> None:
    """A key suite.x reaches the suites that have it: at least one must."""
    known = sorted(set().union(*(files.choice("suite", suite) for suite in suites)) - {"name"})
    for key in typed:
        root, _, rest = key.partition(".")
        field = rest.partition(".")[0]
        if root == "suite" and rest and field not in known:
            close = get_close_matches(field, known, n=1)
            hint = f"Did you mean 'suite.{close[0]}'?" if close else f"Known: {', '.join(known)}."
            if key == UNTIL:
                hint = "Rounds end early (--until-ci) where a suite is timed."
            raise ValueError(f"suite={','.join(suites)}: unknown key {key!r}. {hint}")


def _groups(overrides: dict[str, list[Any]]) -> dict[str, list[str]]:
    """Group to the choices of it that are swept."""
    return {
        group: _known(group, overrides[group]) if group in overrides else [choice]
        for group, choice in defaults().items()
    }


def _cross(
    suite: str,
    overrides: dict[str, list[Any]],
    files: "Files",
    along: Iterable[tuple[str, Any, dict[str, Any]]] = (),
) -> list[dict[str, Any]]:
    """One settings dict for each combination of swept values, the first key varying slowest; what
    goes along with a value follows it."""
    groups = _groups(overrides)
    known = files.choice("suite", suite)

    def reaches(key: str) -> bool:
        return not (key.startswith("suite.") and key.split(".")[1] not in known)

    values = {
        key: swept
        for key, swept in overrides.items()
        if key not in GROUPS and not key.startswith("cluster.") and reaches(key)
    }

    def follows(key: str, names: dict[str, str]) -> bool:
        return reaches(key) and (key != WINDOW or names["family"] != "mqa")

    made = []
    del groups["cluster"]
    for chosen in product(*groups.values()):
        names = dict(zip(groups, chosen, strict=True))
        base = files.settings(names | {"suite": suite})
        # a window is that of the families beside it which have one
        has_window = names["family"] != "mqa" or len(groups["family"]) == 1
        own = {key: swept for key, swept in values.items() if has_window or key != WINDOW}
        for point in product(*own.values()):
            found = dict(zip(own, point, strict=True))
            for key, value, more in along:
                if (names | found).get(key) == value:
                    found |= {name: item for name, item in more.items() if follows(name, names)}
            made.append(_apply(copy.deepcopy(base), found))
    return made


def _set(settings: dict[str, Any], values: dict[str, Any]) -> None:
    """Sets keys like model.window_size in nested settings."""
    for key, value in values.items():
        *path, last = key.split(".")
        section = settings
        for name in path:
            if not isinstance(section.get(name), dict):
                raise ValueError(f"unknown key {key!r}: {name!r} has no keys.")
            section = section[name]
        section[last] = value


def _apply(settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    _set(settings, values)
    model = settings["model"]
    if model["family"] == "mqa" and model["window_size"] is not None:
        raise ValueError(
            f"model.window_size={model['window_size']}: family=mqa sees every key; "
            "for attention in a window use family=mqa_local."
        )
    model.setdefault("vocab_size", settings["data"].get("vocab_size", 256))
    for key, value in settings["optimizer"].items():
        if isinstance(value, dict):  # of each family its own
            if model["family"] not in value:
                raise ValueError(
                    f"optimizer.{key} has no value for family={model['family']}; "
                    f"known: {', '.join(value)}. Set optimizer.{key}."
                )
            settings["optimizer"][key] = value[model["family"]]
    return settings


@cache
def defaults() -> dict[str, str]:
    """Group to the choice that config.yaml makes; a suite is always named."""
    listed = OmegaConf.to_container(OmegaConf.load(CONFIGS / "config.yaml"))["defaults"]
    made = {
        group: name for item in listed if isinstance(item, dict) for group, name in item.items()
    }
    return {group: name for group, name in made.items() if group != "suite"}


class Files:
    """The files of some choices, composed by Hydra at once, each in a package of its own."""

    def __init__(self, groups: dict[str, list[str]]) -> None:
        self._places: dict[tuple[str, ...], str] = {}
        overrides = [f"~{group}" for group in (*defaults(), "suite")]
        for names in product(*(groups[group] for group in MODEL_GROUPS)):
            place = self._place("model", *names)
            chosen = zip(MODEL_GROUPS, names, strict=True)
            overrides += [f"+{group}@{place}={name}" for group, name in chosen]
        for group, names in groups.items():
            if group not in MODEL_GROUPS:
                overrides += [f"+{group}@{self._place(group, name)}={name}" for name in names]
        self._values = copy.deepcopy(_composed(CONFIGS, tuple(overrides)))

    def model(self, *names: str) -> dict[str, Any]:
        """Of one choice of each of MODEL_GROUPS."""
        return self._values["model"] | self._values[self._places["model", *names]]

    def choice(self, group: str, name: str) -> dict[str, Any]:
        return self._values[self._places[group, name]]

    def settings(self, chosen: dict[str, str]) -> dict[str, Any]:
        """All sections for one choice of each group."""
        made = {key: self._values[key] for key in ("kernels", *VALUES)}
        made["model"] = self.model(*(chosen[group] for group in MODEL_GROUPS))
        made["backend"] = self.choice("backend", chosen["backend"])["backend"]
        for group in ("suite", "data", "optimizer"):
            made[group] = self.choice(group, chosen[group])
        return made

    def _place(self, *key: str) -> str:
        return self._places.setdefault(key, f"choice_{len(self._places)}")


@cache  # a command that plans, proves parity and reports asks for the same choices again
def _composed(folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose("config", list(overrides))
        return OmegaConf.to_container(config, resolve=True)
    except HydraException as error:
        raise ValueError(f"configs: {str(error).splitlines()[0]}") from None
