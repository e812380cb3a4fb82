"""From record files to the frame: what a row holds, and an index that is never wrong."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from synthetic_records import modeling, parity, record, sample, training

import analysis
from analysis import index, load
from suites.harness.record import write

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path):
    """Six runs; one has two attempts, one has no sample."""
    for family in ("mqa", "griffin"):
        write(tmp_path, training(family, "jax", 0))
        write(tmp_path, parity(family, "jax"))
    write(tmp_path, modeling("griffin", "jax"))
    lost = record("training_speed", "hawk", outcome="timed_out", reason="60 s", seq_len=512)
    write(tmp_path, lost)
    write(tmp_path, training("mqa", "jax", 0, attempt="20251231T000000", outcome="preempted"))
    return tmp_path


@pytest.fixture
def were_read(monkeypatch):
    """The names of record files that were opened."""
    names, read = [], index._record

    def noted(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(index, "_record", noted)
    return names


def rebuilt(store) -> pd.DataFrame:
    (store / "index.parquet").unlink()
    return analysis.load(store)


# what a row holds


def test_frame_has_a_row_a_sample_and_one_row_for_a_record_without(tmp_path):
    done = training("griffin", "jax", 0)
    lost = record("training_speed", "mqa", outcome="timed_out", reason="60 s", seq_len=512)
    for one in (done, lost):
        write(tmp_path, one)
    frame = analysis.load(tmp_path)
    assert len(frame) == len(done.samples) + 1
    row = frame[frame["outcome"] == "timed_out"].iloc[0]
    assert pd.isna(row["metric"])
    assert pd.isna(row["value"])
    assert (row["reason"], row["phase"], row["seq_len"]) == ("60 s", "measure", 512)
    assert pd.isna(row["prompt_len"])  # this workload has none: null, not 0
    row = frame[frame["outcome"] == "completed"].iloc[0]
    assert (row["linear_scan"], row["attention"], row["node"]) == ("analytic", "plain", "node1")
    assert row["num_params_non_embedding"] == 280_000


def test_every_sample_stands_beside_its_own_record(store):
    frame = analysis.load(store)
    for path in (store / "runs").glob("*/*.json"):
        want = json.loads(path.read_text())
        rows = frame[frame["attempt"] == want["attempt"]]
        assert set(rows["run_id"]) == {want["run_id"]}
        assert set(load.words(rows)["reason"]) == {want["reason"]}
        found = load.words(rows)[["metric", "value", "unit", "repeat", "at", "field"]]
        found = found.astype(object).where(found.notna(), None)
        samples = [tuple(one.values()) for one in want["samples"]]
        assert list(found.itertuples(index=False, name=None)) == (samples or [(None,) * 6])


def test_records_may_be_left_out_before_they_meet_their_samples(store):
    whole = analysis.load(store)
    records, samples = load.read(store)
    for suite in whole["suite"].unique():
        left = load.tidy(records[records["suite"] != suite], samples)
        want = whole[whole["suite"] != suite].reset_index(drop=True)
        pd.testing.assert_frame_equal(left, want)


def test_a_row_holds_numbers_and_no_words(store):
    """At 100,000 records a column of words would take 8 bytes a row, and each its own text."""
    for frame in (analysis.load(store), load.frame_of([training("griffin", "jax", 0)])):
        for name, kind in load.COLUMNS.items():
            dtype = frame[name].dtype
            if kind != "str":
                assert dtype in ("Int64", "Int32", "float64", "boolean"), name
                continue
            assert isinstance(dtype, pd.CategoricalDtype), name
            assert frame[name].cat.codes.dtype == "int8", name
            words = frame[name].cat.categories.tolist()
            assert words == sorted(set(frame[name].dropna())), name  # in order, and all are used


def test_words_stand_again_for_their_categories(store):
    frame = analysis.load(store)
    words = load.words(frame)
    assert words["op"].tolist() == [None] * len(frame)
    for name in load.COLUMNS:
        assert not isinstance(words[name].dtype, pd.CategoricalDtype)
        assert (words[name].isna() == frame[name].isna()).all()
        known = frame[name].notna()
        assert words[name][known].tolist() == frame[name][known].tolist()


def test_frame_comes_back_from_parquet(store, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "PART", 7)
    frame = analysis.load(store)
    path = analysis.write_parquet(frame, tmp_path / "a" / "frame.parquet")
    pd.testing.assert_frame_equal(load.read_parquet(path), frame)
    of_pandas = pd.read_parquet(path)
    assert list(of_pandas.columns) == list(frame.columns)
    assert of_pandas["value"].sum() == pytest.approx(frame["value"].sum())


def test_flops_that_no_float_holds_exactly_are_kept_as_near_as_can_be():
    flops = 2**60 + 1
    frame = load.frame_of([record(costs={"train_flops_per_token": flops})])
    assert frame["train_flops_per_token"].tolist() == [2.0**60]


# the index


def test_the_index_is_read_rather_than_the_records(store, were_read):
    first = analysis.load(store)
    assert len(were_read) == 7
    were_read.clear()
    pd.testing.assert_frame_equal(analysis.load(store), first)
    assert were_read == []


def test_a_new_record_is_read_alone(store, were_read):
    analysis.load(store)
    were_read.clear()
    path = write(store, training("griffin", "torch", 1))
    later = write(store, training("mqa", "jax", 0, attempt="20991231T000000"))
    frame = analysis.load(store)
    assert sorted(were_read) == sorted([path.name, later.name])
    assert frame.loc[frame["is_counted"], "attempt"].isin([later.stem]).any()
    pd.testing.assert_frame_equal(frame, rebuilt(store))


def test_an_index_that_lacks_little_is_not_written_anew(store, were_read, monkeypatch):
    monkeypatch.setattr(index, "MOST_UNKNOWN", 0.15)  # of seven: one record
    analysis.load(store)
    before = (store / "index.parquet").read_bytes()
    write(store, training("griffin", "torch", 1))
    for _ in range(2):
        were_read.clear()
        analysis.load(store)
        assert len(were_read) == 1
        assert (store / "index.parquet").read_bytes() == before
    write(store, training("griffin", "torch", 2))
    frame = analysis.load(store)
    assert (store / "index.parquet").read_bytes() != before
    pd.testing.assert_frame_equal(frame, rebuilt(store))


def test_a_deleted_record_is_gone(store, were_read):
    analysis.load(store)
    were_read.clear()
    gone = next((store / "runs").glob("*/20251231T000000.json"))
    gone.unlink()
    shutil.rmtree(next((store / "runs").glob("*-0-0")))
    frame = analysis.load(store)
    assert were_read == []
    assert frame["attempt"].nunique() == 5
    assert "preempted" not in frame["outcome"].cat.categories
    pd.testing.assert_frame_equal(frame, rebuilt(store))


def test_a_replaced_record_is_read_again(store, were_read):
    analysis.load(store)
    were_read.clear()
    lost = record("training_speed", "hawk", outcome="failed", reason="no room", seq_len=512,
                  samples=(sample("init_time_s", 0.5),))  # fmt: skip
    write(store, lost)
    frame = analysis.load(store)
    assert were_read == [f"{lost.attempt}.json"]
    assert frame.loc[frame["family"] == "hawk", "reason"].tolist() == ["no room"]
    pd.testing.assert_frame_equal(frame, rebuilt(store))


def test_a_damaged_index_is_none(store, were_read):
    want = analysis.load(store)
    path = store / "index.parquet"
    whole = path.read_bytes()
    middle = whole.index(b"timed_out")  # in a page: its checksum is wrong then
    for damaged in (
        b"not parquet",
        b"",
        whole[: len(whole) // 2],
        whole[:middle] + b"completed" + whole[middle + 9 :],
        whole[:-20] + b"\xff" * 12 + whole[-8:],
    ):
        path.write_bytes(damaged)
        were_read.clear()
        pd.testing.assert_frame_equal(analysis.load(store), want)
        assert len(were_read) == 7
        assert path.read_bytes() == whole  # renewed, and alike each time


def test_an_index_of_other_columns_is_none(store, were_read, monkeypatch):
    want = analysis.load(store)
    were_read.clear()
    monkeypatch.setattr(load, "FRAME_SCHEMA", -1)
    pd.testing.assert_frame_equal(analysis.load(store), want)
    assert len(were_read) == 7


def test_a_writer_that_comes_late_loses_nothing(store, monkeypatch):
    """Another process adds a record and renews the index while this one is about to."""
    write_index, late = index._write, []

    def overtaken(*args):
        if not late:
            late.append(write(store, training("griffin", "torch", 1)))
            late.append(analysis.load(store))
        write_index(*args)

    monkeypatch.setattr(index, "_write", overtaken)
    before = analysis.load(store)
    assert before["attempt"].nunique() == 7
    assert late[1]["attempt"].nunique() == 8
    pd.testing.assert_frame_equal(analysis.load(store), late[1])


def test_many_may_renew_the_index_at_once(store):
    with ThreadPoolExecutor(4) as pool:
        frames = list(pool.map(analysis.load, [store] * 8))
    for frame in frames:
        pd.testing.assert_frame_equal(frame, frames[0])
    assert [path.name for path in store.glob(".*")] == []


def test_a_store_that_cannot_be_written_is_read(store):
    (store / "index.parquet" / "in the way").mkdir(parents=True)
    assert analysis.load(store)["attempt"].nunique() == 7
    assert [path.name for path in store.glob(".*")] == []


def test_many_records_are_read_by_several_processes(store):
    """In a process of its own: threads that another test has started would not outlive a fork."""
    want = analysis.load(store)
    (store / "index.parquet").unlink()
    code = (
        "import os, sys, analysis; from analysis import index; index.CHUNK, index.MANY = 2, 3;"
        "own, read = os.getpid(), index._record;"
        "index._record = lambda path: read(path) if os.getpid() != own else 1 / 0;"
        "analysis.load(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, store], cwd=ROOT, check=True)
    assert (store / "index.parquet").exists()
    pd.testing.assert_frame_equal(analysis.load(store), want)


def test_what_is_no_record_is_named(store):
    path = store / "runs" / "x" / "1.json"
    path.parent.mkdir()
    for text in ("{", "[]", '{"samples": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x/1\.json is no record"):
            analysis.load(store)
    path.with_name(".tmp-1.json").write_text("{")
    path.with_name("notes.txt").write_text("{")
    path.unlink()
    assert analysis.load(store)["attempt"].nunique() == 7


@pytest.mark.slow
def test_a_store_of_thousands_has_the_same_report_with_and_without_its_index(tmp_path):
    code = [sys.executable, "benchmarks/report_scale.py", "--records", "2000", "--json"]
    done = subprocess.run([*code, "--out", tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["unchanged"]["value"] == 0
    assert rows["unchanged"]["facts"]["tables"] > 5
    assert rows["read"]["facts"]["rows"] == rows["load"]["facts"]["rows"] > 50_000
    assert rows["new"]["facts"]["rows"] == rows["load"]["facts"]["rows"]
