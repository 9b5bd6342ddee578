"""Reading the metrics of a run: one row per epoch in metrics.csv and in events.jsonl, which `run_dir` writes.

Invalid rows are ignored, because a killed process may leave a truncated file.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from fastcifar.files import parse_json_object

METRICS_COLUMNS: tuple[str, ...] = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_acc",
    "val_loss",
    "val_acc",
    "ema_val_acc",
    "images_per_s",
    "seconds",
)

EpochRow = dict[str, Any]


def read_metrics_csv(path: Path, epochs_done: int) -> list[EpochRow]:
    """Return the complete rows of the first `epochs_done` epochs of a metrics.csv; empty if there is no file."""
    try:
        return [
            {name: row[name] for name in METRICS_COLUMNS}
            for row in csv.DictReader(_read_lines(path))
            if _is_valid_row(row, epochs_done, METRICS_COLUMNS)
        ]
    except csv.Error:
        return []


def read_event_lines(path: Path, epochs_done: int) -> list[str]:
    """Return the complete lines of the first `epochs_done` epochs of an events.jsonl; empty if there is no file."""
    return [line for line in _read_lines(path) if _is_valid_row(parse_json_object(line), epochs_done, ("epoch",))]


def parse_finite_float(value: Any, limit: float = math.inf) -> float | None:
    """Return a cell of metrics.csv or a value of a JSON document as a float.

    Return None for NaN, infinity, values that are not numbers, and absolute values that are not below `limit`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < limit else None


def _read_lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "replace").replace("\0", "").splitlines() if path.exists() else []


def _is_valid_row(row: Any, epochs_done: int, columns: tuple[str, ...]) -> bool:
    try:
        return int(row["epoch"]) < epochs_done and all(row[name] is not None for name in columns)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
