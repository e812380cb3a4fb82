"""What tests/test_triton_attention.py runs in the interpreter's worker: errors of attention, of
rope and of a step of decoding, by name of the result, relative to its largest true value."""

import attention_cases
import numpy as np
import torch
from attention_cases import case_of, normal, positions
from conftest import tiny
from interpreted import poisoned
from sanitizer import sanitize
from torch import Tensor

from implementations.torch_backend.kernels.attention import (
    attention,
    num_parts,
    seen_by,
    window_attention,
)
from implementations.torch_backend.kernels.attention_step import attention_step, parts_of
from implementations.torch_backend.kernels.rope import rope
from implementations.torch_backend.mixers import mqa


def attention_errors(
    *, index: str = "int64", is_contiguous: bool = True, **arguments
) -> dict[str, float]:
    """Forward and backward, of a case of attention_cases.py."""
    case, window = case_of(**arguments), arguments["window"]
    dtype = arguments.get("dtype", "float32")
    *inputs, dy = (put(x, dtype, is_contiguous) for x in case[:4])
    last_BT, position_BT = (
        torch.tensor(x, dtype=getattr(torch, index)) for x in (case.last_BT, case.position_BT)
    )
    with poisoned():
        if window is None:
            y = attention(*inputs, last_BT, position_BT, "triton")
        else:
            y = window_attention(*inputs, position_BT, window, "triton")
        grads = torch.autograd.grad(y, inputs, dy)
    assert y.dtype == inputs[2].dtype
    return errors(case.want, dict(zip(case.want, [y, *grads], strict=True)))


def attention_is_deterministic() -> bool:
    q, k, v = (put(normal(i, (2, 40, n, 16)), "float32") for i, n in enumerate((4, 2, 2)))
    position_BT = torch.arange(40).expand(2, 40)

    def run() -> list[Tensor]:
        y = attention(q, k, v, position_BT, position_BT, "triton")
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v))]

    return all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def accesses() -> list[str]:
    """Out-of-bounds addresses and races of all kernels, at sizes that no block fits."""
    q, k, v = (put(normal(i, (1, 37, n, 12)), "float32") for i, n in enumerate((3, 1, 1)))
    position_BT = torch.arange(37)[None]
    with sanitize() as report:
        y = window_attention(q, k, v, position_BT, 20, "triton")
        torch.autograd.grad(y.sum(), (q, k, v))
        rope(q.detach(), position_BT, 6, 1e4, "triton")
        state = [x.detach().clone() for x in (k, v)]
        new = [x.detach()[:, 0] for x in (q, k, v)]
        attention_step(*new, torch.tensor([50]), *state, 6, 1e4)
    return report.problems


def seen_by_errors() -> int:
    """Bounds of seen_by that differ from those counted in the mask, over several masks."""
    wrong = 0
    for num_keys, block, window, documents in [
        (50, 16, 7, "some"), (50, 16, 50, "one"), (33, 32, 5, "each"), (1, 16, 1, "one"),
    ]:  # fmt: skip
        last = np.arange(num_keys)
        first = last - np.minimum(positions(num_keys, documents), window - 1)
        mask = (last >= first[:, None]) & (last <= last[:, None])
        given = (torch.tensor(x, dtype=torch.int32)[None] for x in (first, last))
        got = seen_by(*given, num_keys, block)[0].numpy()
        for j, bounds in enumerate(got):
            seen = mask[:, j * block : (j + 1) * block]
            some, every = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.all(1))
            wrong += list(bounds[[0, 3]]) != [some[0], some[-1] + 1]
            wrong += bool(len(every)) and list(bounds[1:3]) != [every[0], every[-1] + 1]
            wrong += not len(every) and bounds[1] < bounds[2]
    return wrong


def parts() -> dict[str, list]:
    return {
        "heads": [num_parts(16, 64), num_parts(16, 600), num_parts(10, 64), num_parts(10, 200)],
        "slots": [parts_of(4096, 1), parts_of(4096, 16), parts_of(1024, 16), parts_of(5, 1)],
    }


def rope_errors(
    *, dtype: str, rope_dim: int, head_dim: int, num_heads: int, furthest: int, index: str = "int64"
) -> dict[str, float]:
    """Of the Triton variant: to `plain` (angles are float32 there too), and both ways."""
    shape = (2, 13, num_heads, head_dim)
    x, dy = (put(normal(i, shape, dtype), dtype, is_contiguous=i == 1) for i in range(2))
    position = np.random.default_rng(0).integers(0, furthest, shape[:2])
    position_BT = torch.tensor(position, dtype=getattr(torch, index))
    results = []
    for variant in ("plain", "triton"):
        with poisoned():
            y = rope(x, position_BT, rope_dim, 1e4, variant)
            [dx] = torch.autograd.grad(y, x, dy)
        results.append({"y": y, "dx": dx})
    want = {name: value.detach().double().numpy() for name, value in results[0].items()}
    return errors(want, results[1])


