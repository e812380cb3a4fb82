"""What a report says of language models one by one: n-grams, tokens to a loss, learning rates."""

import numpy as np
import pandas as pd
import pytest
from synthetic_records import extrapolated, record, sample, windowed

from analysis import answer, matching, quality, settings
from analysis.load import frame_of
from analysis.tables import side_by_side

STEPS = np.arange(4, 101, 4)


def trained(family="mqa", seed=0, *, loss=2.0, ngram=2.6, curve=None, num_steps=100, **rest):
    """Bits per byte are 1.3 times the loss; `curve` gives the held-out loss of a step."""
    samples = [sample("loss", loss), sample("bits_per_byte", 1.3 * loss),
               sample("unigram_bits_per_byte", 4.6)]  # fmt: skip
    if ngram is not None:
        samples.append(sample("ngram_bits_per_byte", ngram))
    if curve is not None:
        samples += [sample("held_out_loss", curve(step), at=int(step)) for step in STEPS]
    return record("language_modeling", family, samples=tuple(samples), seed=seed, block=None,
                  batch_size=8, seq_len=16, num_steps=num_steps, **rest)  # fmt: skip


def falling(scale, end=0.0):
    """3 - scale * share of the way, after which it stays."""
    return lambda step: 3 - scale * step / 100 + end


def column(table, header):
    return [row[table.header.index(header)] for row in table.rows]


# n-grams


def test_a_run_that_no_n_gram_model_loses_to_is_flagged():
    records = [trained(seed=0, loss=1.9), trained(seed=1, loss=2.1), trained("hawk", ngram=None)]
    records += [trained("griffin", loss=1.0)]
    frame = frame_of(records)
    table = quality.held_out(frame)
    assert column(table, "family") == ["mqa", "hawk", "griffin"]
    assert column(table, "below n-grams") == ["NO (1 of 2 runs)", "-", "yes"]
    assert column(table, "order-3 n-grams") == ["2.600", "-", "2.600"]
    assert column(table, "tokens") == ["12,800"] * 3
    (said,) = [text for text in answer.caveats(frame) if "n-gram" in text]
    assert said.startswith("1 of 3 language models are not below an order-3 n-gram model")


def test_equal_to_an_n_gram_model_is_not_below_it():
    frame = frame_of([trained(loss=2.0, ngram=1.3 * 2.0)])
    assert column(quality.held_out(frame), "below n-grams") == ["NO (1 of 1 runs)"]


def test_lengths_of_training_are_told_apart():
    frame = frame_of([windowed("griffin", length, None) for length in (256, 512)])
    assert column(quality.held_out(frame), "seq_len") == ["256", "512"]


def test_runs_of_other_suites_alone_make_no_table():
    seeds = [extrapolated("griffin", "jax", seed) for seed in (0, 1, 2)]
    assert quality.tables(frame_of(seeds)) == []


# tokens to the baseline's loss


def test_the_step_is_interpolated_between_two_points():
    curve = pd.Series([3.0, 2.0, 1.0, 1.5], index=[10, 20, 30, 40])
    assert quality.steps_to(curve, 1.75) == pytest.approx(22.5)
    assert quality.steps_to(curve, 2.0) == 20
    assert quality.steps_to(curve, 5.0) == 10
    assert quality.steps_to(curve, 0.5) is None


def test_tokens_to_the_loss_of_mqa_are_paired_by_seed():
    shares = (0.5, 0.6, 0.7)  # of MQA's tokens, by seed; seeds differ by more than families do
    records = []
    for seed, share in enumerate(shares):
        records.append(trained(seed=seed, curve=falling(1, end=seed)))
        records.append(trained("griffin", seed=seed, curve=falling(1 / share, end=seed)))
    (row,) = quality.tokens_to_baseline(frame_of(records)).frame.to_dict("records")
    expected = np.exp(np.mean(np.log(shares)))
    assert row["share"] == pytest.approx(expected)
    assert row["tokens_to_baseline_loss"] == pytest.approx(12800 * expected)
    assert row["low"] < expected < row["high"] < 1
    assert row["verdict"] == "fewer"


def test_a_loss_that_a_seed_never_reaches_has_no_tokens_and_a_reason():
    records = [trained(seed=seed, curve=falling(1)) for seed in range(3)]
    records += [trained("hawk", seed=seed, curve=falling(2 if seed else 0.9)) for seed in range(3)]
    table = quality.tokens_to_baseline(frame_of(records))
    assert column(table, "tokens to reach it") == ["-"]
    assert column(table, "share") == ["-"]
    assert column(table, "seeds") == ["2 of 3"]
    assert column(table, "verdict") == ["not reached by 1 of 3"]


def test_two_seeds_have_no_interval():
    records = [trained(f, seed=s, curve=falling(1 + (f == "hawk")))
               for f in ("mqa", "hawk") for s in range(2)]  # fmt: skip
    table = quality.tokens_to_baseline(frame_of(records))
    assert column(table, "share") == ["0.50"]
    assert column(table, "verdict") == ["not resolved (2 of 3 seeds)"]


# learning rates


