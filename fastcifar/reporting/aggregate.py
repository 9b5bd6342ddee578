"""Runs that differ by the seed alone as one row: mean and sample standard deviation, over runs and epoch by epoch.

Only finished runs are averaged; the others are counted and named. Pure: nothing is read, drawn or measured here.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastcifar.format import format_options
from fastcifar.recipe import OUTPUT_OPTIONS
from fastcifar.reporting.records import RunRecord

MetricRow = dict[str, float | None]
TEST_SPLIT, VALIDATION_SPLIT = "test", "validation"


@dataclass(frozen=True)
class MeanStd:
    """A mean over `n` values and their sample standard deviation, None of a single value."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def from_values(cls, values: Sequence[float | None]) -> MeanStd | None:
        """None if there are no values, or if one of them is None."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean, None of a single value."""
        return None if self.std is None else self.std / math.sqrt(self.n)


@dataclass(frozen=True)
class MetricCurve:
    """A column of metrics.csv over `epochs` (counted from 1), in as many values: the mean over runs, and their std."""

    epochs: list[int]
    mean: list[float]
    std: list[float] | None


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ by the seed alone. `name` tells the row from the others."""

    name: str
    records: list[RunRecord]

    @cached_property
    def finished_runs(self) -> list[RunRecord]:
        """The runs that are averaged."""
        return [record for record in self.records if record.state == "done"]

    @cached_property
    def excluded_runs(self) -> list[RunRecord]:
        """The runs that are not."""
        return [record for record in self.records if record.state != "done"]

    @cached_property
    def plotted_runs(self) -> list[RunRecord]:
        """The runs that curves are of: those that are averaged, and where there are none, those that have begun."""
        return [record for record in self.finished_runs or self.records if record.metric_rows]

    @cached_property
    def options(self) -> dict[str, Any]:
        """Its runs' knobs, which are the same but for the seed; of runs that left nothing behind, those known."""
        return max((record.options for record in self.records), key=len)

    @cached_property
    def accuracy_split(self) -> str:
        """TEST where every finished run met the test set, else VALIDATION; "" without a finished run."""
        if not self.finished_runs:
            return ""
        return (
            TEST_SPLIT
            if all(_run_accuracy(record, TEST_SPLIT) is not None for record in self.finished_runs)
            else VALIDATION_SPLIT
        )

    def accuracy(self, split: str) -> MeanStd | None:
        """Of the weights that the recipe names, on TEST or VALIDATION; None unless all finished runs were measured."""
        return MeanStd.from_values([_run_accuracy(record, split) for record in self.finished_runs])

    @cached_property
    def total_seconds(self) -> MeanStd | None:
        """Start to end; None unless all finished runs say so and ran on one kind of device."""
        found = [record.summary.seconds.get("total") for record in self.finished_runs if record.summary]
        return MeanStd.from_values(found) if len(self.devices) <= 1 else None

    @cached_property
    def devices(self) -> list[str]:
        """The devices of the finished runs, in words."""
        return list(dict.fromkeys(record.device for record in self.finished_runs if record.device))

    @cached_property
    def notes(self) -> list[str]:
        """What a reader has to know before comparing its figures with another row's."""
        steps = {
            record.summary.steps for record in self.finished_runs if record.summary and not record.summary.complete
        }
        twice = [seed for seed, count in Counter(record.seed for record in self.finished_runs).items() if count > 1]
        return [
            *(f"cut at {count:,} steps" for count in sorted(steps)),
            *(f"seed {seed} more than once" for seed in twice),
            *([f"{len(self.devices)} kinds of device"] if len(self.devices) > 1 else []),
        ]

    def per_class_accuracy(self) -> dict[str, float]:
        """Test accuracy of each class, the mean over the finished runs; {} where they do not know the same classes."""
        found = [record.summary.per_class for record in self.finished_runs if record.summary]
        if not found or any(list(classes) != list(found[0]) for classes in found):
            return {}
        spreads = {name: MeanStd.from_values([classes[name] for classes in found]) for name in found[0]}
        return {name: spread.mean for name, spread in spreads.items() if spread}

    def curve(self, column: str) -> MetricCurve | None:
        """`column` over the epochs that all runs drawn have: a mean over ever fewer runs would bend where one ends."""
        series = [_values_by_epoch(record.metric_rows, column) for record in self.plotted_runs]
        epochs = sorted(set.intersection(*map(set, series))) if series else []
        spreads = [MeanStd.from_values([values[epoch] for values in series]) for epoch in epochs]
        found = [spread for spread in spreads if spread]
        if not found:
            return None
        stds = [spread.std for spread in found if spread.std is not None]
        return MetricCurve([epoch + 1 for epoch in epochs], [spread.mean for spread in found], stds or None)

    @cached_property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) of the highest mean validation accuracy, the first of equals."""
        curve = self.curve("val_acc")
        return curve.epochs[curve.mean.index(max(curve.mean))] if curve else None


def group_runs(records: Sequence[RunRecord]) -> list[RunGroup]:
    """The records by their group, in the order of the first of each."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.group_key, []).append(record)
    found = [RunGroup(members[0].name, members) for members in groups.values()]
    names = [_disambiguated_name(row, found) for row in found]
    numbered = [f"{name} ({names[: index + 1].count(name)})" for index, name in enumerate(names)]
    return [
        RunGroup(number if names.count(name) > 1 else name, row.records)
        for row, name, number in zip(found, names, numbered, strict=True)
    ]


def varying_options(groups: Sequence[RunGroup]) -> list[str]:
    """The knobs that differ between rows, without the seed and where runs are kept."""
    names = dict.fromkeys(name for row in groups for name in row.options if name not in ("seed", *OUTPUT_OPTIONS))
    values = {name: {json.dumps(row.options.get(name), sort_keys=True) for row in groups} for name in names}
    return [name for name in names if len(values[name]) > 1]


def _disambiguated_name(row: RunGroup, groups: Sequence[RunGroup]) -> str:
    """The row's name with the options that distinguish it from the other rows of that name, if there are any."""
    names = varying_options([other for other in groups if other.name == row.name])
    options = {name: row.options[name] for name in names if row.options.get(name) is not None}
    return " ".join(filter(None, (row.name, format_options(options, separator=" "))))


def _run_accuracy(record: RunRecord, split: str) -> float | None:
    """Of the weights that the recipe names: on TEST, or on VALIDATION at the epoch that they are of."""
    summary = record.summary
    if summary is None:
        return None
    if split == TEST_SPLIT:
        return summary.test_acc
    averaged = record.metric_rows[-1]["ema_val_acc"] if record.metric_rows else None
    return {"last": summary.val_acc, "best": summary.best_val_acc, "ema": averaged}[summary.eval_weights]


def _values_by_epoch(metric_rows: Sequence[MetricRow], column: str) -> dict[int, float]:
    """epoch -> value, where there is one; of an epoch that is there twice the later row stands."""
    found = {}
    for row in metric_rows:
        epoch, value = row["epoch"], row[column]
        if epoch is not None and value is not None:
            found[int(epoch)] = value
    return found
