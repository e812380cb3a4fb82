"""The page of a report: what it says, that it loads nothing, and that any label is safe in it."""

import csv
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
from synthetic_records import decoding, modeling, parity, record, sample, training

import analysis
from analysis import derive, figures, formats, page, report, tables
from analysis.load import frame_of
from analysis.verify import Shown
from suites.harness.record import write

# What a label may hold, and every format would read as its own language.
HOSTILE = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>",
    "50%_a&b #1 $\\frac$ {y} \\z",
    'comma, "quote", a|b `c` *d* [e](f)', "=1+1", "@SUM(A1)", "new\nline\ttab\x00nul",
    "caf\u00e9 \u0142\u00f3d\u017a \U0001f642 \u2264 \u6f22", "${{ 7*7 }} <% if %> ~^'",
)  # fmt: skip


def hostile_store(store):
    """A small store in which labels, reasons, nodes and versions are hostile."""
    for place, text in enumerate(HOSTILE):
        for backend in ("jax", "torch"):
            for round in range(2):
                write(store, training("griffin", backend, round, 256 + place, host=text,
                                      model={"lambda_init": text}))  # fmt: skip
        lost = record("training_speed", "griffin", "jax", outcome="failed", reason=text,
                      seq_len=1024 + place, provenance={"versions": {"numpy": text}})  # fmt: skip
        write(store, lost)
    write(store, parity("griffin", "jax"))
    # parity has no variant of its own; the page's families and sizes are labels of figures too
    write(store, decoding("griffin", "jax", 0, model={"size": HOSTILE[0]}))
    write(store, decoding("griffin", "jax", 0, model={"size": HOSTILE[2]}))
    return store


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    store = hostile_store(folder / "store")
    title = "Quick & <b>dirty</b> 100% #1_{}$ \U0001f642"
    command = "aerie run 'model.x=`</pre>`' \\"
    return analysis.write_report(store, folder / "report", title=title, command=command)


class Page(HTMLParser):
    """Checks that elements close in order, and collects what they load and where they lead."""

    VOID = ("meta", "br", "link", "img", "input", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.leads, self.ids, self.text = [], [], [], [], []
        self.tags = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "xlink:href", "srcset", "data", "poster") or tag == "link":
                self.loads.append(value)
            elif name == "href":
                self.leads.append(value)
            elif name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def words_of(path):
    return " ".join(" ".join(read(path).text).split())


# what it says


def test_the_page_is_well_formed_and_loads_nothing(quickstart_report):
    _, path = quickstart_report
    found = read(path)
    assert found.open == []
    assert all(target.startswith("#") for target in found.loads)  # parts of its own figures
    text = path.read_text()
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert "default-src 'none'" in text
    assert len(found.ids) == len(set(found.ids))
    for target in found.leads:
        if target.startswith("#"):
            assert target[1:] in found.ids
        else:
            assert (path.parent / target).is_file()


def test_the_page_says_all_that_it_must(quickstart_report):
    _, path = quickstart_report
    text = words_of(path)
    for words in (
        "Which architecture is better, at what cost",
        "Griffin reaches the fewest held-out bits per byte at size tiny, 2.450",
        "in training JAX is 1.4", "too few for a verdict, which needs 6",
        "Language modeling has one seed", "PyTorch eager code", "inconclusive (3 of 6 rounds)",
        "matched", "green", "All 15 comparisons are matched.",
        "killed at <7.9> GiB", "numpy=2.4.6", "aerie run experiment=quickstart", "307,000",
        "280,000", "prefers-color-scheme: dark", "A CPU", "Griffin, PyTorch",
        "aerie report quickstart --figure decode_latency", "aerie report --verify",
    ):  # fmt: skip
        assert words in text, words
    assert "UNVERIFIED" not in text


def test_it_reads_from_the_question_to_the_command(quickstart_report):
    text = quickstart_report[1].read_text()
    ids = ("matching", "tables", "figures", "metrics", "parity", "failures", "machines",
           "reproduce")  # fmt: skip
    order = ['class="question"', 'data-check="answer"', 'class="caveats"']
    order += [f'<h2 id="{name}"' for name in ids]
    places = [text.index(mark) for mark in order]
    assert all(a < b for a, b in pairwise(places))


