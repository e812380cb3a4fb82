"""From overrides to runs: what is crossed, in which order, at which cost, and why it would run."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from implementations import cost
from implementations.config import ModelConfig, build
from suites import compose
from suites.harness import plan, provenance, syntax
from suites.harness.execute import Task
from suites.harness.record import write
from suites.harness.run import Run

# paper.md section 2 (arXiv:2402.19427 table 2, counted exactly): without embeddings, 16 blocks.
NON_EMBEDDING = {
    "100m": {"mqa": 80_308_992, "hawk": 93_801_216, "griffin": 89_303_808},
    "200m": {"mqa": 141_681_664, "hawk": 173_716_480, "griffin": 163_038_208},
    "400m": {"mqa": 316_331_520, "hawk": 374_773_248, "griffin": 355_292_672},
    "1b": {"mqa": 1_120_372_736, "hawk": 1_304_225_792, "griffin": 1_242_941_440},
    "3b": {"mqa": 2_511_031_296, "hawk": 2_996_456_448, "griffin": 2_834_648_064},
    "7b": {"mqa": 5_940_449_280, "hawk": 7_176_425_472, "griffin": 6_790_182_912},
    "14b": {"mqa": 11_588_817_920, "hawk": 14_811_223_040, "griffin": 13_763_941_376},
}
RECURRENT_GEMMA = {
    "recurrentgemma_2b": (2_682_862_080, 2_027_502_080),
    "recurrentgemma_9b": (8_579_977_216, 7_531_401_216),
}
SWEEP = ("suite=training_speed", "family=mqa_local,griffin", "backend=jax,torch",
         "suite.seq_lens=[256,512]", "suite.rounds=3", "kernels.linear_scan=analytic,associative",
         "model.window_size=16,32")  # fmt: skip


def runs_of(*overrides):
    settings = compose.read(overrides, bare=compose.BARE_PLAN).settings
    return [run for made in settings for run in plan.expand(made)]


@pytest.fixture(scope="module")
def files():
    return compose.Files(
        {
            "settings": ["paper"],
            "size": [*NON_EMBEDDING, *RECURRENT_GEMMA, "tiny"],
            "family": ["mqa", "mqa_local", "hawk", "griffin"],
            "gate": ["rg_lru", "lru"],
        }
    )


def test_every_size_and_family_has_the_papers_parameters(files):
    for size, counts in NON_EMBEDDING.items():
        for family, count in counts.items():
            config = build(ModelConfig, files.model("paper", size, family, "rg_lru"), size)
            assert cost.num_params_non_embedding(config) == count, (size, family)
    for size, (total, non_embedding) in RECURRENT_GEMMA.items():
        config = build(ModelConfig, files.model("paper", size, "griffin", "rg_lru"), size)
        assert cost.num_params(config) == total
        assert cost.num_params_non_embedding(config) == non_embedding


def test_a_family_comes_after_its_size(files):
    assert files.model("paper", "7b", "mqa", "rg_lru")["window_size"] is None
    assert files.model("paper", "7b", "mqa_local", "rg_lru")["window_size"] == 1024
    assert files.model("paper", "tiny", "griffin", "rg_lru")["window_size"] == 32


def test_released_settings_are_those_that_recurrent_gemma_sets_itself():
    (gemma,), (paper,), (released,) = (
        [run.model for run in runs_of(*chosen)]
        for chosen in (["size=recurrentgemma_2b"], ["settings=paper"], ["settings=released"])
    )
    fields = ("lambda_init", "rope_fraction", "window_extra_key", "logit_soft_cap",
              "scale_embeddings")  # fmt: skip
    values = {name: getattr(gemma, name) for name in fields}
    assert released == replace(paper, **values)
    assert not any(getattr(paper, name) == value for name, value in values.items())


def test_settings_are_swept_as_every_group():
    runs = runs_of("settings=paper,released", "family=hawk,griffin", "model.logit_soft_cap=20.0")
    assert [run.model.lambda_init for run in runs] == ["paper", "paper", "code", "code"]
    assert {run.model.logit_soft_cap for run in runs} == {20.0}


def test_sweeps_of_groups_and_of_keys_are_crossed():
    runs = runs_of(*SWEEP)
    assert len(runs) == len({run.run_id for run in runs}) == 2 * 2 * 2 * 3 * 2 * 2
    assert {run.workload.seq_len for run in runs} == {256, 512}
    assert {run.kernels.linear_scan for run in runs} == {"analytic", "associative"}
    assert {run.model.window_size for run in runs} == {16, 32}
    assert {run.round for run in runs} == {0, 1, 2}
    assert [run.run_id for run in runs] == [run.run_id for run in runs_of(*SWEEP)]


def test_data_sets_the_vocabulary_unless_the_size_or_the_user_does():
    assert runs_of("data=tokens", "data.paths=[x.bin]")[0].model.vocab_size == 50257
    assert runs_of("model.vocab_size=300")[0].model.vocab_size == 300
    assert runs_of("size=recurrentgemma_2b")[0].model.vocab_size == 256_000
    with pytest.raises(ValueError, match="smaller than data=tokens needs"):
        runs_of("data=tokens", "data.paths=[x.bin]", "model.vocab_size=300")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["family=grifin"], "Did you mean 'griffin'?"),
        (["settings=relesed"], "Did you mean 'released'?"),
        (["setings=paper"], "Did you mean 'settings'?"),
        (["settings.rope_fraction=0.5"], "Architecture is model.rope_fraction"),
        (["modle.d_model=3"], "Did you mean 'model.d_model'?"),
        (["model.d_modle=3"], "Did you mean 'd_model'?"),
        (["window_size=3"], "Did you mean 'model.window_size'?"),
        (["suite=training_sped"], "Did you mean 'training_speed'?"),
        (["suite=training_speed", "suite.seq_len=[8]"], "Did you mean 'suite.seq_lens'?"),
        (["experiment=quickstat"], "Did you mean 'quickstart'?"),
        (["experiment=quickstart", "suite=prefill_latency"], "quickstart.yaml"),
        (["kernels.linear_scan=analytical"], "Did you mean 'analytic'?"),
        (["dtype=fp32"], "float32"),
        (["device_kind=h20"], "h200"),
        (["cluster.runs_in_paralel=2"], "Did you mean 'runs_in_parallel'?"),
        (["cluster.runs_in_parallel=1,2"], "takes one value, not 2"),
        (["family=mqa", "model.window_size=16"], "use family=mqa_local"),
        (["model.d_model=wide"], "is not int"),
        (["model.d_rnn=98"], "use 96 or"),
        (["~family"], "cannot be removed"),
        (["griffin"], "key=value"),
        (["suite=training_speed", "suite.seq_lens=[256"], "cannot read override"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(overrides, message):
    with pytest.raises(ValueError, match=r".") as caught:
        runs_of(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_experiment_lists_suites_and_typed_overrides_win():
    parts = {}
    for run in runs_of("experiment=quickstart", "family=hawk", "suite.rounds=2"):
        parts.setdefault(run.suite, []).append(run)
    assert set(parts) == {"parity", "training_speed", "decode_latency", "language_modeling"}
    assert {run.model.family for runs in parts.values() for run in runs} == {"hawk"}
    assert {run.round for run in parts["training_speed"]} == {0, 1}
    only = runs_of("experiment=quickstart", "suite=parity")
    assert {run.suite for run in only} == {"parity"}


def test_rounds_are_interleaved_and_parity_comes_first():
    runs = runs_of("suite=training_speed,parity", "family=hawk,griffin", "suite.rounds=4",
                   "suite.seq_lens=[256]", "backend=jax")  # fmt: skip
    arranged = plan.arrange(runs)
    assert [run.suite for run, _, _ in arranged][:2] == ["parity", "parity"]
    timed = [item for item in arranged if item[0].suite == "training_speed"]
    assert [run.model.family[0] for run, _, _ in timed] == list("hgghhggh")
    assert [run.round for run, _, _ in timed] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [order for _, _, order in timed] == list(range(8))
    assert len({block for _, block, _ in timed}) == 1


def test_the_store_says_why_a_run_would_run(tmp_path):
    run = runs_of("suite.rounds=1")[0]
    key = provenance.build_key(run.suite, run.backend, provenance.device_name("cpu"))

    def after(outcome, attempt, build=key, **seen):
        task = Task(run=run, build=build, attempt=attempt, parent_pid=0)
        facts = {"versions": provenance.versions(), "device_name": provenance.cpu_model()} | seen
        write(tmp_path, task.record(outcome, provenance=facts, started_at="", seconds=1.0))
        (planned,) = plan.plan(tmp_path, [run])
        return planned.reason, planned.is_pending

    assert plan.plan(tmp_path, [run])[0].reason == "new"
    assert after("preempted", "a") == ("failed: preempted", True)
    old = provenance.versions() | {"jax": "0.9.0"}
    now = provenance.versions()["jax"]
    assert after("completed", "b", "x.y", versions=old) == (f"stale: jax 0.9.0 -> {now}", False)
    assert "device abacus -> " in after("completed", "c", "x.y", device_name="abacus")[0]
    assert after("completed", "d", "x.y") == ("stale: code changed", False)
    assert after("out_of_memory", "e") == ("finished: out_of_memory", False)
    assert after("completed", "f") == ("finished", False)
    assert after("cancelled", "g") == ("finished", False)


@pytest.fixture
def block(tmp_path):
    """Six runs of a block; what is pending after some of their attempts, as (number, outcome)."""
    runs = runs_of("suite=training_speed", "suite.seq_lens=[256]", "family=hawk,griffin",
                   "backend=jax", "suite.rounds=3")  # fmt: skip
    items = plan.plan(tmp_path, runs)
    counter = itertools.count()
    facts = {"versions": provenance.versions(), "device_name": provenance.cpu_model()}

    def after(session, *ends, build=None):
        for number, outcome in ends:
            item = items[number]
            task = Task(run=item.run, build=build or item.build, attempt=f"{next(counter):03}",
                        parent_pid=0, block=f"{item.block}-{session}", order=number)  # fmt: skip
            write(tmp_path, task.record(outcome, provenance=facts, started_at="", seconds=1.0))
        planned = plan.plan(tmp_path, [item.run for item in items])
        return [n for n, item in enumerate(planned) if item.is_pending or item.is_stale]

    return after


def done(*numbers):
    return [(number, "completed") for number in numbers]


@pytest.mark.parametrize("outcome", ["preempted", "node_failure", "timed_out", "cancelled"])
def test_a_block_whose_sweep_was_interrupted_is_measured_whole(block, outcome):
    assert block("s1", *done(0, 1, 2), (3, outcome)) == [0, 1, 2, 3, 4, 5]
    assert block("s2", *done(0), (1, outcome)) == [0, 1, 2, 3, 4, 5]
    assert block("s3", *done(0, 1, 2, 3, 4, 5)) == []


def test_a_rerun_of_a_stale_block_that_is_interrupted_is_stale_as_a_whole(block):
    assert block("s1", *done(0, 1, 2, 3, 4, 5), build="an.older") == [0, 1, 2, 3, 4, 5]
    assert block("s2", *done(0), (1, "preempted")) == [0, 1, 2, 3, 4, 5]


def test_what_fails_or_is_new_leaves_the_rest_of_its_block(block):
    assert block("s1", *done(0, 2, 3)) == [1, 4, 5]  # of families that were added
    assert block("s2", *done(1), (4, "timed_out"), *done(5)) == [4]  # alone, its sweep went on
    assert block("s3", (4, "failed")) == [4]


def test_the_ends_of_runs_are_parsed_once(block, tmp_path, monkeypatch):
    block("s1", *done(0, 1), (2, "failed"))
    found = plan.ends(tmp_path)
    assert sorted(end.counted() for end in found.values()) == ["completed", "completed", "failed"]
    with monkeypatch.context() as patch:
        patch.setattr(plan, "read", None)
        assert plan.ends(tmp_path) == found
    block("s1", *done(2))
    assert {end.counted() for end in plan.ends(tmp_path).values()} == {"completed"}
    (path, *_) = tmp_path.glob("runs/*/*.json")
    path.write_text(
        path.read_text().replace('"completed"', '"cancelled"').replace('"failed"', '"cancelled"')
    )
    assert "cancelled" in {out for end in plan.ends(tmp_path).values() for out in end.outcomes}


def test_a_tpu_is_known_by_its_kind():
    """What it calls itself is not what was asked for, and is no reason to measure again."""
    run = runs_of("suite.rounds=1", "device_kind=v5e", "backend=jax")[0]
    seen = {"versions": provenance.versions(), "device_name": "TPU v5 lite"}
    change = plan._change({"provenance": seen}, run, "v5e", provenance.versions())
    assert change == "code changed"


def test_what_a_job_ran_is_current_on_the_device_that_it_found(tmp_path):
    """It is not the one of the machine that submits, and is no reason to measure again."""
    run = runs_of("suite.rounds=1")[0]

    def after(**seen):
        task = Task(run=run, build=provenance.build_key(run.suite, run.backend, "abacus"),
                    attempt="a", parent_pid=0)  # fmt: skip
        facts = {"versions": provenance.versions(), "build_device": "abacus"} | seen
        write(tmp_path, task.record("completed", provenance=facts, started_at="", seconds=1.0))
        return plan.plan(tmp_path, [run])[0].reason

    assert after(job="12_3") == "finished"
    assert after(job=None).startswith("stale: device")


@pytest.mark.parametrize(("topology", "is_finished"), [("v5e:2x2", True), (None, False)])
def test_a_program_compiled_alone_is_refused_once(topology, is_finished):
    record = {"outcome": "compile_error", "run": {"workload": {"topology": topology}}}
    assert plan.is_finished(record) is is_finished


def test_only_a_search_for_a_frontier_may_end_out_of_memory():
    assert plan.ended_as_planned("unsupported", is_search=False)
    assert not plan.ended_as_planned("out_of_memory", is_search=False)
    assert plan.ended_as_planned("out_of_memory", is_search=True)


def test_a_build_is_what_runs_and_nothing_else(tmp_path):
    seen = provenance.closure({"suites.training_speed", "suites.harness.child"})
    seen |= provenance.engine_modules("jax")
    assert {"implementations.mixers.rg_lru", "implementations.jax_backend.kernels.linear_scan",
            "suites.harness.execute", "suites.harness.measure"} <= seen  # fmt: skip
    assert not [name for name in seen if "torch_backend" in name or "commands" in name]
    assert "suites.parity" not in seen

    numbers = itertools.count()

    def digest(text):
        path = tmp_path / f"{next(numbers)}.py"
        path.write_text(text)
        return syntax.digest(str(path))

    assert digest('"""Doc."""\nx = 1  # one\n') == digest("x = 1\n")
    assert digest("def f():\n    '''Doc.'''\n    return 1") == digest("def f():\n    return 1")
    assert digest("x = 1") != digest("x = 22")
    one, other = (provenance.build_key(s, "jax", "d") for s in ("parity", "training_speed"))
    assert one.split(".")[0] == other.split(".")[0]
    assert one != other
    assert one != provenance.build_key("parity", "torch", "d")
    assert one != provenance.build_key("parity", "jax", "e")


def test_syntax_is_kept_by_content_and_a_torn_file_of_it_is_parsed_anew(tmp_path, monkeypatch):
    place, path = tmp_path / "kept" / "syntax.json", tmp_path / "code.py"
    monkeypatch.setattr(syntax, "_place", lambda: place)

    def digest(text):
        path.write_text(text)
        for cached in (syntax._found, syntax._known):
            cached.cache_clear()
        found = syntax.digest(str(path)), syntax.imports(str(path))
        syntax.keep()
        return found

    first = digest("import os\n")
    with monkeypatch.context() as patch:
        patch.setattr(syntax, "_parse", None)  # not needed again
        assert digest("import os\n") == first
    assert digest("import re\n") != first  # of the same name and size
    place.write_text(place.read_text()[:-20])
    assert digest("import os\n") == first
    place.parent.chmod(0o500)
    place.write_text("")
    assert digest("import os\n") == first
    place.parent.chmod(0o700)
    syntax._known.cache_clear()


def test_planning_imports_no_framework(tmp_path):
    code = (
        "import sys\nfrom suites import compose\nfrom suites.harness import plan\n"
        "from pathlib import Path\n"
        "made = compose.read(['experiment=quickstart']).settings\n"
        f"plan.plan(Path({str(tmp_path)!r}), [r for s in made for r in plan.expand(s)])\n"
        "import json\nprint(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    frameworks = {"jax", "torch", "triton", "transformers", "optax"}
    assert not loaded & {*frameworks, "pandas", "matplotlib", "submitit"}


def test_what_a_gate_is_set_to_is_in_the_id_and_its_defaults_are_not():
    """Runs from before these settings keep their ids."""
    asked = ("suite=training_speed", "suite.seq_lens=[64]", "family=hawk")
    plain = runs_of(*asked)[0]
    assert not {"decay_exponent", "normalize_input"} & plain.to_json()["model"].keys()
    assert Run.from_json(plain.to_json()) == plain
    for override in ("model.decay_exponent=4", "model.normalize_input=false", "gate=lru"):
        other = runs_of(*asked, override)[0]
        assert other.run_id != plain.run_id
        assert Run.from_json(other.to_json()) == other
