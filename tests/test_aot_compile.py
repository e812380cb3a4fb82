"""aerie compile: what is asked, refused and read without libtpu; with it, real compilations."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import tiny
from doubling import doubling_path

from implementations import cost
from implementations.engine import CompileError, tpu_of
from implementations.jax_backend import ahead_of_time
from suites import ahead, compose, gate
from suites.__main__ import main
from suites.harness import plan, provenance, topology
from suites.harness.execute import Task
from suites.harness.executors import environment
from suites.harness.measure import is_out_of_memory, sample
from suites.harness.record import read_all
from suites.harness.run import Run

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None and not os.environ.get("AERIE_REQUIRE_TPU"),
    reason="libtpu is not installed: pip install 'aerie[tpu]'",
)
SMALL = ("family=griffin", "size=tiny", "model.num_layers=3", "suite.seq_len=128",
         "suite.prompt_len=64", "suite.num_new_tokens=8")  # fmt: skip
# What libtpu 0.0.42.1 wrote of a kernel, its spelling included, cut to three bundles.
DUMP = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 1 0 0 0 0
0 0 2 0 0 0 1 0 1 2
0 0 0 0 0 0 0 1 1 2
"""


@pytest.fixture
def with_libtpu(monkeypatch):
    """Requests are planned as where it is installed."""
    monkeypatch.setattr(topology, "find_spec", lambda name: object())


def runs_of(*overrides):
    (settings,) = compose.read(overrides, bare=ahead.BARE).settings
    return list(plan.expand(settings))


def aerie(store, *arguments, **variables):
    """The command in a process of its own: (exit code, rows, stderr)."""
    command = [sys.executable, "-m", "suites", "compile", *arguments, "--json", "--results", store]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "JAX"))}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean | variables
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


# Requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["topology=v5p-128"], "topology 'v5p-128' is not known"),
        (["topology=v7x:2x2"], "in two dimensions up to 16x16 (v5e, v6e) or in three (v4, v5p)"),
        (["topology=v5e:3x3"], "by hosts of 2x2"),
        (["backend=torch"], "backend=torch compiles for no TPU"),
        (["dtype=float64"], "a TPU has none"),
        (["kernels.interpret=true"], "compiles no kernel"),
        (["device_kind=h100"], "is not that of topology=v5e:2x2"),
        (["suite=training_speed"], "aerie compile runs suite=compile"),
        (["experiment=quickstart"], "aerie compile runs suite=compile"),
        (["suite.phases=[trian]"], "Did you mean 'train'?"),
        (["suite.num_new_tokens=1"], "must be at least 2"),
    ],
)
def test_a_wrong_request_is_one_line_and_starts_nothing(
    overrides, said, tmp_path, capsys, with_libtpu
):
    store = tmp_path / "results"
    with pytest.raises(SystemExit) as ended:
        main(["compile", *overrides, "--results", str(store)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not out
    assert not store.exists()


def test_a_missing_libtpu_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["compile", "--results", str(tmp_path / "results")])
    assert ended.value.code == 2
    assert "pip install 'aerie[tpu]'" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("v4:2x2x1", "v4"), ("v5e:16x16", "v5e"), ("v5p:4x4x4", "v5p"), ("v6e:2x2", "v6e")],
)
def test_a_topology_names_its_kind(name, kind):
    assert tpu_of(name) == kind


@pytest.mark.parametrize("name", [
    "v5e", "v5e:4", "v5e:0x2", "v5p:2x2x0", "v5e:2x2x", "v5e:2x2x1", "v6e:32x16", "v4:2x2", "cpu",
])  # fmt: skip
def test_what_is_no_topology_is_refused(name):
    with pytest.raises(ValueError, match="is not known"):
        tpu_of(name)


def test_a_phase_is_a_run_of_the_kind_of_the_topology(with_libtpu):
    runs = runs_of("suite.topology=v6e:2x2")
    assert [run.workload.phase for run in runs] == ["train", "prefill", "decode", "kernel"]
    assert {run.device_kind for run in runs} == {"v6e"}
    assert {run.dtype for run in runs} == {"bfloat16"}
    assert len({run.run_id for run in runs}) == 4
    assert [Run.from_json(run.to_json()) for run in runs] == runs


def test_runs_without_a_topology_keep_their_ids():
    (settings,) = compose.read(["suite=training_speed", "suite.seq_lens=[256]"]).settings
    for run in plan.expand(settings):
        assert "topology" not in run.to_json()["workload"]


def test_what_is_compiled_needs_no_parity(with_libtpu):
    assert not gate.proxies(runs_of())


def test_libtpu_is_part_of_a_build_for_a_tpu_alone(monkeypatch):
    assert "libtpu" in provenance.libraries("jax", "v5e")
    assert "libtpu" not in provenance.libraries("jax", provenance.cpu_model())
    monkeypatch.setattr(provenance.shutil, "which", lambda name: pytest.fail("asked for a GPU"))
    assert provenance.device_name.__wrapped__("v5e") == "v5e"