def test_an_experiment_may_ask_a_question_of_its_own(tmp_path):
    write(tmp_path, training("griffin", "jax", 0))
    path = analysis.write_report(tmp_path, tmp_path / "report", title="T", command="c",
                                 question="Is water wet?")  # fmt: skip
    assert "Is water wet?" in words_of(path)
    assert report.QUESTION not in words_of(path)


def test_unverified_speeds_are_never_bare(tmp_path):
    store = synthetic.quickstart(tmp_path / "store", rounds=1, seq_lens=(256,), with_parity=False)
    path = analysis.write_report(store, tmp_path / "report", title="T", command="c")
    assert "speed numbers are UNVERIFIED" in path.read_text()
    frame = analysis.load(store)
    beside = report.comparison_tables(frame, report.pairs(frame))
    place = beside[0].header.index("parity")
    assert {row[place] for row in beside[0].rows} == {"UNVERIFIED"}
    assert "[UNVERIFIED]" in " ".join(report.answer(frame, beside))
    (cell,) = {c.look for row in page.cells(beside[0], page.Runs(frame)) for c in row
               if c.lead == "UNVERIFIED"}  # fmt: skip
    assert cell == "alarm"


@pytest.mark.parametrize(
    "records",
    [[], [record("training_speed", outcome="failed", reason="x")], [parity("griffin", "jax")],
     [modeling("griffin", "jax")], [record("a_new_suite", samples=(sample("mfu", 0.5),))]],
    ids=["empty", "failures", "parity alone", "one quality run", "unknown suite"],
)  # fmt: skip
def test_a_sparse_store_still_gets_its_report(tmp_path, records):
    for one in records:
        write(tmp_path, one)
    path = analysis.write_report(tmp_path, tmp_path / "report", title="T", command="c")
    assert read(path).open == []


# every number leads to its runs


def test_every_cell_of_a_comparison_leads_to_the_runs_it_came_from(quickstart_report):
    store, path = quickstart_report
    shown = Shown(path.read_text())
    frame = analysis.load(store)
    cells = derive.runs(frame).groupby(["suite", "family", "backend", "seq_len"], dropna=False)
    header, *rows = shown.tables["headline_backend_jax_torch"]
    names = [cell.text for cell in header]
    for row in rows:
        assert all(cell.groups for cell in row)
        facts = dict(zip(names, row, strict=True))
        found = re.fullmatch(r"seq_len (\d+), batch 4", facts["workload"].text)
        if facts["suite"].text != "training_speed" or not found:
            continue
        for backend in ("jax", "torch"):
            key = ("training_speed", facts["family"].text, backend, int(found[1]))
            (group,) = facts[backend].groups
            assert sorted(shown.run_ids(group)) == sorted(cells.get_group(key)["run_id"])
        assert facts["jax / torch"].groups == facts["jax"].groups + facts["torch"].groups
    for run_id, attempt, *_ in shown.runs["runs"]:
        assert (store / "runs" / run_id / f"{attempt}.json").is_file()


def test_the_csv_names_the_runs_of_both_sides(quickstart_report):
    store, path = quickstart_report
    known = set(analysis.load(store)["run_id"])
    table = pd.read_csv(path.parent / "tables" / "backend_jax_torch.csv")
    timed = table[(table["metric"] == "step_time_ms") & (table["seq_len"] == 512)]
    for side in ("ours", "baseline"):
        ids = timed[f"run_ids_{side}"].str.split()
        assert set(ids.map(len)) == {3}
        assert set(ids.explode()) <= known


def test_a_number_of_thousands_of_runs_lists_some_and_says_how_many():
    frame = frame_of([training("griffin", "jax", n) for n in range(page.MAX_RUNS + 5)])
    runs = page.Runs(frame)
    runs.group(tables.machines(frame).frame["run_ids"][0])
    (group,) = runs.to_json()["groups"]
    assert group[0] == page.MAX_RUNS + 5
    assert len(group) - 1 == page.MAX_RUNS


# long tables


def test_a_long_table_shows_its_beginning_and_says_where_the_rest_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROWS", 3)
    for n in range(5):
        write(tmp_path, record("training_speed", outcome="failed", reason="x", seq_len=n + 1))
    path = analysis.write_report(tmp_path, tmp_path / "report", title="T", command="c")
    assert "2 more rows are in the CSV." in words_of(path)
    assert len(Shown(path.read_text()).tables["failures"]) == 1 + 3
    assert len(pd.read_csv(path.parent / "tables" / "failures.csv")) == 5
    for name in ("report.md", "report.tex"):
        assert "2 more rows are in" in path.with_name(name).read_text()


