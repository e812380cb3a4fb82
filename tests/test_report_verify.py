"""aerie report --verify: a written report is held against its samples, and any change is found."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import synthetic_records as synthetic
from test_report_page import hostile_store

import analysis
from analysis import comparisons, formats
from analysis.verify import Shown, verify
from suites import commands


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The store and the report of three families at one length, one run lost."""
    folder = tmp_path_factory.mktemp("small")
    store = folder / "store"
    for family in synthetic.FAMILIES:
        for backend in synthetic.BACKENDS:
            for round in range(2):
                synthetic.write(store, synthetic.training(family, backend, round))
            synthetic.write(store, synthetic.parity(family, backend))
    lost = synthetic.record(outcome="failed", reason="x | y", seq_len=1024)
    synthetic.write(store, lost)
    return store, analysis.write_report(store, folder / "report", title="T", command="c")


@pytest.fixture
def copied(small, tmp_path):
    """A report that may be changed, and the store that it came from."""
    store, path = small
    shutil.copytree(path.parent, tmp_path / "report")
    return tmp_path / "report" / "report.html", store


def found(copied) -> list[str]:
    path, store = copied
    return [str(difference) for difference in verify(path, store).differences]


def change(path, old, new, count=1):
    text = path.read_text(encoding="utf-8")
    assert old in text, old
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def cell_of_the_page(path):
    """A step time that the page shows, as text."""
    shown = Shown(path.read_text(encoding="utf-8"))
    header, row, *_ = shown.tables["headline_backend_jax_torch"]
    place = [cell.text for cell in header].index("jax")
    return row[place].text.split(" ")[0]


def test_a_report_is_what_its_samples_say(quickstart_report):
    store, path = quickstart_report
    verdict = verify(path, store)
    assert verdict.differences == []
    assert verdict.notes == []
    cells = verdict.cells
    shown = Shown(path.read_text(encoding="utf-8"))
    num_shown = sum(len(row) for table in shown.tables.values() for row in table[1:])
    assert num_shown > 1000
    for where in ("report.html", "report.md", "report.tex", "tables/*.tex", "tables/*.csv"):
        assert cells[f"cells of {where}"] >= num_shown, where
    num_samples = len(pd.read_parquet(path.with_name("records.parquet")))
    assert cells["cells of samples.csv"] == 8 * (num_samples + 1)


def test_a_report_of_hostile_labels_is_verified(tmp_path):
    store = hostile_store(tmp_path / "store")
    path = analysis.write_report(store, tmp_path / "report", title="T", command="c")
    assert found((path, store)) == []


def test_a_sparse_report_is_verified(tmp_path):
    path = analysis.write_report(tmp_path, tmp_path / "report", title="T", command="c")
    assert verify(path).differences == []


def test_a_changed_number_of_the_page_is_named(copied):
    path, _ = copied
    number = cell_of_the_page(path)
    change(path, f'<span class="lead">{number}</span>', '<span class="lead">77.7</span>')
    (line,) = found(copied)
    assert "report.html, table headline_backend_jax_torch" in line
    assert "training_speed/mqa" in line
    assert "column jax" in line
    assert "'77.7 [" in line
    assert f"samples say '{number} [" in line


def test_a_changed_sort_value_of_the_page_is_named(copied):
    path, _ = copied
    change(path, 'data-value="1', 'data-value="2')
    assert any("data-value" in line for line in found(copied))


def test_a_changed_word_of_the_answer_is_named(copied):
    change(copied[0], "A training step of Hawk takes 1.", "A training step of Hawk takes 0.")
    (line,) = found(copied)
    assert line.startswith("report.html, answer 1")


def test_a_caveat_that_was_left_out_is_missed(copied):
    text = copied[0].read_text()
    copied[0].write_text(re.sub(r'<li data-check="caveat">.*?</li>', "", text, count=1))
    assert any("number of caveat lines" in line for line in found(copied))


def test_a_row_that_was_left_out_is_missed(copied):
    text = copied[0].read_text()
    copied[0].write_text(re.sub(r"<tr><th scope=\"row\">.*?</tr>\n", "", text, count=1, flags=re.S))
    assert any("its rows" in line for line in found(copied))


def test_a_table_that_was_left_out_is_missed(copied):
    text = copied[0].read_text()
    copied[0].write_text(re.sub(r'<table data-table="parity">.*?</table>', "", text, flags=re.S))
    assert any("its tables" in line for line in found(copied))


