"""`fastcifar compare RUN RUN`: what two runs were asked, where they ran, their curves and accuracies, side by side.

It reads run folders, finished or not; a figure that one of them lacks is None. Nothing here measures, or reads a
checkpoint.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from fastcifar.errors import DataError
from fastcifar.files import read_json_object
from fastcifar.format import format_decimal, format_option_value, format_percent, option_flag
from fastcifar.recipe import OUTPUT_OPTIONS, Recipe, load_saved_recipe
from fastcifar.training.metrics_file import METRICS_COLUMNS, parse_finite_float, read_metrics_csv
from fastcifar.training.run_dir import read_environment

COMPARED_CURVES = {"train_loss": min, "train_acc": max, "val_loss": min, "val_acc": max, "ema_val_acc": max}
TIMING_COLUMNS = ("images_per_s", "seconds")  # columns that differ even where nothing else does
Z_95 = 1.96  # standard errors that 95 % of the differences by chance are within

JsonDocument = dict[str, Any]
MetricValues = list[float | None]


def read_run_document(path: Path) -> JsonDocument | None:
    """A run folder's recipe, environment, curves (column -> a value an epoch) and summary; None for what is none.

    Errors: `DataError` for one that is damaged.
    """
    if not (path / "recipe.toml").is_file():
        return None
    knobs = Recipe.from_saved(load_saved_recipe(path)).model_dump(mode="json")
    rows = read_metrics_csv(path / "metrics.csv", sys.maxsize)
    summary = read_json_object(path / "summary.json")
    if not summary and (path / "summary.json").exists():
        raise DataError(f"{path / 'summary.json'} cannot be read", "compare another run")
    curves = {name: [parse_finite_float(row[name]) for row in rows] for name in METRICS_COLUMNS}
    return {"knobs": knobs, "environment": _read_flat_environment(path), "curves": curves, "summary": summary}


def compare_runs(a: JsonDocument, b: JsonDocument) -> JsonDocument:
    """What differs, each as [a's, b's]: `recipe` by knob, `environment` by what; `curves` and `accuracy`.

    curves: of each column `final`, `best` and `at_equal_epochs` (the last epoch that both have); `epochs` of each;
    `first_difference`, the first epoch and its columns whose printed values are not the same, None if there is none.
    """
    mine, other = a["curves"], b["curves"]
    both = min(len(mine["epoch"]), len(other["epoch"]))
    return {
        "recipe": _differing_items(a["knobs"], b["knobs"], OUTPUT_OPTIONS),
        "environment": _differing_items(a["environment"], b["environment"]),
        "epochs": [len(mine["epoch"]), len(other["epoch"])],
        "equal_epochs": both,
        "curves": {
            name: {
                "final": [_last_value(curve) for curve in (mine[name], other[name])],
                "best": [
                    best((value for value in curve if value is not None), default=None)
                    for curve in (mine[name], other[name])
                ],
                "at_equal_epochs": [_last_value(curve[:both]) for curve in (mine[name], other[name])],
            }
            for name, best in COMPARED_CURVES.items()
        },
        "first_difference": _first_differing_epoch(mine, other, both),
        "accuracy": _compare_accuracy(a, b),
    }


def _differing_items(a: JsonDocument, b: JsonDocument, exclude: tuple[str, ...] = ()) -> JsonDocument:
    names = [name for name in {**a, **b} if name not in exclude and a.get(name) != b.get(name)]
    return {name: [a.get(name), b.get(name)] for name in names}


def _first_differing_epoch(a: dict[str, MetricValues], b: dict[str, MetricValues], epochs: int) -> JsonDocument | None:
    columns = [name for name in METRICS_COLUMNS if name not in TIMING_COLUMNS]
    for epoch in range(epochs):
        found = [name for name in columns if a[name][epoch] != b[name][epoch]]
        if found:
            return {"epoch": epoch, "columns": found}
    return None


def _compare_accuracy(a: JsonDocument, b: JsonDocument) -> JsonDocument | None:
    """Both accuracies on the test set, or where one was not tested on the validation split, with their noise.

    `standard_error` of the difference, as if each had drawn images of its own; on the same images it is smaller, so
    that a difference `within_noise` may still be one. None where there is nothing to compare.
    """
    for name in ("test_acc", "val_acc"):
        found = [
            parse_finite_float(run["summary"].get(name, _last_value(run["curves"].get(name, [])))) for run in (a, b)
        ]
        sizes = [_split_size(run, name) for run in (a, b)]
        if all(value is not None and 0 <= value <= 1 for value in found) and all(sizes):
            mine, other = (float(value or 0) for value in found)
            error = math.sqrt(sum(p * (1 - p) / n for p, n in zip((mine, other), sizes, strict=True)))
            return {
                "measured": name,
                "a": mine,
                "b": other,
                "difference": other - mine,
                "n": sizes,
                "standard_error": error,
                "within_noise": abs(other - mine) <= Z_95 * error,
            }
    return None


def _split_size(run: JsonDocument, name: str) -> int:
    """The images that an accuracy is of."""
    found = run["summary"].get("total") if name == "test_acc" else run["knobs"]["val_size"]
    return found if isinstance(found, int) else 0


def _read_flat_environment(path: Path) -> JsonDocument:
    """env.json, flat: `versions.torch` and so on, without when and how the run was started."""
    flat: JsonDocument = {}
    for name, value in read_environment(path).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name not in ("command", "started", "resumed", "recipe"):
            flat[name] = value
    return flat


def _last_value(curve: MetricValues) -> float | None:
    return curve[-1] if curve else None


def run_comparison_table(comparison: JsonDocument) -> Group:
    """What a person sees of `compare_runs`."""
    asked = Table("differs", "A", "B", box=None)
    for name, values in comparison["recipe"].items():
        asked.add_row(option_flag(name), *map(format_option_value, values))
    for name, values in comparison["environment"].items():
        asked.add_row(name, *map(format_option_value, values))
    curves = Table("curve", box=None)
    for heading in ("last A", "last B", "best A", "best B", f"A after {comparison['equal_epochs']}", "B"):
        curves.add_column(heading, justify="right", no_wrap=True)
    for name, figures in comparison["curves"].items():
        cells = [value for pair in ("final", "best", "at_equal_epochs") for value in figures[pair]]
        if any(value is not None for value in cells):
            curves.add_row(name, *(format_decimal(value, 4) for value in cells))
    same = "the same recipe and environment"
    return Group(
        f"A: {comparison['a']}",
        f"B: {comparison['b']}",
        "",
        *([asked] if asked.row_count else [same]),
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
        else f"{epochs}; the curves do not differ in the {comparison['equal_epochs']} that both have"
    ]
    if accuracy is None:
        return [*lines, "accuracy: not measured in both"]
    n = " and ".join(f"{size:,}" for size in dict.fromkeys(accuracy["n"]))
    verdict = "within" if accuracy["within_noise"] else "beyond"
    noise = f"{verdict} the noise of {n} images (95 %: ±{100 * Z_95 * accuracy['standard_error']:.2f})"
    change = f"{100 * accuracy['difference']:+.2f} points from A to B"
    a, b = (format_percent(accuracy[name]) for name in ("a", "b"))
    return [*lines, f"{accuracy['measured']}: {a} and {b}, {change}, {noise}"]
