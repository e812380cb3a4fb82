"""Figures: each draws its records, with units, in its colours; hostile labels and gaps survive."""

import io
import warnings
from dataclasses import replace
from itertools import combinations, product
from xml.etree import ElementTree

import numpy as np
import pytest
import synthetic_records as synthetic
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from synthetic_records import BACKENDS, FAMILIES, modeling, parity, record, sample, training

from analysis import checks, figures, remember, style
from analysis.figures import drawing, gates, labels
from analysis.load import frame_of

LAYERS = [f"L4/{kind}/layers.{n}.mixer" for kind in ("activations", "grad") for n in range(6)]


@pytest.fixture(scope="module", autouse=True)
def remembering_frame():
    """What is derived of the frame of all is derived once for all tests."""
    with remember.remembering():
        yield


@pytest.fixture(scope="module")
def frame():
    """Something of everything that is drawn."""
    made = []
    for family, backend in product(FAMILIES, BACKENDS):
        made += [parity(family, backend), modeling(family, backend)]
        made += [synthetic.recall(family, backend, seed) for seed in (0, 1)]
        made += [synthetic.extrapolated(family, backend, seed) for seed in (0, 1)]
        made += [synthetic.domain(family, backend, seed, trained)
                 for seed in (0, 1) for trained in (256, 512, 1024)]  # fmt: skip
        for round in range(2):
            for n in (512, 1024, 2048):
                made.append(
                    training(
                        family, backend, round, n, costs={"model_flops": 3e9, "model_bytes": 8e6}
                    )
                )
            for n in (128, 512):
                made.append(synthetic.latency(family, backend, round, n, 64))
                made.append(synthetic.throughput(family, backend, round, n))
            made.append(prefill(family, backend, round))
        made += [synthetic.scaled(family, backend, 0, width) for width in (64, 128, 256)]
        made.append(errors_by_layer(family, backend))
        made += [modeling(family, backend, model={"size": "searched"}, optimizer=optimizer(*at))
                 for at in product((1e-3, 3e-3, 1e-2), (0.1, 0.3))]  # fmt: skip
    for backend, variant, round in product(BACKENDS, ("sequential", "analytic"), (0, 1)):
        made += [synthetic.scan(backend, variant, round, n) for n in (1024, 2048)]
        made.append(
            training("hawk", backend, round, 512, kernels={"linear_scan": variant},
                     provenance=synthetic.scan_kernels(variant), model={"size": "small"})
        )  # fmt: skip
    for family, window in (("griffin", 128), ("griffin", 256), ("mqa_local", 128), ("mqa", None)):
        made.append(synthetic.windowed(family, 512, window))
    curves = [None, "float64", "float64, rounded"]
    losses = [sample("train_loss", 2 + 1e-6 * number, at=step, field=name)
              for number, name in enumerate(curves) for step in (1, 2, 3)]  # fmt: skip
    made.append(record("parity", "hawk", "jax", levels=("L5",), samples=tuple(losses)))
    return frame_of(made)


def optimizer(rate, decay):
    return {"name": "adamw", "learning_rate": rate, "weight_decay": decay}


def prefill(family, backend, round):
    samples = tuple(sample("ttft_ms", n / 64 + round) for n in (1, 2))
    return record("prefill_latency", family, backend, samples=samples, round=round,
                  phase="prefill", prompt_len=64)  # fmt: skip


def errors_by_layer(family, backend):
    samples = []
    for number, field in enumerate(LAYERS):
        samples.append(sample("relative_error", number * 1e-7, field=field))
        samples.append(sample("tolerance", 1e-5, field=field))
    return record("parity", family, backend, samples=tuple(samples), seed=1)


def drawn(name, frame):
    with style.looks(name):
        return figures.FIGURES[name](frame)


def svg_of(figure) -> ElementTree.Element:
    file = io.StringIO()
    with style.looks():  # text stays text
        FigureCanvasSVG(figure).print_svg(file)
    return ElementTree.fromstring(file.getvalue())


