"""Plots of arrays and numbers, written as PNG files by matplotlib, which is imported when a plot is drawn.

The functions `plot_...` raise `UsageError` without matplotlib, and `DiskError` if the file cannot be written.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcifar.device import import_optional
from fastcifar.errors import DiskError, UsageError, disk_errors
from fastcifar.files import write_atomically
from fastcifar.format import format_count, format_short_number, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATPLOTLIB_REMEDY = "pip install 'matplotlib>=3.9'"
IMAGE_GAP = 2  # white pixels between images
CELL_INCHES, ROW_LABEL_INCHES, TITLE_INCHES = 0.55, 1.1, 0.9  # in a grid: of an image, row labels, title and labels
CHARACTERS_PER_INCH = 11  # of a bold title
MAX_GRIDS_PER_ROW, CAPTIONED_IMAGES_PER_ROW = 3, 8
CHART_WIDTH_INCHES, BAR_INCHES = 8, 0.24  # width of a chart, height of a bar with its gap
MAX_ANNOTATED_CLASSES = 20  # maximum number of classes for which matrices show the numbers
GRID_COLOR = "#b8c0c8"
GROUP_COLORS = ("#a9cce3", "#5b9bd0", "#2166a5")  # repeated if there are more groups
STYLE = {
    "font.size": 7,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID_COLOR,
    "grid.linewidth": 0.3,
    "lines.markersize": 4,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Images uint8 [rows, columns, height, width, 3] with a title and labels of the rows and columns."""

    title: str
    images: np.ndarray
    row_labels: Sequence[str]
    column_labels: Sequence[str]


def plot_image_grids(path: Path, grids: Sequence[ImageGrid], title: str = "") -> None:
    """Plot grids of images, up to three in a row, below an optional title."""
    num_rows = math.ceil(len(grids) / MAX_GRIDS_PER_ROW)
    num_columns = math.ceil(len(grids) / num_rows)
    starts = range(0, len(grids), num_columns)
    heights = [max(len(grid.images) for grid in grids[start : start + num_columns]) for start in starts]
    width = num_columns * (CELL_INCHES * max(len(grid.column_labels) for grid in grids) + ROW_LABEL_INCHES)
    with _figure(path, width, sum(CELL_INCHES * height + TITLE_INCHES for height in heights)) as figure:
        if title:
            text = _wrap_label(title.replace(",", ", "), int(CHARACTERS_PER_INCH * width))
            figure.suptitle(text, fontsize=9, fontweight="bold")
        axes = figure.subplots(num_rows, num_columns, squeeze=False, height_ratios=heights).ravel()
        for axis, grid in zip(axes, grids, strict=False):
            axis.set_anchor("N")
            axis.imshow(tile_images(grid.images), interpolation="nearest")
            axis.set_title(_wrap_label(grid.title.replace(",", ", ")), loc="center")
            rows, columns, height, width, _ = grid.images.shape
            axis.set_xticks(np.arange(columns) * (width + IMAGE_GAP) + (width - 1) / 2, grid.column_labels)
            axis.set_yticks(np.arange(rows) * (height + IMAGE_GAP) + (height - 1) / 2, grid.row_labels)
            axis.tick_params(labeltop=True, labelbottom=False)
            axis.set_frame_on(False)
        for axis in axes[len(grids) :]:
            axis.set_axis_off()


def tile_images(grid: np.ndarray) -> np.ndarray:
    """Tile images uint8 [rows, columns, height, width, 3] into one uint8 image, with white gaps between them."""
    rows, columns, height, width, _ = grid.shape
    tiled = np.full((rows, height + IMAGE_GAP, columns, width + IMAGE_GAP, 3), 255, np.uint8)
    tiled[:, :height, :, :width] = grid.transpose(0, 2, 1, 3, 4)
    return tiled.reshape(rows * (height + IMAGE_GAP), columns * (width + IMAGE_GAP), 3)[:-IMAGE_GAP, :-IMAGE_GAP]


