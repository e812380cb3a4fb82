"""Our experiments beside the paper's: what goes along with what, how small they are on a CPU."""

import re

import pytest

from implementations import cost
from suites import compose
from suites.harness import plan

NAMED = ("conv", "controls", "gates", "gates_complex", "gates_windows_lengths", "lambda_init",
         "patterns", "scaling", "tuning", "windows")  # fmt: skip


def runs_of(*overrides: str) -> list:
    request = compose.read(overrides)
    found = [run for settings in request.settings for run in plan.expand(settings)]
    return list({run.run_id: run for run in found}.values())


def trained(runs: list) -> list:
    return [run for run in runs if run.suite == "language_modeling"]


@pytest.mark.parametrize("name", NAMED)
def test_an_experiment_asks_and_says_how_long_it_takes(name):
    text = (compose.CONFIGS / f"experiment/{name}.yaml").read_text()
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines()
                       if line.startswith("#"))  # fmt: skip
    for words in ("It can show", "; not", "Expect", "one H100", "of a cluster", "scale=cpu"):
        assert words in comment, words
    assert compose.read([f"experiment={name}"]).question.endswith("?")


@pytest.mark.parametrize("name", NAMED)
def test_on_a_cpu_it_is_small_and_of_one_backend(name):
    large, small = runs_of(f"experiment={name}"), runs_of(f"experiment={name}", "scale=cpu")
    assert {run.device_kind for run in large} == {"h100"}
    assert {(run.device_kind, run.dtype, run.backend) for run in small} == \
        {("cpu", "float32", "torch")}  # fmt: skip
    assert {run.suite for run in small} == {run.suite for run in large}
    assert all(run.model.size.startswith("cpu_") for run in small)
    runs = trained(small)
    tokens = {run.workload.batch_size * run.workload.seq_len for run in runs}
    assert tokens == {1024}  # a step, at every length
    seeds = {run.seed for run in runs}
    assert seeds == ({0} if name == "tuning" else {0, 1, 2})
    comment = (compose.CONFIGS / f"experiment/{name}.yaml").read_text()
    said = re.search(r"Expect (\d+) runs", comment.replace("\n# ", " "))
    assert int(said[1]) == len(trained(large)), len(trained(large))


def test_sizes_of_a_cpu_have_the_papers_proportions_and_20_tokens_a_parameter():
    runs = trained(runs_of("experiment=scaling", "scale=cpu"))
    sizes = {run.model.size: [r for r in runs if r.model.size == run.model.size] for run in runs}
    assert len(sizes) == 5
    for size, same in sizes.items():
        nominal = int(re.search(r"\d+", size)[0]) * 1000
        model = same[0].model
        assert model.d_model == model.num_heads * model.head_dim
        assert model.d_mlp == 3 * model.d_model
        assert 1.25 <= model.d_rnn / model.d_model <= 1.6  # of table 2
        assert {(run.model.d_model, run.model.d_rnn, run.model.num_layers) for run in same} == \
            {(model.d_model, model.d_rnn, model.num_layers)}  # fmt: skip
        for run in same:
            work = run.workload
            tokens = work.num_steps * work.batch_size * work.seq_len
            assert 0.75 * nominal <= cost.num_params(run.model) <= 1.15 * nominal
            assert tokens == pytest.approx(20 * nominal, rel=0.03)
        families = {run.model.family for run in same}
        assert len(same) == len(families) * (1 if nominal > 400_000 else 3)
        assert len({run.optimizer.num_steps for run in same}) == 1


def test_what_goes_along_follows_a_value_and_what_is_typed_wins():
    steps = {(run.model.size, run.workload.num_steps) for run in
             runs_of("experiment=scaling", "scale=cpu", "size=cpu_50k,cpu_400k")}  # fmt: skip
    assert steps == {("cpu_50k", 1000), ("cpu_400k", 8000)}
    typed = runs_of("experiment=scaling", "scale=cpu", "suite.num_steps=7")
    assert {run.workload.num_steps for run in typed} == {7}
    assert {run.seed for run in typed if run.model.size == "cpu_800k"} == {0}


def test_global_attention_takes_no_window_from_its_neighbours():
    windows = {(run.model.family, run.model.window_size) for run in
               runs_of("experiment=windows", "scale=cpu")}  # fmt: skip
    assert {size for family, size in windows if family == "mqa"} == {None}
    assert {size for family, size in windows if family == "griffin"} == {16, 32, 64, 128}


@pytest.mark.parametrize("name", ["recall", "windows", "paper/figure6", "quickstart"])
def test_an_experiment_of_one_family_is_that_familys_part(name):
    overrides = [f"experiment={name}"] + (["scale=cpu"] if name != "quickstart" else [])
    whole = runs_of(*overrides)
    for family in dict.fromkeys(run.model.family for run in whole):
        own = [run.run_id for run in whole if run.model.family == family]
        assert [run.run_id for run in runs_of(*overrides, f"family={family}")] == own
    with pytest.raises(ValueError, match=r"model.window_size=64: family=mqa sees every key"):
        runs_of(*overrides, "family=mqa", "model.window_size=64")


def test_every_family_is_searched_alike():
    for scale in ((), ("scale=cpu",)):
        grids = {}
        for run in runs_of("experiment=tuning", *scale):
            values = (run.optimizer.learning_rate, run.optimizer.weight_decay, run.seed,
                      run.workload)  # fmt: skip
            grids.setdefault(run.model.family, set()).add(values)
        assert len(grids) == 3
        assert len({frozenset(grid) for grid in grids.values()}) == 1


def test_a_tuned_optimizer_has_each_familys_own_values():
    runs = runs_of("suite=language_modeling", "family=mqa,mqa_local,hawk,griffin",
                   "optimizer=tuned")  # fmt: skip
    assert {run.optimizer.name for run in runs} == {"tuned"}
    assert all(isinstance(run.optimizer.learning_rate, float) for run in runs)
    typed = runs_of("suite=language_modeling", "optimizer=tuned", "optimizer.learning_rate=0.5")
    assert {run.optimizer.learning_rate for run in typed} == {0.5}


@pytest.mark.parametrize(
    ("along", "message"),
    [
        ({"size=tiny": ["optimizer=tuned"]}, "along size=tiny: 'optimizer' is a group"),
        ({"size=tiny": ["suite.num_steps=1,2"]}, "suite.num_steps takes one value, not 2"),
        ({"sise=tiny": ["suite.num_steps=1"]}, "Did you mean 'size'"),
        ({"size=tiny": ["modle.d_model=1"]}, "Did you mean 'model.d_model'"),
    ],
)
def test_what_cannot_go_along_is_named(monkeypatch, along, message):
    values = {"suites": {"language_modeling": []}, "along": along}
    monkeypatch.setattr(compose, "_experiment", lambda name: (values, "configs/experiment/x.yaml"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        compose.read(["experiment=x"])
    assert "\n" not in str(error.value)


def test_a_family_without_a_value_of_its_own_is_named(monkeypatch):
    settings = {"model": {"family": "hawk", "window_size": None}, "data": {},
                "optimizer": {"learning_rate": {"mqa": 0.1}}}  # fmt: skip
    with pytest.raises(ValueError, match=r"optimizer.learning_rate has no value for family=hawk"):
        compose._apply(settings, {})
