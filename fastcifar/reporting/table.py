"""The table of a report: its columns, its rows and their order, and the runs that are not averaged.

A value that was not measured is shown as a dash, never as zero. `table_formats` renders the table.
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
    """A column of the table.

    value      the value for --json, --format csv and --sort
    text       the displayed text, by default the formatted value
    is_option  whether the column is an option of the recipe rather than a result
    """

    value: Callable[[RunGroup], Any]
    text: Callable[[RunGroup], str] | None = None
    is_option: bool = False


def _option_column(name: str) -> Column:
    return Column(lambda group: group.options.get(name), is_option=True)


def _blocks_per_stage(group: RunGroup) -> Any:
    """Return the blocks per stage from the recipe or, if it does not set them, the default of the architecture."""
    arch = group.options.get("arch")
    if group.options.get("blocks") or arch not in MODELS:
        return group.options.get("blocks")
    parameter = inspect.signature(MODELS[arch]).parameters.get("blocks")
    return list(parameter.default) if parameter and isinstance(parameter.default, Sequence) else None


def _parameter_count(group: RunGroup) -> int | None:
    return next((record.summary.params for record in group.finished_runs if record.summary), None)


def _accuracy_mean_column(split: Callable[[RunGroup], str]) -> Column:
    """Return the column of the mean accuracy, as a fraction, on the split that `split` returns for a group."""
    return Column(
        lambda group: _field_or_none(group.accuracy(split(group)), "mean"),
        lambda group: _accuracy_text(group.accuracy(split(group))),
    )


def _accuracy_std_column(split: Callable[[RunGroup], str]) -> Column:
    return Column(lambda group: _field_or_none(group.accuracy(split(group)), "std"))


def _field_or_none(statistics: MeanStd | None, name: str) -> Any:
    return getattr(statistics, name) if statistics else None


def _split_and_weights(group: RunGroup) -> str:
    weights = sorted({record.summary.eval_weights for record in group.finished_runs if record.summary})
    return f"{group.accuracy_split}, {'/'.join(weights)}" if weights else ""


# heading -> column, in the order of the source project's table; other options that differ between rows follow
OPTION_COLUMNS = {
    "model": _option_column("arch"),
    "blocks": Column(_blocks_per_stage, is_option=True),
    "optimizer": _option_column("optimizer"),
    "lr": _option_column("lr"),
    "augment": _option_column("augment"),
    "clip_grad": _option_column("clip_grad"),
    "batch": _option_column("batch_size"),
}
OPTIONS_WITH_COLUMNS = (
    "arch",
    "blocks",
    "optimizer",
    "lr",
    "augment",
    "clip_grad",
    "batch_size",
)  # the options that OPTION_COLUMNS shows
RESULT_COLUMNS = {
    "params": Column(_parameter_count, lambda group: format_count(_parameter_count(group))),
    "accuracy %": _accuracy_mean_column(lambda group: group.accuracy_split),
    "std": _accuracy_std_column(lambda group: group.accuracy_split),
    "of": Column(_split_and_weights),
    "validation %": _accuracy_mean_column(lambda group: VALIDATION_SPLIT),
    "validation std": _accuracy_std_column(lambda group: VALIDATION_SPLIT),
    "n": Column(lambda group: len(group.finished_runs)),
    "time": Column(
        lambda group: _field_or_none(group.total_seconds, "mean"),
        lambda group: format_duration(_field_or_none(group.total_seconds, "mean")),
    ),
    "notes": Column(lambda group: ", ".join([*group.notes, *_excluded_state_counts(group)])),
}
STD_COLUMNS = ("std", "validation std")  # shown after the mean in texts


@dataclass(frozen=True)
class ReportTable:
    """The rows of a report, one for each group of runs, and its columns by heading."""

    rows: list[RunGroup]
    columns: dict[str, Column]

    def row_values(self, group: RunGroup) -> dict[str, Any]:
        """Return the values of a row for programs: accuracies as fractions, times in seconds, None if not measured."""
        return {heading.removesuffix(" %"): column.value(group) for heading, column in self.columns.items()}

    def row_texts(self, group: RunGroup) -> dict[str, str]:
        """Return the displayed texts of a row."""
        return {
            heading: column.text(group) if column.text else format_option_value(column.value(group))
            for heading, column in self.columns.items()
            if heading not in STD_COLUMNS
        }

    def describe_excluded_runs(self) -> list[dict[str, str]]:
        """Return the runs that are not averaged, with their states and reasons."""
        return [
            {
                "row": group.name,
                "seed": format_option_value(record.seed),
                "state": record.state,
                "reason": record.reason,
                "folder": one_line(record.folder),
            }
            for group in self.rows
            for record in group.excluded_runs
        ]


def _excluded_state_counts(group: RunGroup) -> list[str]:
    states = [record.state for record in group.excluded_runs]
    return [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]


def build_report_table(
    groups: Sequence[RunGroup], sort_by: str | None = None, include_validation: bool = False
) -> ReportTable:
    """Return the table of `groups`, sorted by the column `sort_by` if given.

    Numbers are sorted in descending order, texts in ascending order, and missing values last. Raises `UsageError` if
    there is no such column.
    """
    other_options = [name for name in varying_options(groups) if name not in OPTIONS_WITH_COLUMNS]
    columns = {
        "row": Column(lambda group: group.name),
        **OPTION_COLUMNS,
        **{name: _option_column(name) for name in other_options},
        **RESULT_COLUMNS,
    }
    if not include_validation:
        columns = {heading: column for heading, column in columns.items() if not heading.startswith("validation")}
    if sort_by is None:
        return ReportTable(list(groups), columns)
    sort_column = lookup({heading.removesuffix(" %"): column for heading, column in columns.items()}, sort_by, "column")

    def key(group: RunGroup) -> tuple[bool, float, str]:
        value = sort_column.value(group)
        is_number = isinstance(value, int | float)
        text = "" if is_number else format_option_value(value)
        return value is None or value == "", -value if is_number else 0.0, text

    return ReportTable(sorted(groups, key=key), columns)


def _accuracy_text(accuracy: MeanStd | None) -> str:
    return format_mean_std(accuracy.mean, accuracy.std, scale=100) if accuracy else MISSING
