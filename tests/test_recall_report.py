"""What a report says of synthetic tasks: the table, the claims of figure 6, and what is null."""

from dataclasses import replace
from itertools import product

import pytest
import synthetic_records as synthetic

from analysis import answer, claims, recall, report, tables
from analysis.claims import NOT_AT_SCALE, NOT_REPRODUCED, NOT_TESTED, REPRODUCED
from analysis.figures import tasks
from analysis.load import frame_of

FAMILIES = ("mqa", "hawk", "griffin")
BY_NAME = {claim.name: claim for claim in claims.CLAIMS}
PAPER = {
    "induction_heads": {"size": "synthetic"},
    "selective_copying": {"size": "synthetic", "task": "selective_copying", "num_items": 16,
                          "seq_len": 1024},
}  # fmt: skip


def records(seeds=(0, 1, 2), families=FAMILIES, by_family=None, **settings):
    return [
        synthetic.recall(family, "jax", seed, **(settings | (by_family or {}).get(family, {})))
        for family, seed in product(families, seeds)
    ]


def check(name, made):
    return BY_NAME[name].check(frame_of(made))


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    """That a run is of verified code is for test_claims; here it always is."""
    from analysis.evidence import groups

    made = groups._group

    def group(*args):
        found = made(*args)
        found.verified = dict.fromkeys(found.verified, True)
        return found

    monkeypatch.setattr(groups, "_group", group)


def test_the_papers_worlds_reproduce_the_claims():
    told = {"selective_copying": "steps to 0.9 of Hawk over those of MQA: ",
            "induction_heads": "accuracy of Hawk at 4,096: 1 "}  # fmt: skip
    for name, settings in PAPER.items():
        found = check(name, records(**settings))
        assert found.verdict == REPRODUCED, found.evidence
        assert told[name] in found.evidence


def test_hawk_that_learns_as_fast_is_against_the_claim():
    settings = PAPER["selective_copying"] | {"by_family": {"hawk": {"starts": 300}}}
    assert check("selective_copying", records(**settings)).verdict == NOT_REPRODUCED


def test_hawk_that_never_learns_is_a_lower_bound_and_mqa_that_does_not_is_no_evidence():
    never, settings = {"starts": 50_000}, PAPER["selective_copying"]
    slow = check("selective_copying", records(by_family={"hawk": never}, **settings))
    assert slow.verdict == REPRODUCED
    assert "at least" in slow.evidence
    found = check("selective_copying", records(by_family={"mqa": never}, **settings))
    assert found.verdict == NOT_AT_SCALE
    assert "MQA did not learn it in 5,000 steps (3 of 3 seeds)" in found.evidence


def test_each_family_at_its_own_tuned_rate_is_of_one_comparison():
    rates = {"mqa": 1e-3, "hawk": 3e-3, "griffin": 3e-3}
    tuned = {family: {"optimizer": {"name": "tuned", "learning_rate": rate, "weight_decay": 0.0}}
             for family, rate in rates.items()}  # fmt: skip
    for name, settings in PAPER.items():
        found = check(name, records(by_family=tuned, **settings))
        assert found.verdict == REPRODUCED, found.evidence
        assert "MQA" in found.evidence
    adamw = {family: {"optimizer": own["optimizer"] | {"name": "adamw"}}
             for family, own in tuned.items()}  # fmt: skip
    found = check("selective_copying", records(by_family=adamw, **PAPER["selective_copying"]))
    assert found.verdict == NOT_AT_SCALE
    assert "nothing of MQA" in found.evidence


def test_copying_without_hawk_says_nothing_of_it():
    settings = PAPER["selective_copying"] | {"families": ("mqa", "griffin")}
    assert check("selective_copying", records(**settings)).verdict == NOT_TESTED


def test_a_family_that_loses_the_task_at_16_times_is_against_the_claim():
    settings = PAPER["induction_heads"]
    found = check("induction_heads", records(by_family={"hawk": {"reach": 1024}}, **settings))
    assert found.verdict == NOT_REPRODUCED
    found = check("induction_heads", records(by_family={"mqa": {"reach": 8192}}, **settings))
    assert found.verdict == NOT_REPRODUCED


def test_a_family_that_never_learned_says_nothing_of_length():
    settings = PAPER["induction_heads"]
    found = check("induction_heads", records(by_family={"griffin": {"reach": 64}}, **settings))
    assert found.verdict == NOT_AT_SCALE
    assert "Griffin did not learn it in 5,000 steps (3 of 3 seeds)" in found.evidence


