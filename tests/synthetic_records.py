"""Records of runs that never ran, for the tests of analysis: values are formulas, not measures."""

from itertools import product
from pathlib import Path

import numpy as np

from suites.harness.record import METRICS, Record, Sample, write

FAMILIES = ("mqa", "hawk", "griffin")
BACKENDS = ("jax", "torch")
SPEED = {"mqa": 1.0, "mqa_local": 0.9, "hawk": 1.25, "griffin": 1.1, "jax": 1.0, "torch": 1.5}
PATTERNS = {
    "mqa": ["mqa"],
    "mqa_local": ["mqa"],
    "hawk": ["rg_lru"],
    "griffin": ["rg_lru", "rg_lru", "mqa"],
}


def sample(metric: str, value: float, **rest) -> Sample:
    return Sample(metric=metric, value=float(value), unit=METRICS[metric].unit, **rest)


PEAKS = (sample("peak_flops_per_s", 1e11, field="measured"),
         sample("peak_bytes_per_s", 2e10, field="measured"))  # fmt: skip


def record(
    suite: str = "training_speed",
    family: str = "griffin",
    backend: str = "jax",
    *,
    samples: tuple[Sample, ...] = (),
    outcome: str = "completed",
    seed: int = 0,
    round: int = 0,
    dtype: str = "float32",
    device_kind: str = "cpu",
    attempt: str | None = None,
    build: str = "build0",
    block: str | None = "block0",
    order: int = 0,
    host: str = "node1",
    reason: str | None = None,
    model: dict | None = None,
    provenance: dict | None = None,
    costs: dict | None = None,
    optimizer: dict | None = None,
    kernels: dict | None = None,
    data: dict | None = None,
    **work,
) -> Record:
    """One attempt; cell_id and run_id are words here, not hashes, so that failures read well."""
    phase = {"language_modeling": "train", "decode_latency": "decode"}.get(suite, "train")
    workload = {"phase": phase, "batch_size": 4, "seq_len": 0, "prompt_len": 0,
                "num_new_tokens": 0, "num_steps": 0, "repeats": 5} | work  # fmt: skip
    settings = {
        "family": family, "size": "tiny", "pattern": PATTERNS[family], "d_model": 64,
        "num_heads": 4, "num_kv_heads": 1, "window_size": 32 if family == "griffin" else None,
        "lambda_init": "paper",
    } | (model or {})  # fmt: skip
    words = [suite, family, backend, dtype, device_kind, str(sorted(workload.items())),
             str(sorted(settings.items(), key=str)), str([optimizer, kernels, data])]  # fmt: skip
    cell_id = "cell " + " ".join(words)
    run_id = f"{abs(hash_of(cell_id)):012x}-{seed}-{round}"
    return Record(
        run_id=run_id,
        cell_id=cell_id,
        build=build,
        attempt=attempt or f"20260101T000000-{run_id}",
        outcome=outcome,
        reason=reason,
        phase=None if outcome == "completed" else "measure",
        run={
            "suite": suite, "model": settings, "backend": backend, "dtype": dtype,
            "workload": workload,
            "kernels": {"linear_scan": "auto", "attention": "auto"} | (kernels or {}),
            "data": data or {"name": "stdlib", "source": "stdlib"},
            "optimizer": optimizer or {"name": "adamw", "learning_rate": 3e-3},
            "device_kind": device_kind, "seed": seed, "round": round,
        },
        provenance={
            "host": host, "device_name": f"{device_kind} device", "cpu_model": "A CPU",
            "num_cores": 2, "memory_bytes": 8 * 2**30, "python": "3.11.9", "platform": "linux",
            "versions": {"numpy": "2.4.6", "jax": "0.10.2"}, "git_commit": "0123456789abcdef",
            "resolved_kernels": {"linear_scan": "analytic", "attention": "plain",
                                 "program": "compiled" if backend == "jax" else "eager"},
            "num_threads": 2, "data_digest": f"data{seed}", "init_digest": f"init-{family}-{seed}",
        } | (provenance or {}),
        costs={
            "num_params": 300_000 + 1000 * len(family), "num_params_non_embedding": 280_000,
            "train_flops_per_token": 1.7e6, "cache_bytes": 4096,
            "predicted_peak_memory_bytes": 10**8,
        } | (costs or {}),
        samples=samples,
        started_at="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        block=block,
        order=order,
    )  # fmt: skip


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % (2**47 - 115)


