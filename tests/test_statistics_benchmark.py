"""The benchmark of verdicts: its order, its processes, what it makes of them, and its bounds."""

import json

import numpy as np
import pytest

from benchmarks import statistics as benchmark


def samples(noise: float, count: int = 60) -> np.ndarray:
    rng = np.random.default_rng(0)
    return 5 * np.exp(rng.normal(0, noise, (count, 1)) + rng.normal(0, 0.01, (count, 7)))


def test_variants_change_places_as_in_a_block_of_the_tool():
    turns = benchmark.turns()
    assert "".join(name for _, name in turns[:8]) == "ABBAABBA"
    assert [round for round, _ in turns] == [n // 2 for n in range(40)]


def test_a_quiet_machine_calls_variants_equivalent_and_finds_a_slow_down():
    rows = [*benchmark.resampled(samples(0.002), 20)]
    found = benchmark.figures(rows, [])
    assert found["aa_false_rate"] <= 0.1
    assert found["detect_3_percent"] == 1
    assert len(found["groups"]) == 4
    assert all(row.num_rounds >= 12 for row in rows)
    assert {row.verdict for row in rows if row.kind == "A/A"} == {"equivalent"}


def test_a_noisy_machine_goes_on_to_the_last_round_and_meets_no_bound():
    rows = [*benchmark.resampled(samples(0.1), 10)]
    assert {row.num_rounds for row in rows} == {benchmark.MAX_ROUNDS}
    found = benchmark.figures(rows, [])
    met = {row["figure"]: row["is_met"] for row in found["bounds"]}
    assert not met["detect_3_percent"]


def test_real_comparisons_count_by_kind(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(1)
    monkeypatch.setattr(benchmark, "child", lambda units: rng.normal(units, 0.002 * units, 5))
    rows = [*benchmark.measured(4, 2)]
    kinds = [row.kind for row in rows]
    assert sorted(kinds) == ["A/A", "A/A", "A/A under load", "A/A under load",
                             "slower by 5%", "slower by 5%"]  # fmt: skip
    assert [row.verdict for row in rows if row.kind.startswith("slower")] == ["slower", "slower"]
    found = benchmark.figures([*benchmark.resampled(samples(0.002), 4)], rows)
    assert (found["detect_5_percent"], found["aa_real_false_rate"]) == (1, 0)
    benchmark.write(found, rows, tmp_path)
    assert json.loads((tmp_path / "statistics.json").read_text())["detect_5_percent"] == 1
    assert "| `detect_5_percent` | 1 | 0.9 to 1 | met |" in (tmp_path / "README.md").read_text()
    assert len((tmp_path / "comparisons.csv").read_text().splitlines()) == 7


def test_a_false_verdict_in_five_of_forty_is_chance_and_in_seven_not():
    row = benchmark.Judged("A/A", 12, 1.0, 0.99, 1.01, 0.01, "equivalent", True, 1.0)
    false = benchmark.Judged("A/A", 12, 1.1, 1.05, 1.15, 0.01, "faster", False, 1.0)
    slower = benchmark.Judged("slower by 5%", 12, 0.95, 0.94, 0.96, 0.01, "slower", None, 1.0)
    for number, is_chance in ((5, True), (7, False)):
        real = [row] * (40 - number) + [false] * number + [slower] * 20
        synthetic = [*benchmark.resampled(samples(0.002), 2)]
        bounds = benchmark.figures(synthetic, real)["bounds"]
        assert {b["figure"]: b["is_met"] for b in bounds}["aa_real_p"] == is_chance


def test_a_child_gives_the_time_of_each_repeat(monkeypatch):
    monkeypatch.setattr(benchmark, "NUM_REPEATS", 3)
    times = benchmark.child(2)
    assert times.shape == (3,)
    assert (times > 0).all()


def test_recorded_processes_come_back(monkeypatch, tmp_path):
    made = samples(0.01, 5)
    path = benchmark.write_samples(made, tmp_path)
    assert benchmark.read_samples(path) == pytest.approx(made, abs=1e-4)


def test_without_samples_it_says_how_to_make_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["statistics.py", "--samples", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert "--record --out DIR makes it" in capsys.readouterr().err