def lines_of(figure, panel=0):
    return {line.get_label(): line for line in figure.axes[panel].get_lines()}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_draws_with_units_a_caption_and_words(frame, name):
    figure = drawn(name, frame)
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapsed, a glyph that is missing
        canvas.draw()
    stays_within(figure, canvas.get_renderer())
    assert figures.caption(name).endswith(".")
    assert figures.caption(name) in figures.describe(name, figure)
    named = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
    assert any(named) or name == "framework_ratios"
    unitless = ("Optimizer step", "Family", "Layer", "Position in", "Parameters", "Learning rate")
    for axes in figure.axes:
        for label in filter(None, (axes.get_xlabel(), axes.get_ylabel())):
            has_unit = "(" in label or "tokens" in label.lower() or "relative" in label
            assert has_unit or label.startswith(unitless), label


def stays_within(figure, renderer):
    """Nothing is cut off at an edge, and no two panels' words overlap."""
    boxes = {axes: axes.get_tightbbox(renderer) for axes in figure.axes}
    words = [legend.get_window_extent(renderer) for legend in figure.legends]
    words += [figure._supxlabel.get_window_extent(renderer)] if figure._supxlabel else []
    for box in [*boxes.values(), *words]:
        assert box.x0 >= figure.bbox.x0 - 3
        assert box.x1 <= figure.bbox.x1 + 3
        assert box.y0 >= figure.bbox.y0 - 3
        assert box.y1 <= figure.bbox.y1 + 3
    for a, b in combinations([*boxes.values(), *words], 2):
        assert min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)) <= 3


@pytest.mark.parametrize("name", figures.FIGURES)
def test_without_data_there_is_no_figure(name):
    lost = record("training_speed", "mqa", outcome="failed", reason="x", seq_len=512)
    for records in ([], [lost], [record("a_new_suite", "mqa", samples=(sample("mfu", 0.5),))]):
        assert drawn(name, frame_of(records)) is None


def test_family_is_colour_and_backend_is_marker_and_line(frame):
    for name in ("training_throughput", "latency_by_tokens", "throughput_by_tokens",
                 "learning_curves", "accuracy_by_step", "accuracy_by_length"):  # fmt: skip
        figure = drawn(name, frame)
        lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
        for family, backend in product(FAMILIES, BACKENDS):
            name = f"{style.FAMILY_LABELS[family]}, {style.BACKEND_LABELS[backend]}"
            mine = [line for label, line in lines.items() if label.startswith(name)]
            assert {line.get_color() for line in mine} == {style.FAMILY_COLORS[family]}
            assert {line.get_marker() for line in mine} == {style.BACKEND_MARKERS[backend]}
            assert {line.is_dashed() for line in mine} == {backend == "torch"}


def test_lengths_are_logarithmic(frame):
    for name in ("training_throughput", "latency_by_tokens", "loss_by_position", "kernel_speed"):
        assert {axes.get_xscale() for axes in drawn(name, frame).axes} == {"log"}


def test_intervals_are_drawn_from_two_rounds():
    one, two = (
        frame_of([training("griffin", "jax", r, t) for r in range(n) for t in (256, 512)])
        for n in (1, 2)
    )
    assert not drawn("training_throughput", one).axes[0].collections
    assert drawn("training_throughput", two).axes[0].collections


def test_a_line_breaks_where_a_cell_has_no_value():
    records = [training("hawk", "jax", 0, n) for n in (512, 1024, 2048)]
    records += [training("griffin", "jax", 0, n) for n in (512, 2048)]
    lines = lines_of(drawn("training_throughput", frame_of(records)))
    assert not np.isnan(lines["Hawk, JAX UNVERIFIED"].get_ydata()).any()
    gap = lines["Griffin, JAX UNVERIFIED"]
    assert list(gap.get_xdata()) == [512, 1024, 2048]
    assert np.isnan(gap.get_ydata()).tolist() == [False, True, False]


