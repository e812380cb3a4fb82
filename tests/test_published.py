"""The published numbers: what was derived from the papers follows from the files, and absolute
times of other devices are not handed on for drawing."""

import numpy as np
import pandas as pd
import pytest

from analysis import published


def pick(name, **where) -> pd.DataFrame:
    found = published.read(name)
    for column, value in where.items():
        found = found[found[column] == value]
    return found


def value(name, **where) -> float:
    found = pick(name, **where)["value"]
    assert len(found) == 1, (name, where, len(found))
    return float(found.iloc[0])


@pytest.mark.parametrize("name", published.names())
def test_every_file_says_what_where_from_and_how(name):
    found = published.read(name)
    assert tuple(found.columns[-len(published.COLUMNS) :]) == published.COLUMNS
    assert not found[["metric", "unit", "source", "how"]].isna().any().any()
    assert set(found["how"]) <= set(published.HOW)
    assert (found["error"].dropna() >= 0).all()
    places = [*published.varied(name), "metric", "how"]
    assert not found.duplicated(places).any()
    is_time = found["unit"].isin(["s", "ms", "tokens/s"])
    assert found.loc[is_time, "device"].notna().all()
    assert (found["value"].notna() | found["note"].astype(str).str.contains("off the plot")).all()


def test_table_1_averages_its_tasks():
    rows = pick("table1").pivot(index=["family", "size"], columns="task", values="value")
    assert len(rows) == 13
    printed = rows.pop("average")
    assert rows.shape == (13, 6)
    assert (rows.mean(axis=1) - printed).abs().max() <= 0.05 + 1e-9


def test_recurrentgemma_averages_its_tasks():
    rows = pick("recurrentgemma", unit="%")
    rows = rows.pivot(index=["family", "size"], columns="task", values="value")
    printed = rows.pop("average")
    assert rows.shape == (4, 18)
    assert (rows.mean(axis=1) - printed).abs().max() <= 0.05 + 1e-9


def test_the_labels_of_figure_1b_are_its_bars():
    bars = pick("figure1b", metric="tokens_per_s")
    bars = bars.pivot(index="num_new_tokens", columns="family", values="value")
    labels = pick("figure1b", metric="speedup")
    assert len(labels) == 8
    for row in labels.itertuples():
        bar = bars.loc[row.num_new_tokens, row.family] / bars.loc[row.num_new_tokens, "mqa"]
        # both readings off by their error
        slack = 0.05 + bar * np.hypot(60 / bars.loc[row.num_new_tokens, "mqa"], 60 / 9560)
        assert abs(bar - row.value) <= slack, row
    assert value("figure1b", metric="speedup", family="hawk", num_new_tokens=4096) == 14.8
    assert round(bars["hawk"].mean() / bars["griffin"].mean(), 2) == 2.24


def test_figure_3_grows_as_the_text_says():
    growth = published.relative("figure3").pivot(
        index=["size", "family"], columns="seq_len", values="value"
    )
    assert (growth.diff(axis=1).loc[:, 4096:] >= 0).all().all()
    assert growth.xs("griffin", level="family").loc[:, 2048].to_dict() == {
        "400m": 0.93, "1b": 0.97, "7b": 1.05}  # fmt: skip
    growth = (growth[8192] / growth[2048]).round(2).to_dict()
    assert growth["400m", "mqa"] == 1.46
    assert growth["400m", "griffin"] == 1.05
    assert growth["1b", "mqa"] == 1.33
    assert growth["7b", "mqa"] == 1.13
    assert growth["7b", "griffin"] == 1.02


def test_figure_4_has_its_ratios_and_a_flat_hawk():
    for prompt_len, ratio in ((1, 1.39), (4096, 1.89)):
        mqa, hawk = (
            value("figure4", family=f, prompt_len=prompt_len, num_new_tokens=4096)
            for f in ("mqa", "hawk")
        )
        assert round(mqa / hawk, 2) == ratio
    empty = pick("figure4", prompt_len=1).pivot(
        index="num_new_tokens", columns="family", values="value"
    )
    per_step = empty.loc[1024:].div(empty.loc[1024:].index, axis=0) * 1e3
    assert per_step["hawk"].between(23.7, 23.9).all()
    assert per_step["griffin"].between(24.3, 24.5).all()
    assert round(per_step.loc[4096, "mqa"], 1) == 33.1
    assert empty.loc[512, "mqa"] < empty.loc[512, "hawk"]  # they cross near 1k
    assert empty.loc[1024, "mqa"] > empty.loc[1024, "hawk"]


