"""The metrics of a run: one row per epoch in metrics.csv and in events.jsonl, which `run_dir` writes.

Invalid rows and missing files are ignored: a killed process may leave a truncated file.
"""

import csv
import math
import sys
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from fastcifar.files import parse_json_object, read_regular_file


class ValidationMetrics(TypedDict):
    """The columns of `EpochRow` that are measured on the validation split."""

    val_loss: float | None
    val_acc: float | None
    ema_val_acc: float | None


class EpochMetrics(TypedDict):
    """The metrics of an epoch. Accuracies are fractions; validation metrics that were not computed are None."""

    epoch: int  # from 0
    step: int  # steps since the start of the run
    lr: float
    train_loss: float
    train_acc: float
    val_loss: float | None
    val_acc: float | None
    ema_val_acc: float | None


class EpochRow(EpochMetrics):
    """A row of metrics.csv: the metrics of an epoch and its speed."""

    images_per_s: float
    seconds: float  # since the start of the run
    time: NotRequired[float]  # seconds since 1970, in events.jsonl only


METRICS_COLUMNS = tuple(name for name in EpochRow.__annotations__ if name != "time")


def read_metrics(path: Path, limit: float = math.inf) -> list[dict[str, float | None]]:
    """Return the complete rows of a metrics.csv, with every cell parsed by `parse_finite_float`."""
    return [
        {name: parse_finite_float(row[name], limit) for name in METRICS_COLUMNS}
        for row in read_metrics_csv(path, sys.maxsize)
    ]


def read_metrics_csv(path: Path, epochs_done: int) -> list[dict[str, str]]:
    """Return the text of the complete rows of the first `epochs_done` epochs of a metrics.csv."""
    try:
        return [
            {name: row[name] for name in METRICS_COLUMNS}
            for row in csv.DictReader(_read_lines(path))
            if _is_valid_row(row, epochs_done, METRICS_COLUMNS)
        ]
    except csv.Error:
        return []


def read_event_lines(path: Path, epochs_done: int) -> list[str]:
    """Return the complete lines of the first `epochs_done` epochs of an events.jsonl."""
    return [line for line in _read_lines(path) if _is_valid_row(parse_json_object(line), epochs_done, ("epoch",))]


def parse_finite_float(value: Any, limit: float = math.inf) -> float | None:
    """Return a cell of metrics.csv or a JSON value as a float, or None unless its magnitude is below `limit`."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < limit else None


def _read_lines(path: Path) -> list[str]:
    try:
        return read_regular_file(path).decode("utf-8", "replace").replace("\0", "").splitlines()
    except FileNotFoundError:
        return []


def _is_valid_row(row: Any, epochs_done: int, columns: tuple[str, ...]) -> bool:
    try:
        return int(row["epoch"]) < epochs_done and all(row[name] is not None for name in columns)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