def plot_captioned_images(path: Path, images: np.ndarray, captions: Sequence[str], highlighted: Sequence[bool]) -> None:
    """Plot images uint8 [n, height, width, 3] with captions below them, in red where `highlighted`."""
    columns = min(len(images), CAPTIONED_IMAGES_PER_ROW)
    rows = math.ceil(len(images) / columns)
    with _figure(path, 1.2 * max(columns, 2), 1.45 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, image, caption, is_highlighted in zip(axes, images, captions, highlighted, strict=False):
            axis.imshow(image, interpolation="nearest")
            color = "tab:red" if is_highlighted else "black"
            axis.text(0.5, -0.05, caption, fontsize=8, color=color, transform=axis.transAxes, ha="center", va="top")


@dataclass(frozen=True)
class BarPanel:
    """Horizontal bars of the medians, colored by group, with trials as dots and a note after each bar."""

    title: str
    labels: list[str]
    groups: list[str]
    medians: list[float]
    trials: list[list[float]]
    notes: list[str]


def plot_bar_chart(path: Path, title: str, panels: Sequence[BarPanel]) -> None:
    """Plot panels of horizontal bars below each other."""
    heights = [len(panel.labels) + 1.2 for panel in panels]
    with _figure(path, CHART_WIDTH_INCHES, 0.9 + BAR_INCHES * sum(heights)) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontsize=8)
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
        for axis, panel in zip(axes.flat, panels, strict=True):
            positions = range(len(panel.labels))
            colors = dict(zip(dict.fromkeys(panel.groups), itertools.cycle(GROUP_COLORS), strict=False))
            axis.barh(positions, panel.medians, height=0.62, color=[colors[group] for group in panel.groups])
            for position, trials, median, note in zip(positions, panel.trials, panel.medians, panel.notes, strict=True):
                axis.plot(trials, [position] * len(trials), "o", markersize=3, color="black", alpha=0.6, mew=0)
                text = f"{format_short_number(median)}  ({note})" if note else format_short_number(median)
                axis.annotate(text, (max(*trials, median), position), (6, 0), textcoords="offset points", va="center")
            axis.set_title(panel.title)
            axis.set_yticks(positions, panel.labels)
            axis.invert_yaxis()
            axis.set_xlim(0, 1.3 * max(itertools.chain(panel.medians, *panel.trials)))
            axis.locator_params(axis="x", nbins=6)
            axis.xaxis.set_major_formatter(lambda value, _: format_short_number(value))
            axis.grid(axis="x")
            axis.spines["bottom"].set_visible(False)


def plot_reliability_diagram(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float | None, float | None]]]
) -> None:
    """Plot the accuracy against the confidence and, below it, the fraction of images in each bin of confidence.

    `curves`: name -> equally wide bins (number of images, mean confidence, accuracy), with None in empty bins.
    """
    with _figure(path, 5, 6) as figure:
        accuracy_axis, count_axis = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        accuracy_axis.plot((0, 1), (0, 1), "--", color=GRID_COLOR, linewidth=1, label="perfect calibration")
        colors = (GROUP_COLORS[2], "#d9822b", "black")
        for (name, bins), color, marker in zip(curves.items(), colors, "os^", strict=False):
            counts, confidences, accuracies = np.array(bins, np.float64).T  # None becomes NaN
            fractions = counts / counts.sum()
            label = f"{name}, calibration error {np.nansum(fractions * abs(confidences - accuracies)):.4f}"
            filled = counts > 0
            accuracy_axis.plot(confidences[filled], accuracies[filled], marker=marker, color=color, label=label)
            count_axis.stairs(fractions, np.linspace(0, 1, len(bins) + 1), color=color, linewidth=1.2)
        accuracy_axis.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        accuracy_axis.legend(loc="upper left")
        count_axis.set(ylim=(0, None), xlabel="confidence", ylabel="fraction of images")
        accuracy_axis.grid()
        count_axis.grid()


def plot_confusion_matrix(path: Path, counts: np.ndarray, classes: Sequence[str], title: str = "") -> None:
    """Plot a confusion matrix of counts or mean counts [classes, classes], with a row for each label."""
    side = 1.6 + 0.5 * len(classes) if len(classes) <= MAX_ANNOTATED_CLASSES else 11
    shades = np.sqrt(counts / counts.sum(1, keepdims=True).clip(1))  # misclassifications are invisible without sqrt
    with _figure(path, side, side) as figure:
        axis = figure.subplots()
        _draw_matrix(axis, shades, np.vectorize(format_count)(counts), classes, classes)
        axis.set(title=title, xlabel="predicted class", ylabel="label")
        axis.tick_params(labeltop=True, labelbottom=False)


