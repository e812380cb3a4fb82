"""Several devices: each holds all parameters and computes the gradients of its rows of a batch.

Twin: implementations/jax_backend/data_parallel.py.  One process a device. Gradients are summed in
one all-reduce after the backward pass, and not bucket by bucket within it as
DistributedDataParallel does: the loss is a mean over scored targets, of which ranks may have
different numbers, and one sum in float32 is simple to hold to what one device computes.
"""

from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from implementations.engine import CPU, IGNORED, Batch, Unsupported
from implementations.rank import Rank

# Ranks compile for as long as they need, and one that dies is noticed by suites/harness/ranks.py.
PATIENCE = timedelta(days=1)


def choose_device(device_kind: str, num_devices: int) -> None:
    """Makes the rank's own device the current one: of those that are visible, as many as ranks."""
    rank = Rank.of()
    if rank.count != num_devices:
        raise Unsupported(
            f"num_devices={num_devices}: PyTorch needs a process for each, and this run has "
            f"{rank.count}."
        )
    if device_kind == CPU:
        return
    found = torch.cuda.device_count()
    if found != num_devices:
        raise Unsupported(f"num_devices={num_devices}, but PyTorch sees {found} here.")
    torch.cuda.set_device(rank.index)


def join(device: torch.device) -> None:
    """Meets the other ranks."""
    if dist.is_initialized():
        return
    rank = Rank.of()
    store = dist.TCPStore(
        rank.host,
        rank.port,
        rank.count,
        is_master=rank.index == 0,
        timeout=PATIENCE,
        master_listen_fd=rank.listen_fd,
    )
    dist.init_process_group(
        "gloo" if device.type == CPU else "nccl",
        store=store,
        rank=rank.index,
        world_size=rank.count,
        timeout=PATIENCE,
        device_id=None if device.type == CPU else device,
    )


def rows(batch: Batch, num_devices: int) -> Batch:
    """The rows of this rank."""
    share = batch.tokens_BT.shape[0] // num_devices
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    return Batch(batch.tokens_BT[mine], batch.targets_BT[mine], batch.position_BT[mine])


def summed(loss: Tensor, params: list[nn.Parameter], rows: Batch, batch: Batch) -> Tensor:
    """The loss of the whole batch, its gradients in params, from those of rows: means over scored
    targets, which count by how many there are."""
    weight = num_scored(rows) / max(num_scored(batch), 1)
    grads = [param.grad for param in params]
    flat = torch.cat([*(grad.flatten() for grad in grads), loss.to(grads[0].dtype).view(1)])
    dist.all_reduce(flat.mul_(weight))
    *sums, loss = flat.split([*(grad.numel() for grad in grads), 1])
    # Copied back: a weight that is stored transposed has such a gradient too, and the fused
    # optimizer walks both in the order of memory.
    torch._foreach_copy_(grads, [total.view_as(g) for total, g in zip(sums, grads, strict=True)])
    return loss[0]


def gathered(nll_BT: Tensor) -> Tensor:
    """Of all rows."""
    parts = [torch.empty_like(nll_BT) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, nll_BT)
    return torch.cat(parts)


def num_scored(batch: Batch) -> int:
    return int(np.count_nonzero(batch.targets_BT != IGNORED))
