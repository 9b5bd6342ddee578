"""The pictures of a report: which columns of metrics.csv make which chart, in which colours; rows -> PNG files.

The page draws the same charts; how a PNG is drawn is in `plots`.
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

# Okabe and Ito's colours, which every eye tells apart, without yellow and black, and three more for longer tables; they
# are seen on white and on black, and after the last they begin again.
LINE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#808080", "#8c6bb1", "#a6761d")


@dataclass(frozen=True)
class Chart:
    """columns: of metrics.csv; the first one's lines are whole, the second one's dashed."""

    title: str
    columns: dict[str, str]
    is_fraction: bool = False

    def line_style_note(self, rows: Sequence[RunGroup]) -> str:
        """What the kinds of lines mean, for the reader of this chart of `rows`."""
        kinds = zip(self.columns.values(), ("whole line", "dashed line"), strict=False)
        said = [f"{what}: {kind}" for what, kind in kinds if what]
        if any(column.startswith("val_") for column in self.columns):
            said.append("dot: best epoch")
        if any(len(row.plotted_runs) > 1 for row in rows):
            said.append("band: ± std over seeds")
        return "; ".join(said)


CHARTS = {
    "accuracy": Chart("accuracy, %", {"val_acc": "validation", "train_acc": "training"}, is_fraction=True),
    "loss": Chart("loss, nats", {"val_loss": "validation", "train_loss": "training"}),
    "throughput": Chart("images/s in training", {"images_per_s": ""}),
}


def chart_lines(chart: Chart, rows: Sequence[RunGroup]) -> list[LineSeries]:
    """The curves of `chart`, each row in its colour; validation's have the best epoch marked."""
    found = []
    for row, colour in zip(rows, itertools.cycle(LINE_COLORS), strict=False):
        name = row.name if row.finished_runs else f"{row.name} (not finished)"
        for place, (column, what) in enumerate(chart.columns.items()):
            curve = row.curve(column)
            if curve is None:
                continue
            scale = 100 if chart.is_fraction else 1
            best = row.best_epoch if column.startswith("val_") else None
            found.append(
                LineSeries(
                    name=name,
                    variant=what,
                    color=colour,
                    is_dashed=place > 0,
                    x=curve.epochs,
                    y=[scale * mean for mean in curve.mean],
                    std=[scale * std for std in curve.std] if curve.std and place == 0 else None,
                    marked_index=curve.epochs.index(best) if best in curve.epochs else None,
                )
            )
    return found


def write_report_plots(
    folder: Path, rows: Sequence[RunGroup], misclassified_by_row: Mapping[str, Misclassified]
) -> list[Path]:
    """Writes the charts that there are curves for, the accuracy of each class, and what `seen` shows of each row.

    Returns the files. Errors: `DiskError`.
    """
    files = []
    for name, chart in CHARTS.items():
        if found := chart_lines(chart, rows):
            files.append(folder / f"{name}.png")
            plotting.plot_line_chart(files[-1], chart.title, chart.line_style_note(rows), found)
    by_class = {row.name: shares for row in rows if (shares := row.per_class_accuracy())}
    if by_class:
        files.append(folder / "classes.png")
        plotting.plot_fraction_heatmap(files[-1], "test accuracy of each class, %", by_class)
    for place, row in enumerate(rows):
        if mistakes := misclassified_by_row.get(row.name):
            files += _write_misclassified_plots(folder, f"{place + 1}-{_safe_file_name(row.name)}.png", mistakes)
    return files


def _write_misclassified_plots(folder: Path, suffix: str, misclassified: Misclassified) -> list[Path]:
    files = [folder / f"confusion-{suffix}"]
    plotting.plot_confusion_matrix(files[0], misclassified.confusion_matrix, misclassified.classes)
    if len(misclassified.images):
        captions = [caption.replace(", not ", "\nnot ") for caption in misclassified.captions()]
        files.append(folder / f"mistakes-{suffix}")
        plotting.plot_captioned_images(files[1], misclassified.images, captions, [False] * len(captions))
    return files


def _safe_file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", name)[:60].strip("-")
