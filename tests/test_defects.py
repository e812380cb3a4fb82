"""The planted defects fit the code they are planted in, and a plant changes what is computed."""

import ast
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from suites.ladder.defects import DEFECTS, LEVELS, Defect, changed, plant

ROOT = Path(__file__).resolve().parents[1]

# Prints where the module lies, its compiled file's age before and after, and gelu of 1.
PLANT_AND_USE = """
import importlib.util, os
from suites.ladder.defects import DEFECTS, plant
def age():
    path = importlib.util.cache_from_source("implementations/reference.py")
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None
before = age()
[defect] = [d for d in DEFECTS if d.name == "truth_exact_gelu"]
plant(defect)
import numpy as np
from implementations import reference
print(os.path.relpath(reference.__file__), before == age(), float(reference.gelu(np.array(1.0))))
try:
    plant(defect)
except ValueError as error:
    print(error)
"""


def source(defect: Defect) -> str:
    return (ROOT / f"{defect.module.replace('.', '/')}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_the_line_occurs_once_and_what_replaces_it_is_python(defect):
    assert "\n" not in defect.line + defect.fault
    assert defect.level in LEVELS
    assert (defect.level == "truth") == (defect.backend is None)
    before = source(defect)
    assert ast.dump(ast.parse(changed(defect, before))) != ast.dump(ast.parse(before))


def test_names_are_unique_and_every_part_has_its_defects():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    assert all(d.name.split("_")[0] == (d.backend or "truth") for d in DEFECTS)
    count = Counter(defect.backend for defect in DEFECTS)
    assert count["jax"] + count["torch"] >= 25
    assert min(count["jax"], count["torch"]) >= 12
    assert count[None] >= 5
    assert {defect.level for defect in DEFECTS} == set(LEVELS)


def test_a_plant_changes_the_result_and_nothing_on_disk():
    done = subprocess.run(
        [sys.executable, "-c", PLANT_AND_USE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    used, refused = done.stdout.splitlines()
    path, is_untouched, gelu = used.split()
    assert path == "implementations/reference.py"
    assert is_untouched == "True"
    assert float(gelu) == pytest.approx(0.841345, abs=1e-6)  # Phi(1); the approximation: 0.841192
    assert "implementations.reference is imported already" in refused


@pytest.mark.parametrize(("line", "times"), [("no such line", "0"), ("return", r"\d\d")])
def test_a_line_that_does_not_occur_once_is_refused(line, times):
    defect = replace(DEFECTS[0], line=line)
    with pytest.raises(ValueError, match=f"occurs {times} times in {defect.module}"):
        changed(defect, source(defect))


def test_an_imported_module_is_refused():
    import implementations.config

    finders = list(sys.meta_path)
    with pytest.raises(ValueError, match="imported already"):
        plant(replace(DEFECTS[0], module=implementations.config.__name__))
    assert sys.meta_path == finders