@pytest.mark.parametrize("outcome", ["out_of_memory", "out_of_memory_predicted", "timed_out"])
def test_a_run_that_did_not_end_breaks_its_line_and_is_marked(outcome):
    records = [training("mqa", "jax", 0, n) for n in (512, 2048)]
    records.append(
        record("training_speed", "mqa", "jax", outcome=outcome, seq_len=1024, reason="x")
    )
    lines = lines_of(drawn("training_throughput", frame_of(records)))
    assert np.isnan(lines["MQA-Transformer, JAX UNVERIFIED"].get_ydata()).tolist() == [0, 1, 0]
    mark = lines[f"MQA-Transformer, JAX: {outcome.replace('_', ' ')}"]
    assert list(mark.get_xdata()) == [1024]


def test_without_parity_markers_are_hollow_and_the_figure_says_so(frame):
    bare = frame[frame["suite"] != "parity"]
    speeds = ("relative_step_time", "training_throughput", "latency_by_tokens", "roofline",
              "throughput_by_tokens", "kernel_speed", "step_time_by_scan")  # fmt: skip
    for name in speeds:
        figure = drawn(name, bare)
        assert checks.UNVERIFIED in figure.get_supxlabel(), name
        marked = [line for axes in figure.axes for line in axes.get_lines()
                  if checks.UNVERIFIED in str(line.get_label())]  # fmt: skip
        assert marked, name
        assert {line.get_markerfacecolor() for line in marked} == {"none"}, name


HOSTILE = ["a$b$c", "<script>&\"'", "100%", "under_score_{x}", "_hidden", "line\nfeed",
           r"\frac{1}{0}", "$", "tab\tand\x1bescape", "x" * 300]  # fmt: skip


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_are_drawn_as_they_are(label):
    records = [replace(training("griffin", "jax", r, n), cell_id=f"{label}{n}")
               for r in (0, 1) for n in (512, 1024)]  # fmt: skip
    for one in records:
        one.run["model"]["family"] = one.run["backend"] = label
        one.run["model"]["size"] = one.run["data"]["name"] = label
    records.append(training("hawk", "jax", 0, 512))
    figure = drawn("training_throughput", frame_of(records))
    words = " ".join(svg_of(figure).itertext())
    shown = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    shown = shown if len(shown) < labels.LONGEST else "xxx..."
    assert shown in " ".join(words.split())
    entries = [text.get_text().replace(r"\$", "$") for text in figure.legends[0].get_texts()]
    assert any(shown in entry for entry in entries)
    FigureCanvasAgg(figure).draw()


def test_a_figure_says_how_much_it_leaves_out():
    records = [training("griffin", "jax", 0, n, model={"size": f"size{k}"})
               for k in range(drawing.MAX_PANELS + 2) for n in (512, 1024)]  # fmt: skip
    figure = drawn("training_throughput", frame_of(records))
    assert len(figure.axes) == drawing.MAX_PANELS
    assert "2 further panels" in figure.get_supxlabel()
    records = [training("griffin", "jax", 0, n, model={"d_model": 8 * k})
               for k in range(1, drawing.MAX_LINES + 4) for n in (512, 1024)]  # fmt: skip
    figure = drawn("training_throughput", frame_of(records))
    assert "3 further lines" in figure.get_supxlabel()


# single figures


def test_best_throughput_is_that_of_the_fastest_batch_and_says_where_the_search_ended(frame):
    figure = drawn("throughput_by_tokens", frame)
    (line,) = (v for k, v in lines_of(figure).items() if k.startswith("Hawk, JAX"))
    rows = frame[(frame["suite"] == "decode_throughput") & (frame["family"] == "hawk")
                 & (frame["backend"] == "jax") & (frame["metric"] == "tokens_per_s")]  # fmt: skip
    medians = rows.groupby(["num_new_tokens", "round", "at"])["value"].median()
    best = medians.groupby(["num_new_tokens", "at"]).median().groupby("num_new_tokens").max()
    np.testing.assert_allclose(line.get_ydata(), best.to_numpy(dtype=float))
    assert "4 of 12 searches were still gaining at suite.max_batch_size" in figure.get_supxlabel()
    ratios = lines_of(figure, 1)
    assert all(ratios[k].get_ydata()[-1] > 2 for k in ratios if k.startswith("Hawk"))