def test_figure_4_b_is_a_prefill_later_than_a():
    rows = pick("figure4").pivot(
        index="num_new_tokens", columns=["family", "prompt_len"], values="value"
    )
    assert (rows.diff().dropna() > 0).all().all()
    for family in ("hawk", "griffin"):  # at every length the same prefill, within two readings
        later = rows[family, 4096] - rows[family, 1]
        assert (later - 2.15).abs().max() <= 0.1
        per_token = rows[family, 1].div(rows.index, axis=0) * 1e3
        assert per_token.between(23.4, 24.5).all()
    slower = rows["mqa", 4096] - rows["mqa", 1]
    assert slower.is_monotonic_increasing
    assert slower.loc[4096] > 10 * slower.loc[128]


def test_figure_1a_has_the_slopes_that_were_fitted_to_it():
    want = {"mqa": (21.9, -0.0482, 0.9970), "hawk": (28.6, -0.0531, 0.9976),
            "griffin": (19.3, -0.0456, 0.9975)}  # fmt: skip
    for family, (scale, exponent, r_squared) in want.items():
        rows = pick("figure1a", family=family)
        x, y = np.log(rows["train_flops"]), np.log(rows["value"])
        slope, constant = np.polyfit(x, y, 1)
        assert abs(slope - exponent) < 0.00006, family
        assert abs(np.exp(constant) - scale) < 0.06, family
        assert abs(np.corrcoef(x, y)[0, 1] ** 2 - r_squared) < 0.00006, family


def test_figure_1a_has_the_gaps_to_mqa():
    gaps = published.relative("figure1a").pivot(index="size", columns="family", values="value")
    want = {"100m": (-0.027, 0.216), "200m": (-0.043, 0.155), "400m": (-0.033, 0.132),
            "1b": (-0.022, 0.085), "7b": (-0.026, 0.031)}  # fmt: skip
    for size, (griffin, hawk) in want.items():
        assert round(gaps.loc[size, "griffin"], 3) == griffin
        assert round(gaps.loc[size, "hawk"], 3) == hawk


def test_figure_5_has_its_minima():
    for family, encoding, position, least in (
        ("mqa", "rope", 2300, 2.544),
        ("mqa", "none", 2300, 2.654),
        ("hawk", "none", 7800, 2.616),
        ("griffin", "rope", 13000, 2.489),
    ):
        curve = pick("figure5", panel="left", family=family, position_encoding=encoding)
        found = curve[curve["metric"] == "least_mean_loss_so_far"].iloc[0]
        assert (found["value"], found["position"]) == (least, position)
        plotted = curve[curve["metric"] == "mean_loss_so_far"].dropna(subset="value")
        # no point lies below the minimum, and the lowest is a neighbour of it
        assert plotted["value"].min() >= least
        lowest = plotted.loc[plotted["value"].idxmin(), "position"]
        assert 0.5 <= lowest / position <= 2


def test_both_panels_of_figure_5_show_nearly_the_same_curves():
    curves = pick("figure5", metric="mean_loss_so_far").dropna(subset="value")
    curves = curves.pivot(
        index="position", columns=["panel", "family", "position_encoding", "seq_len"],
        values="value",
    )  # fmt: skip
    for family, encoding in (("griffin", "rope"), ("hawk", "none")):
        apart = curves["left", family, encoding, 2048] - curves["right", family, encoding, 2048]
        assert apart.dropna().between(0.006, 0.0255).all()
        longer = curves["right", family, encoding, 8192]
        assert (longer.loc[:65536].diff().dropna() < 0.003).all()
        # from 4K (Griffin), from 16K (Hawk) the longer training is ahead, and stays so
        gain = (curves["right", family, encoding, 2048] - longer).dropna()
        assert gain.is_monotonic_increasing
        assert gain.loc[128] < -0.03 < 0 < gain.iloc[-1]
    mqa = curves["left", "mqa", "none", 2048] - curves["left", "mqa", "rope", 2048]
    assert mqa.loc[:2048].between(0.093, 0.107).all()