def test_a_sweep_of_many_values_is_no_list_of_pairs(tmp_path, monkeypatch):
    for n in range(4):
        write(tmp_path, training("griffin", "jax", 0, optimizer={"learning_rate": n / 1000}))
    frame = analysis.load(tmp_path)
    assert len(report.pairs(frame)) == 3
    monkeypatch.setattr(report, "MOST_VALUES", 3)
    assert report.pairs(frame) == [("backend", "jax", "torch")]
    path = analysis.write_report(tmp_path, tmp_path / "report", title="T", command="c")
    assert "optimizer.learning_rate has 4 values, which are not paired here" in words_of(path)


# files beside it


def test_the_files_beside_the_page(quickstart_report):
    store, path = quickstart_report
    folder = path.parent
    frame = pd.read_parquet(folder / "records.parquet")
    assert len(frame) == len(analysis.load(store))
    table = pd.read_csv(folder / "tables" / "backend_jax_torch.csv")
    lost = table[(table["seq_len"] == 1024) & (table["metric"] == "step_time_ms")].iloc[0]
    assert np.isnan(lost["value_ours"])
    assert lost["outcome_ours"] == "out_of_memory"
    for target in re.findall(r"\]\(([^)]+)\)", (folder / "report.md").read_text()):
        assert (folder / target).is_file()
    drawn = sorted((folder / "figures").glob("*.png"))
    assert drawn
    for png in drawn:
        assert png.read_bytes()[:4] == b"\x89PNG"
        assert png.with_suffix(".svg").is_file()


def test_the_csv_of_records_and_samples_is_the_frame(quickstart_report):
    store, path = quickstart_report
    facts, samples = (pd.read_csv(path.parent / f"{name}.csv") for name in ("records", "samples"))
    both = samples.merge(facts, on=["run_id", "attempt"], validate="many_to_one")
    frame = analysis.load(store)
    assert len(both) == len(frame)
    assert set(both.columns) == set(frame.columns)
    for name in ("metric", "family", "round", "value", "seq_len"):
        want = frame[name].astype(both[name].dtype)
        pd.testing.assert_series_equal(both[name], want, check_names=False)


def test_millions_of_samples_are_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGE", 10)
    frame = frame_of([training("griffin", "jax", 0)])
    formats.write_frame(frame, tmp_path)
    assert not (tmp_path / "samples.csv").exists()
    assert len(pd.read_csv(tmp_path / "samples.csv.gz")) == len(frame)


def test_a_second_report_leaves_nothing_of_the_first(tmp_path):
    store, out = tmp_path / "store", tmp_path / "report"
    write(store, training("griffin", "jax", 0))
    analysis.write_report(store, out, title="T", command="c")
    (out / "tables" / "old.csv").write_text("x")
    (out / "figures" / "decode_latency.png").write_text("x")
    (out / "tables" / "mine.txt").write_text("not of a report")
    analysis.write_report(store, out, title="T", command="c")
    assert not list(out.rglob("old.*"))
    assert not list(out.rglob("decode_latency.*"))
    assert (out / "tables" / "mine.txt").exists()


def test_an_svg_file_stands_alone_on_white(quickstart_report):
    for path in (quickstart_report[1].parent / "figures").glob("*.svg"):
        root = ET.parse(path).getroot()
        assert root[0].attrib["fill"] == "#ffffff"
        assert root.attrib["width"].endswith("pt")
        assert "currentColor" not in path.read_text()


# colours


