"""Factorial ablation: effects by hand, designs with holes, error rates, what is not estimable."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from synthetic_records import modeling, record, sample

from analysis import factorial, report, tables, verify
from analysis.load import frame_of
from suites.harness.record import write

NAMES = ("a", "b", "c")
AERIE = Path(sys.executable).with_name("aerie")
SWEEP = ("suite=language_modeling", "family=griffin", "size=cpu_50k", "backend=jax,torch",
         "gate=rg_lru,lru", "model.window_size=16,32", "dtype=float32", "suite.num_steps=10",
         "suite.batch_size=2", "suite.seq_len=64", "suite.num_held_out_batches=2",
         "suite.seeds=[0,1,2]", "cluster.runs_in_parallel=2")  # fmt: skip


def grid(value, seeds=range(3), levels=((0, 1), (0, 1), (0, 1)), names=NAMES) -> pd.DataFrame:
    rows = [
        dict(zip(names, cell, strict=True)) | {"seed": seed, "value": value(*cell, seed)}
        for seed in seeds
        for cell in product(*levels)
    ]
    return pd.DataFrame(rows)


def noisy(scale: float, number: int = 0):
    rng = np.random.default_rng(number)
    return lambda *cell: (
        2 * cell[0] - cell[1] + 0.5 * cell[0] * cell[1] + cell[-1] + scale * rng.standard_normal()
    )


def row_of(made: factorial.Ablation, effect: str) -> pd.Series:
    return made.effects.set_index("effect").loc[effect]


def test_two_by_two_by_two_by_hand():
    """Differences of means of eight cells; noise only in the three-way interaction and seeds."""
    noise = {0: 0.3, 1: -0.1, 2: -0.2}  # times the sign of the three-way interaction
    sign = lambda *cell: (-1) ** sum(cell)  # noqa: E731
    design = grid(
        lambda a, b, c, seed: 10 * seed + 2 * a - b + 0.5 * a * b + noise[seed] * sign(a, b, c)
    )
    made = factorial.effects(design)
    # averaged over b: 2 + 0.5 / 2; over a: -1 + 0.5 / 2
    assert row_of(made, "a")["difference"] == pytest.approx(2.25)
    assert row_of(made, "b")["difference"] == pytest.approx(-0.75)
    assert row_of(made, "c")["difference"] == pytest.approx(0, abs=1e-9)
    assert row_of(made, "a x b")["difference"] == pytest.approx(0.5)
    # residual: 8 cells of each seed, noise^2; 24 values - 3 seeds - 3 mains - 3 pairs = 15 free
    square = 8 * (0.3**2 + 0.1**2 + 0.2**2) / 15
    half = scipy.stats.t.ppf(0.975, 15) * np.sqrt(square * (1 / 12 + 1 / 12))
    found = row_of(made, "a")
    assert (found["low"], found["high"]) == pytest.approx((2.25 - half, 2.25 + half))
    table = made.variance.set_index("effect")
    assert table.loc["residual", ["freedom", "mean_square"]].tolist() == pytest.approx([15, square])
    assert table.loc["a", "sum_of_squares"] == pytest.approx(24 / 4 * 2.25**2)
    assert table.loc["a x b", "F"] == pytest.approx(24 / 16 * 0.5**2 / square)
    assert table.loc["b", "p"] == pytest.approx(found := row_of(made, "b")["p"])
    assert found == pytest.approx(2 * scipy.stats.t.sf(0.75 / np.sqrt(square / 6), 15))


def test_a_missing_cell_leaves_all_effects_where_they_are():
    design = grid(noisy(0.0))
    holed = design[~((design["a"] == 1) & (design["b"] == 1) & (design["c"] == 1))]
    made = factorial.effects(holed)
    assert made.num_missing == 1
    for effect, value in (("a", 2.25), ("b", -0.75), ("c", 0), ("a x b", 0.5), ("b x c", 0)):
        assert row_of(made, effect)["difference"] == pytest.approx(value, abs=1e-9)
    means = holed.groupby("a")["value"].mean()  # which the hole has made unequal
    assert means[1] - means[0] != pytest.approx(2.25, abs=0.05)


def test_missing_seeds_of_a_cell_are_no_bias_either():
    design = grid(noisy(0.0))
    holed = design.drop(
        design[(design["seed"] == 2) & (design["a"] == 0) & (design["b"] == 0)].index
    )
    assert row_of(factorial.effects(holed), "a")["difference"] == pytest.approx(2.25)


def test_an_interaction_without_one_of_its_cells_is_not_estimable():
    design = grid(lambda a, b, seed: 2 * a - b + seed, levels=((0, 1), (0, 1)), names=("a", "b"))
    made = factorial.effects(design[(design["a"] == 0) | (design["b"] == 0)])
    found = row_of(made, "a x b")
    assert (found["verdict"], found["reason"]) == ("not estimable", "no run with a=1, b=1")
    assert row_of(made, "a")["difference"] == pytest.approx(2)
    assert row_of(made, "b")["difference"] == pytest.approx(-1)


def test_factors_that_change_together_are_not_estimable():
    design = grid(lambda a, seed: a + seed, levels=((0, 1),), names=("a",)).assign(
        b=lambda d: d["a"]
    )
    made = factorial.effects(design)
    assert set(made.effects["verdict"]) == {"not estimable"}
    assert "changes with other factors" in row_of(made, "a")["reason"]


def test_three_levels_stand_beside_the_baseline_that_is_named():
    design = grid(lambda a, b, seed: {"x": 1.0, "y": 3.0, "z": 0.5}[a] + b + seed,
                  levels=(("x", "y", "z"), (0, 1)), names=("a", "b"))  # fmt: skip
    found = factorial.effects(design, baseline={"a": "y"}).effects
    found = found[found["effect"] == "a"].set_index("levels")["difference"]
    assert found["a=x beside y"] == pytest.approx(-2)
    assert found["a=z beside y"] == pytest.approx(-2.5)


def test_one_seed_gives_differences_without_intervals():
    made = factorial.effects(grid(noisy(0.1), seeds=[0]))
    assert made.effects["difference"].notna().all()
    assert made.effects[["low", "p", "p_holm", "detectable"]].isna().all(axis=None)
    assert set(made.effects["verdict"]) == {"not resolved"}
    assert set(made.effects["reason"]) == {"1 seed"}


def test_better_is_lower_or_higher():
    design = grid(noisy(0.01))
    assert row_of(factorial.effects(design), "b")["verdict"] == "better"
    assert row_of(factorial.effects(design, better="higher"), "b")["verdict"] == "worse"


def test_intervals_hold_the_truth_and_no_effect_is_seldom_called_one():
    """300 designs without any effect: a false verdict in at most 5%, by Holm; intervals at 95%."""
    rng = np.random.default_rng(0)
    held, false = [], 0
    for _ in range(300):
        made = factorial.effects(grid(lambda *cell: cell[-1] + rng.standard_normal())).effects
        held += list((made["low"] <= 0) & (made["high"] >= 0))
        false += made["verdict"].isin(["better", "worse"]).any()
    assert 0.93 <= np.mean(held) <= 0.97
    assert false / 300 <= 0.08  # 5% and three deviations of 300 trials


def test_p_values_of_all_rows_are_adjusted_together():
    made = factorial.effects(grid(noisy(1.0))).effects
    assert made["p_holm"].min() == pytest.approx(min(1, len(made) * made["p"].min()))
    assert (made["p_holm"] >= made["p"]).all()


@pytest.mark.parametrize(
    ("design", "options", "message"),
    [
        (grid(noisy(0)).drop(columns="seed"), {}, "needs the columns seed"),
        (grid(noisy(0)).assign(a=1), {}, "'a' is no factor"),
        (grid(noisy(0)), {"baseline": {"a": 7}}, "baseline a=7: no run has it; known: 0, 1"),
    ],
)
def test_what_is_no_design_is_refused_in_one_line(design, options, message):
    with pytest.raises(ValueError, match=message):
        factorial.effects(design, **options)


def trained(loss: float, seed: int, backend: str = "jax", family: str = "griffin", **model):
    return record("language_modeling", family, backend, samples=(sample("bits_per_byte", loss),),
                  seed=seed, block=None, model=model)  # fmt: skip


def ablation_records(backend: str = "jax", scale: float = 1.0) -> list:
    """lambda_init and biases, two by two, three seeds."""
    rng = np.random.default_rng(len(backend))
    return [
        trained(2 + 0.1 * seed + scale * (0.05 * (init == "code") - 0.02 * biases)
                + 0.001 * rng.standard_normal(), seed, backend, lambda_init=init, biases=biases)
        for init in ("paper", "code") for biases in (True, False) for seed in range(3)
    ]  # fmt: skip


def test_factors_are_the_settings_that_vary_and_results_stand_by_backend():
    frame = frame_of(ablation_records("jax") + ablation_records("torch", -1.0))
    found = factorial.factors(frame, "language_modeling")
    assert found == {"model.biases": ("false", "true"), "model.lambda_init": ("code", "paper")}
    made = factorial.ablations(frame, "language_modeling", baseline={"model.lambda_init": "paper"})
    assert list(made) == ["jax", "torch"]
    for backend, sign in (("jax", 1), ("torch", -1)):
        row = row_of(made[backend], "model.lambda_init")
        assert row["levels"] == "lambda_init=code beside paper"
        assert row["difference"] == pytest.approx(sign * 0.05, abs=0.003)
        assert row["verdict"] == ("worse" if sign > 0 else "better")
        assert made[backend].num_seeds == 3
        assert (
            row_of(made[backend], "model.biases x model.lambda_init")["verdict"] == "not resolved"
        )


def test_a_family_without_the_setting_is_no_part_of_its_ablation():
    records = ablation_records()
    records += [trained(3.0, seed, family="mqa", lambda_init="none") for seed in range(3)]
    (made,) = factorial.ablations(frame_of(records), "language_modeling").values()
    assert list(made.effects["effect"].unique()) == [
        "model.biases", "model.lambda_init", "model.biases x model.lambda_init"
    ]  # fmt: skip
    assert made.num_cells == 4


def test_times_are_taken_apart_by_their_logarithms_over_rounds():
    rng = np.random.default_rng(0)
    records = [
        record(samples=(sample("step_time_ms", takes * rng.normal(1, 0.001)),), round=round,
               model={"lambda_init": init}, seq_len=64)
        for init, takes in (("paper", 10), ("code", 11)) for round in range(6)
    ]  # fmt: skip
    made = factorial.ablations(
        frame_of(records), "training_speed", baseline={"model.lambda_init": "paper"}
    )
    row = row_of(made["jax"], "model.lambda_init")
    assert row["difference"] == pytest.approx(np.log(1.1), abs=0.002)
    assert (row["verdict"], made["jax"].num_seeds) == ("worse", 6)


def test_where_nothing_varies_there_is_no_ablation():
    frame = frame_of([trained(2.0, seed) for seed in range(3)])
    assert factorial.ablations(frame, "language_modeling") == {}


def test_a_level_of_which_no_run_completed_is_no_level():
    records = ablation_records()
    lost = [
        record("language_modeling", seed=seed, block=None, outcome="diverged",
               model={"lambda_init": "paper", "biases": "some"})
        for seed in range(3)
    ]  # fmt: skip
    (made,) = factorial.ablations(frame_of(records + lost), "language_modeling").values()
    assert "some" not in " ".join(made.effects["levels"])


def test_rounding_is_no_effect():
    """Settings that change no bit: what differs between seeds leaves rounding of 1e-16."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        base = rng.normal(2.5, 0.1, 3)
        made = factorial.effects(grid(lambda *cell, base=base: base[cell[-1]]))
        assert set(made.effects["verdict"]) == {"not resolved"}
        assert (made.effects["difference"] == 0).all()
        assert (made.variance["sum_of_squares"] == 0).all()


