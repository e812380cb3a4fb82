"""Several devices of one node: they compute what one does, and a rank that dies ends the run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, tiny
from data_parallel_cases import MODELS, batches, compute
from stub_suite import stub_run
from test_execute import go

from implementations import cost
from implementations.engine import Batch, Kernels, Unsupported, load_engine
from implementations.rank import Rank
from suites import compose
from suites.harness import plan, provenance, ranks
from suites.harness.devices import devices_environment
from suites.harness.record import read_all
from suites.harness.run import Run, Workload

ROOT = Path(__file__).resolve().parents[1]
NUM_DEVICES = 4
FAMILIES = ["griffin", pytest.param("mqa", marks=pytest.mark.slow)]
# Largest difference to one device, relative to the largest value of the tensor, after 4 steps in
# float32. Measured over 3 seeds, 2 families and both backends: losses 1e-6, gradients of the first
# batch 3e-6, moments 7e-5, parameters 1.7e-4 and what they predict 1.3e-5 (Adam divides by the
# gradient's size: where that is small, rounding errors are not). A mean of the ranks' means, which
# have from 0 to 48 scored targets, differs by more than 0.1.
TOLERANCE = {
    "losses": 5e-6,
    "nll_BT": 1e-4,
    "grad": 2e-5,
    "first_moment": 5e-4,
    "second_moment": 5e-4,
    "step": 0,
    "parameters": 1e-3,
}


def computed(
    backend: str, family: str, tmp_path: Path, *, num_processes: int, virtual: int = 0
) -> list[dict[str, np.ndarray]]:
    """What each rank found."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for index in range(num_processes):
        rank = Rank(index=index, count=num_processes, port=port)
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environ |= ranks.environment(rank, {}) if num_processes > 1 else {}
        if virtual:
            environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={virtual}"
        path = tmp_path / f"{index}.npz"
        arguments = [backend, family, str(NUM_DEVICES), "0", str(path)]
        command = [sys.executable, "tests/data_parallel_cases.py", *arguments]
        log = (tmp_path / f"{index}.log").open("wb")
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log))
    codes = [process.wait() for process in processes]
    logs = [path.read_text()[-2000:] for path in sorted(tmp_path.glob("*.log"))]
    assert codes == [0] * num_processes, "\n".join(logs)
    return [dict(np.load(tmp_path / f"{index}.npz")) for index in range(num_processes)]


