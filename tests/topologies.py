"""Real TPUs to compile for, without one: libtpu's topologies. A test that asks for one is skipped
where libtpu is missing, unless AERIE_REQUIRE_TPU=1 says that it must be there."""

import os

import jax
import pytest

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else a second process is refused
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks Google's cloud what it runs on


def tpu(topology: str) -> jax.Device:
    """The first device of, say, v5e:2x2."""
    from jax.experimental import topologies

    if os.environ.get("AERIE_REQUIRE_TPU") != "1":
        pytest.importorskip("libtpu")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