def test_a_difference_without_noise_is_resolved():
    made = factorial.effects(grid(lambda a, b, c, seed: 2.5 + 0.1 * seed + 1e-9 * a))
    verdicts = made.effects.set_index("effect")["verdict"]
    assert verdicts.pop("a") == "worse"
    assert set(verdicts) == {"not resolved"}


def test_without_the_conventional_baseline_the_first_measured_level_is_it(tmp_path):
    records = [
        modeling(family, "jax", seed, model={"lambda_init": init})
        for family, init, seed in product(("hawk", "griffin"), ("paper", "code"), range(3))
    ]
    (made,) = factorial.ablations(frame_of(records), "language_modeling").values()
    assert made.baseline == {"family": "hawk", "model.lambda_init": "code"}
    path = report.write_report(tmp_path, tmp_path / "out", title="T", command="c",
                               frame=frame_of(records))  # fmt: skip
    assert "family=griffin beside hawk" in path.with_suffix(".md").read_text()


def test_a_baseline_of_what_does_not_vary_is_refused():
    frame = frame_of(ablation_records())
    with pytest.raises(ValueError, match=r"model\.window_size=32: not varied in language_modeling"):
        factorial.ablations(frame, "language_modeling", baseline={"model.window_size": "32"})


def test_the_table_of_an_ablation_names_baseline_verdict_and_what_is_missing():
    records = ablation_records("jax") + ablation_records("torch")[:-3]
    baseline = {"model.lambda_init": "paper", "model.biases": "true"}
    made = {table.name: table for table in tables.ablations(frame_of(records), baseline)}
    assert list(made) == [f"{what}_language_modeling_{backend}" for backend in ("jax", "torch")
                          for what in ("ablation", "variance")]  # fmt: skip
    table = made["ablation_language_modeling_jax"]
    row = next(row for row in table.rows if row[0] == "model.lambda_init")
    assert row[1] == "lambda_init=code beside paper"
    assert row[2].startswith("+0.05")
    assert (row[2].endswith("] bit/B"), row[4]) == (True, "worse")
    together = next(row for row in table.rows if " x " in row[0])
    assert together[4].startswith("not resolved (0.00")
    assert "model.biases=true, model.lambda_init=paper" in table.note
    assert "1 of 4 cells are missing" in made["ablation_language_modeling_torch"].note
    lost = next(row for row in made["ablation_language_modeling_torch"].rows if " x " in row[0])
    assert lost[2] == "-"
    assert lost[4] == "not estimable (no run with model.biases=false, model.lambda_init=code)"
    assert made["variance_language_modeling_jax"].rows[-1][0] == "residual"