@pytest.mark.parametrize(
    ("name", "settings", "lack"),
    [
        ("induction_heads", {"size": "tiny"}, "size tiny, not synthetic"),
        ("induction_heads", {"seq_len": 128}, "trained at 128 tokens, not 256"),
        ("induction_heads", {"seeds": (0, 1)}, "2 seeds of 3"),
        ("induction_heads", {"families": ("hawk",)}, "nothing of MQA at 512"),
        ("selective_copying", {"seq_len": 128}, "trained at 128 tokens, not 1,024"),
        ("selective_copying", {"num_items": 8}, "8 tokens to copy, not 16"),
        ("selective_copying", {"families": ("hawk", "mqa")}, "nothing of Griffin"),
    ],
)
def test_what_lacks_of_the_papers_scale_is_named(name, settings, lack):
    found = check(name, records(**(PAPER[name] | settings)))
    assert found.verdict == NOT_AT_SCALE
    assert lack in found.evidence


def test_one_task_is_no_evidence_on_another():
    for name, other in (("induction_heads", "selective_copying"),
                        ("selective_copying", "induction_heads")):  # fmt: skip
        assert check(name, records(**PAPER[other])).verdict == NOT_TESTED


def test_the_table_has_a_row_a_family_and_null_steps_are_more_than_all():
    slow = {"hawk": {"starts": 50_000}, "griffin": {"num_examples": None}}
    made = recall.table(frame_of(records(by_family=slow)))
    rows = [dict(zip(made.header, row, strict=True)) for row in made.rows]
    assert [row["family"] for row in rows] == ["MQA-Transformer", "Hawk", "Griffin"]
    assert rows[0]["steps to 90%"] == "1,000"
    assert rows[1]["steps to 90%"] == rows[1]["steps to 95%"] == "> 5,000"
    assert rows[0]["at 256"] == "1.00 [0.98, 1.00]"  # of 192 examples
    assert rows[0]["at 512"].startswith("0.25 [")
    assert made.frame["num_seeds_to_90"].tolist() == [3, 0, 3]
    assert made.frame["run_ids"].str.split().map(len).tolist() == [3, 3, 3]


def test_a_seed_that_did_not_learn_counts_in_the_median_of_steps():
    late = records(seeds=(2, 3), families=("hawk",), by_family={"hawk": {"starts": 50_000}})
    made = [*records(seeds=(0, 1), families=("hawk",)), *late]
    (row,) = recall.table(frame_of(made)).frame.to_dict("records")
    assert (row["num_seeds"], row["num_seeds_to_90"]) == (4, 2)
    assert row["num_steps_to_90"] == float("inf")


def test_the_report_holds_the_table_and_both_figures(tmp_path):
    made = records(num_examples=64)
    page = report.write_report(tmp_path, tmp_path / "report", title="recall", command="aerie run",
                               frame=frame_of(made))  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert "Synthetic tasks" in text
    for name in ("accuracy_by_step", "accuracy_by_length"):
        assert list((tmp_path / "report" / "figures").glob(f"{name}*")), name


def test_the_answer_tells_in_how_many_steps_and_what_is_held():
    (said,) = answer.answer(frame_of(records(**PAPER["induction_heads"])), [])
    assert said.startswith(
        "90% of induction_heads at 256 tokens (JAX, 3 seeds): MQA-Transformer in "
    )
    assert "; Hawk in " in said
    assert "1.00 at 4,096" in said


def test_each_length_of_a_comparison_is_named():
    found = tables.side_by_side(frame_of(records()), "family", "hawk", "mqa")
    rows = [dict(zip(found.header, row, strict=True)) for row in found.rows]
    by_length = [row["workload"] for row in rows if row["metric"] == "Accuracy by length"]
    assert len(by_length) == len(set(by_length)) > 1
    assert sum(work.endswith("asked at 512") for work in by_length) == 1


def test_what_a_task_brings_along_is_told_by_its_name_alone():
    made = [one for settings in PAPER.values() for one in records(**settings)]
    table = tables.side_by_side(frame_of(made), "family", "hawk", "mqa")
    assert "data" in table.header
    assert "variant" not in table.header


def test_a_run_that_stopped_as_learned_counts_on_in_the_curve():
    """Of two seeds one stops at step 3,000, all right; the other never learns: half, to the end."""
    learned, never = (synthetic.recall("hawk", "jax", seed, starts=starts)
                      for seed, starts in enumerate((400, 50_000)))  # fmt: skip
    looks = [one for one in learned.samples if one.metric == "accuracy" and one.at > 3000]
    learned = replace(learned, samples=tuple(s for s in learned.samples if s not in looks))
    found = recall.accuracies(frame_of([learned, never]), "accuracy").set_index("at")
    assert found.loc[5000, "value"] == pytest.approx(0.5, abs=0.01)
    assert found.loc[250, "value"] < 0.2
    assert found.loc[5000, "high"] == 1


def test_each_length_of_training_has_a_panel_without_the_window_that_goes_with_it():
    made = [
        *records(seq_len=64, model={"window_size": 32}),
        *records(seq_len=256, model={"window_size": 128}),
    ]
    figure = tasks.accuracy_by_length(frame_of(made))
    assert sorted(axes.get_title() for axes in figure.axes) == ["256 tokens", "64 tokens"]
    names = {text.get_text() for text in figure.legends[0].texts}
    assert len(names) == len(FAMILIES) + 1
    assert not any("window" in name for name in names)