def test_decode_time_says_that_prefill_is_not_in_it(frame):
    assert "TTFT) is not included" in drawn("latency_by_tokens", frame).get_supxlabel()


def test_gates_have_the_levels_of_the_paper():
    """The LRU's constant share at a = 0.5, 0.9, 0.99, read from figure 7 of arXiv:2402.19427."""
    r = np.linspace(0, 1, 11)
    for decay, level in zip(gates.DECAYS, (0.634, 0.326, 0.125), strict=True):
        np.testing.assert_allclose(gates.share_of_input("LRU", decay, r), level, atol=5e-4)
        for name in ("RG-LRU", "GRU", "Mamba"):
            share = gates.share_of_input(name, decay, r)
            assert share[0] == 0
            assert (np.diff(share) > 0).all()
        assert gates.share_of_input("RG-LRU", decay, r)[-1] == pytest.approx(level, abs=5e-4)


def test_gates_are_drawn_for_recurrences_alone_and_called_analytic(frame):
    assert drawn("gate_behaviour", frame_of([training("mqa", "jax", 0)])) is None
    assert "Analytic" in drawn("gate_behaviour", frame).get_supxlabel()


def test_accuracy_has_a_binomial_interval_of_its_examples():
    few, many, none = (
        drawn("accuracy_by_length", frame_of([synthetic.recall("mqa", "jax", 0, n)])).axes[0]
        for n in (16, 1024, None)
    )
    # k of n at the longest length, where mqa is nearly 0: Wilson's interval ends above it
    tops = [axes.collections[0].get_segments()[-1][1, 1] for axes in (few, many)]
    assert tops[0] == pytest.approx(0.194, abs=2e-3)  # of 0 of 16
    assert tops[1] < 0.01
    assert not none.collections


def test_the_roof_is_the_peak_that_the_records_name(frame):
    figure = drawn("roofline", frame)
    roof = lines_of(figure)["Peak of the device"]
    assert roof.get_ydata().max() == pytest.approx(1e11)
    assert "cpu device, float32 (measured; grey: its range over runs)" in figure.get_supxlabel()
    step = training("griffin", "jax", 0, costs={"model_flops": 3e9, "model_bytes": 8e6})
    figure = drawn("roofline", frame_of([step]))
    (points,) = (v for k, v in lines_of(figure).items() if k.startswith("Griffin"))
    times = [s.value for s in step.samples if s.metric == "step_time_ms"]
    assert points.get_xdata()[0] == pytest.approx(3e9 / 8e6)
    assert points.get_ydata()[0] == pytest.approx(3e9 / (np.median(times) * 1e-3))


def test_the_frontier_says_what_was_tried_and_what_predicted():
    ends = {512: "completed", 1024: "out_of_memory", 2048: "out_of_memory_predicted"}
    records = [training("mqa", "jax", 0, 512)]
    records += [record("training_speed", "mqa", "jax", outcome=outcome, seq_len=n, reason="x")
                for n, outcome in ends.items() if outcome != "completed"]  # fmt: skip
    records += [synthetic.throughput(family, "jax", 0, 512) for family in ("hawk", "griffin")]
    figure = drawn("memory_frontier", frame_of(records))
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    assert set(labels) == {"completed", "out of memory, tried", "out of memory, predicted",
                           "the search ended here, not memory"}  # fmt: skip
    context = figure.axes[1]
    assert context.get_xlabel() == "Longest context (tokens)"
    marks = {line.get_marker(): line.get_xdata()[0] for line in context.get_lines()
             if len(line.get_xdata()) == 1}  # fmt: skip
    assert (marks["o"], marks["x"]) == (512, 1024)


