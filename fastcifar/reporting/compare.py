"""`fastcifar compare A B`: two runs, or two files of one kind, compared as that kind is. A kind is a row of COMPARERS.

The kind is told from what is there, never from its name. Nothing here measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from fastcifar.errors import DataError, UsageError
from fastcifar.evaluation import prediction_files
from fastcifar.format import format_percent, key_value_table
from fastcifar.reporting.benchmark_tables import benchmark_comparison_table, compare_benchmarks, parse_benchmark
from fastcifar.reporting.compare_runs import compare_runs, read_run_document, run_comparison_table

MAX_LABEL_PAIRS = 15  # rows of the table of two prediction files


@dataclass(frozen=True)
class Comparer:
    """How one kind is compared.

    read     a path -> its content, or None if it is not of this kind
    compare  two contents -> the document of --json
    table    that document -> what a person sees
    """

    read: Callable[[Path], Any]
    compare: Callable[[Any, Any], dict[str, Any]]
    build_table: Callable[[dict[str, Any]], Group]


def read_benchmark_file(path: Path) -> dict[str, Any] | None:
    """The document of a file that `bench --json` was written to."""
    try:
        return parse_benchmark(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def detect_predictions_file(path: Path) -> Path | None:
    """The path of a file that is no JSON: what it is instead, its comparison says."""
    if path.is_dir():
        return None
    try:
        return None if path.read_bytes().lstrip()[:1] in (b"{", b"[") else path
    except OSError:
        return path


def prediction_comparison_table(result: dict[str, Any]) -> Group:
    """What `fastcifar compare` found of two submissions."""
    summary = key_value_table(
        "",
        {
            "a": result["a"],
            "b": result["b"],
            "differ": f"{result['differ']:,} of {result['total']:,} labels, {format_percent(result['share'])}",
        },
    )
    if not result["pairs"]:
        return Group(summary)
    pairs = Table("label in a", "label in b", box=None)
    pairs.add_column("images", justify="right")
    for pair in result["pairs"][:MAX_LABEL_PAIRS]:
        pairs.add_row(pair["a"], pair["b"], f"{pair['count']:,}")
    left = len(result["pairs"]) - MAX_LABEL_PAIRS
    return Group(summary, "", pairs, *([f"and {left} more pairs (--json has all)"] if left > 0 else []))


COMPARERS: dict[str, Comparer] = {
    "run": Comparer(read_run_document, compare_runs, run_comparison_table),
    "benchmark": Comparer(read_benchmark_file, compare_benchmarks, benchmark_comparison_table),
    "submission": Comparer(detect_predictions_file, prediction_files.compare_predictions, prediction_comparison_table),
}


def compare_paths(a: Path, b: Path) -> dict[str, Any]:
    """`{"kind", "a", "b"}` and what the kind's comparer found.

    Errors: `UsageError` unless both are of one kind, and the kind's own.
    """
    found = [detect_kind(path) for path in (a, b)]
    (kind, mine), (other_kind, other) = found
    if kind != other_kind:
        raise UsageError(f"{a} is a {kind} and {b} is a {other_kind}", "give two of one kind")
    return {"kind": kind, "a": str(a), "b": str(b), **COMPARERS[kind].compare(mine, other)}


def detect_kind(path: Path) -> tuple[str, Any]:
    """The kind of `path` and its content. Errors: `DataError` for what is not there, `UsageError` for no kind."""
    if not path.exists():
        raise DataError(f"there is no {path}", "check the path")
    for kind, comparer in COMPARERS.items():
        content = comparer.read(path)
        if content is not None:
            return kind, content
    raise UsageError(
        f"{path} is no {' or '.join(COMPARERS)}", "give run folders, what `bench --json` printed, or CSVs of `predict`"
    )