def training(family: str, backend: str, round: int, seq_len: int = 512, **rest) -> Record:
    rng = np.random.default_rng([len(family), len(backend), round, seq_len])
    step = 100 * SPEED[family] * SPEED[backend] * (1 + seq_len / 2048) * rng.normal(1, 0.01)
    times = step * rng.normal(1, 0.01, 5)
    samples = [
        *(sample("step_time_ms", t, repeat=i) for i, t in enumerate(times)),
        *(sample("tokens_per_s", 4 * 512e3 / t, repeat=i) for i, t in enumerate(times)),
        *(sample("mfu", 10 / t, repeat=i) for i, t in enumerate(times)),
        sample("peak_flops_per_s", 1e11, field="measured"),
        sample("compile_time_s", 3.0 * SPEED[backend]),
        sample("peak_memory_bytes", 4e8 * SPEED[backend]),
    ]
    return record("training_speed", family, backend, samples=tuple(samples), round=round,
                  seq_len=seq_len, **rest)  # fmt: skip


def decoding(family: str, backend: str, round: int, prompt_len: int = 64, **rest) -> Record:
    rng = np.random.default_rng([len(family), len(backend), round, prompt_len])
    tpot = SPEED[family] * SPEED[backend] * rng.normal(1, 0.02, 5)
    samples = [
        *(sample("tpot_ms", t, repeat=i) for i, t in enumerate(tpot)),
        *(sample("decode_time_s", t * 0.127, repeat=i) for i, t in enumerate(tpot)),
        sample("mbu", 0.2),
        sample("cache_bytes", 4096 * (1 + prompt_len if family == "mqa" else 1)),
    ]
    return record("decode_latency", family, backend, samples=tuple(samples), round=round,
                  prompt_len=prompt_len, num_new_tokens=128, **rest)  # fmt: skip


def modeling(family: str, backend: str, seed: int = 0, **rest) -> Record:
    offset = {"mqa": 0.05, "hawk": 0.02, "griffin": 0.0}[family] + 0.003 * (backend == "torch")
    curve = [sample("train_loss", 1.6 + offset + 3.9 * np.exp(-step / 40), at=step)
             for step in range(200)]  # fmt: skip
    positions = [sample("loss_by_position", 1.7 + offset + 2 / (1 + p), at=p) for p in range(128)]
    held = [sample("held_out_loss", 1.7 + offset + 4 * np.exp(-step / 40), at=step)
            for step in range(8, 201, 8)]  # fmt: skip
    held += [sample("loss", 1.7 + offset), sample("bits_per_byte", 2.45 + 1.4 * offset),
             sample("unigram_bits_per_byte", 4.6), sample("ngram_bits_per_byte", 2.9)]  # fmt: skip
    return record("language_modeling", family, backend, samples=(*curve, *positions, *held),
                  seed=seed, seq_len=128, num_steps=200, **rest)  # fmt: skip


def parity(family: str, backend: str, *, error: float = 1e-6, **rest) -> Record:
    fields = {
        "logits": 0.5 * error,
        "grad/layers.0.mixer.linear_x.weight": error,
        "grad/embedding": 0.2 * error,
        "steps/embedding": 0.7 * error,
        "decode": 0.1 * error,
    }
    samples = []
    for name, value in fields.items():
        samples.append(sample("relative_error", value, field=name))
        samples.append(sample("tolerance", 1e-5, field=name))
    return record("parity", family, backend, samples=tuple(samples), seq_len=128, block=None,
                  **rest)  # fmt: skip


def quickstart(store: Path, *, rounds: int = 3, seq_lens=(256, 512), with_parity=True) -> Path:
    """A store as the quickstart leaves it."""
    for family, backend in product(FAMILIES, BACKENDS):
        for round in range(rounds):
            for seq_len in seq_lens:
                write(store, training(family, backend, round, seq_len))
            for prompt_len in (64, 256):
                write(store, decoding(family, backend, round, prompt_len))
        write(store, modeling(family, backend))
        if with_parity:
            write(store, parity(family, backend))
    return store


