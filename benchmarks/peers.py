"""aerie against transformers' RecurrentGemma: one CPU, equal threads, weights, shapes, tokens.

    python benchmarks/peers.py [--json] [--rounds N]

Two phases, float32: `train`, forward and backward without optimizer on 4 x 1024 tokens; `decode`,
256 greedy tokens for 4 sequences after a prompt of 64. Every measurement is a fresh process; the
three contestants run in turn (A B C C B A ...), so that drift of the machine meets all alike. Each
process also writes its logits, and a ratio is printed only beside the error between them.

Both of our backends are compiled programs (JAX always, PyTorch by kernels.compile=true), compiled
in the discarded first call. The peer runs as `generate` and its forward pass come: its loop over
time, in Python, is too long to compile.

Needs the extra `peers`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's folder would hide Python's own statistics
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from implementations.config import ModelConfig
from implementations.engine import Batch, Kernels, load_engine

BATCH_SIZE, SEQ_LEN, PROMPT_LEN, NUM_NEW_TOKENS = 4, 1024, 64, 256
REPEATS = 3  # timed in one process, after one that is discarded
PEER = "transformers"
CONTESTANTS = (PEER, "torch", "jax")

# RecurrentGemma's settings, as far as the peer leaves a choice: gate blocks are its heads, half of
# each head is rotated, logits are capped, inputs scaled; its window counts keys as ours does.
MODEL = ModelConfig(
    family="griffin",
    size="peers",
    pattern=("rg_lru", "rg_lru", "mqa"),
    d_model=256,
    d_rnn=320,
    d_mlp=768,
    num_layers=6,
    num_heads=4,
    head_dim=64,
    num_gate_blocks=4,
    window_size=256,
    vocab_size=256,
    rope_fraction=0.5,
    logit_soft_cap=30.0,
    scale_embeddings=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--rounds", type=int, default=4, help="processes a contestant")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        measure(arguments.contestant, arguments.out)
        return
    rows = compare(arguments.rounds)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['backend']:6} {row['phase']:7} ours {row['ours_s']:.3f} s   "
            f"{row['peer']} {row['peer_s']:.3f} s   speedup {row['speedup']:.1f}   "
            f"logits error {row['logits_error']:.1e}"
        )


def compare(rounds: int) -> list[dict]:
    """One row a backend and phase; times are medians over processes of medians over repeats."""
    seconds = {(name, phase): [] for name in CONTESTANTS for phase in ("train", "decode")}
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        for round in range(rounds):
            for name in CONTESTANTS if round % 2 == 0 else reversed(CONTESTANTS):
                print(f"round {round + 1} of {rounds}: {name}", file=sys.stderr)
                out = Path(folder) / f"{name}.npz"
                command = [sys.executable, __file__, "--contestant", name, "--out", str(out)]
                subprocess.run(command, check=True, env=environment())
                with np.load(out) as result:
                    logits[name] = result["logits"]
                    for phase in ("train", "decode"):
                        seconds[name, phase].append(float(np.median(result[phase])))
    truth = logits[PEER]
    return [
        {
            "peer": PEER,
            "backend": backend,
            "phase": phase,
            "ours_s": median(seconds[backend, phase]),
            "peer_s": median(seconds[PEER, phase]),
            "speedup": median(seconds[PEER, phase]) / median(seconds[backend, phase]),
            "logits_error": float(np.abs(logits[backend] - truth).max() / np.abs(truth).max()),
        }
        for backend in ("torch", "jax")
        for phase in ("train", "decode")
    ]


def environment() -> dict[str, str]:
    threads = str(os.cpu_count())
    pinned = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
    return os.environ | pinned | {"HF_HUB_OFFLINE": "1"}


def measure(contestant: str, out: Path) -> None:
    """One process: logits, then REPEATS times of each phase, into one .npz file."""
    rng = np.random.default_rng(0)
    batch = Batch.of(rng.integers(MODEL.vocab_size, size=(BATCH_SIZE, SEQ_LEN + 1)))
    prompt_BT = batch.tokens_BT[:, :PROMPT_LEN]
    contest = measure_peer if contestant == PEER else measure_ours
    logits, train, decode = contest(contestant, batch, prompt_BT)
    np.savez(out, logits=logits, train=train, decode=decode)


def measure_ours(backend: str, batch: Batch, prompt_BT: np.ndarray) -> tuple:
    # plain attention: the faster one in a window of 256
    kernels = Kernels(attention="plain", compile=True)
    engine = load_engine(backend)(MODEL, kernels=kernels, seed=0)

    def prefill() -> tuple:
        token_B, cache = engine.prefill(prompt_BT, capacity=PROMPT_LEN + NUM_NEW_TOKENS)
        engine.synchronize()
        return token_B, cache

    def decode(state: tuple) -> None:
        tokens_BT, _ = engine.decode(*state, num_tokens=NUM_NEW_TOKENS)
        np.asarray(tokens_BT)

    return (
        engine.logits(batch),
        repeat(lambda: None, lambda _: engine.loss_and_grad(batch)),
        repeat(prefill, decode),
    )


def measure_peer(_: str, batch: Batch, prompt_BT: np.ndarray) -> tuple:
    import torch

    model = load_engine(PEER)(MODEL, seed=0).model
    tokens_BT = torch.from_numpy(np.array(batch.tokens_BT, np.int64))
    targets_BT = torch.from_numpy(np.array(batch.targets_BT, np.int64))
    prompt = torch.from_numpy(np.array(prompt_BT, np.int64))

    def train(_) -> None:
        model.zero_grad()
        logits_BTV = model(tokens_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        loss.backward()

    def decode(_) -> None:
        # One token more: `generate` counts the one that the prefill yields, as decode() does not.
        # Its prefill of 64 tokens is inside, a hundredth of the whole.
        new = {"min_new_tokens": NUM_NEW_TOKENS + 1, "max_new_tokens": NUM_NEW_TOKENS + 1}
        with torch.inference_mode():
            model.generate(prompt, do_sample=False, pad_token_id=0, **new)

    with torch.inference_mode():
        logits = model(tokens_BT, use_cache=False).logits.float().numpy()
    return logits, repeat(lambda: None, train), repeat(lambda: None, decode)


def repeat(prepare: Callable, work: Callable) -> list[float]:
    """Seconds of work(prepare()), REPEATS times after a discarded one; prepare is not timed."""
    seconds = []
    for _ in range(REPEATS + 1):
        ready = prepare()
        start = time.perf_counter()
        work(ready)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


if __name__ == "__main__":
    main()
