"""Groups of runs that differ only by the seed: mean and spread of their results and curves."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fastcifar.format import format_mean_std, format_options, one_line
from fastcifar.recipe import OUTPUT_OPTIONS
from fastcifar.reporting.records import RunRecord
from fastcifar.training.summary import RunSummary

TEST_SPLIT, VALIDATION_SPLIT = "test", "validation"


@dataclass(frozen=True)
class MeanStd:
    """The mean of `n` values, their sample standard deviation, None for less than three, and the range of two."""

    mean: float
    std: float | None
    n: int
    range_of_two: tuple[float, float] | None = None

    @classmethod
    def from_values(cls, values: Sequence[float | None]) -> MeanStd | None:
        """Return the statistics of `values`; None if there are no values or any value is None."""
        measured = [value for value in values if value is not None]
        if not measured or len(measured) < len(values):
            return None
        n = len(measured)
        std, limits = statistics.stdev(measured) if n > 2 else None, (min(measured), max(measured)) if n == 2 else None
        return cls(statistics.fmean(measured), std, n, limits)

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean, or None without a standard deviation."""
        return None if self.std is None else self.std / math.sqrt(self.n)

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean by Student's t distribution, or None without a standard error."""
        if (error := self.standard_error) is None:
            return None
        half_width = student_t_975(self.n - 1) * error
        return self.mean - half_width, self.mean + half_width

    def format(self, digits: int = 2, scale: float = 1) -> str:
        """Return the mean times `scale` and its spread: `93.99 ± 0.12`, of two values `94.00 (93.90-94.10)`."""
        text = format_mean_std(self.mean, self.std, digits, scale)
        if self.range_of_two is None:
            return text
        return f"{text} ({'-'.join(f'{scale * value:.{digits}f}' for value in self.range_of_two)})"


