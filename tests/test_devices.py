"""Devices that are not there, or are another kind, are unsupported in one line."""

import pytest
import torch
from conftest import BACKENDS, tiny

from implementations.engine import Unsupported, load_engine


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