def test_power_laws_reach_as_far_as_they_were_fitted_and_have_bands_over_seeds():
    widths = (64, 128, 256, 512)
    records = [synthetic.scaled(family, "jax", seed, width)
               for family in FAMILIES for seed in (0, 1) for width in widths]  # fmt: skip
    figure = drawn("scaling", frame_of(records))
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    over_flops, over_params = figure.axes
    for axes in (over_flops, over_params):
        points = [line for line in axes.get_lines() if line.get_marker() == "o"]
        laws = [line for line in axes.get_lines() if len(line.get_xdata()) == 100]
        assert len(points) == len(laws) == len(axes.collections) - len(points) == len(FAMILIES)
        for law in laws:
            (mine,) = (line for line in points if line.get_color() == law.get_color())
            assert law.get_xdata()[[0, -1]] == pytest.approx(mine.get_xdata()[[0, -1]])
    words = " ".join(figure.get_supxlabel().split())
    assert "Exponents over parameters: MQA-Transformer, JAX -0.1" in words
    one = frame_of([synthetic.scaled("mqa", "jax", 0, width) for width in widths[:3]])
    assert not drawn("scaling", one).axes[0].collections  # one seed: neither bars nor a band


def test_panels_of_small_models_come_first():
    made = [
        modeling("mqa", "jax", model={"size": size}, costs={"num_params": count})
        for size, count in (("a_large", 200_000), ("b_small", 100_000))
    ]
    figure = drawn("held_out_curves", frame_of(made))
    assert [axes.get_title("left") for axes in figure.axes] == ["b_small", "a_large"]


def test_training_lengths_of_one_size_are_no_scaling():
    records = [synthetic.windowed("griffin", length, None) for length in (256, 512)]
    assert drawn("scaling", frame_of(records)) is None


def test_errors_by_layer_are_shares_of_their_tolerance_over_depth(frame):
    figure = drawn("parity_by_layer", frame)
    assert [axes.get_title("left") for axes in figure.axes] == ["L4/activations", "L4/grad"]
    line = lines_of(figure, 1)["Griffin, JAX"]
    assert list(line.get_xdata()) == list(range(6))
    np.testing.assert_allclose(line.get_ydata(), [number * 1e-2 for number in range(6, 12)])


def test_ratios_are_read_without_colour(frame):
    figure = drawn("framework_ratios", frame)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert len(words) == sum(bool(word) for word in words) > 6
    for word in words:
        number, verdict = word.split("\n")
        assert number.rstrip("*").endswith("x")
        assert verdict in ("JAX faster", "JAX slower", "equivalent", "inconclusive", "unpaired")
    assert any(number.split("\n")[0].endswith("*") for number in words)
    assert checks.UNVERIFIED in figure.get_supxlabel()


# ratios that were not measured side by side


def apart(make, *names, lengths=(512, 1024), together=(), **rest):
    """Records of each name; those of lengths in `together` are of one block."""
    return frame_of([make(name, round, n, block="b" if n in together else f"b-{name}", **rest)
                     for name in names for round in range(2) for n in lengths])  # fmt: skip


def step(family, round, n, **rest):
    return training(family, "jax", round, n, **rest)


def step_by_scan(variant, round, n, **rest):
    return training("hawk", "jax", round, n, kernels={"linear_scan": variant},
                    provenance=synthetic.scan_kernels(variant), **rest)  # fmt: skip


def scan_alone(variant, round, n, **rest):
    return synthetic.scan("jax", variant, round, n, **rest)


def seconds(family, round, n, **rest):
    return synthetic.latency(family, "jax", round, n, 64, **rest)


def rate(family, round, n, **rest):
    return synthetic.throughput(family, "jax", round, n, **rest)


RATIOS = [("relative_step_time", step, ("mqa", "griffin")),
          ("latency_by_tokens", seconds, ("mqa", "griffin")),
          ("throughput_by_tokens", rate, ("mqa", "griffin")),
          ("relative_scan_time", scan_alone, ("sequential", "analytic")),
          ("step_time_by_scan", step_by_scan, ("sequential", "analytic"))]  # fmt: skip


