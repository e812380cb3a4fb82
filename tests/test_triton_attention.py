"""Attention, RoPE and the decode step in Triton, interpreted, against the float64 reference."""

import pytest
from attention_cases import ATTENTIONS, CHUNKS, TOLERANCE, check

CASES = "triton_attention_cases"

# RoPE is compared with `plain`: the same float32 angles.
ROPE_TOLERANCE = {"float32": 3e-7, "bfloat16": 4e-3}
# To `plain` in float64: a float32 angle is 6e-8 of the position off, of which the furthest is 466.
STEP_TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_and_its_gradients_match_the_reference(interpreted, case):
    errors = interpreted(CASES, "attention_errors", **case)
    check(errors, TOLERANCE[case.get("dtype", "float32")])


@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_queries_after_a_state_see_its_keys(interpreted, case):
    errors = interpreted(CASES, "attention_errors", **case)
    check(errors, TOLERANCE[case.get("dtype", "float32")])


def test_two_runs_give_the_same_bits(interpreted):
    assert interpreted(CASES, "attention_is_deterministic")


def test_no_kernel_leaves_its_tensors_or_races(interpreted):
    assert interpreted(CASES, "accesses") == []


def test_the_queries_of_a_block_of_keys_are_those_of_the_mask(interpreted):
    assert interpreted(CASES, "seen_by_errors") == 0


def test_few_blocks_of_keys_share_out_the_heads(interpreted):
    parts = interpreted(CASES, "parts")
    assert parts["heads"] == [16, 1, 10, 5]
    assert parts["slots"] == [(64, 64), (128, 32), (64, 16), (64, 1)]


@pytest.mark.parametrize(
    "case",
    [
        {"rope_dim": 16, "head_dim": 16, "num_heads": 4, "furthest": 300},
        {"rope_dim": 6, "head_dim": 12, "num_heads": 3, "furthest": 16384, "index": "int32"},
        {"rope_dim": 2, "head_dim": 16, "num_heads": 1, "furthest": 1_000_000},
        {"rope_dim": 128, "head_dim": 256, "num_heads": 2, "furthest": 16384},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ROPE_TOLERANCE)
def test_rope_turns_as_plain_does_at_every_distance(interpreted, case, dtype):
    check(interpreted(CASES, "rope_errors", dtype=dtype, **case), ROPE_TOLERANCE[dtype])


@pytest.mark.parametrize(
    "case",
    [
        {"num_slots": 1},
        {"num_slots": 32, "rope_dim": 16},
        {"num_slots": 63, "num_kv_heads": 2, "batch_size": 2, "head_dim": 12, "index": "int32"},
        {"num_slots": 200, "num_heads": 20, "rope_dim": 0},
        {"num_slots": 64, "dtype": "bfloat16"},
        {"num_slots": 129, "dtype": "bfloat16", "num_heads": 3, "num_kv_heads": 3},
    ],
    ids=str,
)
def test_a_step_writes_one_slot_and_attends_to_those_written(interpreted, case):
    errors = interpreted(CASES, "step_errors", **case)
    check(errors, STEP_TOLERANCE[case.get("dtype", "float32")])


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_the_mixer_prefills_in_chunks_and_decodes_as_in_one_pass(interpreted, window, num_kv_heads):
    errors = interpreted(CASES, "mixer_errors", window=window, num_kv_heads=num_kv_heads)
    check(errors, STEP_TOLERANCE["float32"])
