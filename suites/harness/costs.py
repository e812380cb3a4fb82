"""What one timed call of a workload must do at least: exact FLOPs, and the bytes that must move."""

from collections.abc import Callable

from implementations import cost
from implementations.config import ModelConfig
from suites.harness.run import Workload

TIMED_BACKWARD = ("train", "kernel")  # phases of an op alone that take its gradients too


def work_costs(model: ModelConfig, work: Workload, dtype: str) -> dict[str, float]:
    """model_flops and model_bytes: of one optimizer step, one prefill, all decode steps of a
    batch, or one call of an op. Activations move too, and are not counted."""
    batch = {"batch_size": work.batch_size, "dtype": dtype}
    if work.op or work.phase == "kernel":
        has_backward = work.phase in TIMED_BACKWARD
        flops = cost.recurrence_flops(model, work.batch_size, work.seq_len)
        flops = flops if has_backward else flops / 3  # a backward pass is twice its forward pass
        num_bytes = cost.scan_bytes(
            model, work.op or "rg_lru", seq_len=work.seq_len, has_backward=has_backward, **batch
        )
    elif work.phase == "train":
        flops = cost.train_flops_per_token(model, work.seq_len) * work.batch_size * work.seq_len
        num_bytes = cost.train_bytes(model, dtype)
    elif work.phase == "prefill":
        flops = cost.prefill_flops(model, work.batch_size, work.prompt_len)
        num_bytes = cost.prefill_bytes(model, prompt_len=work.prompt_len, **batch)
    elif work.phase == "decode":
        contexts = range(work.prompt_len, work.prompt_len + work.num_new_tokens - 1)
        flops = _sum(
            lambda context: cost.decode_flops(model, work.batch_size, range(context, context + 1)),
            contexts,
            model,
        )
        num_bytes = _sum(
            lambda context: cost.decode_bytes(model, context=context, **batch), contexts, model
        )
    else:
        return {}
    return {"model_flops": flops, "model_bytes": num_bytes}


def _sum(of: Callable[[int], float], contexts: range, model: ModelConfig) -> float:
    """Of what is linear in the context until the window is full, and constant from there: exact
    from the ends, and cheap where contexts are many."""
    full = model.num_visible_keys
    start, stop = contexts.start, contexts.stop
    full = stop if full is None else min(max(full - 1, start), stop)
    pieces = (range(start, full), range(full, stop))
    return sum(len(part) * (of(part[0]) + of(part[-1])) / 2 for part in pieces if part)