def ratio_lines(figure):
    return {name: line for name, line in lines_of(figure, -1).items()
            if name.startswith(("Griffin", "analytic"))}  # fmt: skip


@pytest.mark.parametrize(("name", "make", "sides"), RATIOS)
def test_unpaired_ratios_stand_on_no_line_and_are_counted(name, make, sides):
    figure = drawn(name, apart(make, *sides))
    ((label, line),) = ratio_lines(figure).items()
    assert label.endswith(": unpaired")
    assert (line.get_marker(), line.get_linestyle()) == ("d", "None")
    assert len(line.get_xdata()) == 2
    words = " ".join(figure.get_supxlabel().split())
    assert "2 of 2 ratios are unpaired: not measured side by side" in words
    assert label in figures.describe(name, figure)


@pytest.mark.parametrize(("name", "make", "sides"), RATIOS)
def test_paired_ratios_are_drawn_as_ever(name, make, sides):
    figure = drawn(name, apart(make, *sides, together=(512, 1024)))
    ((label, line),) = ratio_lines(figure).items()
    assert line.get_marker() == "o"
    assert "unpaired" not in label + figure.get_supxlabel()


@pytest.mark.parametrize(("name", "make", "sides"), RATIOS)
def test_a_line_breaks_at_a_ratio_that_is_unpaired(name, make, sides):
    lengths = (512, 1024, 2048)
    figure = drawn(name, apart(make, *sides, lengths=lengths, together=(512, 2048)))
    found = ratio_lines(figure)
    (lone,) = (line for label, line in found.items() if label.endswith(": unpaired"))
    (line,) = (line for label, line in found.items() if not label.endswith(": unpaired"))
    assert len(lone.get_xdata()) == 1
    if name != "step_time_by_scan":  # whose rows nothing connects
        assert list(np.isnan(line.get_ydata())) == [False, True, False]
    assert "1 of 3 ratios are unpaired" in figure.get_supxlabel()


def test_ratios_of_different_machines_are_unpaired():
    records = [step(family, round, n, host=f"node-{family}")
               for family in ("mqa", "griffin")
               for round in range(2) for n in (512, 1024)]  # fmt: skip
    assert "2 of 2 ratios" in drawn("relative_step_time", frame_of(records)).get_supxlabel()


# ghosts of the literature


def ghosts_of(figure):
    return {label: line for axes in figure.axes for line in axes.get_lines()
            if "De et al. 2024" in (label := str(line.get_label()))}  # fmt: skip


def test_ghosts_are_ratios_of_the_paper_where_size_and_shape_are_the_same():
    lengths = (1024, 2048, 8192)
    records = [training(f, "jax", r, n, model={"size": "400m"})
               for f in FAMILIES for r in (0, 1) for n in lengths]  # fmt: skip
    (line,) = ghosts_of(drawn("relative_step_time", frame_of(records))).values()
    assert line.get_label() == "Griffin: De et al. 2024, TPU-v3"
    assert list(line.get_xdata()) == [2048, 8192]  # no 1,024 in the paper, no 4,096 in ours
    np.testing.assert_allclose(line.get_ydata(), [0.93 / 1.00, 0.98 / 1.46])
    assert (line.get_color(), line.get_markerfacecolor()) == (style.GHOST, "none")
    assert line.get_linestyle() == "None"
    small = [training(f, "jax", r, n) for f in FAMILIES for r in (0, 1) for n in lengths]
    assert not ghosts_of(drawn("relative_step_time", frame_of(small)))