def luminance(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


@pytest.mark.parametrize("theme", page.PALETTE)
@pytest.mark.parametrize("text", ["ink", "soft", "good", "alarm", "link"])
@pytest.mark.parametrize("ground", ["paper", "band"])
def test_text_stands_out_from_its_ground(theme, text, ground):
    colours = page.PALETTE[theme]
    light, dark = sorted([luminance(colours[text]), luminance(colours[ground])], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, AA


def test_a_verdict_is_a_word_with_a_mark():
    for text in ("jax faster", "jax slower", "equivalent", "inconclusive (3 of 6 rounds)",
                 "unpaired (not of one block)", "jax worse", "not resolved (few seeds)",
                 "green", "RED", "matched", "UNVERIFIED"):  # fmt: skip
        assert page.marked(text)[1], text
    assert page.marked("-") == page.marked("step_time_ms") == ("", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,024", 1024), ("0.97x [0.95, 0.99]", 0.97), ("-0.0030 bit/B", -0.003), ("2e-05", 2e-5),
     ("- (out_of_memory)", None), ("2 values", 2), ("302,912 / 280,000", 302_912),
     ("0c5a5b27e3e9", None), ("seq_len 256", None)],
)  # fmt: skip
def test_numbers_are_told_from_words(text, value):
    assert page.number(text) == value


# hostile labels


def test_a_hostile_label_is_text_in_the_page(hostile):
    found = read(hostile)
    assert found.open == []
    assert found.tags["script"] == 2  # the list of runs, and the page's own
    assert "img" not in found.tags
    assert "b" not in found.tags
    assert "onerror" not in re.sub(r"&lt;img src=x onerror=alert\(2\)&gt;", "", hostile.read_text())
    shown = Shown(hostile.read_text())
    reasons = {row[-2].text for row in shown.tables["failures"]}
    for text in HOSTILE:
        assert " ".join(formats.visible(text).split()) in reasons


def test_a_hostile_label_cannot_end_a_script(tmp_path):
    run = training("griffin", "jax", 0, attempt="</script><script>alert(1)</script>")
    frame = frame_of([run])
    path = analysis.write_report(tmp_path, tmp_path, title="T", command="c", frame=frame)
    shown = Shown(path.read_text())
    assert shown.runs["runs"][0][1] == run.attempt
    assert read(path).tags["script"] == 2


def test_a_hostile_label_is_one_cell_of_csv(hostile):
    with open(hostile.parent / "tables" / "failures.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reasons = {row["reason"] for row in rows}
    for text in HOSTILE:
        text = formats.visible(text)
        assert (f"'{text}" if text[0] in "=@" else text) in reasons
    for path in hostile.parent.rglob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                assert not [cell for cell in row if cell.startswith(("=", "@", "\t"))]


def test_a_negative_number_is_no_formula(tmp_path):
    frame = pd.DataFrame({"number": [-1.5, None], "text": ["-", "-1+1"]})
    formats.write_csv(frame, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == '"number","text"\n-1.5,"-"\n,"\'-1+1"\n'


def test_a_hostile_label_is_one_cell_of_markdown(hostile):
    text = hostile.with_name("report.md").read_text(encoding="utf-8")
    width = None
    for line in text.splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line))
        is_row = line.startswith("| ")
        assert not is_row or width in (None, bars), line
        width = bars if is_row else None
    assert "<script" not in text
    assert "<img" not in text
    assert "[e](f)" not in text
    assert "$\\" not in text.replace("\\$", "")


@pytest.mark.parametrize(
    ("text", "want"),
    [("a|b", r"a\|b"), ("c\nd", "c d"), ("step_time_ms", "step_time_ms"), ("_x_", r"\_x\_"),
     ("0.4 [0.3, 0.5] (stale)", "0.4 [0.3, 0.5] (stale)"), ("[a](b)", r"[a\](b)"),
     ("<b>&", "&lt;b&gt;&amp;"), ("# x", r"\# x"), ("`$\\", r"\`\$\\"), ("- (lost)", "- (lost)")],
)  # fmt: skip
def test_markdown_escapes_what_it_would_read(text, want):
    assert formats.markdown(text) == want


def test_a_fence_is_longer_than_the_backticks_within():
    assert formats.markdown_code("a ```` b") == "`````\na ```` b\n`````"


def test_a_hostile_label_is_text_in_every_figure(hostile):
    drawn = list((hostile.parent / "figures").glob("*.svg"))
    assert drawn
    for path in drawn:
        root = ET.parse(path).getroot()
        assert not root.findall(".//{*}script")
    texts = " ".join("".join(root.itertext()) for root in (ET.parse(p).getroot() for p in drawn))
    assert "<script>" in texts  # as text
    assert "$\\frac$" in texts  # no formula


def test_records_of_a_hostile_report_are_json(hostile):
    found = re.search(r'id="run-list">(.*?)</script>', hostile.read_text(), re.DOTALL)
    assert json.loads(found[1])["runs"]


def test_every_figure_has_words_for_those_who_do_not_see_it(quickstart_report):
    text = quickstart_report[1].read_text()
    names = re.findall(r'<figure id="figure-(\w+)">', text)
    assert names
    for name in names:
        assert figures.caption(name)
    assert text.count('role="img" aria-label="') == len(names)
