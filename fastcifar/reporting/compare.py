"""Compare two runs, two benchmark files or two prediction files. The content determines the kind of a path."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from pydantic_core import to_jsonable_python
from rich.console import Group

from fastcifar.errors import DataError, UsageError
from fastcifar.evaluation.prediction_files import PredictionComparison, compare_predictions
from fastcifar.files import read_regular_file
from fastcifar.format import (
    KeyValueTable,
    NumericTable,
    format_decimal,
    format_option_value,
    format_percent,
    option_flag,
    whole_line,
)
from fastcifar.recipe import OUTPUT_OPTIONS
from fastcifar.reporting.benchmark_tables import BenchDocument, benchmark_comparison_table, compare_benchmarks
from fastcifar.reporting.records import RECIPE_FILE, RunRecord, read_recipe_options, read_run_record
from fastcifar.training.metrics_file import METRICS_COLUMNS

COMPARED_CURVES = {"train_loss": min, "train_acc": max, "val_loss": min, "val_acc": max, "ema_val_acc": max}
TIMING_COLUMNS = ("images_per_s", "seconds")  # columns that differ between otherwise identical runs
LAUNCH_INFO = ("schema_version", "command", "started", "resumed", "recipe")  # keys of env.json that are not compared
Z_95 = 1.96  # standard errors; the two-sided 95 % quantile of the normal distribution
MAX_LABEL_PAIRS = 15  # maximum number of rows in the table of two prediction files


class AccuracyComparison(TypedDict):
    """The accuracies that two runs measured on `n` images each.

    The binomial `standard_error` of the difference treats the images of the two runs as independent samples. On the
    same images the true error is smaller, so a difference `within_noise` can still be real.
    """

    measured: str
    a: float
    b: float
    difference: float
    n: list[int]
    standard_error: float
    within_noise: bool


class RunComparison(TypedDict):
    """The comparison of two runs, whose folders are `a` and `b`; lists are [value of A, value of B]."""

    a: str
    b: str
    recipe: dict[str, list[Any]]  # options that differ
    environment: dict[str, list[Any]]  # entries that differ
    epochs: list[int]
    equal_epochs: int  # the number of epochs of the shorter run
    curves: dict[str, dict[str, list[float | None]]]  # column -> "final", "best" and "at_equal_epochs"
    first_difference: dict[str, Any] | None  # the first "epoch", counted from 0, and the "columns" that differ in it
    accuracy: AccuracyComparison | None  # on the test set or, if a run was not tested, on the validation split


def read_run(path: Path) -> RunRecord | None:
    """Return the record of a run folder, finished or not; None for other paths. A damaged run raises `DataError`."""
    if not os.path.isfile(path / RECIPE_FILE):
        return None
    read_recipe_options(path)
    record = read_run_record(path)
    if record.state == "damaged":
        raise DataError(f"{path}: {record.reason}", "compare another run")
    return record


def compare_runs(a: RunRecord, b: RunRecord) -> RunComparison:
    """Compare the recipes, environments, curves and accuracies of two runs."""
    epochs = [len(a.metric_rows), len(b.metric_rows)]
    equal_epochs = min(epochs)
    curves: dict[str, dict[str, list[float | None]]] = {}
    for name, min_or_max in COMPARED_CURVES.items():
        values = [[row[name] for row in run.metric_rows] for run in (a, b)]
        curves[name] = {
            "final": [next(reversed(curve), None) for curve in values],
            "best": [min_or_max((value for value in curve if value is not None), default=None) for curve in values],
            "at_equal_epochs": [next(reversed(curve[:equal_epochs]), None) for curve in values],
        }
    columns = [name for name in METRICS_COLUMNS if name not in TIMING_COLUMNS]
    differences = (
        {"epoch": epoch, "columns": differing}
        for epoch, (row_a, row_b) in enumerate(zip(a.metric_rows, b.metric_rows, strict=False))
        if (differing := [name for name in columns if row_a[name] != row_b[name]])
    )
    options = [{name: value for name, value in run.options.items() if name not in OUTPUT_OPTIONS} for run in (a, b)]
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "recipe": _differing_items(*options),
        "environment": _differing_items(_flat_environment(a), _flat_environment(b)),
        "epochs": epochs,
        "equal_epochs": equal_epochs,
        "curves": curves,
        "first_difference": next(differences, None),
        "accuracy": _compare_accuracy(a, b, "test_acc") or _compare_accuracy(a, b, "val_acc"),
    }


def _differing_items(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [a.get(name), b.get(name)] for name in {**a, **b} if a.get(name) != b.get(name)}


def _flat_environment(run: RunRecord) -> dict[str, Any]:
    """Return the environment with dotted names such as `versions.torch`."""
    flat: dict[str, Any] = {}
    for name, value in run.environment.model_dump().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name not in LAUNCH_INFO:
            flat[name] = value
    return flat


def _compare_accuracy(a: RunRecord, b: RunRecord, name: str) -> AccuracyComparison | None:
    """Compare the accuracy `name`, "test_acc" or "val_acc"; return None unless both runs have it."""
    (acc_a, size_a), (acc_b, size_b) = (_final_accuracy(run, name) for run in (a, b))
    if acc_a is None or acc_b is None or not (size_a and size_b):
        return None
    standard_error = math.sqrt(acc_a * (1 - acc_a) / size_a + acc_b * (1 - acc_b) / size_b)
    return {
        "measured": name,
        "a": acc_a,
        "b": acc_b,
        "difference": acc_b - acc_a,
        "n": [size_a, size_b],
        "standard_error": standard_error,
        "within_noise": abs(acc_b - acc_a) <= Z_95 * standard_error,
    }


def _final_accuracy(run: RunRecord, name: str) -> tuple[float | None, int]:
    """Return an accuracy of the summary, or of the last epoch if there is none, and the number of its images."""
    if name == "test_acc":
        return (run.summary.test_acc, run.summary.total or 0) if run.summary else (None, 0)
    accuracies = [run.summary.val_acc] if run.summary else [row["val_acc"] for row in run.metric_rows]
    accuracy = next(reversed(accuracies), None)
    num_images = run.options["val_size"] or (run.summary and run.summary.val_total) or 0
    return (accuracy if accuracy is not None and 0 <= accuracy <= 1 else None), num_images


def run_comparison_table(comparison: RunComparison) -> Group:
    """Return the table of a comparison of two runs."""
    differences = NumericTable(["differs", "A", "B"])
    options = {option_flag(name): values for name, values in comparison["recipe"].items()}
    for name, values in (options | comparison["environment"]).items():
        differences.add_row(name, *map(format_option_value, values))
    after = f"after {comparison['equal_epochs']}"
    curves = NumericTable(["curve"], ["last A", "last B", "best A", "best B", f"A {after}", f"B {after}"])
    for name, curve in comparison["curves"].items():
        values = [*curve["final"], *curve["best"], *curve["at_equal_epochs"]]
        if values != [None] * len(values):
            curves.add_row(name, *(format_decimal(value, 4) for value in values))
    first, accuracy = comparison["first_difference"], comparison["accuracy"]
    curve_note = f"do not differ in the {comparison['equal_epochs']} common epochs"
    if first:
        curve_note = f"first differ in epoch {first['epoch'] + 1}: {', '.join(first['columns'])}"
    accuracy_note = "accuracy: not measured in both runs"
    if accuracy:
        n = " and ".join(f"{size:,}" for size in dict.fromkeys(accuracy["n"]))
        relation = "within" if accuracy["within_noise"] else "beyond"
        noise = f"{relation} the noise of {n} images (95 %: ±{100 * Z_95 * accuracy['standard_error']:.2f})"
        values = f"{format_percent(accuracy['a'])} and {format_percent(accuracy['b'])}"
        difference = f"{100 * accuracy['difference']:+.2f} points from A to B"
        accuracy_note = f"{accuracy['measured']}: {values}, {difference}, {noise}"
    return Group(
        whole_line(f"A: {comparison['a']}"),
        whole_line(f"B: {comparison['b']}"),
        "",
        differences if differences.rows else "the same recipe and environment",
        "",
        curves,
        f"{comparison['epochs'][0]} and {comparison['epochs'][1]} epochs; the curves {curve_note}",
        accuracy_note,
    )


def detect_predictions_file(path: Path) -> Path | None:
    """Return `path` if it is a file that is not JSON, else None; the comparison checks its content."""
    if path.is_dir():
        return None
    try:
        return None if read_regular_file(path).lstrip()[:1] in (b"{", b"[") else path
    except OSError:
        return path


def prediction_comparison_table(result: PredictionComparison) -> Group:
    """Return the table of a comparison of two prediction files."""
    difference = f"{result['differ']:,} of {result['total']:,} labels, {format_percent(result['share'])}"
    summary = KeyValueTable({"a": result["a"], "b": result["b"], "differ": difference})
    if not result["pairs"]:
        return Group(summary)
    pairs = NumericTable(["label in a", "label in b"], ["images"])
    for pair in result["pairs"][:MAX_LABEL_PAIRS]:
        pairs.add_row(pair["a"], pair["b"], f"{pair['count']:,}")
    omitted = len(result["pairs"]) - MAX_LABEL_PAIRS
    return Group(summary, "", pairs, *([f"and {omitted} more pairs (--json lists all)"] if omitted > 0 else []))


class Comparer(NamedTuple):
    """The functions that compare one kind of path."""

    read: Callable[[Path], Any]  # returns None if the path is of another kind
    compare: Callable[[Any, Any], Any]
    build_table: Callable[[Any], Group]


COMPARERS = {
    "run": Comparer(read_run, compare_runs, run_comparison_table),
    "benchmark": Comparer(BenchDocument.read, compare_benchmarks, benchmark_comparison_table),
    "submission": Comparer(detect_predictions_file, compare_predictions, prediction_comparison_table),
}


def compare_paths(a: Path, b: Path) -> tuple[dict[str, Any], Group]:
    """Return the document of `compare --json` and its table. Raises `UsageError` for paths of different kinds."""
    kind, content_a = detect_kind(a)
    other_kind, content_b = detect_kind(b)
    if kind != other_kind:
        raise UsageError(f"{a} is a {kind} and {b} is a {other_kind}", "give two paths of the same kind")
    comparison = COMPARERS[kind].compare(content_a, content_b)
    document = {"kind": kind, "a": str(a), "b": str(b), **to_jsonable_python(comparison)}
    return document, COMPARERS[kind].build_table(comparison)


def detect_kind(path: Path) -> tuple[str, Any]:
    """Return the kind of `path` and its content. Raises `UsageError` if it has none, `DataError` if it is missing."""
    if not path.exists():
        raise DataError(f"{path} does not exist", "check the path")
    for kind, comparer in COMPARERS.items():
        content = comparer.read(path)
        if content is not None:
            return kind, content
    remedy = "give run folders, outputs of `bench --json` or CSV files of `predict`"
    raise UsageError(f"{path} is not a {' or '.join(COMPARERS)}", remedy)