def test_curves_that_extrapolate_fall_beyond_the_training_length():
    for name in ("figure5", "figure10"):
        rows = published.relative(name)
        griffin = rows[(rows["family"] == "griffin") & (rows["position"] == 8192)]
        assert (griffin["value"] < 0).all()
        mqa = rows[(rows["family"] == "mqa") & (rows["position"] == 4096)]
        assert (mqa["value"] > 0.6).all()
    books = value("figure5", panel="right", family="hawk", seq_len=2048, position=2048)
    arxiv = value("figure10", panel="right", family="hawk", seq_len=2048, position=2048)
    assert books - arxiv > 0.5  # the left of figure 10 had hawk at its books


def test_figure_8_has_its_ratios():
    rows = published.relative("figure8a")
    for variant, dtype, low, high in (
        ("pallas_tpu", "bfloat16", 1 / 2.81, 1 / 2.3),
        ("associative", "bfloat16", 2.0, 2.15),
        ("associative", "float32", 2.85, 3.14),
    ):
        part = rows[(rows["linear_scan"] == variant) & (rows["dtype"] == dtype)]
        assert len(part) >= 4
        assert part["value"].between(low, high).all(), part
    step = published.relative("figure8b").set_index(["size", "linear_scan"])["value"]
    assert step.xs("pallas_tpu", level=1).between(0.8, 0.9).all()
    slower = step.xs("associative", level=1).to_dict()
    assert slower == {"400m": 1.58, "1b": 1.27, "7b": 1.41}


def test_a_scan_of_figure_8_takes_twice_as_long_for_twice_the_steps():
    rows = pick("figure8a", error=0.05).pivot(
        index="seq_len", columns=["linear_scan", "dtype"], values="value"
    )
    growth = (rows / rows.shift(1)).stack([0, 1]).dropna()
    assert len(growth) == 15
    assert growth.between(1.7, 2.05).all()


def test_figure_9_has_the_gaps_of_a_1k_window():
    gaps = published.relative("figure9").set_index(["family", "window_size", "seq_len"])["value"]
    for seq_len, gap in ((2048, -0.019), (4096, -0.008), (8192, -0.003)):
        assert abs(gaps["griffin", 1024, seq_len] - gap) <= 0.001 + 1e-9  # two readings of 0.0005
    for _, losses in pick("figure9").groupby(["family", "seq_len"]):
        assert (losses.sort_values("window_size")["value"].diff().dropna() < 0).all()
    for _, losses in pick("figure9", family="griffin").groupby("seq_len"):
        assert losses["value"].between(2.56, 2.6).all()
    local = [gaps[place] for place in gaps.index if place[0] == "mqa_local"]
    assert len(local) == 6
    assert min(local) > 0


def test_table_2_counts_are_its_widths():
    widths = pick("table2", how="printed").pivot(index="size", columns="metric", values="value")
    assert (widths["d_model"] / widths["num_heads"] == 128).all()
    assert (widths["mlp_expansion"] == 3).all()
    ratio = {"100m": 1.333, "200m": 1.5, "400m": 1.333, "1b": 1.25, "3b": 1.333, "7b": 1.375,
             "14b": 1.6}  # fmt: skip
    assert (widths["d_rnn"] / widths["d_model"]).round(3).to_dict() == ratio
    for size, w in widths.iterrows():
        d, r, n = w["d_model"], w["d_rnn"], w["num_layers"]
        shared = 2 * d + 9 * d**2 + 7 * d
        attention = 2 * d**2 + 2 * d * 128 + d
        recurrent = 3 * d * r + 2 * r**2 / 16 + 4 * r + r + 2 * r + r + 2 * r + d
        num_attention = n // 3
        for family, num in (("mqa", n), ("hawk", 0), ("griffin", num_attention)):
            want = n * shared + num * attention + (n - num) * recurrent + d
            assert value("table2", family=family, size=size) == want, (size, family)
    tokens = widths["num_tokens"] / pick("table2", family="hawk").set_index("size")["value"]
    assert tokens.round(1).to_dict() == {"100m": 20.3, "200m": 22.5, "400m": 20.8, "1b": 19.2,
                                         "3b": 20.0, "7b": 18.5, "14b": 20.3}  # fmt: skip


