"""The main job, as a newcomer meets it: one command, every run completed, a report to look at."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

AERIE = Path(sys.executable).with_name("aerie")
QUICKSTART = ("run", "experiment=quickstart")
NUM_RUNS = 66  # (parity 1, training 2 x 3 rounds, decoding 3 rounds, language 1) x 3 x 2
LEARNED = 0.5  # bit per byte under the unigram entropy of the same text


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    done = aerie(*QUICKSTART, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done


def aerie(*arguments, cwd):
    return subprocess.run(
        [AERIE, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=3600
    )


def test_it_ends_with_the_tables_and_the_path_of_the_report(home):
    folder, done = home
    assert "JAX beside PyTorch" in done.stdout
    assert "Griffin beside MQA-Transformer" in done.stdout
    assert f"{NUM_RUNS} runs: {NUM_RUNS} completed." in done.stdout
    assert "3 rounds are too few for a verdict" in done.stdout
    path = folder / done.stdout.splitlines()[-1].removeprefix("report: ")
    assert path.name == "report.html"
    for file in ("report.md", "records.parquet", "tables/backend_jax_torch.csv",
                 "figures/learning_curves.png"):  # fmt: skip
        assert (path.parent / file).stat().st_size > 0


def test_every_speed_is_verified_and_every_comparison_matched(home):
    folder, _ = home
    report = folder / "results" / "reports" / "quickstart"
    assert "UNVERIFIED" not in (report / "report.html").read_text()
    certificate = pd.read_csv(report / "tables" / "certificate.csv")
    assert len(certificate) > 0
    assert set(certificate["matched"].str.strip()) == {"matched"}


def test_every_model_has_learned(home):
    folder, _ = home
    frame = pd.read_parquet(folder / "results" / "reports" / "quickstart" / "records.parquet")
    quality = frame[frame["suite"] == "language_modeling"]
    bits = quality[quality["metric"] == "bits_per_byte"].set_index("run_id")["value"]
    entropy = quality[quality["metric"] == "unigram_bits_per_byte"].set_index("run_id")["value"]
    assert len(bits) == 6
    assert (entropy - bits).min() > LEARNED


def test_running_it_again_starts_nothing(home):
    folder, _ = home
    done = aerie(*QUICKSTART, "--json", cwd=folder)
    assert done.returncode == 0
    assert json.loads(done.stdout)["num_started"] == 0
    assert "nothing to run" in done.stderr
