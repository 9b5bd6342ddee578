"""`fastcifar compare RUN RUN`: compare the recipes, environments, curves and accuracies of two runs.

The run folders can be finished or not; a missing value is None. Checkpoints are not read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from fastcifar.errors import DataError
from fastcifar.format import format_decimal, format_option_value, format_percent, option_flag
from fastcifar.recipe import OUTPUT_OPTIONS, Recipe
from fastcifar.recipes import load_saved_recipe
from fastcifar.training.metrics_file import METRICS_COLUMNS, read_metrics
from fastcifar.training.run_dir import read_environment
from fastcifar.training.summary import read_summary

COMPARED_CURVES = {"train_loss": min, "train_acc": max, "val_loss": min, "val_acc": max, "ema_val_acc": max}
TIMING_COLUMNS = ("images_per_s", "seconds")  # columns that differ between otherwise identical runs
Z_95 = 1.96  # standard errors; the two-sided 95 % quantile of the normal distribution

JsonDocument = dict[str, Any]
MetricValues = list[float | None]


def read_run_document(path: Path) -> JsonDocument | None:
    """Return the options, environment, curves (column -> one value per epoch) and summary of a run folder.

    Returns None if `path` is not a run folder. Raises `DataError` if its summary is damaged, and `UsageError` if its
    recipe is invalid.
    """
    if not (path / "recipe.toml").is_file():
        return None
    options = Recipe.from_saved(load_saved_recipe(path)).model_dump(mode="json")
    rows = read_metrics(path / "metrics.csv")
    summary = read_summary(path)
    if not summary and (path / "summary.json").exists():
        raise DataError(f"{path / 'summary.json'} cannot be read", "compare another run")
    curves = {name: [row[name] for row in rows] for name in METRICS_COLUMNS}
    return {"options": options, "environment": _read_flat_environment(path), "curves": curves, "summary": summary}


def compare_runs(a: JsonDocument, b: JsonDocument) -> JsonDocument:
    """Compare two documents of `read_run_document`; values are pairs [of a, of b].

    recipe, environment  the options and environment entries that differ
    epochs               the number of epochs of each run; `equal_epochs`: the smaller of the two
    curves               for each column `final`, `best` and `at_equal_epochs` (after `equal_epochs` epochs)
    first_difference     the first epoch, from 0, whose metrics differ, and the columns that differ; None if none do
    accuracy             see `_compare_accuracy`
    """
    curves_a, curves_b = a["curves"], b["curves"]
    equal_epochs = min(len(curves_a["epoch"]), len(curves_b["epoch"]))
    return {
        "recipe": _differing_items(a["options"], b["options"], OUTPUT_OPTIONS),
        "environment": _differing_items(a["environment"], b["environment"]),
        "epochs": [len(curves_a["epoch"]), len(curves_b["epoch"])],
        "equal_epochs": equal_epochs,
        "curves": {
            name: {
                "final": [_last_value(curve) for curve in (curves_a[name], curves_b[name])],
                "best": [
                    min_or_max((value for value in curve if value is not None), default=None)
                    for curve in (curves_a[name], curves_b[name])
                ],
                "at_equal_epochs": [_last_value(curve[:equal_epochs]) for curve in (curves_a[name], curves_b[name])],
            }
            for name, min_or_max in COMPARED_CURVES.items()
        },
        "first_difference": _first_differing_epoch(curves_a, curves_b, equal_epochs),
        "accuracy": _compare_accuracy(a, b),
    }


def _differing_items(a: JsonDocument, b: JsonDocument, exclude: tuple[str, ...] = ()) -> JsonDocument:
    names = [name for name in {**a, **b} if name not in exclude and a.get(name) != b.get(name)]
    return {name: [a.get(name), b.get(name)] for name in names}


def _first_differing_epoch(a: dict[str, MetricValues], b: dict[str, MetricValues], epochs: int) -> JsonDocument | None:
    columns = [name for name in METRICS_COLUMNS if name not in TIMING_COLUMNS]
    for epoch in range(epochs):
        differing = [name for name in columns if a[name][epoch] != b[name][epoch]]
        if differing:
            return {"epoch": epoch, "columns": differing}
    return None


def _compare_accuracy(a: JsonDocument, b: JsonDocument) -> JsonDocument | None:
    """Compare the accuracies on the test set or, if one of the runs was not tested, on the validation split.

    The binomial `standard_error` of the difference treats the images of the two runs as independent samples. On the
    same images the true error is smaller, so a difference `within_noise` can still be real. Returns None if neither
    accuracy is available for both runs.
    """
    for name in ("test_acc", "val_acc"):
        accuracies = [_final_accuracy(run, name) for run in (a, b)]
        sizes = [_split_size(run, name) for run in (a, b)]
        if all(accuracy is not None and 0 <= accuracy <= 1 for accuracy in accuracies) and all(sizes):
            acc_a, acc_b = (float(accuracy or 0) for accuracy in accuracies)
            standard_error = math.sqrt(sum(p * (1 - p) / n for p, n in zip((acc_a, acc_b), sizes, strict=True)))
            return {
                "measured": name,
                "a": acc_a,
                "b": acc_b,
                "difference": acc_b - acc_a,
                "n": sizes,
                "standard_error": standard_error,
                "within_noise": abs(acc_b - acc_a) <= Z_95 * standard_error,
            }
    return None


def _final_accuracy(run: JsonDocument, name: str) -> float | None:
    """Return `test_acc` or `val_acc` of the summary; without a summary, the last value in metrics.csv."""
    return getattr(run["summary"], name) if run["summary"] else _last_value(run["curves"].get(name, []))


def _split_size(run: JsonDocument, name: str) -> int:
    """Return the number of images of the split that the accuracy `name` was measured on; 0 if unknown."""
    if name == "val_acc":
        return run["options"]["val_size"]
    return run["summary"].total if run["summary"] else 0


def _read_flat_environment(path: Path) -> JsonDocument:
    """Return env.json with dotted names such as `versions.torch`, without the recipe, command and start times."""
    flat: JsonDocument = {}
    for name, value in read_environment(path).model_dump().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name not in ("schema_version", "command", "started", "resumed", "recipe"):
            flat[name] = value
    return flat


def _last_value(curve: MetricValues) -> float | None:
    return curve[-1] if curve else None


def run_comparison_table(comparison: JsonDocument) -> Group:
    """Return the table of a comparison by `compare_runs`, with the paths `a` and `b` in it."""
    differences = Table("differs", "A", "B", box=None)
    for name, values in comparison["recipe"].items():
        differences.add_row(option_flag(name), *map(format_option_value, values))
    for name, values in comparison["environment"].items():
        differences.add_row(name, *map(format_option_value, values))
    curves = Table("curve", box=None)
    equal_epochs = comparison["equal_epochs"]
    for heading in ("last A", "last B", "best A", "best B", f"A after {equal_epochs}", f"B after {equal_epochs}"):
        curves.add_column(heading, justify="right", no_wrap=True)
    for name, values in comparison["curves"].items():
        figures = [figure for pair in ("final", "best", "at_equal_epochs") for figure in values[pair]]
        if any(figure is not None for figure in figures):
            curves.add_row(name, *(format_decimal(figure, 4) for figure in figures))
    return Group(
        f"A: {comparison['a']}",
        f"B: {comparison['b']}",
        "",
        *([differences] if differences.row_count else ["the same recipe and environment"]),
        "",
        curves,
        *_summary_lines(comparison),
    )


def _summary_lines(comparison: JsonDocument) -> list[str]:
    first, accuracy = comparison["first_difference"], comparison["accuracy"]
    epochs = f"{comparison['epochs'][0]} and {comparison['epochs'][1]} epochs"
    lines = [
        f"{epochs}; the curves first differ in epoch {first['epoch']}: {', '.join(first['columns'])}"
        if first
        else f"{epochs}; the curves do not differ in the {comparison['equal_epochs']} common epochs"
    ]
    if accuracy is None:
        return [*lines, "accuracy: not measured in both runs"]
    n = " and ".join(f"{size:,}" for size in dict.fromkeys(accuracy["n"]))
    relation = "within" if accuracy["within_noise"] else "beyond"
    noise = f"{relation} the noise of {n} images (95 %: ±{100 * Z_95 * accuracy['standard_error']:.2f})"
    change = f"{100 * accuracy['difference']:+.2f} points from A to B"
    a, b = (format_percent(accuracy[name]) for name in ("a", "b"))
    return [*lines, f"{accuracy['measured']}: {a} and {b}, {change}, {noise}"]
