"""The charts of a report, from columns of metrics.csv, and writing them as PNG files.

The HTML page shows the same charts (html.py). `fastcifar.plotting` draws the PNG files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcifar import plotting
from fastcifar.plotting import LineSeries
from fastcifar.reporting.aggregate import RunGroup
from fastcifar.reporting.misclassified import Misclassified

# The color-blind safe palette of Okabe and Ito without yellow and black, and three more colors. All of them are visible
# on white and on black backgrounds. With more groups than colors, colors repeat.
LINE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#808080", "#8c6bb1", "#a6761d")


@dataclass(frozen=True)
class Chart:
    """A line chart. `columns` maps columns of metrics.csv to labels; the first is drawn solid, the second dashed."""

    title: str
    columns: dict[str, str]
    is_fraction: bool = False

    def line_style_note(self, groups: Sequence[RunGroup]) -> str:
        """Return the legend of the line styles in the chart of `groups`."""
        styles = zip(self.columns.values(), ("solid line", "dashed line"), strict=False)
        notes = [f"{label}: {style}" for label, style in styles if label]
        if any(column.startswith("val_") for column in self.columns):
            notes.append("dot: best epoch")
        if any(len(group.plotted_runs) > 1 for group in groups):
            notes.append("band: ± std over seeds")
        return "; ".join(notes)


CHARTS = {
    "accuracy": Chart("accuracy, %", {"val_acc": "validation", "train_acc": "training"}, is_fraction=True),
    "loss": Chart("loss, nats", {"val_loss": "validation", "train_loss": "training"}),
    "throughput": Chart("training throughput, images/s", {"images_per_s": ""}),
}


def chart_lines(chart: Chart, groups: Sequence[RunGroup]) -> list[LineSeries]:
    """Return the curves of `chart`, one color for each group; the best epoch is marked on validation curves."""
    scale = 100 if chart.is_fraction else 1
    lines = []
    for group, color in zip(groups, itertools.cycle(LINE_COLORS), strict=False):
        name = group.name if group.finished_runs else f"{group.name} (not finished)"
        for index, (column, label) in enumerate(chart.columns.items()):
            curve = group.curve(column)
            if curve is None:
                continue
            best_epoch = group.best_epoch if column.startswith("val_") else None
            line = LineSeries(
                name=name,
                variant=label,
                color=color,
                is_dashed=index > 0,
                x=curve.epochs,
                y=[scale * mean for mean in curve.mean],
                std=[scale * std for std in curve.std] if curve.std and index == 0 else None,
                marked_index=curve.epochs.index(best_epoch) if best_epoch in curve.epochs else None,
            )
            lines.append(line)
    return lines


def write_report_plots(
    folder: Path, groups: Sequence[RunGroup], misclassified_by_group: Mapping[str, Misclassified]
) -> list[Path]:
    """Write PNG files to `folder`: charts of the curves, the accuracy of each class, and the misclassified images.

    Returns the paths of the files. Raises `DiskError` if a file cannot be written.
    """
    files = []
    for name, chart in CHARTS.items():
        if lines := chart_lines(chart, groups):
            files.append(folder / f"{name}.png")
            plotting.plot_line_chart(files[-1], chart.title, chart.line_style_note(groups), lines)
    per_class = {group.name: group.class_accuracies for group in groups if group.class_accuracies}
    if per_class:
        files.append(folder / "classes.png")
        plotting.plot_fraction_heatmap(files[-1], "test accuracy of each class, %", per_class)
    for number, group in enumerate(groups, start=1):
        misclassified = misclassified_by_group.get(group.name)
        if misclassified is None:
            continue
        safe_name = re.sub(r"[^A-Za-z0-9.=-]+", "-", group.name)[:60].strip("-")
        files.append(folder / f"confusion-{number}-{safe_name}.png")
        plotting.plot_confusion_matrix(files[-1], misclassified.confusion_matrix, misclassified.classes)
        if len(misclassified.images):
            captions = [caption.replace(", not ", "\nnot ") for caption in misclassified.captions()]
            files.append(folder / f"mistakes-{number}-{safe_name}.png")
            plotting.plot_captioned_images(files[-1], misclassified.images, captions, [False] * len(captions))
    return files
