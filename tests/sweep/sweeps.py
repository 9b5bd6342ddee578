"""Helpers of the sweep tests: a sweep file of tiny trials, and the contents of a sweep folder."""

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


def write_sweep_file(folder: Path, axes: str = GRID, epochs: int = 2) -> str:
    """Write a sweep file, by default of six trials, and return its path."""
    path = folder / "tiny.toml"
    path.write_text(TINY.format(epochs=epochs) + axes)
    return str(path)


def read_log_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of trials.jsonl, without an incomplete last line."""
    path = folder / "trials.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def trial_states(folder: Path) -> dict[str, str]:
    """Return the last state of each trial."""
    return {line["trial"]: line["state"] for line in read_log_lines(folder)}


def trial_accuracies(folder: Path) -> dict[str, tuple[float, float]]:
    """Return validation and test accuracy of each trial that is done."""
    done = [line for line in read_log_lines(folder) if line["state"] == "done"]
    summaries = {line["trial"]: json.loads((folder / line["run"] / "summary.json").read_text()) for line in done}
    return {trial: (summary["val_acc"], summary["test_acc"]) for trial, summary in summaries.items()}


def assert_equal_sweeps(first: Path, second: Path) -> None:
    """Assert that both sweeps have the same trials, that all are done, and that their runs are bit-identical."""
    assert trial_states(first) == trial_states(second)
    assert set(trial_states(first).values()) == {"done"}
    assert trial_accuracies(first) == trial_accuracies(second)
    for trial in trial_states(first):
        assert_equal_runs(first / "runs" / trial, second / "runs" / trial)