def plot_fraction_heatmap(path: Path, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Plot fractions, row name -> class -> fraction, as a heatmap of percentages."""
    classes = list(dict.fromkeys(name for row in rows.values() for name in row))
    percentages = 100 * np.array([[row.get(name, np.nan) for name in classes] for row in rows.values()])
    low, high = np.nanmin(percentages), np.nanmax(percentages)
    shades = (percentages - low) / (high - low or 1)
    class_inches = 0.6 if len(classes) <= MAX_ANNOTATED_CLASSES else 0.12
    with _figure(path, max(2.6 + class_inches * len(classes), 5), 1.3 + 0.32 * len(rows)) as figure:
        axis = figure.subplots()
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
        names = [_escape_formula(shorten(name)) for name in rows]
        _draw_matrix(axis, shades, np.char.mod("%.1f", percentages), names, classes)


def _draw_matrix(
    axis: Axes, shades: np.ndarray, texts: np.ndarray, row_names: Sequence[str], classes: Sequence[str]
) -> None:
    """Draw numbers from 0 to 1 as shades of blue and, if there are few classes, `texts` in the cells."""
    axis.imshow(shades, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    is_annotated = len(classes) <= MAX_ANNOTATED_CLASSES
    if is_annotated:
        for (row, column), text in np.ndenumerate(texts):
            color = "white" if shades[row, column] > 0.6 else "black"
            axis.text(column, row, text, ha="center", va="center", color=color)
    axis.set_xticks(range(len(classes)), classes, fontsize=7 if is_annotated else 4, rotation=90)
    axis.set_yticks(range(len(row_names)), row_names, fontsize=7 if len(row_names) <= MAX_ANNOTATED_CLASSES else 4)
    axis.set_frame_on(False)


@dataclass(frozen=True)
class LineSeries:
    """A line, optionally with the standard deviation of y and a marked point; lines of a `name` share a color."""

    name: str
    variant: str
    color: str
    is_dashed: bool
    x: list[int]
    y: list[float]
    std: list[float] | None
    marked_index: int | None


def plot_line_chart(path: Path, title: str, caption: str, lines: Sequence[LineSeries]) -> None:
    """Plot lines over the epochs; `caption` explains them below."""
    with _figure(path, CHART_WIDTH_INCHES, 4.2) as figure:
        axis = figure.subplots()
        for line in lines:
            style, width = ("--", 1) if line.is_dashed else ("-", 1.5)
            marker = "." if len(line.x) == 1 else ""
            axis.plot(line.x, line.y, style, color=line.color, linewidth=width, marker=marker)
            if line.std:
                low, high = np.subtract(line.y, line.std), np.add(line.y, line.std)
                axis.fill_between(line.x, low, high, color=line.color, alpha=0.15, linewidth=0)
            if line.marked_index is not None:
                x, y = line.x[line.marked_index], line.y[line.marked_index]
                axis.plot(x, y, "o", color=line.color, markersize=6, markeredgecolor="white")
        for name, color in dict.fromkeys((line.name, line.color) for line in lines):
            axis.plot([], [], color=color, linewidth=2, label=_escape_formula(shorten(name)))
        figure.legend(loc="outside right upper")
        axis.set(title=title, xlabel=f"epoch   ({caption})" if caption else "epoch")
        axis.locator_params(axis="x", integer=True)
        axis.yaxis.set_major_formatter(lambda value, _: format_short_number(value))
        axis.grid()


def require_png(path: Path) -> None:
    """Raise the `UsageError` or `DiskError` with which writing a plot to `path` would fail."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is not the name of a PNG file", "choose a file name that ends in .png")
    import_optional("matplotlib.figure", MATPLOTLIB_REMEDY)
    if not path.parent.is_dir():
        raise DiskError(f"cannot write {path}: there is no folder {path.parent}", "choose an existing folder")


def create_plots_dir(path: Path) -> None:
    """Create the folder `path` for plots. Raises `UsageError` without matplotlib, and `DiskError` if creation fails."""
    import_optional("matplotlib.figure", MATPLOTLIB_REMEDY)
    with disk_errors(f"create the folder {path}", "choose another folder"):
        path.mkdir(parents=True, exist_ok=True)


def _wrap_label(text: str, characters: int = 34) -> str:
    """Wrap a text into lines of `characters`, with dollar signs escaped so that they start no formula."""
    return _escape_formula("\n".join(textwrap.wrap(text, characters)))


def _escape_formula(text: str) -> str:
    """Escape dollar signs, so that they start no formula."""
    return text.replace("$", r"\$")


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure of this size in inches, and write it to `path` at the end of the `with` block."""
    library = import_optional("matplotlib.figure", MATPLOTLIB_REMEDY)  # not pyplot, which may need a display
    buffer = io.BytesIO()
    with import_optional("matplotlib", MATPLOTLIB_REMEDY).rc_context(STYLE):
        figure = library.Figure(figsize=(width, height), dpi=150, layout="constrained")
        yield figure
        figure.savefig(buffer, format="png")
    with disk_errors(f"write {path}", "choose an existing folder"):
        write_atomically(path, buffer.getvalue())
