"""The table of an ablation: what its columns are, which rows it has in which order, and who is in no mean.

A figure that was not measured is a dash, never a zero. How a table is written is in `formats`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastcifar.errors import lookup
from fastcifar.format import MISSING, format_count, format_duration, format_mean_std, format_option_value, one_line
from fastcifar.models import MODELS
from fastcifar.reporting.aggregate import VALIDATION_SPLIT, MeanStd, RunGroup, varying_options


@dataclass(frozen=True)
class Column:
    """A column of the table: its `value` in --json, --format csv and for --sort, and the `text` that a person reads.

    is_knob: it is asked for by the recipe, not measured.
    """

    value: Callable[[RunGroup], Any]
    text: Callable[[RunGroup], str] | None = None
    is_option: bool = False


def _option_column(name: str) -> Column:
    return Column(lambda row: row.options.get(name), is_option=True)


def _blocks_per_stage(row: RunGroup) -> Any:
    """The blocks of each stage, by the recipe or, where it does not say, by its architecture."""
    arch = row.options.get("arch")
    if row.options.get("blocks") or arch not in MODELS:
        return row.options.get("blocks")
    taken = inspect.signature(MODELS[arch]).parameters.get("blocks")
    return list(taken.default) if taken and isinstance(taken.default, Sequence) else None


def _parameter_count(row: RunGroup) -> int | None:
    return next((record.summary.params for record in row.finished_runs if record.summary), None)


def _accuracy_mean_column(split: Callable[[RunGroup], str]) -> Column:
    """The accuracy on a split: its mean, a fraction."""
    return Column(
        lambda row: _field_or_none(row.accuracy(split(row)), "mean"),
        lambda row: _accuracy_text(row.accuracy(split(row))),
    )


def _accuracy_std_column(split: Callable[[RunGroup], str]) -> Column:
    return Column(lambda row: _field_or_none(row.accuracy(split(row)), "std"))


def _field_or_none(spread: MeanStd | None, name: str) -> Any:
    return getattr(spread, name) if spread else None


def _split_and_weights(row: RunGroup) -> str:
    weights = sorted({record.summary.eval_weights for record in row.finished_runs if record.summary})
    return f"{row.accuracy_split}, {'/'.join(weights)}" if weights else ""


# heading -> column, in the order of the source project's table; the knobs that rows differ in besides come after these
OPTION_COLUMNS = {
    "model": _option_column("arch"),
    "blocks": Column(_blocks_per_stage, is_option=True),
    "optimizer": _option_column("optimizer"),
    "lr": _option_column("lr"),
    "augment": _option_column("augment"),
    "clip_grad": _option_column("clip_grad"),
    "batch": _option_column("batch_size"),
}
OPTIONS_WITH_COLUMNS = ("arch", "blocks", "optimizer", "lr", "augment", "clip_grad", "batch_size")  # the knobs in KNOBS
RESULT_COLUMNS = {
    "params": Column(_parameter_count, lambda row: format_count(_parameter_count(row))),
    "accuracy %": _accuracy_mean_column(lambda row: row.accuracy_split),
    "std": _accuracy_std_column(lambda row: row.accuracy_split),
    "of": Column(_split_and_weights),
    "validation %": _accuracy_mean_column(lambda row: VALIDATION_SPLIT),
    "validation std": _accuracy_std_column(lambda row: VALIDATION_SPLIT),
    "n": Column(lambda row: len(row.finished_runs)),
    "time": Column(
        lambda row: _field_or_none(row.total_seconds, "mean"),
        lambda row: format_duration(_field_or_none(row.total_seconds, "mean")),
    ),
    "notes": Column(lambda row: ", ".join([*row.notes, *_excluded_state_counts(row)])),
}
STD_COLUMNS = ("std", "validation std")  # a person reads it behind the mean


@dataclass(frozen=True)
class ReportTable:
    """Rows and the columns to show of them."""

    rows: list[RunGroup]
    columns: dict[str, Column]

    def row_values(self, row: RunGroup) -> dict[str, Any]:
        """The row for programs: accuracies are fractions, times seconds, what was not measured is None."""
        return {heading.removesuffix(" %"): column.value(row) for heading, column in self.columns.items()}

    def row_texts(self, row: RunGroup) -> dict[str, str]:
        """The row for people."""
        return {
            heading: column.text(row) if column.text else format_option_value(column.value(row))
            for heading, column in self.columns.items()
            if heading not in STD_COLUMNS
        }

    def describe_excluded_runs(self) -> list[dict[str, str]]:
        """The runs that are in no mean, and why."""
        return [
            {
                "row": row.name,
                "seed": format_option_value(record.seed),
                "state": record.state,
                "reason": record.reason,
                "folder": one_line(record.folder),
            }
            for row in self.rows
            for record in row.excluded_runs
        ]


def _excluded_state_counts(row: RunGroup) -> list[str]:
    states = [record.state for record in row.excluded_runs]
    return [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]


def build_report_table(
    groups: Sequence[RunGroup], sort_by: str | None = None, include_validation: bool = False
) -> ReportTable:
    """The table of rows. `sort`: by a column, figures from the largest, text from A, what is missing last.

    Errors: `UsageError` for another column.
    """
    others = [name for name in varying_options(groups) if name not in OPTIONS_WITH_COLUMNS]
    columns = {
        "row": Column(lambda row: row.name),
        **OPTION_COLUMNS,
        **{name: _option_column(name) for name in others},
        **RESULT_COLUMNS,
    }
    if not include_validation:
        columns = {heading: column for heading, column in columns.items() if not heading.startswith("validation")}
    if sort_by is None:
        return ReportTable(list(groups), columns)
    by = lookup({heading.removesuffix(" %"): column for heading, column in columns.items()}, sort_by, "column")

    def key(row: RunGroup) -> tuple[bool, float, str]:
        value = by.value(row)
        is_number = isinstance(value, int | float)
        text = "" if is_number else format_option_value(value)
        return value is None or value == "", -value if is_number else 0.0, text

    return ReportTable(sorted(groups, key=key), columns)


def _accuracy_text(spread: MeanStd | None) -> str:
    return format_mean_std(spread.mean, spread.std, scale=100) if spread else MISSING