def step_errors(
    *,
    num_slots: int,
    dtype: str = "float32",
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 16,
    batch_size: int = 1,
    rope_dim: int = 8,
    index: str = "int64",
) -> dict[str, float]:
    """The largest over positions in the first round of a ring, at its end, and beyond it; to
    `plain` in float64, slots included. Slots beyond the position hold NaN."""
    B, S, N, K, H = batch_size, num_slots, num_heads, num_kv_heads, head_dim
    worst: dict[str, float] = {}
    for position in sorted({0, S // 2, S - 1, S, 2 * S + S // 3}):
        new = [normal(10 + i, (B, n, H), dtype) for i, n in enumerate((N, K, K))]
        slots = [normal(20 + i, (B, S, K, H), dtype) for i in range(2)]
        position_B = torch.full((B,), position, dtype=getattr(torch, index))
        results = []
        for step, of in ((plain_step, "float64"), (attention_step, dtype)):
            state = [put(x, of).detach() for x in slots]
            unwritten = slice(position + 1, None)
            if step is attention_step:
                for x in state:
                    x[:, unwritten] = torch.nan
            given = [put(x, of).detach() for x in new]
            with poisoned():
                y = step(*given, position_B, *state, rope_dim, 1e4)
            for x in state:
                x[:, unwritten] = 0
            results.append({"y": y, "k": state[0], "v": state[1]})
        want = {name: value.double().numpy() for name, value in results[0].items()}
        for name, error in errors(want, results[1]).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def plain_step(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKH: Tensor,
    position_B: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    rope_dim: int,
    base: float,
) -> Tensor:
    """What attention_step does, by rope and attention."""
    num_slots, position_BT = k_BSKH.shape[1], position_B[:, None]
    q_BTNH = rope(q_BNH[:, None], position_BT, rope_dim, base, "plain")
    k_BTKH = rope(k_BKH[:, None], position_BT, rope_dim, base, "plain")
    slot = position_B[:1].long() % num_slots
    k_BSKH.index_copy_(1, slot, k_BTKH)
    v_BSKH.index_copy_(1, slot, v_BKH[:, None])
    last_BT = position_BT.clamp(max=num_slots - 1)
    return attention(q_BTNH, k_BSKH, v_BSKH, last_BT, last_BT, "plain")[:, 0]


def mixer_errors(*, window: int | None, num_kv_heads: int) -> dict[str, float]:
    """The whole mixer: prefill in chunks, then steps, against one pass of the plain variants."""
    family = "mqa" if window is None else "mqa_local"
    overrides = {"window_size": window, "num_kv_heads": num_kv_heads, "head_dim": 12}
    config = tiny(family, **overrides, d_model=32, rope_fraction=0.5)
    torch.manual_seed(0)
    plain = mqa.Mixer(config, {"attention": "plain", "layers": "plain"})
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = mqa.Mixer(config, {"attention": "triton", "layers": "triton"})
    ours.load_state_dict(plain.state_dict())
    T = 45
    x_BTD, position_BT = torch.randn(2, T, 32), torch.arange(T).expand(2, T)
    with torch.inference_mode():
        want = {"y": plain(x_BTD, position_BT, None)[0].double().numpy()}
        state = mqa.empty_state(config, 2, T, torch.float32, torch.device("cpu"))
        parts, start = [], 0
        for length in (7, 1, 23, *[1] * 14):
            piece = slice(start, start + length)
            y_BTD, state = ours(x_BTD[:, piece], position_BT[:, piece], state)
            parts.append(y_BTD)
            start += length
    return errors(want, {"y": torch.cat(parts, 1)})


def put(x: np.ndarray, dtype: str, is_contiguous: bool = True) -> Tensor:
    tensor = torch.tensor(x, dtype=getattr(torch, dtype))
    if not is_contiguous:  # as a slice of a product of several heads' weights would be
        tensor = torch.stack([tensor, tensor], -2).flatten(-3, -2)[..., ::2, :]
    return tensor.requires_grad_()


def errors(want: dict[str, np.ndarray], got: dict[str, Tensor]) -> dict[str, float]:
    arrays = {name: tensor.detach().double().numpy() for name, tensor in got.items()}
    return attention_cases.errors(want, arrays)
