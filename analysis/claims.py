"""The paper's claims, one by one, and what our records say of each.

A claim is a sentence of arXiv:2402.19427 (or 2404.07839) with its number and its place. It is
checked by ratios and shapes, never by absolutes of another machine, and the verdict is

    reproduced                   at the paper's scale every quantity lies, with its whole interval,
                                 where the claim says, in verified runs of 6 rounds or 3 seeds;
                                 exact counts of parameters and bytes need no rounds, and caches
                                 no scale
    not reproduced               at the paper's scale one lies, with its whole interval, elsewhere
    not tested at this scale     there are numbers, but of another scale, unpaired or too few to
                                 tell; also, always, where the scale is out of reach
    not tested                   no record speaks of it

How a claim finds its numbers is in analysis/evidence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from analysis import remember
from analysis.evidence import decoding, length, quality, recall, size, speed
from analysis.evidence.groups import (
    ABOVE_ONE,
    ABOVE_ZERO,
    ACCELERATOR,
    BELOW_ZERO,
    TPU,
    Finding,
    within,
)
from analysis.tables import RUNS, Table
from analysis.wording import NONE

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
NOT_AT_SCALE = "not tested at this scale"
NOT_TESTED = "not tested"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_AT_SCALE, NOT_TESTED)
AGREES = {True: "as claimed", False: "against the claim", None: "open"}
MAX_FINDINGS = 3  # that an evidence sentence tells; the others are counted


@dataclass(frozen=True)
class Verdict:
    verdict: str
    evidence: str  # a sentence with numbers and intervals, or what it lacks
    ours: str = NONE  # the numbers of the finding that speaks first
    run_ids: tuple[str, ...] = ()
    has_numbers: bool = False


@dataclass(frozen=True, kw_only=True)
class Claim:
    name: str
    text: str
    place: str
    paper: str  # the paper's number
    needs: str  # what would test it
    tolerance: str = ""  # how far off still counts, and why
    find: Callable[[pd.DataFrame], list[Finding]] | None = None
    out_of_reach: str = ""  # why no run of ours can be at its scale

    def check(self, frame: pd.DataFrame) -> Verdict:
        findings = [] if self.find is None else self.find(frame)
        if self.out_of_reach:
            text = f"{self.out_of_reach[0].upper()}{self.out_of_reach[1:]}."
            return _verdict(NOT_AT_SCALE, text, findings)
        if not findings:
            return Verdict(NOT_TESTED, f"Needs {self.needs}.")
        told = [finding for finding in findings if finding.is_evidence]
        if against := [finding for finding in told if finding.holds is False]:
            rest = len(told) - len(against)
            more = f" {rest} of {len(told)} settings do not contradict it." if rest else ""
            return _verdict(NOT_REPRODUCED, _sentence(against) + more, against)
        if agreeing := [finding for finding in told if finding.holds]:
            return _verdict(REPRODUCED, _sentence(agreeing), agreeing)
        # the nearest to the paper's scale speaks first
        nearest = sorted(findings, key=lambda finding: (len(finding.lacks), -finding.count))
        told = nearest[:MAX_FINDINGS]  # whose runs alone are named: there may be thousands
        return _verdict(NOT_AT_SCALE, _sentence(nearest, with_lacks=True), told)


def _verdict(verdict: str, text: str, findings: list[Finding]) -> Verdict:
    ids = dict.fromkeys(run_id for finding in findings for run_id in finding.run_ids)
    ours = findings[0].numbers() if findings else NONE
    return Verdict(verdict, text, ours, tuple(ids), has_numbers=bool(findings))


def _sentence(findings: list[Finding], with_lacks: bool = False) -> str:
    told = findings[:MAX_FINDINGS]
    parts = []
    shared: list[str] = []
    if with_lacks:  # what all lack is said once
        shared = [
            one
            for one in told[0].shortcomings()
            if all(one in finding.shortcomings() for finding in told)
        ]
        parts += [f"Not enough: {'; '.join(shared)}."] if shared else []
    for finding in told:
        text = finding.text()
        if with_lacks:
            own = [one for one in finding.shortcomings() if one not in shared]
            text += f", {AGREES[finding.holds]}" + (f" ({'; '.join(own)})" if own else "")
        parts.append(f"{text}.")
    if more := len(findings) - MAX_FINDINGS:
        parts += [f"And {more} more."] if more > 0 else []
    return " ".join(parts)


def check_all(frame: pd.DataFrame) -> list[tuple[Claim, Verdict]]:
    with remember.remembering():
        return [(claim, claim.check(frame)) for claim in CLAIMS]


def table(frame: pd.DataFrame, *, is_whole: bool) -> Table:
    """Every claim, those with numbers first; without is_whole those alone on which our records
    have something to say."""
    checked = check_all(frame)
    if not is_whole:
        checked = [one for one in checked if one[1].has_numbers]
    # of one verdict, those about which there are numbers first
    checked.sort(key=lambda one: (not one[1].has_numbers, VERDICTS.index(one[1].verdict)))
    header = ["claim", "place", "the paper", "ours", "verdict", "evidence", "tolerance", "runs"]
    rows, raw = [], []
    for claim, found in checked:
        runs = f"{len(found.run_ids):,}" if found.run_ids else NONE
        rows.append([claim.text, claim.place, claim.paper, found.ours, found.verdict,
                     found.evidence, claim.tolerance or NONE, runs])  # fmt: skip
        raw.append({
            "name": claim.name, "claim": claim.text, "place": claim.place, "paper": claim.paper,
            "ours": found.ours, "verdict": found.verdict, "evidence": found.evidence,
            "tolerance": claim.tolerance, "num_runs": len(found.run_ids),
            "run_ids": " ".join(found.run_ids),
        })  # fmt: skip
    counts = {name: sum(found.verdict == name for _, found in checked) for name in VERDICTS}
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    note = (
        f"{words}. But for exact counts of parameters and bytes, reproduced and not reproduced are "
        "said of verified runs at the paper's scale alone, of 6 rounds or 3 seeds, whose whole "
        "interval (95%) lies on one side. A family's growth over workloads is unpaired, as each is "
        "a block of its own, and has no such verdict; a ratio of two families' growths has. "
        "Compared are ratios and shapes; the paper's seconds are a TPU-v3's, and its text is not "
        "public."
    )
    columns = ["name", "claim", "place", "paper", "ours", "verdict", "evidence", "tolerance",
               "num_runs", "run_ids"]  # fmt: skip
    frame = pd.DataFrame(raw, columns=columns)
    return Table("claims", "The paper's claims", header, rows, frame, note, runs=RUNS)


_STEPS = "suite=training_speed at 400m in bfloat16 on a GPU or TPU, 2048 and 8192 tokens"
_DECODE = "experiment=paper/figure4 on a GPU or TPU (1b, batch 16, 4096 new tokens)"
_THROUGHPUT = "experiment=paper/figure1b on a GPU or TPU (1b, a search that ends at memory)"
_SCANS = "experiment=paper/figure8 with kernels.linear_scan=sequential,associative,pallas_tpu"
_LOSS = "experiment=paper/figure1a at the token budgets of table 2"
_BEYOND = "experiment=length_extrapolation size=1b"
_300B = "models of 300B tokens are out of reach; no small one stands for them"

CLAIMS = (
    # Sizes and bytes: exact
    Claim(
        name="num_params",
        text="The widths of table 2 make models of 100M to 14B parameters without embeddings.",
        place="table 2",
        paper="316M (MQA), 375M (Hawk), 355M (Griffin) at 400M, computed from its widths",
        tolerance="0.5%: biases, which the paper does not mention, are 0.2%",
        needs="a run at one of the paper's sizes",
        find=size.num_params,
    ),
    Claim(
        name="widths_are_not_params",
        text="At equal widths Hawk and Griffin have more parameters than the MQA-Transformer.",
        place="a footnote; table 2",
        paper="+18.5% (Hawk) and +12.3% (Griffin) at 400M",
        tolerance="1% of the ratio",
        needs="runs of two families at one of the paper's sizes",
        find=size.param_ratios,
    ),
    Claim(
        name="cache_formulas",
        text="A cache is 2 N T d_head elements for MQA; N d_rnn and the taps of the convolution "
        "for Hawk; for Griffin both, with T at most the window.",
        place="section 5.1, appendix F",
        paper="50.3 MB (MQA), 0.61 MB (Hawk), 4.60 MB (Griffin) a sequence of 4K at 1B, bfloat16",
        tolerance="1%: the cache that was allocated, in its own dtype",
        needs="suite=decode_latency",
        find=size.cache_formulas,
    ),
    Claim(
        name="cache_growth",
        text="Hawk's cache does not grow with the sequence, Griffin's only up to its window; "
        "MQA's grows with every token.",
        place="section 5.1",
        paper="x1.00 (Hawk), x1.00 (Griffin, beyond 1024), x2.00 (MQA) for twice the length",
        tolerance="1%",
        needs="suite=decode_latency at two lengths beyond the window",
        find=size.cache_growth,
    ),
    Claim(
        name="scan_is_memory_bound",
        text="The scan does too little arithmetic for its bytes: it is bound by memory.",
        place="appendix D",
        paper="0.75 FLOP a byte; a TPU-v3 needs 4.2 (vector unit)",
        tolerance="below the ridge of the device's own peaks",
        needs="suite=kernel_speed on a GPU or TPU",
        find=speed.scan_intensity,
    ),
    # Training speed
    Claim(
        name="step_time_shape",
        text="From 2k to 8k tokens a sequence, at equal tokens a step, MQA's step slows down more "
        "than Griffin's.",
        place="figure 3",
        paper="x1.46 against x1.05 at 400M: 1.39 times as much",
        needs=_STEPS,
        find=lambda frame: speed.step_growth(frame, shape=ABOVE_ONE),
    ),
    Claim(
        name="step_time_numbers",
        text="At 400M Griffin's step grows by 5% from 2k to 8k tokens, MQA's by 46%.",
        place="figure 3",
        paper="x1.05 (Griffin), x1.46 (MQA)",
        tolerance="10% of each: whether the paper's attention was fused is not known",
        needs=_STEPS,
        find=lambda frame: speed.step_growth(
            frame, griffin=within(1.05, 0.10), mqa=within(1.46, 0.10), sizes=("400m",)
        ),
    ),
    Claim(
        name="step_time_at_8k",
        text="At 8k tokens Griffin's training step takes less time than MQA's.",
        place="figure 3",
        paper="0.67 of it at 400M, 0.76 at 1B",
        needs=_STEPS,
        find=speed.step_ratio,
    ),
    Claim(
        name="step_time_by_size",
        text="The larger the model, the less MQA's step grows with the sequence.",
        place="figure 3",
        paper="x1.46 (400M), x1.33 (1B), x1.13 (7B) from 2k to 8k",
        needs=_STEPS.replace("400m", "400m and 1b"),
        find=speed.step_growth_by_size,
    ),
    Claim(
        name="scan_speeds_up_the_step",
        text="A hand-written scan takes 10 to 20% off the time of Hawk's whole step.",
        place="figure 8(b), appendix D",
        paper="0.85 (400M), 0.81 (1B), 0.89 (7B) of the native loop's",
        tolerance="0.05 of the step: between 0.76 and 0.94",
        needs=f"{_SCANS}, on a TPU",
        find=lambda frame: speed.scan_in_step(frame, "pallas_tpu", (0.76, 0.94)),
    ),
    Claim(
        name="associative_slows_the_step",
        text="An associative scan makes Hawk's whole step slower than the native loop does.",
        place="figure 8(b), appendix D",
        paper="1.58 (400M), 1.27 (1B), 1.41 (7B) times its time",
        needs=f"{_SCANS}, on a TPU",
        find=lambda frame: speed.scan_in_step(frame, "associative", ABOVE_ONE),
    ),
    # The scan alone
    Claim(
        name="linear_beats_associative",
        text="A native loop over time scans faster than an associative scan.",
        place="figure 8(a)",
        paper="2.0 to 2.1 times (bfloat16); the authors expect no such order elsewhere",
        needs=f"{_SCANS}, on a TPU",
        find=lambda frame: speed.scans(frame, "associative", "sequential", ABOVE_ONE, TPU),
    ),
    Claim(
        name="kernel_beats_associative",
        text="A hand-written kernel that walks time is faster than an associative scan.",
        place="figure 8(a)",
        paper="4.8 to 6.0 times (bfloat16, TPU-v3)",
        needs="experiment=paper/figure8 on a GPU or TPU",
        find=lambda frame: speed.scans(frame, "associative", None, ABOVE_ONE, ACCELERATOR),
    ),
    Claim(
        name="pallas_beats_native",
        text="The Pallas kernel scans almost 3 times as fast as the native loop.",
        place="figure 8(a), appendix D",
        paper="2.3 to 2.8 times",
        tolerance="20%: other TPUs than a v3",
        needs=f"{_SCANS}, on a TPU",
        find=lambda frame: speed.scans(
            frame, "sequential", "pallas_tpu", (2.3 / 1.2, 2.8 * 1.2), TPU
        ),
    ),
    # Decoding
    Claim(
        name="latency_of_long_outputs",
        text="Hawk and Griffin decode long outputs faster than the MQA-Transformer.",
        place="figure 4(a)",
        paper="1.39 times (Hawk) and 1.36 times (Griffin) for 4096 tokens after an empty prompt",
        needs=_DECODE,
        find=decoding.latency_ratio,
    ),
    Claim(
        name="latency_after_a_prompt",
        text="After a long prompt they lead by more in decoding than after an empty one.",
        place="figure 4(b)",
        paper="Hawk 1.91 against 1.39 times, less 2.1 s of prefill of either (read for Hawk)",
        needs=_DECODE,
        find=decoding.latency_by_prompt,
    ),
    Claim(
        name="latency_is_flat",
        text="Hawk and Griffin take as long for the last tokens of an output as for the first.",
        place="figure 4",
        paper="23.8 ms (Hawk) and 24.4 ms (Griffin) a token at every length",
        tolerance="10% in TPOT from 128 tokens to 4096; at 128 the paper's reading is off by 10%",
        needs=_DECODE,
        find=decoding.latency_growth,
    ),
    Claim(
        name="latency_of_short_outputs",
        text="Up to some hundred tokens the families decode equally fast: parameters are what "
        "moves.",
        place="figure 4(a)",
        paper="MQA / Hawk 0.99 at 512 tokens; the curves cross near 1k",
        tolerance="10%: readings leave 4%, and Hawk has 16% more parameters",
        needs=_DECODE.replace("4096", "512"),
        find=decoding.latency_at_512,
    ),
    Claim(
        name="throughput_is_flat",
        text="Throughput of Hawk and Griffin does not fall with the number of tokens sampled.",
        place="figure 1(b)",
        paper="x1.01 (Hawk), x1.00 (Griffin) from 512 to 4096 tokens",
        tolerance="5%: the paper's points differ by less than 1%",
        needs=_THROUGHPUT,
        find=decoding.throughput_growth,
    ),
    Claim(
        name="throughput_of_mqa_falls",
        text="MQA's throughput falls as more tokens are sampled.",
        place="figure 1(b)",
        paper="by a factor of 6.0 from 512 to 4096 tokens",
        needs=_THROUGHPUT,
        find=decoding.throughput_of_mqa,
    ),
    Claim(
        name="hawk_throughput_at_4096",
        text="Hawk samples 14.8 times as many tokens a second as MQA, at 4096 tokens.",
        place="figure 1(b)",
        paper="14.8 times",
        tolerance="25%; bytes and bandwidth predict 0.9 to 1.5 times, so expect less",
        needs=_THROUGHPUT,
        find=lambda frame: decoding.throughput_ratio(frame, "hawk", "mqa", within(14.8, 0.25)),
    ),
    Claim(
        name="griffin_throughput_at_4096",
        text="Griffin samples 6.6 times as many tokens a second as MQA, at 4096 tokens.",
        place="figure 1(b)",
        paper="6.6 times",
        tolerance="25%, as for Hawk",
        needs=_THROUGHPUT,
        find=lambda frame: decoding.throughput_ratio(frame, "griffin", "mqa", within(6.6, 0.25)),
    ),
    Claim(
        name="hawk_beats_griffin",
        text="Hawk samples more tokens a second than Griffin, whose local cache limits the batch.",
        place="figure 1(b)",
        paper="2.24 times",
        needs=_THROUGHPUT,
        find=lambda frame: decoding.throughput_ratio(frame, "hawk", "griffin", ABOVE_ONE),
    ),
    Claim(
        name="recurrentgemma_is_flat",
        text="RecurrentGemma-2B samples as fast however long its output is.",
        place="arXiv:2404.07839, figure 1",
        paper="about 6K tokens/s at every length (TPU-v5e)",
        tolerance="5%",
        needs="suite=decode_throughput size=recurrentgemma_2b family=griffin on a GPU or TPU",
        find=lambda frame: decoding.throughput_growth(frame, is_recurrentgemma=True),
    ),
    # Quality
    Claim(
        name="griffin_learns_more",
        text="Griffin's held-out loss is below MQA's at every training budget.",
        place="figure 1(a)",
        paper="-0.022 to -0.043 nats/token from 100M to 7B",
        needs=_LOSS,
        find=quality.loss_of_griffin,
    ),
    Claim(
        name="hawk_catches_up",
        text="Hawk's gap to MQA closes as models and budgets grow.",
        place="figure 1(a)",
        paper="+0.216 nats/token at 100M, +0.132 at 400M, +0.031 at 7B",
        needs=f"{_LOSS}, two sizes",
        find=quality.gap_of_hawk,
    ),
    Claim(
        name="power_law",
        text="The loss of each family falls as a power of its training FLOPs.",
        place="figure 1(a)",
        paper="R2 0.997 or more in log-log, five or six sizes",
        tolerance="R2 of 0.99, over three sizes or more",
        needs=f"{_LOSS}, three sizes",
        find=quality.power_law,
    ),
    Claim(
        name="window_of_1k",
        text="Griffin with a window of 1024 has less loss than global MQA at each training length.",
        place="figure 9, appendix E",
        paper="-0.018, -0.009, -0.003 nats/token at 2k, 4k and 8k",
        needs="experiment=paper/figure9, with scale=4k and scale=8k",
        find=lambda frame: quality.windows(frame, "griffin", BELOW_ZERO),
    ),
    Claim(
        name="local_mqa_is_worse",
        text="MQA with local attention alone has more loss than global MQA.",
        place="figure 9, appendix E",
        paper="+0.012 (2k), +0.028 (4k) nats/token with a window of 1024",
        needs="experiment=paper/figure9, with scale=4k",
        find=lambda frame: quality.windows(frame, "mqa_local", ABOVE_ZERO, (2048, 4096)),
    ),
    Claim(
        name="longer_training_costs_early",
        text="Trained on 8k tokens, Hawk and Griffin lose a little at short positions.",
        place="figure 5, right",
        paper="Griffin +0.022, Hawk +0.035 nats/token over the first 512 positions (1B)",
        needs="experiment=paper/figure5 size=1b, and again with scale=8k",
        find=quality.longer_training,
    ),
    Claim(
        name="extrapolation",
        text="Hawk and Griffin go on gaining to at least 4 times their training length.",
        place="figure 5, left",
        paper="least loss at 7.8K (Hawk) and 13K (Griffin) after training at 2K",
        tolerance="less mean loss up to 4 times than up to one",
        needs=_BEYOND,
        find=length.extrapolation,
    ),
    Claim(
        name="rope_blows_up",
        text="MQA, with RoPE or without, loses all beyond its training length.",
        place="figure 5, left",
        paper="3.46 nats/token at 4K against 2.55 at 2K (RoPE)",
        tolerance="0.3 nats/token more mean loss up to 2 times than up to one",
        needs=f"{_BEYOND} family=mqa model.rope_fraction=1.0,0.0",
        find=length.failure_of_attention,
    ),
    Claim(
        name="longer_training_gains_late",
        text="Training on 8k tokens is better than on 2k from 8k positions on.",
        place="figures 5 and 10, right",
        paper="Griffin -0.025 nats/token at 8K, -0.060 at 32K (books)",
        tolerance="Griffin's mean loss up to 8K, and both families' up to 16K",
        needs=f"{_BEYOND} suite.seq_lens=[2048,8192]",
        find=length.gain_of_longer_training,
    ),
    Claim(
        name="selective_copying",
        text="Hawk learns to copy selectively, but needs many more steps than MQA and Griffin.",
        place="figure 6(a)",
        paper="53K steps to 0.9 (Hawk), 16.5K (Griffin), 13K (MQA)",
        needs="experiment=paper/figure6 data=selective_copying",
        find=recall.selective_copying,
    ),
    Claim(
        name="induction_heads",
        text="Hawk and Griffin find induction heads in sequences 16 times as long as in training; "
        "MQA does not at 2 times.",
        place="figure 6(b)",
        paper="1.00 at 4096 after training at 256; MQA 0.52 at 512",
        needs="experiment=paper/figure6 data=induction_heads",
        tolerance="0.9 of the answers right count as found",
        find=recall.induction_heads,
    ),
    Claim(
        name="phonebook",
        text="Without fine-tuning, MQA and Griffin look a number up in a phonebook; Hawk cannot.",
        place="figure 6(c)",
        paper="at 989 tokens: 0.94 (MQA), 0.99 (Griffin), 0 (Hawk)",
        needs="pre-trained models of 7B",
        out_of_reach=_300B,
    ),
    Claim(
        name="downstream_average",
        text="Griffin's average over six tasks is above MQA's and Hawk's at every size.",
        place="table 1",
        paper="57.2, 60.7, 65.8 (Griffin) against 54.4, 59.0, 64.2 (MQA) at 1B, 3B, 7B",
        needs="experiment=paper/table1 with pre-trained models",
        out_of_reach=_300B,
    ),
    Claim(
        name="hawk_and_mamba",
        text="Hawk-3B is above Mamba-3B on average, after half as many tokens.",
        place="table 1",
        paper="59.5 against 58.5",
        needs="pre-trained models",
        out_of_reach=_300B,
    ),
    Claim(
        name="complex_gates",
        text="The complex-valued CG-LRU is not beneficial for language modeling.",
        place="appendix B",
        paper="no number",
        tolerance="a gain of 0.003 nats/token, the paper's least difference, is none",
        needs="experiment=gates_complex at a size and budget of table 2",
        find=quality.complex_gates,
    ),
)