def test_table_3_has_its_ridge():
    table = published.read("table3").set_index("metric")["value"]
    assert int(table["peak_flops_per_s"] / table["peak_bytes_per_s"]) == 136
    assert round(table["vector_flops_per_s"] / table["peak_bytes_per_s"], 1) == 4.2
    moved = table["loaded_bytes_per_element"] + table["stored_bytes_per_element"]
    assert table["flops_per_byte"] == table["flops_per_element"] / moved


def test_figure_6_orders_the_families():
    steps = pick("figure6a", metric="num_steps_to_accuracy")
    steps = steps.pivot(index="accuracy_reached", columns="family", values="value")
    assert (steps["mqa"] < steps["griffin"]).all()
    assert (steps["griffin"] < steps["hawk"] / 3).all()
    assert (steps.diff().dropna() > 0).all().all()
    assert pick("figure6a", metric="accuracy")["value"].between(0.97, 0.985).all()
    assert (steps["hawk"] / steps["mqa"]).round(1).to_dict() == {0.5: 11.7, 0.9: 4.1, 0.95: 3.8}
    induction = pick("figure6b").pivot(index="evaluated_seq_len", columns="family", values="value")
    assert (induction["hawk"] == 1).all()
    assert induction.loc[4096, "griffin"] == 1  # 16x the training length
    assert induction.loc[512, "mqa"] < 0.6
    # 64 sequences, three digits
    assert (induction.stack() * 64 % 1).map(lambda left: min(left, 1 - left)).max() < 0.05


def test_figure_6c_falls_with_the_length():
    rows = pick("figure6c")
    for _, curve in rows.groupby("family"):
        assert curve["evaluated_seq_len"].is_monotonic_increasing
        assert (curve["value"].diff().dropna() <= 0).all()
    at = rows.set_index(["family", "evaluated_seq_len"])["value"]
    assert at["mqa", 2170] > 4 * at["mqa", 2318]  # its end: the training length
    assert at["griffin", 3206] == 0.30
    assert at["hawk", 254] < 0.05


def test_recurrentgemma_is_its_own_sum():
    rows = pick("recurrentgemma", unit="1").pivot(index="size", columns="metric", values="value")
    whole = rows["num_params_non_embedding"] + rows["num_params_embedding"]
    assert ((whole - rows["num_params"]).abs() <= 1.5e7).all()  # three numbers to 1e7
    assert rows["num_params_embedding"].to_dict() == pytest.approx(
        (rows["vocab_size"] * rows["d_model"]).to_dict(), rel=0.01
    )


@pytest.mark.parametrize("name", published.RELATIVE)
def test_what_may_be_drawn_has_no_device_in_it(name):
    found = published.relative(name)
    assert set(found["unit"]) <= {"1", "nats/token", "%"}
    assert "device" not in found
    base = published.RELATIVE[name]
    rows = found
    for column, wanted in base.where.items():
        rows = rows[rows[column] == wanted]
    assert len(rows)
    assert set(rows["value"]) == {1.0 if base.is_ratio else 0.0}
    assert (found["error"].dropna() >= 0).all()


def test_times_have_a_ratio_or_are_not_drawn():
    timed = [name for name in published.names() if published.read(name)["device"].notna().any()]
    with_ratio = set(timed) & set(published.RELATIVE)
    assert with_ratio == {"figure1b", "figure3", "figure4", "figure8a", "figure8b"}
    for name in set(timed) - with_ratio:
        with pytest.raises(ValueError, match="no baseline"):
            published.relative(name)


def test_an_unknown_name_says_what_is_known():
    with pytest.raises(ValueError, match="known: figure10"):
        published.read("figure2")


def test_what_was_read_may_be_changed():
    found = published.read("figure3")
    found.loc[0, "value"] = 7.0
    assert published.read("figure3").loc[0, "value"] == 1.0