def test_a_cell_that_leads_to_other_runs_is_named(copied):
    text = copied[0].read_text()
    places = [m.start(1) for m in re.finditer(r'data-runs="(\d+)"', text)]
    changed = text[: places[0]] + "5" + text[places[0] + 1 :]
    copied[0].write_text(changed)
    assert any("its runs" in line for line in found(copied))


def test_hidden_text_is_not_what_a_page_shows(copied):
    """A number that stands beside the right one is seen; a mark that is hidden is none."""
    path, _ = copied
    number = cell_of_the_page(path)
    change(path, f'<span class="lead">{number}</span>', f'<span class="lead">{number}</span> 9')
    assert len(found(copied)) == 1


@pytest.mark.parametrize(
    ("file", "pattern"),
    [("report.md", r"\| (\d+\.\d)x? \["), ("report.tex", r"& (\d+\.\d)x? "),
     ("tables/headline_backend_jax_torch.tex", r"& (\d+\.\d)x? "),
     ("tables/backend_jax_torch.csv", r",(\d+\.\d+),"),
     ("tables/parity.csv", r",(1e-0?6|0\.000001),"),
     ("samples.csv", r",(\d+\.\d+),"), ("records.csv", r",(1700000)")],
)  # fmt: skip
def test_a_changed_number_of_a_file_is_named(copied, file, pattern):
    path = copied[0].parent / file
    text = path.read_text()
    place = re.search(pattern, text)
    path.write_text(text[: place.start(1)] + "7.77" + text[place.end(1) :])
    lines = found(copied)
    assert lines
    assert all(line.startswith(file) for line in lines)
    assert "7.77" in lines[0]


GONE = "says 'nothing: there is no such file'"
FILES = ("report.md", "report.tex", "tables/headline_backend_jax_torch.tex",
         "tables/failures.tex", "tables/parity.csv", "samples.csv",
         "figures/relative_step_time.svg", "figures/relative_step_time.png")  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_gone_is_a_difference(copied, file):
    (copied[0].parent / file).unlink()
    (line,) = found(copied)
    assert line.startswith(file)
    assert GONE in line


def test_a_report_without_its_files_is_none(copied):
    folder = copied[0].parent
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("report.html", "records.parquet"):
            path.unlink()
    lines = found(copied)
    assert {line.split(":")[0].split(",")[0] for line in lines} >= set(FILES)
    assert all(GONE in line for line in lines)


def test_a_figure_that_was_changed_is_a_difference(copied):
    folder = copied[0].parent / "figures"
    change(folder / "relative_step_time.svg", "Hawk", "Hank")
    (folder / "peak_memory.png").write_bytes(b"no figure")
    svg, png = sorted(found(copied), reverse=True)
    assert svg.startswith("figures/relative_step_time.svg, SHA-256")
    assert png.startswith("figures/peak_memory.png, SHA-256")


def test_a_figure_of_the_page_that_was_changed_is_a_difference(copied):
    path, _ = copied
    text = path.read_text()
    start = text.index('<figure id="figure-relative_step_time">')
    place = text.index(">Hawk", text.index("<svg", start))
    path.write_text(text[:place] + ">Hank" + text[place + 5 :])
    (line,) = found(copied)
    assert line.startswith("report.html, figure relative_step_time, SHA-256")


def test_a_figure_of_the_page_that_was_left_out_is_missed(copied):
    text = copied[0].read_text()
    pattern = r'<figure id="figure-peak_memory">.*?</figure>'
    assert re.search(pattern, text, flags=re.S)
    copied[0].write_text(re.sub(pattern, "", text, flags=re.S))
    (line,) = found(copied)
    assert line.startswith("report.html, its figures")


def test_a_changed_sample_is_found_everywhere(copied):
    """In the page, in CSV, against the store, and by the digest in the page."""
    path, _ = copied
    parquet = path.parent / "records.parquet"
    frame = pd.read_parquet(parquet)
    is_it = (frame["suite"] == "training_speed") & (frame["metric"] == "step_time_ms")
    is_it &= (frame["family"] == "hawk") & (frame["round"] == 1) & (frame["seq_len"] == 512)
    frame.loc[is_it, "value"] *= 1.5
    analysis.write_parquet(frame, parquet)
    text = "\n".join(found(copied))
    for words in ("SHA-256 of records.parquet", "report.html, table headline_backend_jax_torch",
                  "report.html, table headline_family_hawk_mqa", "samples.csv, row",
                  "tables/backend_jax_torch.csv, row", "report.md", "report.tex",
                  "records.parquet, run"):  # fmt: skip
        assert words in text, words