def check(family: str, backend: str, found: list[dict[str, np.ndarray]]) -> None:
    want = compute(backend, family, 1, 0)
    first, *others = found
    for name, value in want.items():
        kind = name.split(".")[0]
        error = np.abs(first[name] - value).max() / max(np.abs(value).max(), 1e-30)
        tolerance = TOLERANCE.get(kind, TOLERANCE["parameters"])
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
        for other in others:
            np.testing.assert_array_equal(other[name], first[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks_of_torch_compute_what_one_does(family, tmp_path):
    check(family, "torch", computed("torch", family, tmp_path, num_processes=4))


@pytest.mark.slow  # a minute, most of it to compile
@pytest.mark.parametrize("family", FAMILIES)
def test_four_devices_of_one_process_of_jax_compute_what_one_does(family, tmp_path):
    check(family, "jax", computed("jax", family, tmp_path, num_processes=1, virtual=4))


@pytest.mark.slow  # half a minute: each process compiles for itself
@pytest.mark.parametrize("family", MODELS)
def test_four_processes_of_jax_compute_what_one_does(family, tmp_path):
    check(family, "jax", computed("jax", family, tmp_path, num_processes=4))


def test_the_batches_tell_a_mean_of_means_from_the_mean():
    """The cases are uneven enough: else the tests above would show nothing."""
    batch = batches(0)[0]
    engine = load_engine("torch")(tiny("mqa", **MODELS["mqa"]))
    whole, _ = engine.loss_and_grad(batch)
    parts = [
        engine.loss_and_grad(Batch(*(x[s : s + 2] for x in vars(batch).values())))[0]
        for s in (0, 2, 4, 6)
    ]
    assert abs(np.mean(parts) - whole) > 100 * TOLERANCE["losses"] * whole


# What is refused, in one line


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("jax", "num_devices=3, but JAX sees 1 of kind 'cpu'"),
        ("torch", "num_devices=3: PyTorch needs a process for each, and this run has 1"),
        pytest.param(
            "transformers",
            "'transformers' runs on one device: not 3",
            marks=pytest.mark.slow,  # 10 s to import it
        ),
    ],
)
def test_another_number_of_devices_is_refused(backend, said):
    if backend == "transformers":
        pytest.importorskip("transformers")
    with pytest.raises(Unsupported, match=said) as error:
        load_engine(backend)(tiny("griffin"), num_devices=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpreted_kernels_are_refused_on_several_devices(backend):
    with pytest.raises(Unsupported, match="on one device, not several"):
        load_engine(backend)(tiny("hawk"), kernels=Kernels(interpret=True), num_devices=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_several_devices_do_not_offer_is_refused(backend):
    engine = load_engine(backend)(tiny("hawk"))
    engine.num_devices = 2
    batch = batches(0)[0]
    calls = {
        "logits": lambda: engine.logits(batch),
        "activations": lambda: engine.activations(batch),
        "op": lambda: engine.op("rms_norm", {}, {}, ()),
        "prepare_op": lambda: engine.prepare_op("rg_lru", {}),
        "prefill": lambda: engine.prefill(batch.tokens_BT, capacity=32),
        "empty_cache": lambda: engine.empty_cache(1, capacity=32),
        "extend": lambda: engine.extend(batch.tokens_BT, None),
        "decode": lambda: engine.decode(None, None, num_tokens=1),
    }
    for name, call in calls.items():
        with pytest.raises(Unsupported, match=f"^{name} is for one device: num_devices=2"):
            call()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size=6 does not divide by num_devices=4"):
        Workload(phase="train", batch_size=6, num_devices=4)
    with pytest.raises(ValueError, match="num_devices=0; must be at least 1"):
        Workload(phase="train", batch_size=6, num_devices=0)


# Runs


def test_one_device_leaves_a_run_its_id():
    run = stub_run()
    assert "num_devices" not in run.to_json()["workload"]
    assert Run.from_json(run.to_json()) == run
    two = stub_run(workload={"batch_size": 2, "num_devices": 2})
    assert Run.from_json(two.to_json()) == two
    assert two.run_id != stub_run(workload={"batch_size": 2}).run_id


def test_predicted_memory_is_of_one_device():
    shared = stub_run(workload={"batch_size": 8, "num_devices": 4})
    memory = cost.train_memory_bytes(shared.model, batch_size=2, seq_len=8, dtype="float32")
    assert plan.costs(shared)["predicted_peak_memory_bytes"] == memory


def parallel(what: str) -> Run:
    return stub_run(what, backend="torch", workload={"batch_size": 4, "num_devices": 4})


def ended(store: Path, what: str):
    """The record of a run of four ranks, and how long it took."""
    start = time.perf_counter()
    go(store, [parallel(what)])
    (record,) = read_all(store)
    return record, time.perf_counter() - start


def all_ranks_are_gone() -> bool:
    deadline = time.monotonic() + 5
    while ranks_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not ranks_alive()


def ranks_alive() -> list[int]:
    """Of this test: by the first folder of their PYTHONPATH."""
    site = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environ = environ_of(int(place.name))
            is_rank = ranks.PARENT in environ and site in environ.get("PYTHONPATH", "")
            if is_rank and ") Z " not in (place / "stat").read_text():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def environ_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def test_several_ranks_leave_one_record(stub):
    record, _ = ended(stub, "ranks")
    assert record.outcome == "completed", record.reason
    assert [s.at for s in record.samples if s.metric == "loss"] == [4]
    assert [p.name for p in stub.glob("runs/*/*")] == [f"{record.attempt}.json"]
    assert all_ranks_are_gone()


@pytest.mark.parametrize(
    ("what", "outcome", "reason"),
    [
        ("kill_rank_2", "failed", "rank 2: killed by SIGKILL"),
        ("exit_rank_2", "failed", "rank 2: exited with 3 .*cannot open shared object"),
        ("raise_rank_2", "out_of_memory", "rank 2: RuntimeError: RESOURCE_EXHAUSTED"),
        ("lose_rank_2", "failed", "rank 2: killed by SIGKILL"),  # not what others saw of it
        ("unsupported", "unsupported", "^pallas_tpu needs a TPU"),  # all alike: rank 0 speaks
        ("kill_rank_0", "failed", "killed by SIGKILL"),
    ],
)
def test_a_rank_that_dies_ends_the_run_within_seconds(stub, what, outcome, reason):
    record, seconds = ended(stub, what)
    assert record.outcome == outcome, record.reason
    assert re.search(reason, record.reason), record.reason
    assert seconds < 15
    assert all_ranks_are_gone()
    assert json.dumps(record.to_json())


def test_ranks_share_the_cores_of_the_run():
    environ = {"AERIE_CORES": "2,3,4,5,6,7,8,9"}
    given = [ranks.environment(Rank(index=i, count=4, port=1), environ) for i in range(4)]
    assert [item["AERIE_CORES"] for item in given] == ["2,3", "4,5", "6,7", "8,9"]
    assert {item["OMP_NUM_THREADS"] for item in given} == {"2"}
    assert Rank.of(given[3]) == Rank(index=3, count=4, port=1)
    few = [ranks.share([0, 1], index, 4) for index in range(4)]
    assert few == [[0], [1], [0], [1]]


def real_runs(suite: str, *overrides: str) -> list[Run]:
    shared = [f"suite={suite}", "suite.num_devices=4", "family=griffin", "size=tiny", "data=random"]
    request = compose.read([*shared, *overrides])
    return [run for settings in request.settings for run in plan.expand(settings)]


SHORT = {
    "training_speed": ["suite.seq_lens=[32]", "suite.tokens_per_step=256", "suite.rounds=1",
                       "suite.repeats=2"],
    "language_modeling": ["suite.num_steps=4", "suite.seq_len=32", "suite.seeds=[0]",
                          "suite.num_held_out_batches=2"],
}  # fmt: skip


@pytest.mark.slow  # real runs: each rank imports its framework
def test_a_real_run_whose_rank_is_killed_in_a_collective_names_it(tmp_path, monkeypatch):
    """Steps without end: the other ranks wait for the one that is gone."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(provenance.ROOT))))
    endless = [*SHORT["training_speed"], "suite.repeats=1000000", "backend=torch"]
    killed_at = []

    def kill_rank_2() -> None:
        while not any(
            '"phase": "measure"' in p.read_text() for p in tmp_path.glob("runs/*/.phase-*")
        ):
            time.sleep(0.1)
        time.sleep(1.0)
        ours = [pid for pid in ranks_alive() if Rank.of(environ_of(pid)).index == 2]
        killed_at.append(time.monotonic())
        os.kill(ours[0], signal.SIGKILL)

    threading.Thread(target=kill_rank_2, daemon=True).start()
    go(tmp_path, real_runs("training_speed", *endless), run_limit_s=120.0)
    assert time.monotonic() - killed_at[0] < 15
    (record,) = read_all(tmp_path)
    assert record.outcome == "failed"
    assert record.reason.startswith("rank 2: killed by SIGKILL"), record.reason
    assert record.phase == "measure"
    assert all_ranks_are_gone()


@pytest.mark.slow  # real runs: each rank imports its framework
@pytest.mark.parametrize("suite", SHORT)
def test_runs_on_four_devices_complete(suite, tmp_path):
    go(tmp_path, real_runs(suite, "backend=torch,jax", *SHORT[suite]), run_limit_s=120.0)
    records = list(read_all(tmp_path))
    assert {r.run["backend"]: r.outcome for r in records} == dict.fromkeys(BACKENDS, "completed")
    if suite == "language_modeling":
        losses = [s.value for r in records for s in r.samples if s.metric == "loss"]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# Devices


@pytest.mark.parametrize(
    ("kind", "slot", "num_devices", "environ", "want"),
    [
        ("cpu", 3, 1, {}, {}),
        ("cpu", 0, 4, {}, {"JAX_NUM_CPU_DEVICES": "4"}),
        ("h100", 1, 1, {}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("h100", 1, 1, {"CUDA_VISIBLE_DEVICES": "5, 7"}, {"CUDA_VISIBLE_DEVICES": "7"}),
        ("h200", 1, 2, {"CUDA_VISIBLE_DEVICES": "7,5,3,1"}, {"CUDA_VISIBLE_DEVICES": "3,1"}),
        ("h100", 0, 2, {"CUDA_VISIBLE_DEVICES": "GPU-a1,MIG-b2,GPU-c3"},
         {"CUDA_VISIBLE_DEVICES": "GPU-a1,MIG-b2"}),
        ("v5e", 2, 1, {}, {"TPU_VISIBLE_CHIPS": "2", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
                           "TPU_PROCESS_BOUNDS": "1,1,1"}),
        ("v5e", 1, 1, {"TPU_VISIBLE_CHIPS": "2,3"},
         {"TPU_VISIBLE_CHIPS": "3", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
          "TPU_PROCESS_BOUNDS": "1,1,1"}),
        ("v6e", 0, 4, {}, {"TPU_VISIBLE_CHIPS": "0,1,2,3", "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
                           "TPU_PROCESS_BOUNDS": "1,1,1"}),
    ],
)  # fmt: skip
def test_a_slot_has_its_own_of_the_devices_given(kind, slot, num_devices, environ, want):
    assert devices_environment(kind, slot, num_devices, environ) == want


@pytest.mark.parametrize("kind", ["h100", "v5e"])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_slots_side_by_side_share_no_device(kind, num_devices):
    variable = {"h100": "CUDA_VISIBLE_DEVICES", "v5e": "TPU_VISIBLE_CHIPS"}[kind]
    listed = {variable: "8,9,10,11"}
    found = [
        device
        for slot in range(4 // num_devices)
        for device in devices_environment(kind, slot, num_devices, listed)[variable].split(",")
    ]
    assert found == ["8", "9", "10", "11"]


@pytest.mark.parametrize(
    ("slot", "num_devices", "environ", "said"),
    [
        (2, 1, {"CUDA_VISIBLE_DEVICES": "0,1"}, "slot 2 .* needs 3 .*DEVICES=0,1 lists 2"),
        (0, 4, {"CUDA_VISIBLE_DEVICES": "MIG-a"}, "slot 0 with num_devices=4 .* lists 1"),
        (0, 1, {"CUDA_VISIBLE_DEVICES": ""}, "slot 0 .* lists 0"),
    ],
)
def test_a_slot_beyond_the_list_is_named(slot, num_devices, environ, said):
    with pytest.raises(Unsupported, match=said):
        devices_environment("h100", slot, num_devices, environ)


def test_chips_that_make_no_part_of_a_host_are_refused():
    with pytest.raises(Unsupported, match="num_devices=3: chips of one TPU host are 1, 2, 4, 8"):
        devices_environment("v5e", 0, 3, {})


def test_a_run_without_its_devices_ends_as_unsupported(stub, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a1")
    run = stub_run("done", device_kind="h100", workload={"batch_size": 2, "num_devices": 2})
    go(stub, [run])
    (record,) = read_all(stub)
    assert record.outcome == "unsupported"
    assert "lists 1" in record.reason
    assert not list(stub.glob("claims/[!.]*"))
    assert not list(stub.glob("runs/*/.task-*"))