def test_one_setting_alone_needs_no_table_of_its_own():
    records = [trained(2, seed, family=name) for name in ("hawk", "mqa") for seed in range(3)]
    assert tables.ablations(frame_of(records)) == []


def test_an_ablation_stands_in_the_report_and_is_verified(tmp_path):
    for made in ablation_records("jax") + ablation_records("torch"):
        write(tmp_path / "store", made)
    page = report.write_report(tmp_path / "store", tmp_path / "page", title="t", command="c",
                               defaults={"model.lambda_init": ["paper"]})  # fmt: skip
    assert "lambda_init=code beside paper" in page.read_text()
    assert (tmp_path / "page" / "tables" / "ablation_language_modeling_jax.csv").is_file()
    assert not verify.verify(page).differences


@pytest.mark.slow
def test_gates_and_windows_run_in_both_backends_and_are_taken_apart(tmp_path):
    done = subprocess.run([AERIE, "run", *SWEEP], cwd=tmp_path, text=True, capture_output=True,
                          check=False, timeout=1800)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "24 runs: 24 completed." in done.stdout
    page = tmp_path / done.stdout.splitlines()[-1].removeprefix("report: ")
    for backend in ("jax", "torch"):
        found = pd.read_csv(page.parent / "tables" / f"ablation_language_modeling_{backend}.csv")
        effects = found.set_index("effect")
        assert set(effects.index) == {"model.gate", "model.window_size",
                                      "model.gate x model.window_size"}  # fmt: skip
        assert effects["p_holm"].between(0, 1).all()
    matched = pd.read_csv(page.parent / "tables" / "certificate.csv").set_index("compared")
    verdicts = matched["matched"].str.strip()
    assert set(verdicts) == {"matched"}
    gates = [f"griffin {backend}, gate: lru, rg_lru" for backend in ("jax", "torch")]
    assert list(verdicts[gates]) == ["matched"] * 2
    assert not verify.verify(page).differences
