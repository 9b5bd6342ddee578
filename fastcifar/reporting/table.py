"""The table of an ablation: what its columns are, which rows it has in which order, and who is in no mean.

A figure that was not measured is a dash, never a zero. How a table is written is in `formats`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fastcifar.errors import pick
from fastcifar.models import MODELS
from fastcifar.reporting.aggregate import VALIDATION, Row, Spread, varying
from fastcifar.reporting.records import one_line, spelt


@dataclass(frozen=True)
class Column:
    """A column of the table: its `value` in --json, --format csv and for --sort, and the `text` that a person reads.

    is_knob: it is asked for by the recipe, not measured.
    """

    value: Callable[[Row], Any]
    text: Callable[[Row], str] | None = None
    is_knob: bool = False


def _knob(name: str) -> Column:
    return Column(lambda row: row.knobs.get(name), is_knob=True)


def _blocks(row: Row) -> Any:
    """The blocks of each stage, by the recipe or, where it does not say, by its architecture."""
    arch = row.knobs.get("arch")
    if row.knobs.get("blocks") or arch not in MODELS:
        return row.knobs.get("blocks")
    taken = inspect.signature(MODELS[arch]).parameters.get("blocks")
    return list(taken.default) if taken and isinstance(taken.default, Sequence) else None


def _params(row: Row) -> int | None:
    return next((record.summary.params for record in row.done if record.summary), None)


def _mean(split: Callable[[Row], str]) -> Column:
    """The accuracy on a split: its mean, a fraction."""
    return Column(lambda row: _of(row.accuracy(split(row)), "mean"), lambda row: _percents(row.accuracy(split(row))))


def _std(split: Callable[[Row], str]) -> Column:
    return Column(lambda row: _of(row.accuracy(split(row)), "std"))


def _of(spread: Spread | None, name: str) -> Any:
    return getattr(spread, name) if spread else None


def _measured_on(row: Row) -> str:
    weights = sorted({record.summary.weights for record in row.done if record.summary})
    return f"{row.measured_on}, {'/'.join(weights)}" if weights else ""


# heading -> column, in the order of the source project's table; the knobs that rows differ in besides come after these
KNOBS = {
    "model": _knob("arch"),
    "blocks": Column(_blocks, is_knob=True),
    "optimizer": _knob("optimizer"),
    "lr": _knob("lr"),
    "augment": _knob("augment"),
    "clip": _knob("clip"),
    "batch": _knob("batch_size"),
}
SHOWN = ("arch", "blocks", "optimizer", "lr", "augment", "clip", "batch_size")  # the knobs in KNOBS
MEASURED = {
    "params": Column(_params, lambda row: _count(_params(row))),
    "accuracy %": _mean(lambda row: row.measured_on),
    "std": _std(lambda row: row.measured_on),
    "of": Column(_measured_on),
    "validation %": _mean(lambda row: VALIDATION),
    "validation std": _std(lambda row: VALIDATION),
    "n": Column(lambda row: len(row.done)),
    "time": Column(lambda row: _of(row.seconds, "mean"), lambda row: _time(_of(row.seconds, "mean"))),
    "notes": Column(lambda row: ", ".join([*row.notes, *_states(row)])),
}
IN_THE_MEAN = ("std", "validation std")  # a person reads it behind the mean


@dataclass(frozen=True)
class Ablation:
    """Rows and the columns to show of them."""

    rows: list[Row]
    columns: dict[str, Column]

    def values(self, row: Row) -> dict[str, Any]:
        """The row for programs: accuracies are fractions, times seconds, what was not measured is None."""
        return {heading.removesuffix(" %"): column.value(row) for heading, column in self.columns.items()}

    def texts(self, row: Row) -> dict[str, str]:
        """The row for people."""
        return {
            heading: column.text(row) if column.text else spelt(column.value(row))
            for heading, column in self.columns.items()
            if heading not in IN_THE_MEAN
        }

    def left_out(self) -> list[dict[str, str]]:
        """The runs that are in no mean, and why."""
        return [
            {
                "row": row.name,
                "seed": spelt(record.seed),
                "state": record.state,
                "reason": record.reason,
                "folder": one_line(record.folder),
            }
            for row in self.rows
            for record in row.left_out
        ]


def _states(row: Row) -> list[str]:
    states = [record.state for record in row.left_out]
    return [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]


def tabulate(found: Sequence[Row], sort: str | None = None, validation: bool = False) -> Ablation:
    """The table of rows. `sort`: by a column, figures from the largest, text from A, what is missing last.

    Errors: `UsageError` for another column.
    """
    others = [name for name in varying(found) if name not in SHOWN]
    columns = {"row": Column(lambda row: row.name), **KNOBS, **{name: _knob(name) for name in others}, **MEASURED}
    if not validation:
        columns = {heading: column for heading, column in columns.items() if not heading.startswith("validation")}
    if sort is None:
        return Ablation(list(found), columns)
    by = pick({heading.removesuffix(" %"): column for heading, column in columns.items()}, sort, "column")

    def key(row: Row) -> tuple[bool, float, str]:
        value = by.value(row)
        is_number = isinstance(value, int | float)
        return value is None or value == "", -value if is_number else 0.0, "" if is_number else spelt(value)

    return Ablation(sorted(found, key=key), columns)


def _percents(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{100 * spread.mean:.2f} ± {'-' if spread.std is None else f'{100 * spread.std:.2f}'}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _time(seconds: float | None) -> str:
    """Hours, minutes and seconds; of a run of less than ten seconds their tenths."""
    if seconds is None:
        return "-"
    return str(timedelta(seconds=round(seconds))) if round(seconds) >= 10 else f"{seconds:.1f} s"
