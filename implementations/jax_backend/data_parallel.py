"""Several devices: each holds all parameters and computes the gradients of its rows of a batch.

Twin: implementations/torch_backend/data_parallel.py.  The same programs serve one process that has
all devices and several processes that have some each. Rows are computed in shard_map: kernels of
Pallas cannot be partitioned, and the loss is taken in chunks of tokens that know nothing of rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from implementations.engine import CPU, IGNORED, Batch, Unsupported, platform_of
from implementations.rank import Rank
from implementations.sharding import MESH_AXES

DATA = MESH_AXES[0]
WHOLE, ROWS = PartitionSpec(), PartitionSpec(DATA)
# Ranks compile for as long as they need, and one that dies is noticed by suites/harness/ranks.py.
PATIENCE_S = 24 * 3600


def join(device_kind: str, num_devices: int) -> None:
    """Meets the run's other processes, where it has any; before JAX looks at its devices."""
    rank = Rank.of()
    if rank.count == 1 or jax.distributed.is_initialized():
        return
    if num_devices % rank.count:
        raise Unsupported(f"num_devices={num_devices} does not divide by {rank.count} processes.")
    share, local = num_devices // rank.count, None
    if platform_of(device_kind) == "gpu":
        local = range(rank.index * share, (rank.index + 1) * share)
    if device_kind == CPU:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # of programs that were read from a cache, processes wait for each other for ever
        jax.config.update("jax_enable_compilation_cache", False)
    jax.distributed.initialize(
        f"{rank.host}:{rank.port}",
        num_processes=rank.count,
        process_id=rank.index,
        local_device_ids=local,
        cluster_detection_method="deactivate",  # variables of Slurm that are set in part stop it
        initialization_timeout=PATIENCE_S,
        heartbeat_timeout_seconds=PATIENCE_S,
    )


def open_mesh(devices: list[jax.Device], num_devices: int) -> Mesh:
    if len(devices) != num_devices:
        raise Unsupported(
            f"num_devices={num_devices}, but JAX sees {len(devices)} of kind "
            f"{devices[0].device_kind!r} in {jax.process_count()} process(es)."
        )
    return Mesh(np.array(devices), (DATA,))


def put(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """The same arrays on the host of every process, on the devices of all."""
    sharding = NamedSharding(mesh, spec)

    def put_one(value: Any) -> Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

    return jax.tree.map(put_one, tree)


Rows = Callable[[dict, Batch], Any]  # computes something of rows: of a batch, or of some of it


def summed(compute: Rows, mesh: Mesh | None) -> Rows:
    """Loss and gradients of the whole batch, from those of rows: means over scored targets, which
    count by how many there are."""

    def of_rows(params: dict, batch: Batch) -> tuple:
        num_scored = (batch.targets_BT != IGNORED).sum()
        weight = num_scored / jnp.maximum(lax.psum(num_scored, DATA), 1)
        found = jax.tree.map(lambda value: value * weight, compute(params, batch))
        return lax.psum(found, DATA)

    return compute if mesh is None else _over(mesh, of_rows)


def gathered(compute: Rows, mesh: Mesh | None) -> Rows:
    """What is computed of each row, of all rows."""
    if mesh is None:
        return compute
    return _over(mesh, lambda *inputs: lax.all_gather(compute(*inputs), DATA, tiled=True))


def _over(mesh: Mesh, function: Rows) -> Rows:
    # With check_vma the gradient of what is on all devices would be a sum over them already.
    return jax.shard_map(
        function, mesh=mesh, in_specs=(WHOLE, ROWS), out_specs=WHOLE, check_vma=False
    )
