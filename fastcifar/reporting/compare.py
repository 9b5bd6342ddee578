"""`fastcifar compare A B`: compare two runs, two benchmark files or two prediction files.

The kinds are the entries of `COMPARERS`. The kind of a path is detected from its content, never from its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from fastcifar.errors import DataError, UsageError
from fastcifar.evaluation.prediction_files import PredictionComparison, compare_predictions
from fastcifar.format import format_percent, key_value_table
from fastcifar.reporting.benchmark_tables import (
    BenchComparison,
    BenchDocument,
    benchmark_comparison_table,
    compare_benchmarks,
)
from fastcifar.reporting.compare_runs import compare_runs, read_run_document, run_comparison_table

MAX_LABEL_PAIRS = 15  # maximum number of rows in the table of two prediction files


@dataclass(frozen=True)
class Comparer:
    """The functions that compare one kind of path.

    read         path -> its content, or None if the path is of another kind
    compare      two contents -> the document of --json
    build_table  that document -> its table for the terminal
    """

    read: Callable[[Path], Any]
    compare: Callable[[Any, Any], Mapping[str, Any]]
    build_table: Callable[[Any], Group]


def detect_predictions_file(path: Path) -> Path | None:
    """Return `path` if it is a file that is not JSON, else None; the comparison checks its content."""
    if path.is_dir():
        return None
    try:
        return None if path.read_bytes().lstrip()[:1] in (b"{", b"[") else path
    except OSError:
        return path


def prediction_comparison_table(result: PredictionComparison) -> Group:
    """Return the table of a comparison of two prediction files."""
    summary = key_value_table(
        {
            "a": result["a"],
            "b": result["b"],
            "differ": f"{result['differ']:,} of {result['total']:,} labels, {format_percent(result['share'])}",
        }
    )
    if not result["pairs"]:
        return Group(summary)
    pairs = Table("label in a", "label in b", box=None)
    pairs.add_column("images", justify="right")
    for pair in result["pairs"][:MAX_LABEL_PAIRS]:
        pairs.add_row(pair["a"], pair["b"], f"{pair['count']:,}")
    omitted = len(result["pairs"]) - MAX_LABEL_PAIRS
    return Group(summary, "", pairs, *([f"and {omitted} more pairs (--json lists all)"] if omitted > 0 else []))


COMPARERS: dict[str, Comparer] = {
    "run": Comparer(read_run_document, compare_runs, run_comparison_table),
    "benchmark": Comparer(
        BenchDocument.read,
        lambda a, b: compare_benchmarks(a, b).model_dump(mode="json"),
        lambda result: benchmark_comparison_table(BenchComparison.model_validate(result)),
    ),
    "submission": Comparer(detect_predictions_file, compare_predictions, prediction_comparison_table),
}


def compare_paths(a: Path, b: Path) -> dict[str, Any]:
    """Return `{"kind", "a", "b"}` and the result of the comparer of that kind.

    Raises `UsageError` if the kinds differ, and the errors of `detect_kind` and of the comparer.
    """
    kind, content_a = detect_kind(a)
    other_kind, content_b = detect_kind(b)
    if kind != other_kind:
        raise UsageError(f"{a} is a {kind} and {b} is a {other_kind}", "give two paths of the same kind")
    return {"kind": kind, "a": str(a), "b": str(b), **COMPARERS[kind].compare(content_a, content_b)}


def detect_kind(path: Path) -> tuple[str, Any]:
    """Return the kind of `path` and its content.

    Raises `DataError` if `path` does not exist, and `UsageError` if it is of no kind in `COMPARERS`.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist", "check the path")
    for kind, comparer in COMPARERS.items():
        content = comparer.read(path)
        if content is not None:
            return kind, content
    raise UsageError(
        f"{path} is not a {' or '.join(COMPARERS)}",
        "give run folders, outputs of `bench --json` or CSV files of `predict`",
    )