def test_ghosts_of_decoding_stand_beside_ratios_alone():
    records = [make(f, "jax", 0, n, prompt, model={"size": "1b"})
               for f in FAMILIES for n in (512, 4096)
               for make, prompt in ((synthetic.latency, 1), (synthetic.throughput, 1))]  # fmt: skip
    latency, throughput = (drawn(name, frame_of(records))
                           for name in ("latency_by_tokens", "throughput_by_tokens"))  # fmt: skip
    for figure in (latency, throughput):
        above, below = figure.axes
        assert not [line for line in above.get_lines() if line.get_color() == style.GHOST]
        assert [line for line in below.get_lines() if line.get_color() == style.GHOST]
    ghosts = ghosts_of(throughput)
    np.testing.assert_allclose(ghosts["Hawk: De et al. 2024, TPU-v3"].get_ydata(), [2.5, 14.8])
    (griffin,) = (v for k, v in ghosts_of(latency).items() if k.startswith("Griffin"))
    np.testing.assert_allclose(griffin.get_ydata(), [12.5 / 12.1, 99.9 / 135.4], rtol=1e-6)


def test_ghosts_of_scans_are_relative_to_the_sequential_scan():
    shape = {"dtype": "bfloat16", "model": {"size": "100m", "d_rnn": 1024}}
    records = [synthetic.scan("jax", v, 0, n, **shape, phase=phase)
               for v in ("sequential", "associative") for n in (1024, 2048)
               for phase in ("evaluate", "train")]  # fmt: skip
    figure = drawn("relative_scan_time", frame_of(records))
    (line,) = ghosts_of(figure).values()
    assert line.axes is figure.axes[0]  # the paper has no backward pass
    np.testing.assert_allclose(line.get_ydata(), [3.63 / 1.79, 6.87 / 3.30])
    assert not ghosts_of(drawn("kernel_speed", frame_of(records)))  # milliseconds of a TPU


def test_ghosts_of_losses_are_distances_from_mqa():
    records = [record("language_modeling", family, "jax", seq_len=2048, num_steps=2,
                      samples=(sample("loss", loss),),
                      model={"size": "400m", "window_size": window})
               for family, window, loss in (("mqa", None, 3.0), ("mqa_local", 512, 3.1),
                                            ("griffin", 1024, 2.9))]  # fmt: skip
    ghosts = ghosts_of(drawn("window_sizes", frame_of(records)))
    (griffin,) = (v for k, v in ghosts.items() if k.startswith("Griffin"))
    np.testing.assert_allclose(griffin.get_ydata(), [3.0 + 2.581 - 2.599])
    assert all("their distance from MQA" in label for label in ghosts)


# colours: Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of
# Color Vision Deficiency", severity 1.0, on linear RGB

BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                   [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
WHITE_POINT = (0.95047, 1.0, 1.08883)
FAMILIES_APART = 25.0  # CIE76; 2.3 is just noticeable. Okabe and Ito's four have 16
OTHERS_APART = 15.0
CONTRAST = 3.0  # WCAG 1.4.11, of graphics
PAPERS = ("#ffffff", "#14181c")  # of the page, light and dark


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / WHITE_POINT
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(TO_XYZ[1] @ linear(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize(
    ("colors", "apart"),
    [(style.FAMILY_COLORS, FAMILIES_APART), (style.VARIANT_COLORS, OTHERS_APART),
     (dict(zip("abcd", style.OTHER_COLORS, strict=True)) | style.FAMILY_COLORS, OTHERS_APART)],
    ids=["families", "variants", "all"],
)  # fmt: skip
def test_colours_stay_apart_for_the_colour_blind(colors, apart, blindness):
    seen = {name: lab(np.array(BLINDNESS[blindness]) @ linear(c)) for name, c in colors.items()}
    for one, other in combinations(seen, 2):
        distance = np.linalg.norm(seen[one] - seen[other])
        assert distance >= apart, f"{one} and {other}: {distance:.1f} with {blindness}"


@pytest.mark.parametrize("paper", PAPERS)
def test_colours_stand_out_from_the_page(paper):
    colors = [*style.FAMILY_COLORS.values(), *style.OTHER_COLORS, *style.VARIANT_COLORS.values(),
              style.GHOST, style.ALARM]  # fmt: skip
    for color in colors:
        assert contrast(color, paper) >= CONTRAST, f"{color}: {contrast(color, paper):.2f}"