def throughput(
    family: str, backend: str, round: int, num_new_tokens: int, prompt_len: int = 16, **rest
) -> Record:
    """A search over batch sizes that memory ends; MQA's cache ends it sooner, and slows it."""
    rng = np.random.default_rng([len(family), len(backend), round, num_new_tokens])
    grows = num_new_tokens / 512 if family == "mqa" else 0.1
    largest = {"mqa": 16, "hawk": 128, "griffin": 64}[family]
    samples = []
    batch = 1
    while batch <= largest:
        rate = 900 * batch / (SPEED[backend] * (1 + batch / 40) * (1 + grows))
        for repeat, value in enumerate(rate * rng.normal(1, 0.01, 3)):
            samples.append(sample("tokens_per_s", value, repeat=repeat, at=batch))
        batch *= 2
    ended = "bound" if family == "hawk" else "out_of_memory_predicted"
    samples.append(sample("max_batch_size", largest, field=ended))
    return record("decode_throughput", family, backend, samples=tuple(samples), round=round,
                  phase="decode", batch_size=1, prompt_len=prompt_len,
                  num_new_tokens=num_new_tokens, **rest)  # fmt: skip


def latency(
    family: str, backend: str, round: int, num_new_tokens: int, prompt_len: int, **rest
) -> Record:
    """Seconds of decoding: a KV cache slows with the context, a state does not."""
    rng = np.random.default_rng([len(family), len(backend), round, num_new_tokens, prompt_len])
    context = prompt_len + num_new_tokens / 2
    step = SPEED[family] * SPEED[backend] * (1 + (context / 2000 if family == "mqa" else 0))
    times = 4e-3 * num_new_tokens * step * rng.normal(1, 0.02) * rng.normal(1, 0.01, 5)
    samples = [sample("decode_time_s", t, repeat=i) for i, t in enumerate(times)]
    samples += [sample("tpot_ms", t * 1e3 / num_new_tokens, repeat=i) for i, t in enumerate(times)]
    samples += PEAKS
    return record("decode_latency", family, backend, samples=tuple(samples), round=round,
                  batch_size=16, prompt_len=prompt_len, num_new_tokens=num_new_tokens,
                  costs={"model_flops": 1e6 * num_new_tokens * 16,
                         "model_bytes": 1.2e6 * num_new_tokens}, **rest)  # fmt: skip


def scan(
    backend: str, variant: str, round: int, seq_len: int, *, op: str = "linear_scan",
    phase: str = "evaluate", **rest,
) -> Record:  # fmt: skip
    rng = np.random.default_rng([len(backend), len(variant), round, seq_len, len(phase)])
    factor = {"sequential": 2.5, "associative": 5.0, "analytic": 1.0}[variant]
    factor *= SPEED[backend] * (3 if phase == "train" else 1)
    time = factor * seq_len / 1024 * rng.normal(1, 0.02)
    samples = [sample("op_time_ms", time * t, repeat=i)
               for i, t in enumerate(rng.normal(1, 0.01, 5))]  # fmt: skip
    return record("kernel_speed", "hawk", backend, samples=(*samples, *PEAKS), round=round,
                  phase=phase, op=op, batch_size=8, seq_len=seq_len,
                  provenance=scan_kernels(variant), kernels={"linear_scan": variant},
                  costs={"model_flops": 2e4 * seq_len, "model_bytes": 6e4 * seq_len},
                  **rest)  # fmt: skip


def scan_kernels(variant: str) -> dict:
    return {"resolved_kernels": {"linear_scan": variant, "attention": "plain",
                                 "program": "compiled"}}  # fmt: skip


def scaled(family: str, backend: str, seed: int, width: int, **rest) -> Record:
    """A quality run of one size of a power law: loss over parameters, with tokens in proportion."""
    rng = np.random.default_rng([len(family), len(backend), seed, width])
    num_params = 12 * width**2 * {"mqa": 1.0, "hawk": 1.18, "griffin": 1.12}[family]
    scale = {"mqa": 1.0, "hawk": 1.03, "griffin": 0.985}[family]
    loss = scale * 12 * num_params**-0.12 * rng.normal(1, 0.004)
    return record(
        "language_modeling", family, backend, samples=(sample("loss", loss),), seed=seed,
        seq_len=512, batch_size=8, num_steps=int(num_params / 200), phase="train",
        model={"size": f"w{width}", "d_model": width},
        costs={"num_params_non_embedding": int(num_params),
               "train_flops_per_token": 6.0 * num_params}, **rest,
    )  # fmt: skip


