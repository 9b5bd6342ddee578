"""Runs that differ by the seed alone as one row: mean and sample standard deviation, over runs and epoch by epoch.

Only finished runs are averaged; the others are counted and named. Pure: nothing is read, drawn or measured here.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastcifar.recipe import WHERE_KEPT
from fastcifar.reporting.records import Record, spelt

MetricRow = dict[str, float | None]
TEST, VALIDATION = "test", "validation"


@dataclass(frozen=True)
class Spread:
    """A mean over `n` values and their sample standard deviation, None of a single one."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Curve:
    """A column of metrics.csv over `epochs` (counted from 1), in as many values: the mean over runs, and their std."""

    epochs: list[int]
    mean: list[float]
    std: list[float] | None


@dataclass(frozen=True)
class Row:
    """Runs that differ by the seed alone. `name` tells the row from the others."""

    name: str
    records: list[Record]

    @cached_property
    def done(self) -> list[Record]:
        """The runs that are averaged."""
        return [record for record in self.records if record.state == "done"]

    @cached_property
    def left_out(self) -> list[Record]:
        """The runs that are not."""
        return [record for record in self.records if record.state != "done"]

    @cached_property
    def drawn(self) -> list[Record]:
        """The runs that curves are of: those that are averaged, and where there are none, those that have begun."""
        return [record for record in self.done or self.records if record.epochs]

    @cached_property
    def knobs(self) -> dict[str, Any]:
        """Its runs' knobs, which are the same but for the seed; of runs that left nothing behind, those known."""
        return max((record.knobs for record in self.records), key=len)

    @cached_property
    def measured_on(self) -> str:
        """TEST where every finished run met the test set, else VALIDATION; "" without a finished run."""
        if not self.done:
            return ""
        return TEST if all(_accuracy(record, TEST) is not None for record in self.done) else VALIDATION

    def accuracy(self, split: str) -> Spread | None:
        """Of the weights that the recipe names, on TEST or VALIDATION; None unless all finished runs were measured."""
        found = [_accuracy(record, split) for record in self.done]
        return Spread.of([value for value in found if value is not None]) if None not in found else None

    @cached_property
    def seconds(self) -> Spread | None:
        """Start to end; None unless all finished runs say so and ran on one kind of device."""
        found = [record.summary.seconds.get("total") for record in self.done if record.summary]
        if None in found or len(self.devices) > 1:
            return None
        return Spread.of([value for value in found if value is not None])

    @cached_property
    def devices(self) -> list[str]:
        """The devices of the finished runs, in words."""
        return list(dict.fromkeys(record.device for record in self.done if record.device))

    @cached_property
    def notes(self) -> list[str]:
        """What a reader has to know before comparing its figures with another row's."""
        steps = {record.summary.steps for record in self.done if record.summary and not record.summary.complete}
        twice = [seed for seed, count in Counter(record.seed for record in self.done).items() if count > 1]
        return [
            *(f"cut at {count:,} steps" for count in sorted(steps)),
            *(f"seed {seed} more than once" for seed in twice),
            *([f"{len(self.devices)} kinds of device"] if len(self.devices) > 1 else []),
        ]

    def per_class(self) -> dict[str, float]:
        """Test accuracy of each class, the mean over the finished runs; {} where they do not know the same classes."""
        found = [record.summary.per_class for record in self.done if record.summary]
        if not found or any(list(classes) != list(found[0]) for classes in found):
            return {}
        columns = {name: [classes[name] for classes in found] for name in found[0]}
        return {name: statistics.fmean(values) for name, values in columns.items() if None not in values}  # type: ignore[type-var]

    def curve(self, column: str) -> Curve | None:
        """`column` over the epochs that all runs drawn have: a mean over ever fewer runs would bend where one ends."""
        series = [_series(record.epochs, column) for record in self.drawn]
        epochs = sorted(set.intersection(*map(set, series))) if series else []
        spreads = [Spread.of([values[epoch] for values in series]) for epoch in epochs]
        found = [spread for spread in spreads if spread]
        if not found:
            return None
        stds = [spread.std for spread in found if spread.std is not None]
        return Curve([epoch + 1 for epoch in epochs], [spread.mean for spread in found], stds or None)

    @cached_property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) of the highest mean validation accuracy, the first of equals."""
        curve = self.curve("val_acc")
        return curve.epochs[curve.mean.index(max(curve.mean))] if curve else None


def rows(records: Sequence[Record]) -> list[Row]:
    """The records by their group, in the order of the first of each."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    found = [Row(members[0].name, members) for members in groups.values()]
    names = [_told_apart(row, found) for row in found]
    numbered = [f"{name} ({names[: index + 1].count(name)})" for index, name in enumerate(names)]
    return [
        Row(number if names.count(name) > 1 else name, row.records)
        for row, name, number in zip(found, names, numbered, strict=True)
    ]


def varying(found: Sequence[Row]) -> list[str]:
    """The knobs that differ between rows, without the seed and where runs are kept."""
    names = dict.fromkeys(name for row in found for name in row.knobs if name not in ("seed", *WHERE_KEPT))
    values = {name: {json.dumps(row.knobs.get(name), sort_keys=True) for row in found} for name in names}
    return [name for name in names if len(values[name]) > 1]


def _told_apart(row: Row, found: Sequence[Row]) -> str:
    """The row's name and the knobs that tell it from the rows of that name, where there are any."""
    known = [(knob, row.knobs.get(knob)) for knob in varying([other for other in found if other.name == row.name])]
    return " ".join([row.name, *(f"{knob}={spelt(value)}" for knob, value in known if value is not None)])


def _accuracy(record: Record, split: str) -> float | None:
    """Of the weights that the recipe names: on TEST, or on VALIDATION at the epoch that they are of."""
    summary = record.summary
    if summary is None:
        return None
    if split == TEST:
        return summary.test_acc
    averaged = record.epochs[-1]["ema_val_acc"] if record.epochs else None
    return {"last": summary.val_acc, "best": summary.best_val_acc, "ema": averaged}[summary.weights]


def _series(epochs: Sequence[MetricRow], column: str) -> dict[int, float]:
    """epoch -> value, where there is one; of an epoch that is there twice the later row stands."""
    found = {}
    for row in epochs:
        epoch, value = row["epoch"], row[column]
        if epoch is not None and value is not None:
            found[int(epoch)] = value
    return found
