"""Comparison of run folders, ignoring times and other values that differ between equal runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcifar.training import checkpoint

TIMES = ("images_per_s", "seconds")  # of metrics.csv and summary.json
RUN_SPECIFIC = ("run", "config", "peak_memory_bytes", *TIMES)  # of summary.json


def rows(folder: Path | str) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without the times; check that the epochs are consecutive."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        csv_rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in csv_rows] == [str(epoch) for epoch in range(len(csv_rows))]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in csv_rows]


def events(folder: Path | str) -> list[dict[str, Any]]:
    """Return the rows of events.jsonl without the times."""
    lines = (Path(folder) / "events.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in (*TIMES, "time")} for line in lines]


def summary(folder: Path | str) -> dict[str, Any]:
    """Return summary.json without the values that differ between equal runs."""
    content = json.loads((Path(folder) / "summary.json").read_text())
    return {name: value for name, value in content.items() if name not in RUN_SPECIFIC}


def last(folder: Path | str) -> dict[str, Any]:
    """Return the checkpoint last.pt of a run."""
    return dict(checkpoint.load_checkpoint(Path(folder) / "checkpoints" / "last.pt"))


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the contents of all files in `folder`."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_equal_runs(folder: Path | str, expected_folder: Path | str) -> None:
    """Assert that two runs have the same rows and summary and a bit-identical final training state."""
    assert rows(folder) == rows(expected_folder)
    assert events(folder) == events(expected_folder)
    assert summary(folder) == summary(expected_folder)
    checkpoints = last(folder), last(expected_folder)
    for state in checkpoints:
        del state["clock"], state["recipe"]
    assert_same(*checkpoints, "checkpoint")


def assert_same(value: Any, expected: Any, where: str) -> None:
    """Assert that nested containers of tensors and values are bit-identical; `where` names them in the message."""
    assert type(value) is type(expected), where
    if isinstance(value, Tensor):
        assert torch.equal(value, expected), where
    elif isinstance(value, dict):
        assert value.keys() == expected.keys(), where
        for key in value:
            assert_same(value[key], expected[key], f"{where}.{key}")
    elif isinstance(value, list | tuple):
        assert len(value) == len(expected), where
        for index, pair in enumerate(zip(value, expected, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert value == expected, where
