"""What the tests of sweeps share: a file of tiny trials, and what a sweep's folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.runs import assert_equal_runs

TINY = """
seeds = 2
[base]
arch = "resnet"
blocks = [1, 1]
channels = [8, 16]
data = "synthetic:200"
augment = "crop:4:zero,flip"
val_size = 40
epochs = {epochs}
batch_size = 32
device = "cpu"
precision = "fp32"
compile = false
"""
GRID = "[grid]\nlr = [0.1, 0.02, 0.005]\n"


def file(folder: Path, more: str = GRID, epochs: int = 2) -> str:
    """A sweep file of six trials, or of others."""
    path = folder / "tiny.toml"
    path.write_text(TINY.format(epochs=epochs) + more)
    return str(path)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of trials.jsonl; one that is being written does not count yet."""
    path = folder / "trials.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def states(folder: Path) -> dict[str, str]:
    """trial -> its state, as its last line has it."""
    return {line["trial"]: line["state"] for line in lines(folder)}


def table(folder: Path) -> dict[str, tuple[float, float]]:
    """trial -> validation and test accuracy of those that are done."""
    done = [line for line in lines(folder) if line["state"] == "done"]
    found = {line["trial"]: json.loads((folder / line["run"] / "summary.json").read_text()) for line in done}
    return {trial: (summary["val_acc"], summary["test_acc"]) for trial, summary in found.items()}


def assert_equal_sweeps(mine: Path, other: Path) -> None:
    """The same trials, every one done, and every pair of runs equal to the last bit."""
    assert states(mine) == states(other)
    assert set(states(mine).values()) == {"done"}
    assert table(mine) == table(other)
    for trial in states(mine):
        assert_equal_runs(mine / "runs" / trial, other / "runs" / trial)
