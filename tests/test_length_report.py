"""What analysis says of lengths: the matrix of buckets, and bands over documents."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from synthetic_records import domain, extrapolated

from analysis import (
    answer,
    comparisons,
    factorial,
    figures,
    lengths,
    positions,
    report,
    statistics,
    style,
    wording,
)
from analysis.load import frame_of

TRAINED = (256, 512, 1024)
SEEDS = (0, 1, 2)


def frame_of_domains(penalty=0.1, seeds=SEEDS, trained=TRAINED):
    made = [domain("griffin", "jax", seed, n, penalty) for seed in seeds for n in trained]
    return frame_of(made)


def places(found):
    return {(row["trained"], row["evaluated"]): row for row in found.to_dict("records")}


def test_the_penalty_is_paired_by_seed_within_an_evaluated_bucket():
    """Seeds differ by 0.05 nats, which the pairs do not see; buckets by 0.1, which they do not."""
    found = places(lengths.domains(frame_of_domains()))
    assert len(found) == 9
    for (trained, evaluated), row in found.items():
        octaves = abs(np.log2(trained / evaluated))
        assert row["num_seeds"] == 3
        assert row["loss"] == pytest.approx(
            2.45 - 0.1 * TRAINED.index(evaluated) + 0.1 * octaves, abs=0.01
        )
        if trained == evaluated:
            assert np.isnan(row["penalty"])
            assert pd.isna(row["verdict"])
        else:
            assert row["penalty"] == pytest.approx(0.1 * octaves, abs=0.01)
            assert row["verdict"] == "worse"
            assert row["penalty_low"] < 0.1 * octaves < row["penalty_high"]
            assert row["penalty_high"] - row["penalty_low"] < 0.05


def test_a_penalty_that_is_not_there_is_not_resolved_and_says_what_would_be():
    found = places(lengths.domains(frame_of_domains(penalty=0.0)))
    verdicts = [row["verdict"] for place, row in found.items() if place[0] != place[1]]
    assert verdicts.count("not resolved") >= 5  # of 6, at 95%
    table = lengths.table(frame_of_domains(penalty=0.0))
    text = table.rows[1][-1]
    assert text.startswith("not resolved (")
    assert "nats/token would be" in text


def test_what_has_no_partner_has_no_penalty():
    found = places(lengths.domains(frame_of_domains(trained=(256, 512))))
    assert np.isnan(found[256, 1024]["penalty"])
    assert found[256, 512]["verdict"] == "worse"
    alone = places(lengths.domains(frame_of_domains(seeds=(0,))))
    (one,) = {row["verdict"] for place, row in alone.items() if place[0] != place[1]}
    assert one == "1 of 2 seeds"


def test_the_table_is_in_the_report_where_there_are_such_runs_alone():
    def names(frame):
        return [section.anchor for section in report.sections(frame, ())]

    assert "lengths" in names(frame_of_domains())
    assert "lengths" not in names(frame_of([extrapolated("mqa", "jax")]))


def test_the_heat_map_has_a_panel_a_family_and_frames_the_own_bucket():
    made = [domain(family, "jax", seed, n) for family in ("hawk", "mqa") for seed in SEEDS
            for n in TRAINED]  # fmt: skip
    with style.looks():
        figure = figures.FIGURES["length_domains"](frame_of(made))
    titles = [axes.get_title("left") for axes in figure.axes]
    assert [title.split(",")[0] for title in titles] == ["MQA-Transformer", "Hawk"]
    for axes in figure.axes:
        assert len(axes.patches) == 3
        texts = [text.get_text() for text in axes.texts]
        assert len(texts) == 9
        assert sum("+" in text for text in texts) == 6


def test_the_band_over_documents_is_as_wide_as_their_standard_error():
    made = [extrapolated("mqa", "jax", seed) for seed in SEEDS]
    with style.looks():
        figure = figures.FIGURES["loss_by_position"](frame_of(made))
    (axes,) = figure.axes
    bands = [item for item in axes.collections if isinstance(item, PolyCollection)]
    assert len(bands) == 2  # over seeds, and over documents
    (line,) = (line for line in axes.get_lines() if str(line.get_label()).startswith("MQA"))
    middle = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    half = statistics.student_half_width(20, 0.05 * np.sqrt(20))
    corners = bands[-1].get_paths()[0].vertices
    for at in (2.0, 129.0, 449.0):
        ends = corners[np.isclose(corners[:, 0], at), 1]
        assert ends.max() == pytest.approx(middle[at] + half)
        assert ends.min() == pytest.approx(middle[at] - half)


def frame_of_trained(*seq_lens, families=("mqa", "hawk", "griffin")):
    return frame_of([extrapolated(family, "jax", seed, seq_len)
                     for family in families for seed in SEEDS for seq_len in seq_lens])  # fmt: skip


RISE = {"mqa": 0.5, "hawk": 0.01, "griffin": -0.02}  # nats an octave beyond the training length


def test_training_lengths_are_compared_where_none_was_trained():
    """At the same positions a longer one lies an octave less beyond its own length; `loss_beyond`,
    which is of other positions for each, is the same for all."""
    frame = frame_of_trained(64, 128, 256)
    found = positions.longer(frame).set_index("family")
    assert set(found["start"]) == {256}
    for family, rise in RISE.items():
        row = found.loc[family]
        assert (row["short"], row["long"], row["num_seeds"]) == (64, 256, 3)
        assert row["value"] == pytest.approx(-2 * rise, abs=0.02)
    assert found["verdict"]["mqa"] == "better"
    assert positions.unseen(frame).groupby("run_id").size().eq(1).all()


def test_losses_of_other_positions_are_not_compared():
    frame = frame_of(
        [extrapolated("griffin", "jax", seed, n) for seed in SEEDS for n in (128, 256)]
    )
    found = comparisons.comparisons(frame, "seq_len", "256", "128")
    told = {row["metric"]: wording.verdict(row, "256") for row in found.to_dict("records")}
    assert told["loss_beyond"] == "unpaired (of other positions)"
    assert "unpaired" not in told["loss"]
    assert (
        found.set_index("metric").loc["loss_beyond", ["value_ours", "value_baseline"]].notna().all()
    )
    by_family = [extrapolated(family, "jax", seed) for seed in SEEDS for family in ("mqa", "hawk")]
    found = comparisons.comparisons(frame_of(by_family), "family", "hawk", "mqa")
    assert found.set_index("metric").loc["loss_beyond", "verdict"] == "better"


def test_an_ablation_of_training_lengths_is_of_the_same_positions():
    (made,) = factorial.ablations(frame_of_trained(64, 256, families=["mqa", "hawk"]),
                                  "length_extrapolation").values()  # fmt: skip
    assert made.start == 256
    effects = made.effects.set_index("effect")["difference"]
    assert effects["seq_len"] == pytest.approx(-(RISE["mqa"] + RISE["hawk"]), abs=0.02)
    (table, _) = report.tables.ablations(frame_of_trained(64, 256))
    assert "at positions from 256 on" in table.note


def test_one_training_length_is_compared_as_it_was_measured():
    frame = frame_of_trained(128)
    assert positions.longer(frame).empty
    assert "at positions" not in " ".join(answer.answer(frame, []))


def test_without_a_seed_in_common_longer_training_says_nothing():
    records = [extrapolated("hawk", "jax", seed, n) for seed, n in ((0, 64), (1, 256))]
    assert positions.longer(frame_of(records)).empty


def test_runs_that_were_asked_elsewhere_move_no_position():
    """Another experiment, trained at lengths where these were never asked."""
    there = [replace(one, run_id=f"{one.run_id}-there", cell_id=f"{one.cell_id} there",
                     run=one.run | {"workload": one.run["workload"] | {"eval_seq_len": 8192}})
             for one in (extrapolated("hawk", "jax", seed, 512) for seed in SEEDS)]  # fmt: skip
    here = [extrapolated("hawk", "jax", seed, n) for seed in SEEDS for n in (64, 256)]
    (row,) = positions.longer(frame_of(here + there)).to_dict("records")
    assert (row["start"], row["long"]) == (256, 256)


def test_the_answer_says_what_longer_training_does():
    (text, *_) = [text for text in answer.answer(frame_of_trained(64, 256), [])
                  if "at positions from 256 on" in text]  # fmt: skip
    assert text.index("MQA-Transformer -") < text.index("Hawk") < text.index("Griffin")
    assert "better" in text


def test_the_answer_says_what_other_lengths_than_were_trained_cost():
    (text,) = [
        text for text in answer.answer(frame_of_domains(), []) if "bucket of lengths" in text
    ]
    shorter, longer = text.split("trained on longer documents")
    assert "trained on shorter documents Griffin +0." in shorter
    assert "(3 worse)" in shorter
    assert "(3 worse)" in longer
