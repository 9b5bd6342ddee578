"""Two runs side by side: what must be equal of them, and what is only time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcifar.training import checkpoint

TIMES = ("images_per_s", "seconds")  # of metrics.csv and summary.json
OWN = ("run", "config", "peak_memory_bytes", *TIMES)  # of summary.json


def rows(folder: Path | str) -> list[dict[str, str]]:
    """The rows of metrics.csv without the times; each of the columns is there, and no header twice."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["epoch"] for row in found] == [str(epoch) for epoch in range(len(found))]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def events(folder: Path | str) -> list[dict[str, Any]]:
    """The rows of events.jsonl without the times."""
    lines = (Path(folder) / "events.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in (*TIMES, "time")} for line in lines]


def summary(folder: Path | str) -> dict[str, Any]:
    found = json.loads((Path(folder) / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in OWN}


def last(folder: Path | str) -> dict[str, Any]:
    return checkpoint.load_checkpoint(Path(folder) / "checkpoints" / "last.pt")


def assert_equal_runs(mine: Path | str, other: Path | str) -> None:
    """The same rows, summary and final state to the last bit: weights, average, optimizer, counters, random state."""
    assert rows(mine) == rows(other)
    assert events(mine) == events(other)
    assert summary(mine) == summary(other)
    first, second = last(mine), last(other)
    for state in (first, second):
        del state["clock"], state["recipe"]
    assert_same(first, second, "checkpoint")


def assert_same(mine: Any, other: Any, where: str) -> None:
    assert type(mine) is type(other), where
    if isinstance(mine, Tensor):
        assert torch.equal(mine, other), where
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys(), where
        for key in mine:
            assert_same(mine[key], other[key], f"{where}.{key}")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(other), where
        for index, pair in enumerate(zip(mine, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert mine == other, where
