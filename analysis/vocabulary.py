"""What analysis calls things, and which metrics it shows."""

from typing import Any

import pandas as pd

# The metrics that tables show, by suite, the first being the suite's own question.
HEADLINES = {
    "training_speed": ("step_time_ms", "tokens_per_s", "mfu", "peak_memory_bytes",
                       "compile_time_s"),
    "prefill_latency": ("ttft_ms", "mfu", "peak_memory_bytes", "compile_time_s"),
    "decode_latency": ("tpot_ms", "decode_time_s", "mbu", "cache_bytes"),
    "decode_throughput": ("tokens_per_s", "max_batch_size"),
    "kernel_speed": ("op_time_ms", "mbu", "peak_memory_bytes"),
    "language_modeling": ("bits_per_byte", "loss", "unigram_bits_per_byte",
                          "ngram_bits_per_byte"),
    "recall": ("accuracy_over_lengths", "accuracy_by_length"),
    "downstream": ("accuracy",),
    "length_extrapolation": ("loss_beyond", "loss"),
    "length_domains": ("loss", "num_passes"),
}  # fmt: skip
SPEEDS = ("step_time_ms", "tokens_per_s", "ttft_ms", "tpot_ms", "decode_time_s", "op_time_ms",
          "mfu", "mbu", "init_time_s", "compile_time_s", "first_step_time_ms")  # fmt: skip
TIMES = ("step_time_ms", "tokens_per_s", "ttft_ms", "tpot_ms", "decode_time_s",
         "op_time_ms")  # fmt: skip
# compared by difference, not by ratio
QUALITIES = ("bits_per_byte", "loss", "train_loss", "held_out_loss", "loss_beyond", "accuracy",
             "accuracy_over_lengths", "accuracy_by_length")  # fmt: skip
# from 0 to 1, both of them reached
SHARES = ("accuracy", "accuracy_over_lengths", "accuracy_by_length", "token_accuracy",
          "token_accuracy_by_length")  # fmt: skip
# one value for each `at`
CURVES = ("train_loss", "held_out_loss", "loss_by_position", "loss_up_to", "loss_by_length",
          "loss_error", "num_documents")  # fmt: skip
FAMILIES = ("mqa", "mqa_local", "hawk", "griffin")


def plain(value: Any) -> Any:
    """A value that is equal to itself: every kind of missing becomes None."""
    return None if pd.isna(value) else value


def family_order(name: str) -> tuple[int, str]:
    return (FAMILIES.index(name) if name in FAMILIES else len(FAMILIES), name)