def test_a_child_is_told_all_that_libtpu_needs(with_libtpu, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")  # a user's
    train, *_, kernel = runs_of()
    told = environment([0], train)
    assert told["JAX_PLATFORMS"] == "cpu"
    assert told["TPU_SKIP_MDS_QUERY"] == "1"
    assert told["LIBTPU_INIT_ARGS"] == ""
    told = environment([0], kernel, "/dumps")
    assert told[topology.DUMPS_VARIABLE] == "/dumps"
    assert "--xla_jf_dump_to=/dumps " in told["LIBTPU_INIT_ARGS"]
    assert "scoped_vmem" not in told["LIBTPU_INIT_ARGS"]


# Costs and rows ---------------------------------------------------------------------------------


def test_costs_of_a_phase_are_those_of_its_program(with_libtpu):
    overrides = ("family=griffin", "suite.batch_size=2", "suite.seq_len=8", "suite.prompt_len=5",
                 "suite.num_new_tokens=3")  # fmt: skip
    train, prefill, decode, kernel = map(plan.costs, runs_of(*overrides))
    model = tiny("griffin")
    num_params = cost.num_params(model)
    assert train["model_flops"] == 16 * cost.train_flops_per_token(model, 8)
    assert train["model_bytes"] == 8 * 4 * num_params
    assert prefill["model_flops"] == cost.prefill_flops(model, 2, 5)
    # two steps, with 5 and 6 positions behind them
    visible = [cost.forward_flops_per_token(model, keys) for keys in (6, 7)]
    assert decode["model_flops"] == 2 * sum(visible)
    weights = 2 * 2 * num_params
    assert weights < decode["model_bytes"] < weights + 2 * decode["cache_bytes"] + 1
    # x, gates and states, then those again with dh, and three gradients: 12 of bfloat16; the first
    # and the last state, and their gradients, in float32
    assert kernel["model_bytes"] == (12 * 2 * 8 * 2 + 4 * 2 * 4) * model.d_rnn
    assert kernel["model_flops"] == 3 * 6 * 2 * 8 * model.d_rnn
    # without the engine's float32 parameters
    assert decode["predicted_peak_memory_bytes"] < 3 * num_params


def planned(run):
    return plan.Planned(run=run, build="b", reason="new", is_pending=True, is_stale=False,
                        outcome=None, costs=plan.costs(run), block=None, order=None)  # fmt: skip


def record_of(run, outcome, *samples, **values):
    task = Task(run=run, build="b", attempt="a", parent_pid=0)
    facts = {"provenance": {"device_name": "TPU v5 lite"}, "started_at": "", "seconds": 1.0}
    return json.loads(
        json.dumps(task.record(outcome, samples=samples, **(facts | values)).to_json())
    )


def test_a_row_adds_up_kernels_and_leaves_null_what_is_not_known(with_libtpu):
    *_, run = runs_of()
    found = [sample("aot_compile_time_s", 1.5), sample("peak_memory_bytes", 100),
             sample("collectives", 0), sample("num_bundles", 10, field="forward"),
             sample("num_spills", 0, field="forward"), sample("num_bundles", 20, field="backward"),
             sample("num_spills", 3, field="backward")]  # fmt: skip
    row = ahead.row(planned(run), record_of(run, "completed", *found))
    assert (row["phase"], row["status"], row["reason"]) == ("kernel", "completed", None)
    assert (row["peak_memory_bytes"], row["collectives"]) == (100, 0)
    assert (row["num_bundles"], row["num_spills"], row["bound_ms"]) == (30, 3, None)
    assert row["kernels"]["backward"] == {"num_bundles": 20, "num_spills": 3}

    refused = record_of(run, "compile_error", reason="E1001: vmem", phase="compile")
    row = ahead.row(planned(run), refused)
    assert (row["status"], row["reason"]) == ("compile_error", "E1001: vmem")
    measured = ("peak_memory_bytes", "collectives", "aot_compile_time_s", "num_spills", "bound_ms")
    assert not any(row[name] is not None for name in measured)
    assert row["predicted_peak_memory_bytes"] > 0
    assert ahead.row(planned(run), None)["status"] == "not run"


# What the compiler says -------------------------------------------------------------------------


def test_a_dump_tells_bundles_and_spills(tmp_path):
    assert topology.read_dump(DUMP) == topology.KernelCode(num_bundles=3, num_spills=2)
    for name, text in {"scan.1": DUMP, "scan.12": DUMP + DUMP[-20:], "fusion": DUMP}.items():
        (tmp_path / f"179-{name}-00-{topology.DUMP}.txt").write_text(text)
    (tmp_path / "179-TLP-hlo.txt").write_text("no such thing")
    found = topology.read_dumps(tmp_path, ["scan.1", "other"])
    assert found == {"scan.1": topology.read_dump(DUMP)}
    assert not topology.read_dumps(tmp_path / "none", ["scan.1"])


def test_memory_of_the_device_is_told_from_a_kernels_own():
    hbm = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (181.65G) ..."
    vmem = "RESOURCE_EXHAUSTED: E1001: Ran out of memory in memory space vmem while allocating"
    assert is_out_of_memory(ahead_of_time.refusal(hbm))
    assert isinstance(
        ahead_of_time.refusal(hbm.replace("on HBM", "in memory space hbm")), MemoryError
    )
    for said in (vmem, "INTERNAL: Mosaic failed to compile TPU kernel: unsupported"):
        assert isinstance(ahead_of_time.refusal(said), CompileError)


def test_peak_memory_is_the_larger_of_the_compilers_and_the_sum_of_its_parts():
    parts = {"argument": 100, "output": 50, "temp": 30, "alias": 40}
    found = SimpleNamespace(**{f"{key}_size_in_bytes": value for key, value in parts.items()})
    assert ahead_of_time.peak_memory_bytes(found) == 140
    for peak, want in ((120, 140), (150, 150)):
        found.peak_memory_in_bytes = peak
        assert ahead_of_time.peak_memory_bytes(found) == want


# With libtpu ------------------------------------------------------------------------------------


@needs_libtpu
def test_inference_compiles_for_a_v5e(tmp_path):
    phases = "suite.phases=[prefill,decode,kernel]"
    code, rows, err = aerie(tmp_path, *SMALL, phases, "topology=v5e:2x2")
    assert code == 0, err
    assert [row["phase"] for row in rows] == ["prefill", "decode", "kernel"]
    for row in rows:
        assert row["status"] == "completed"
        assert row["device_name"] == "TPU v5 lite"
        assert row["linear_scan"] == row["attention"] == "pallas_tpu"
        assert row["collectives"] == 0
        assert row["aot_compile_time_s"] > 0
        # padded to tiles of 8 x 128, tiny takes more than was predicted
        assert row["peak_memory_bytes"] > 0.5 * row["predicted_peak_memory_bytes"]
    *_, kernel = rows
    # 12 x 128 x 96 of bfloat16 at 819 GB/s
    assert kernel["bound_ms"] == pytest.approx(96 * (12 * 128 * 2 + 4 * 4) / 819e9 * 1e3)
    assert len(kernel["kernels"]) == 2  # forward and backward
    assert kernel["num_bundles"] > 100
    assert kernel["num_spills"] == 0
    assert {record.outcome for record in read_all(tmp_path)} == {"completed"}
    assert not list(tmp_path.glob("runs/*/*.log"))  # nothing was said

    again, same, err = aerie(tmp_path, *SMALL, phases, "topology=v5e:2x2")
    assert (again, same) == (0, rows)
    assert "nothing to run" in err


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_every_phase_compiles_for_every_kind(tmp_path, name):
    code, rows, err = aerie(tmp_path, *SMALL, f"topology={name}")
    assert code == 0, err
    assert {row["status"] for row in rows} == {"completed"}
    train = rows[0]
    assert train["peak_memory_bytes"] > cost.num_params(tiny("griffin", num_layers=3)) * 12


@needs_libtpu
def test_too_much_memory_is_a_typed_end_that_costs_others_nothing(tmp_path):
    sizes = ("suite.phases=[kernel]", "suite.batch_size=1000000,1")
    code, (large, small), _ = aerie(tmp_path, *SMALL, *sizes, "topology=v6e:2x2")
    assert code == 1
    assert large["status"] == "out_of_memory"
    assert "Ran out of memory" in large["reason"]
    assert "hbm" in large["reason"].lower()
    assert large["peak_memory_bytes"] is None
    assert small["status"] == "completed"


@needs_libtpu
def test_a_kernels_code_is_counted_and_one_beyond_vmem_is_a_compile_error(tmp_path):
    """In a compiler whose recurrence is one kernel over a block of batch_size x seq_len."""
    site, sizes = tmp_path / "site", "suite.batch_size=64,65536"
    site.mkdir()
    path = os.pathsep.join([str(doubling_path(site)), os.environ.get("PYTHONPATH", "")])
    asked = (*SMALL, "suite.phases=[kernel]", sizes, "topology=v6e:2x2")
    code, (fits, exceeds), _ = aerie(tmp_path / "results", *asked, PYTHONPATH=path)
    assert code == 1
    assert fits["status"] == "completed"
    (code,) = fits["kernels"].values()
    assert 64 * 128 // (8 * 128) < code["num_bundles"] < 1000  # a bundle for each register at least
    assert (fits["num_bundles"], fits["num_spills"]) == (code["num_bundles"], 0)
    assert exceeds["status"] == "compile_error"
    assert "memory space vmem" in exceeds["reason"]
    assert "exceeded scoped vmem limit" in exceeds["reason"]
    assert exceeds["num_bundles"] is None


@needs_libtpu
def test_a_family_without_a_recurrence_has_no_kernel_to_compile(tmp_path):
    code, (row,), _ = aerie(tmp_path, "family=mqa", "suite.phases=[kernel]")
    assert (code, row["status"]) == (0, "unsupported")
    assert "family=mqa has no recurrence" in row["reason"]
