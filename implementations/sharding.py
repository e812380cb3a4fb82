"""One table: logical axis of a parameter -> mesh axis. Both backends read it.

Megatron-style (arXiv:2402.19427 section 4.1): the inner widths of MLP, attention and recurrence go
to the mesh axis "model"; gates are block-diagonal, so blocks shard with the channels they mix.
"""

MESH_AXES = ("data", "model")

# None: replicated along the model axis.
RULES: dict[str, str | None] = {
    "vocab": "model",
    "model": None,
    "mlp": "model",
    "heads": "model",
    "kv": None,
    "rnn": "model",
    "taps": None,
    "gate_blocks": "model",
    "gate_in": None,
    "gate_out": None,
}


def partition(axes: tuple[str, ...]) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of a parameter with these logical axes."""
    return tuple(RULES[axis] for axis in axes)