def student_t_975(degrees_of_freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution for at least 2 degrees of freedom, within 0.05 %.

    It is the expansion of Abramowitz and Stegun, 26.7.5, which is not precise enough for 2 and 3 degrees.
    """
    n = degrees_of_freedom
    series = 1.959964 + 2.372271 / n + 2.822249 / n**2 + 2.556750 / n**3 + 1.589536 / n**4
    return {2: 4.302653, 3: 3.182446}.get(n, series)


class MetricCurve(NamedTuple):
    """The mean and standard deviation of a metric over runs."""

    epochs: list[int]  # counted from 1
    mean: list[float]
    std: list[float] | None  # None for less than three runs


@dataclass(eq=False)
class RunGroup:
    """Runs that differ only by the seed, one row of a report. Only `finished_runs` are averaged."""

    name: str  # unique within a report: see `group_runs`
    records: list[RunRecord]

    @cached_property
    def finished_runs(self) -> list[RunRecord]:
        return [record for record in self.records if record.state == "done"]

    @cached_property
    def excluded_runs(self) -> list[RunRecord]:
        return [record for record in self.records if record.state != "done"]

    @cached_property
    def plotted_runs(self) -> list[RunRecord]:
        """The finished runs, or all runs if none is finished, without those that lack a valid recipe or metrics."""
        return [record for record in self.finished_runs or self.records if record.options and record.metric_rows]

    @cached_property
    def summaries(self) -> list[RunSummary]:
        return [record.summary for record in self.finished_runs if record.summary]

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options that the runs share, from the record with the most; a trial without a run folder records few."""
        return max((record.options for record in self.records), key=len)

    @cached_property
    def accuracy_split(self) -> str:
        """`TEST_SPLIT` if all finished runs have a test accuracy, else `VALIDATION_SPLIT`; "" if no run is finished."""
        return TEST_SPLIT if self.accuracy(TEST_SPLIT) else VALIDATION_SPLIT if self.finished_runs else ""

    def accuracy(self, split: str) -> MeanStd | None:
        """Return the accuracy of the weights selected by `eval_weights`; None unless all finished runs have it.

        On `VALIDATION_SPLIT`, it is the accuracy in the epoch from which the weights are taken.
        """
        values: list[float | None] = []
        for summary, record in zip(self.summaries, self.finished_runs, strict=True):
            ema_val_acc = record.metric_rows[-1]["ema_val_acc"] if record.metric_rows else None
            val_accs = {"last": summary.val_acc, "best": summary.best_val_acc, "ema": ema_val_acc}
            values.append(summary.test_acc if split == TEST_SPLIT else val_accs[summary.eval_weights])
        return MeanStd.from_values(values)

    @cached_property
    def total_seconds(self) -> MeanStd | None:
        """The duration of a run; None unless all finished runs report it and ran on the same kind of device."""
        totals = [summary.seconds.get("total") for summary in self.summaries]
        return MeanStd.from_values(totals) if len(self.devices) <= 1 else None

    @cached_property
    def devices(self) -> set[str]:
        return {record.device for record in self.finished_runs if record.device}

    @cached_property
    def notes(self) -> list[str]:
        """Caveats for comparing this group with others: a step limit, repeated seeds, different devices."""
        steps = {summary.steps for summary in self.summaries if not summary.complete}
        seed_counts = Counter(record.seed for record in self.finished_runs)
        notes = [f"stopped at {count:,} steps" for count in sorted(steps)]
        notes += [f"seed {seed} more than once" for seed, count in seed_counts.items() if count > 1]
        return notes + ([f"{len(self.devices)} kinds of device"] if len(self.devices) > 1 else [])

    @cached_property
    def class_accuracies(self) -> dict[str, float]:
        """The mean test accuracy of each class; {} if the finished runs do not have the same classes."""
        per_run = [summary.per_class for summary in self.summaries]
        if not per_run or any(list(accuracies) != list(per_run[0]) for accuracies in per_run):
            return {}
        means = {name: MeanStd.from_values([accuracies[name] for accuracies in per_run]) for name in per_run[0]}
        return {name: accuracy.mean for name, accuracy in means.items() if accuracy}

    def curve(self, column: str) -> MetricCurve | None:
        """Return `column` of metrics.csv over the epochs that all plotted runs have; None if there is no such epoch.

        Later epochs are omitted, because the mean would jump at the end of each shorter run.
        """
        by_run: list[dict[float, float]] = []  # epoch -> value, of the last row if an epoch is repeated
        for record in self.plotted_runs:
            pairs = [(row["epoch"], row[column]) for row in record.metric_rows]
            by_run.append({epoch: value for epoch, value in pairs if epoch is not None and value is not None})
        epochs = sorted(set.intersection(*map(set, by_run))) if by_run else []
        if not epochs:
            return None
        values = np.array([[values_by_epoch[epoch] for epoch in epochs] for values_by_epoch in by_run])
        std = values.std(0, ddof=1).tolist() if len(by_run) > 2 else None
        return MetricCurve([int(epoch) + 1 for epoch in epochs], values.mean(0).tolist(), std)

    @cached_property
    def best_epoch(self) -> int | None:
        """The first epoch (counted from 1) with the highest mean validation accuracy."""
        curve = self.curve("val_acc")
        return curve.epochs[curve.mean.index(max(curve.mean))] if curve else None


def group_runs(records: Sequence[RunRecord]) -> list[RunGroup]:
    """Group the records by `group_key`, and name each group.

    The name of trials of a sweep is their label, and that of a single run its folder. Other runs are named by what
    differs between the groups. Equal names are extended by what differs between their groups, or numbered.
    """
    records_by_key: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        records_by_key[record.group_key].append(record)
    groups = [RunGroup(members[0].label, members) for members in records_by_key.values()]
    unlabeled = [group for group in groups if not group.name]
    differences = dict(zip(unlabeled, describe_differences(unlabeled), strict=True))
    groups_by_name: dict[str, list[RunGroup]] = defaultdict(list)
    for group in groups:
        first = group.records[0]
        folder_name = one_line(first.folder.resolve().name) if len(group.records) == 1 else ""
        group.name = group.name or folder_name or differences[group] or first.recipe or first.options.get("arch", "")
        groups_by_name[group.name].append(group)
    for name, equal in groups_by_name.items():
        extended = [f"{name} {text}".strip() for text in describe_differences(equal)]
        totals, counts = Counter(extended), Counter[str]()
        for group, text in zip(equal, extended, strict=True):
            counts[text] += 1
            group.name = f"{text} ({counts[text]})" if totals[text] > 1 else text
    return groups


def describe_differences(groups: Sequence[RunGroup]) -> list[str]:
    """Return short texts such as `se68 lr=0.1` that tell the groups apart if their options differ."""
    options = {
        name: [format_options({name: group.options[name]}) if name in group.options else "" for group in groups]
        for name in varying_options(groups)
    }
    shortest_first = sorted(options, key=lambda name: max(map(len, options[name])))
    candidates = [
        [str(group.options.get("arch", "")) for group in groups],
        [group.records[0].recipe for group in groups],
        *(options[name] for name in shortest_first if name != "arch"),
    ]
    chosen: list[tuple[str, ...]] = [() for _ in groups]
    for texts in candidates:
        extended = [(*words, text) for words, text in zip(chosen, texts, strict=True)]
        if len(set(extended)) > len(set(chosen)):
            chosen = extended
    return [" ".join(filter(None, words)) for words in chosen]


def varying_options(groups: Sequence[RunGroup]) -> list[str]:
    """Return the names of the options that differ between groups, without the seed and the output options.

    A group without an option, such as a damaged run, does not differ in this option.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for name, value in group.options.items():
            if name not in ("seed", *OUTPUT_OPTIONS):
                values[name].add(json.dumps(value, sort_keys=True))
    return [name for name, texts in values.items() if len(texts) > 1]
