"""JAX's scan beside PyTorch's on this CPU, in one run: python benchmarks/cpu_scan.py --out DIR

suite=kernel_speed with each backend's own variant (`auto`, on a CPU `analytic`), interleaved, at
Hawk's sizes tiny and 100m and the shapes that a training step of 1,024 tokens has, and 2,048 steps
of 1 and 8 sequences. Ratios are times of JAX over times of PyTorch; the goal is LIMIT at most.
Exits with 1 where one is above it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import subprocess

import pandas as pd

from analysis import checks, comparisons
from analysis.load import load
from suites.harness.record import PASSES

LIMIT = 1.5
SHAPES = ((4, 256), (2, 512), (1, 2048), (8, 2048))  # batch_size, seq_len
SETTINGS = ("family=hawk", "size=tiny,100m", "model.num_layers=1", "backend=jax,torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the records go")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    for batch_size, seq_len in SHAPES:
        shape = (f"suite.batch_size={batch_size}", f"suite.seq_lens=[{seq_len}]")
        command = ["run", "suite=kernel_speed", *SETTINGS, *shape, f"suite.rounds={asked.rounds}"]
        subprocess.run(
            [sys.executable, "-m", "suites", *command, "--results", str(asked.out)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    found = comparisons.comparisons(load(asked.out))
    found = found[found["metric"] == "op_time_ms"]
    print("| size | op | pass | batch x steps | JAX (ms) | PyTorch (ms) | JAX / PyTorch | parity |")
    print("|---|---|---|---|---|---|---|---|")
    order = ["size", "op", "work_phase", "seq_len", "batch_size"]
    for row in found.sort_values(order, ascending=[False, *[True] * 4]).to_dict("records"):
        ours, theirs = row["value_ours"], row["value_baseline"]
        marks = {row["parity_ours"], row["parity_baseline"]}
        print(
            f"| {row['size']} | {row['op']} | {PASSES[row['work_phase']]} "
            f"| {row['batch_size']} x {row['seq_len']:,} | {ours:.3g} | {theirs:.3g} "
            f"| {1 / row['speedup']:.2f} "
            f"| {'green' if marks == {checks.GREEN} else checks.UNVERIFIED} |"
        )
    worst = worst_ratio(found)
    print(f"\nThe largest ratio is {worst:.2f}; the goal is {LIMIT} at most.")
    return int(not worst <= LIMIT)


def worst_ratio(found: pd.DataFrame) -> float:
    """JAX's time over PyTorch's; nan, which is within no limit, where a pair has none."""
    return float((1 / found["speedup"]).max(skipna=False))


if __name__ == "__main__":
    sys.exit(main())