def searched(family, losses, decay=0.1, **rest):
    return [trained(family, loss=loss, optimizer=optimizer(rate, decay), **rest)
            for rate, loss in losses.items()]  # fmt: skip


def optimizer(rate, decay=0.1, name="adamw"):
    return {"name": name, "learning_rate": rate, "weight_decay": decay, "beta1": 0.9}


def test_the_best_learning_rate_is_named_with_the_whole_curve():
    records = searched("hawk", {1e-3: 2.3, 3e-3: 2.1, 1e-2: 2.2})
    records += searched("mqa", {1e-3: 2.3, 3e-3: 2.2, 1e-2: 2.0})
    frame = frame_of(records)
    table = quality.learning_rates(frame)
    assert column(table, "family") == ["mqa"] * 3 + ["hawk"] * 3
    assert column(table, "learning_rate") == ["0.01", "0.003", "0.001", "0.003", "0.01", "0.001"]
    what = column(table, "what it is")
    assert what[0] == "best, AT THE EDGE: the largest learning_rate of the grid"
    assert what[3] == "best"
    assert [text for text in what if not text] == [""] * 4
    (said,) = quality.edges(frame)
    assert "MQA-Transformer at size tiny lies at the edge of the grid (0.01, weight" in said
    assert said in answer.caveats(frame)


def test_a_family_that_was_searched_more_is_told():
    records = searched("hawk", {1e-3: 2.3, 3e-3: 2.1, 1e-2: 2.2})
    records += searched("mqa", {1e-3: 2.3, 3e-3: 2.2})
    what = column(quality.learning_rates(frame_of(records)), "what it is")
    assert "of 2 settings, others had 3" in what[0]
    assert what[2] == "best"


def test_one_optimizer_is_no_search():
    frame = frame_of([trained(family) for family in ("mqa", "hawk")])
    assert not quality.learning_rates(frame).rows


def test_a_run_that_diverged_stays_in_the_search():
    records = searched("hawk", {1e-3: 2.3, 3e-3: 2.1})
    records.append(record("language_modeling", "hawk", outcome="diverged", reason="nan", block=None,
                          batch_size=8, seq_len=16, num_steps=100,
                          optimizer=optimizer(1.0)))  # fmt: skip
    table = quality.learning_rates(frame_of(records))
    assert column(table, "loss") == ["2.100", "2.300", "- (diverged)"]
    assert column(table, "what it is")[0] == "best"


def test_families_are_compared_each_at_its_own_tuned_rate():
    records = [trained("mqa", optimizer=optimizer(3e-3, name="tuned")),
               trained("hawk", optimizer=optimizer(1e-2, name="tuned"))]  # fmt: skip
    table = settings.asked(frame_of(records))
    assert settings.shared(table, "family").nunique() == 1
    assert [m.is_matched for m in matching.certificate(frame_of(records)) if m.scope[:3] == "jax"] \
        == [True]  # fmt: skip
    untuned = frame_of([trained("mqa", optimizer=optimizer(3e-3)),
                        trained("hawk", optimizer=optimizer(1e-2))])  # fmt: skip
    assert settings.shared(settings.asked(untuned), "family").nunique() == 2
    other = frame_of(
        [
            trained("mqa", optimizer=optimizer(3e-3, name="tuned")),
            trained("hawk", optimizer=optimizer(1e-2, name="tuned") | {"beta1": 0.8}),
        ]
    )
    assert settings.shared(settings.asked(other), "family").nunique() == 2


# as they grow


def test_a_power_law_says_what_it_spans():
    records = []
    for size, flops in {"a": 1e6, "b": 3e6, "c": 1e7, "d": 4e7}.items():
        loss = 3 * (flops / 1e6) ** -0.1
        records += [trained("hawk", seed, loss=loss, model={"size": size},
                            costs={"train_flops_per_token": flops,
                                   "num_params_non_embedding": int(flops / 6)})
                    for seed in range(3)]  # fmt: skip
    table = quality.power_laws(frame_of(records))
    assert column(table, "loss falls with") == ["training FLOPs", "parameters"]
    assert column(table, "decades") == ["1.6", "1.6"]
    assert all(text.startswith("-0.100") for text in column(table, "exponent"))
    assert "they span 1.6 to 1.6 decades" in table.note


# controls


def test_one_model_under_two_names_is_not_resolved_and_half_of_it_is_worse():
    records = []
    for seed in range(3):
        for name, extra in (("tiny", 0.0), ("again", 0.0), ("half", 0.2 + 0.01 * seed)):
            model = {"lambda_init": name, "size": "tiny"}
            records.append(trained("hawk", seed, loss=2 + 0.1 * seed + extra, model=model))
    frame = frame_of(records)
    verdicts = {}
    for name in ("again", "half"):
        table = side_by_side(frame, "model.lambda_init", name, "tiny", is_brief=True)
        (verdicts[name],) = column(table, "verdict")
    assert verdicts == {"again": "not resolved (equal in every seed)",
                        "half": "lambda_init=half worse"}  # fmt: skip
    assert "Minimum detectable effect, found four times in five: " in table.note
