"""Test prediction files with independent readers, and their comparison with a result computed by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fastcifar.errors import DataError, DiskError, UsageError
from fastcifar.evaluation.prediction_files import (
    PredictionFormat,
    compare_predictions,
    read_predictions,
    write_predictions,
)
from fastcifar.reporting.compare import prediction_comparison_table

CLASSES = ["airplane", "cat", "dog, small"]
PROBABILITIES = np.array([[0.2, 0.5, 0.3], [0.1234567, 0.0, 0.8765433]])


def test_fault43_fault31_ids_are_neutralized_and_written_in_every_format(tmp_path: Path) -> None:
    ids = ["=1+1", "+a", "-b", "@c", "\t=d", "a\nb", "caf\udce9", "~", "plain", "x" * 500]
    columns = {"ID": ids, "=x": [-1.5, *range(9)]}
    write_predictions(tmp_path / "a.csv", columns)
    write_predictions(tmp_path / "a.jsonl", columns)
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["ID", "'=x"]
    assert [row[0] for row in rows] == [
        "'=1+1", "'+a", "'-b", "'@c", "'\t=d", "a\nb", r"caf\udce9", "~", "plain", "x" * 500
    ]  # fmt: skip
    assert rows[0][1] == "-1.5"
    assert list(read_predictions(tmp_path / "a.csv")) == [row[0] for row in rows]
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["ID"] for line in lines] == ids


def test_columns() -> None:
    assert PredictionFormat().build_columns([9, 4], PROBABILITIES, CLASSES) == {"ID": [9, 4], "Labels": [1, 2]}
    all_columns = PredictionFormat(use_class_names=True, top_k=2, with_probabilities=True)
    assert all_columns.build_columns([9, 4], PROBABILITIES, CLASSES) == {
        "ID": [9, 4],
        "Labels": ["cat", "dog, small"],
        "top_1": ["cat", "dog, small"],
        "top_1_probability": [0.5, 0.876543],
        "top_2": ["dog, small", "airplane"],
        "top_2_probability": [0.3, 0.123457],
        "airplane": [0.2, 0.123457],
        "cat": [0.5, 0.0],
        "dog, small": [0.3, 0.876543],
    }
    renamed = PredictionFormat("id,label", top_k=1).build_columns([9, 4], PROBABILITIES, CLASSES)
    assert list(renamed)[:3] == ["id", "label", "top_1"]


def test_csv_and_jsonl_round_trip(tmp_path: Path) -> None:
    columns = PredictionFormat(None, True, 0, True).build_columns([9, 4], PROBABILITIES, CLASSES)
    for suffix in (".csv", ".jsonl"):
        write_predictions(tmp_path / f"a{suffix}", columns)
    assert (tmp_path / "a.csv").read_text().startswith("ID,Labels,airplane,")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        expected = {name: values[index] for name, values in columns.items()}
        assert line == expected
        assert row == {name: str(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("out", "format", "message"),
    [
        ("a.txt", PredictionFormat(), r"ends in one of \.csv, \.jsonl"),
        ("a.jsonl", PredictionFormat("a,b"), r"only to \.csv files"),
        *(("a.csv", PredictionFormat(header), "two different columns") for header in ("id", "a,b,c", "a,a", "")),
        ("a.csv", PredictionFormat("id,cat", with_probabilities=True), "2 columns would be named 'cat'"),
        ("a.csv", PredictionFormat("top_1,label", top_k=1), "2 columns would be named 'top_1'"),
        ("a.csv", PredictionFormat(top_k=4), "choose 0 to 3"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, out: str, format: PredictionFormat, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        format.check(tmp_path / out, CLASSES)


def test_unwritable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiskError):
        PredictionFormat().check(tmp_path / "missing" / "a.csv", CLASSES)
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(DiskError):
        write_predictions(tmp_path / "a.csv", {"ID": [1]})
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_compare_predictions(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ID,Labels\n1,3\n2,5\n3,3\n4,0\n5,3\n")
    (tmp_path / "b.csv").write_text("id,label,sure\r\n5,5,0.4\r\n4,0,0.9\r\n3,5,0.7\r\n2,3,0.6\r\n1,3,0.5\r\n")
    comparison = compare_predictions(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (comparison["differ"], comparison["total"], comparison["share"]) == (3, 5, 0.6)
    assert comparison["pairs"] == [{"a": "3", "b": "5", "count": 2}, {"a": "5", "b": "3", "count": 1}]
    assert prediction_comparison_table(comparison)
    assert compare_predictions(tmp_path / "a.csv", tmp_path / "a.csv")["differ"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ID,Labels\n1,3\n2,5\n2,5\n", "line 4: the id '2' occurs twice"),
        ("ID,Labels\n1,3\n", "1 ids only in"),
        ("ID,Labels\n1,cat\n2,dog\n", "contains class names"),
        ("ID,Labels\n1,3\n2\n", "expected an id and a label"),
        ("ID,Labels\n", "contains no predictions"),
        ("", "contains no predictions"),
    ],
)
def test_fault13_incomparable_prediction_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text("ID,Labels\n1,3\n2,5\n")
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        compare_predictions(tmp_path / "a.csv", tmp_path / "b.csv")
    assert caught.value.exit_code == 3
    with pytest.raises(DataError):
        read_predictions(tmp_path / "missing.csv")