def windowed(family: str, seq_len: int, window: int | None, seed: int = 0) -> Record:
    rng = np.random.default_rng([len(family), seq_len, window or 0, seed])
    loss = 2.6 + (0.0 if window is None else 0.03 * np.log2(seq_len / window) - 0.01)
    loss -= 0.035 if family == "griffin" else 0
    return record("language_modeling", family, "jax", seed=seed, seq_len=seq_len, num_steps=200,
                  samples=(sample("loss", loss + rng.normal(0, 0.002)),),
                  model={"window_size": window})  # fmt: skip


def recall(
    family: str,
    backend: str,
    seed: int = 0,
    num_examples: int | None = 64,
    *,
    task: str = "induction_heads",
    num_items: int = 0,
    size: str = "tiny",
    seq_len: int = 256,
    starts: int | None = None,
    reach: int | None = None,
    num_steps: int = 5000,
    **rest,
) -> Record:
    """Accuracy over steps (half at `starts`) and over lengths (all right up to `reach`), of so many
    examples."""
    starts = starts or {"mqa": 400, "hawk": 2500, "griffin": 600}[family] + 100 * seed
    reach = reach or {"mqa": 256, "hawk": 8192, "griffin": 4096}[family]
    curve = {step: 1 / (1 + np.exp((starts - step) / 150)) for step in range(0, num_steps + 1, 250)}
    samples = [sample("accuracy", value, at=step) for step, value in curve.items()]
    for level in (90, 95):
        first = next((step for step, value in curve.items() if value >= level / 100), None)
        samples.append(Sample(metric="num_steps_to_accuracy", value=first, unit="steps", at=level))
    lengths = 2 ** np.arange(6, 14)
    samples += [sample("accuracy_by_length", min(1.0, (reach / n) ** 2), at=int(n))
                for n in lengths]  # fmt: skip
    over = np.mean([min(1.0, (reach / n) ** 2) for n in lengths])
    samples.append(sample("accuracy_over_lengths", over))
    if num_examples:
        samples.append(sample("num_examples", num_examples))
    data = {"name": task, "source": task} | ({"num_items": num_items} if num_items else {})
    return record("recall", family, backend, samples=tuple(samples), seed=seed, phase="train",
                  seq_len=seq_len, num_steps=num_steps, data=data,
                  model={"size": size} | rest.pop("model", {}), **rest)  # fmt: skip


def extrapolated(family: str, backend: str, seed: int = 0, seq_len: int = 128) -> Record:
    """MQA's loss rises beyond its training length, the others' goes on falling."""
    rng = np.random.default_rng([len(family), len(backend), seed, seq_len])
    rise = {"mqa": 0.5, "hawk": 0.01, "griffin": -0.02}[family]
    samples = [sample("loss", 1.9), sample("loss_beyond", 1.9 + rise)]
    for at in (0, 1, 2, 4, 8, 16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448):
        loss = 1.8 + 2 / (1 + at) + rise * max(0, np.log2((at + 1) / seq_len))
        samples += [sample("loss_by_position", loss + rng.normal(0, 0.01), at=at),
                    sample("loss_error", 0.05, at=at),
                    sample("num_documents", 20, at=at)]  # fmt: skip
    return record("length_extrapolation", family, backend, samples=tuple(samples), seed=seed,
                  seq_len=seq_len, batch_size=512 // seq_len, num_steps=200,
                  eval_seq_len=512)  # fmt: skip


def domain(family: str, backend: str, seed: int, trained: int, penalty: float = 0.1) -> Record:
    """`penalty` nats for each octave between the bucket that was trained and that evaluated."""
    rng = np.random.default_rng([len(family), len(backend), seed, trained])
    samples = [sample("num_passes", 2.0)]
    for number, evaluated in enumerate((256, 512, 1024)):
        octaves = abs(np.log2(trained / evaluated))
        loss = 2.4 - 0.1 * number + 0.05 * seed + penalty * octaves + rng.normal(0, 0.002)
        samples += [sample("loss_by_length", loss, at=evaluated),
                    sample("loss_error", 0.04, at=evaluated),
                    sample("num_documents", 30, at=evaluated)]  # fmt: skip
        if evaluated == trained:
            samples.append(sample("loss", loss))
    return record("length_domains", family, backend, samples=tuple(samples), seed=seed,
                  seq_len=trained, batch_size=4096 // trained, num_steps=200,
                  length_buckets=[128, 256, 512, 1024])  # fmt: skip
