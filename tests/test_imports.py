"""Imports run one way: the contracts of pyproject.toml hold, and the front door stays light."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"jax", "torch", "triton", "transformers", "optax", "hydra", "numpy", "pandas", "rich",
         "implementations"}  # fmt: skip


def test_the_contracts_hold():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom suites.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_submitit_closes_no_handler_of_others():
    code = (
        "import logging\nfrom suites.harness import launch\n"
        "class Handler(logging.Handler):\n    is_closed = False\n"
        "    def close(self):\n        self.is_closed = True\n"
        "handler = Handler()\nimport submitit\nprint(handler.is_closed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_only_the_front_door_imports_hydra():
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("implementations", "suites", "analysis")
        for path in (ROOT / folder).rglob("*.py")
        if "hydra" in path.read_text(encoding="utf-8").replace("Hydra", "")
    }
    assert users == {"suites/compose.py"}
