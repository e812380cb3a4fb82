"""Devices that are not there, or are another kind, are unsupported in one line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BACKENDS, tiny

from implementations.engine import Unsupported, load_engine
from implementations.ops import OPS
from suites import compose
from suites.harness import plan
from suites.ladder.ops import cases


@pytest.mark.parametrize("kind", ["h200", "v5e"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_there_is_named(backend, kind):
    with pytest.raises(Unsupported, match=f"finds no device '{kind}' here; it finds: cpu") as error:
        load_engine(backend)(tiny("hawk"), device_kind=kind)
    assert "\n" not in str(error.value)


def test_torch_takes_no_other_gpu_than_the_one_asked_for(monkeypatch):
    from implementations.torch_backend.engine import find_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert find_device("h100") == torch.device("cuda", 0)
    for kind in ("h200", "v5e"):
        with pytest.raises(Unsupported, match="it finds: NVIDIA H100"):
            find_device(kind)


def test_every_op_of_torch_keeps_to_the_device_of_its_inputs(monkeypatch):
    """On `meta`, which is not the CPU and computes nothing, so that a mixture of both shows."""
    from implementations.torch_backend import engine

    monkeypatch.setattr(engine, "on_host", lambda values: values)
    run = next(iter(plan.expand(compose.read(["suite=parity", "family=griffin"]).settings[0])))
    variants = {"linear_scan": "associative", "attention": "plain", "layers": "plain"}
    torch_engine = SimpleNamespace(
        device=torch.device("meta"), config=run.model, resolved_kernels=variants,
        dtype=torch.float32, master_dtype=torch.float32, num_devices=1,
    )  # fmt: skip
    for case in cases(run):
        shapes = OPS[case.op].forward(run.model, case.params, case.inputs)
        doutputs = tuple(np.zeros(y.shape, np.float32) for y in shapes)
        found = engine.Engine.op(torch_engine, case.op, case.params, case.inputs, doutputs)
        for values in found:
            assert {y.device.type for y in values.values()} <= {"meta"}, case.name
