"""Which devices a child sees: runs side by side get disjoint ones, of those that we were given."""

from collections.abc import Mapping

from implementations.engine import CPU, Unsupported, platform_of

LISTS = {"gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}
# How libtpu is told that a process has these chips of its host, and no neighbours: without, it
# takes the whole host, and a second process finds it locked. Chips of a host are numbered by rows.
CHIPS_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


def devices_environment(
    device_kind: str, slot: int, num_devices: int, environ: Mapping[str, str]
) -> dict[str, str]:
    """What the child in a slot, counted from 0, has in its environment; those beside it ask for as
    many devices. Names stay as the list has them, which may be UUIDs or parts of a GPU (MIG).
    Where there is no list, devices are numbered from 0, and the engine says what it finds.
    """
    platform = platform_of(device_kind)
    if platform == CPU:  # a process of JAX makes as many of its cores; PyTorch has a process each
        return {"JAX_NUM_CPU_DEVICES": str(num_devices)} if num_devices > 1 else {}
    variable, end = LISTS[platform], (slot + 1) * num_devices
    listed = [str(index) for index in range(end)]
    if variable in environ:
        listed = [name.strip() for name in environ[variable].split(",") if name.strip()]
    if len(listed) < end:
        raise Unsupported(
            f"slot {slot} with num_devices={num_devices} needs {end} devices, and "
            f"{variable}={environ[variable]} lists {len(listed)}."
        )
    found = {variable: ",".join(listed[end - num_devices : end])}
    if platform == "gpu":
        return found
    if num_devices not in CHIPS_BOUNDS:
        counts = ", ".join(map(str, CHIPS_BOUNDS))
        raise Unsupported(f"num_devices={num_devices}: chips of one TPU host are {counts}.")
    bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": CHIPS_BOUNDS[num_devices]}
    return found | bounds | {"TPU_PROCESS_BOUNDS": "1,1,1"}