def test_one_sample_that_moves_no_median_is_found_too(copied):
    path, _ = copied
    parquet = path.parent / "records.parquet"
    frame = pd.read_parquet(parquet)
    rows = frame[(frame["metric"] == "step_time_ms")]
    largest = rows["value"].idxmax()
    frame.loc[largest, "value"] *= 1.0001
    analysis.write_parquet(frame, parquet)
    lines = found(copied)
    assert any("SHA-256" in line for line in lines)
    assert any(line.startswith("samples.csv") for line in lines)
    assert any("records.parquet, run" in line and "step_time_ms" in line for line in lines)


def test_a_changed_record_of_the_store_is_found(tmp_path):
    store = tmp_path / "store"
    record = synthetic.training("griffin", "jax", 0)
    written = synthetic.write(store, record)
    path = analysis.write_report(store, tmp_path / "report", title="T", command="c")
    values = json.loads(written.read_text())
    values["samples"][0]["value"] += 1
    written.write_text(json.dumps(values))
    (line,) = found((path, store))
    assert record.run_id in line
    written.unlink()
    verdict = verify(path, store)
    assert verdict.differences == []
    assert "1 attempts of the report are no longer in" in verdict.notes[0]


def test_the_store_that_the_page_names_may_be_gone(copied, tmp_path, monkeypatch):
    path, _ = copied
    verdict = verify(path, tmp_path / "nowhere")
    assert verdict.differences == []
    assert "records.parquet is all there is" in verdict.notes[0]


def test_values_are_computed_by_a_second_way(copied, monkeypatch):
    """A mistake of the report's own medians would be made again by computing them again."""
    path, store = copied
    right = comparisons.to_be_read

    def wrong(*args, **rest):
        found = right(*args, **rest)
        return found.assign(value_ours=1.01 * found["value_ours"])

    monkeypatch.setattr(comparisons, "to_be_read", wrong)
    analysis.write_report(store, path.parent, title="T", command="c")
    lines = found((path, store))
    assert lines
    assert all("column value_ours" in line for line in lines)


def test_compressed_samples_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGE", 10)
    store = tmp_path / "store"
    synthetic.write(store, synthetic.training("griffin", "jax", 0))
    path = analysis.write_report(store, tmp_path / "report", title="T", command="c")
    assert found((path, store)) == []
    file = path.parent / "samples.csv.gz"
    text = gzip.decompress(file.read_bytes()).decode()
    file.write_bytes(gzip.compress(text.replace(',3,"s"', ',4,"s"').encode()))
    (line,) = found((path, store))
    assert line.startswith("samples.csv.gz, row")


def test_the_command_fails_on_a_difference_and_names_it(copied, capsys):
    path, store = copied
    assert commands.verify(str(path.parent), store, None) == 0
    out = capsys.readouterr().out
    (last,) = out.splitlines()[-1:]
    assert re.search(r"report.html: verified: [\d,]+ cells of report.html, ", last)
    for words in ("cells of report.md", "cells of report.tex", "cells of tables/*.csv",
                  "files of figures/*.svg", "files of figures/*.png"):  # fmt: skip
        assert re.search(rf"[\d,]+ {re.escape(words)}", last), words
    change(path, f'<span class="lead">{cell_of_the_page(path)}<', '<span class="lead">77.7<')
    assert commands.verify(str(path), store, None) == 1
    out = capsys.readouterr().out
    assert "1 difference in" in out
    assert "says '77.7 [" in out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["--verify", "nothing_here"], "known: "), (["--verify"], "aerie report"),
     (["--verify", "quickstart"], "aerie report quickstart"),
     (["--verify", "a", "b"], "one report"), (["--verify", "--figure", "x"], "--figure")],
)  # fmt: skip
def test_a_report_that_is_not_there_is_one_line(tmp_path, arguments, hint):
    done = subprocess.run(
        [sys.executable, "-m", "suites", "report", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=None,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert hint in done.stderr
