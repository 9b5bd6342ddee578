"""Plots of arrays and numbers, written as PNG files.

matplotlib is imported only when a plot is drawn, and without pyplot: there is no global state, no display is needed,
and the backend is always Agg.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.device import import_optional
from fastcifar.errors import DiskError, UsageError
from fastcifar.files import write_atomically
from fastcifar.format import format_count, format_short_number

MATPLOTLIB_REMEDY = "pip install 'matplotlib>=3.9'"
DPI = 150
IMAGE_GAP = 2  # white pixels between images
CELL_INCHES = 0.55  # size of an image with its gap
ROW_LABEL_INCHES = 1.1  # width of the row labels of a grid
TITLE_INCHES = 0.9  # height of the title and the column labels of a grid
MAX_GRIDS_PER_ROW = 3
CAPTIONED_IMAGES_PER_ROW = 8
CHART_WIDTH_INCHES, BAR_INCHES = 8, 0.24  # width of a chart, height of a bar with its gap
MAX_ANNOTATED_CLASSES = 20  # maximum number of classes for which matrices show the numbers
TEXT_COLOR, GRID_COLOR = "#1f2d3a", "#b8c0c8"
GROUP_COLORS = ("#a9cce3", "#5b9bd0", "#2166a5")  # repeated if there are more groups


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Images uint8 [rows, columns, height, width, 3] with a title and labels of the rows and columns."""

    title: str
    images: np.ndarray
    row_labels: Sequence[str]
    column_labels: Sequence[str]


def plot_image_grids(path: Path, grids: Sequence[ImageGrid]) -> None:
    """Plot grids of images, up to three in a row.

    Raises `UsageError` if matplotlib is not installed and `DiskError` if `path` cannot be written.
    """
    num_rows = math.ceil(len(grids) / MAX_GRIDS_PER_ROW)
    num_columns = math.ceil(len(grids) / num_rows)
    rows = [grids[start : start + num_columns] for start in range(0, len(grids), num_columns)]
    heights = [max(len(grid.images) for grid in row) for row in rows]
    width = num_columns * (CELL_INCHES * max(len(grid.column_labels) for grid in grids) + ROW_LABEL_INCHES)
    figure = _new_figure((width, sum(CELL_INCHES * height + TITLE_INCHES for height in heights)))
    axes = figure.subplots(num_rows, num_columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, grid in zip(axes.flat, grids, strict=False):
        axis.set_axis_on()
        axis.set_anchor("N")
        axis.imshow(tile_images(grid.images), interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(grid.title.replace(",", ", "), 34)), fontsize=9, fontweight="bold")
        axis.set_xticks(_image_centers(grid.images.shape[1], grid.images.shape[3]), grid.column_labels, fontsize=7)
        axis.set_yticks(_image_centers(grid.images.shape[0], grid.images.shape[2]), grid.row_labels, fontsize=7)
        axis.tick_params(length=0, labeltop=True, labelbottom=False)
        axis.spines[:].set_visible(False)
    _save_figure(figure, path)


def plot_captioned_images(path: Path, images: np.ndarray, captions: Sequence[str], highlighted: Sequence[bool]) -> None:
    """Plot images uint8 [n, height, width, 3] with captions below them, in red where `highlighted`.

    Raises `UsageError` if matplotlib is not installed and `DiskError` if `path` cannot be written.
    """
    columns = min(len(images), CAPTIONED_IMAGES_PER_ROW)
    rows = math.ceil(len(images) / columns)
    figure = _new_figure((1.2 * max(columns, 2), 1.45 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption, is_highlighted in zip(axes.flat, images, captions, highlighted, strict=False):
        axis.imshow(image, interpolation="nearest")
        color = "tab:red" if is_highlighted else "black"
        axis.text(0.5, -0.05, caption, fontsize=8, color=color, transform=axis.transAxes, ha="center", va="top")
    _save_figure(figure, path)


@dataclass(frozen=True)
class BarPanel:
    """Horizontal bars, one per label, whose lengths are medians; the trials are dots, and a note follows each bar.

    Bars of the same group have the same color.
    """

    title: str
    labels: list[str]
    groups: list[str]
    medians: list[float]
    trials: list[list[float]]
    notes: list[str]


def plot_bar_chart(path: Path, title: str, panels: Sequence[BarPanel]) -> None:
    """Plot panels of horizontal bars below each other. Raises the errors of `plot_image_grids`."""
    heights = [len(panel.labels) + 1.2 for panel in panels]
    figure = _new_figure((CHART_WIDTH_INCHES, 0.9 + BAR_INCHES * sum(heights)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, color=TEXT_COLOR)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_bar_panel(axis, panel)
    _save_figure(figure, path)


def _draw_bar_panel(axis: Any, panel: BarPanel) -> None:
    positions = range(len(panel.labels))
    colors = dict(zip(dict.fromkeys(panel.groups), itertools.cycle(GROUP_COLORS), strict=False))
    axis.barh(positions, panel.medians, height=0.62, color=[colors[group] for group in panel.groups])
    for position, trials, median, note in zip(positions, panel.trials, panel.medians, panel.notes, strict=True):
        axis.plot(trials, [position] * len(trials), "o", markersize=3, color=TEXT_COLOR, alpha=0.6, markeredgewidth=0)
        text = f"{format_short_number(median)}  ({note})" if note else format_short_number(median)
        end = (max(*trials, median), position)
        axis.annotate(text, end, (6, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(positions, panel.labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(itertools.chain(panel.medians, *panel.trials)))
    axis.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter(lambda value, _: format_short_number(value))
    axis.tick_params(axis="x", labelsize=7, color=GRID_COLOR, labelcolor=TEXT_COLOR)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=GRID_COLOR, linewidth=0.5, alpha=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color(GRID_COLOR)


def plot_reliability_diagram(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float | None, float | None]]]
) -> None:
    """Plot the accuracy against the confidence and, below it, the fraction of images in each bin of confidence.

    `curves` maps names to equally wide bins of (number of images, mean confidence, accuracy) from 0 to 1; mean
    confidence and accuracy are None in an empty bin. Raises the errors of `plot_image_grids`.
    """
    figure = _new_figure((5, 6))
    accuracy_axis, count_axis = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    accuracy_axis.plot((0, 1), (0, 1), "--", color=GRID_COLOR, linewidth=1, label="perfect calibration")
    colors = (GROUP_COLORS[2], "#d9822b", TEXT_COLOR)
    for (name, bins), color, marker in zip(curves.items(), colors, "os^", strict=False):
        total = sum(count for count, _, _ in bins)
        fractions = [count / total for count, _, _ in bins]
        filled = [(n / total, conf, acc) for n, conf, acc in bins if conf is not None and acc is not None]
        calibration_error = sum(fraction * abs(conf - acc) for fraction, conf, acc in filled)
        _, confidences, accuracies = zip(*filled, strict=True)
        label = f"{name}, calibration error {calibration_error:.4f}"
        accuracy_axis.plot(confidences, accuracies, f"-{marker}", color=color, markersize=4, linewidth=1.2, label=label)
        edges = [index / len(bins) for index in range(len(bins) + 1)]
        count_axis.stairs(fractions, edges, color=color, linewidth=1.2)
    accuracy_axis.set(xlim=(0, 1), ylim=(0, 1))
    accuracy_axis.set_ylabel("accuracy", fontsize=8, color=TEXT_COLOR)
    accuracy_axis.legend(fontsize=7, frameon=False, loc="upper left")
    count_axis.set(ylim=(0, None))
    count_axis.set_xlabel("confidence", fontsize=8, color=TEXT_COLOR)
    count_axis.set_ylabel("fraction of images", fontsize=8, color=TEXT_COLOR)
    for axis in (accuracy_axis, count_axis):
        _style_axis(axis)
    _save_figure(figure, path)


def plot_confusion_matrix(path: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Plot a confusion matrix of counts or mean counts [classes, classes], with a row for each label.

    The color is the square root of the fraction of the row, because misclassifications would be invisible on a linear
    scale. Raises the errors of `plot_image_grids`.
    """
    is_annotated = len(classes) <= MAX_ANNOTATED_CLASSES
    side = 1.6 + 0.5 * len(classes) if is_annotated else 11
    figure = _new_figure((side, side))
    axis = figure.subplots()
    fractions = counts / counts.sum(1, keepdims=True).clip(1)
    axis.imshow(fractions**0.5, cmap="Blues", vmin=0, vmax=1)
    if is_annotated:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.3 else TEXT_COLOR if count else GRID_COLOR
            axis.text(column, row, format_count(count), ha="center", va="center", fontsize=7, color=color)
    size = 8 if is_annotated else 4
    rotation: dict[str, Any] = {"rotation": 45, "ha": "left"} if is_annotated else {"rotation": 90}
    axis.set_xticks(range(len(classes)), classes, fontsize=size, **rotation)
    axis.set_yticks(range(len(classes)), classes, fontsize=size)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_xlabel("predicted class", fontsize=8, color=TEXT_COLOR)
    axis.set_ylabel("label", fontsize=8, color=TEXT_COLOR)
    axis.spines[:].set_visible(False)
    _save_figure(figure, path)


@dataclass(frozen=True)
class LineSeries:
    """A line with an optional standard deviation `std` of y and the index of a point to mark.

    Lines of the same `name` share a color and a legend entry; `variant` distinguishes them.
    """

    name: str
    variant: str
    color: str
    is_dashed: bool
    x: list[int]
    y: list[float]
    std: list[float] | None
    marked_index: int | None


def plot_line_chart(path: Path, title: str, caption: str, lines: Sequence[LineSeries]) -> None:
    """Plot lines over the epochs; `caption` explains them below. Raises the errors of `plot_image_grids`."""
    figure = _new_figure((CHART_WIDTH_INCHES, 4.2))
    axis = figure.subplots()
    for line in lines:
        style, width = ("--", 1) if line.is_dashed else ("-", 1.5)
        marker = "." if len(line.x) == 1 else ""
        axis.plot(line.x, line.y, style, color=line.color, linewidth=width, marker=marker)
        if line.std:
            low, high = ([y + sign * std for y, std in zip(line.y, line.std, strict=True)] for sign in (-1, 1))
            axis.fill_between(line.x, low, high, color=line.color, alpha=0.15, linewidth=0)
        if line.marked_index is not None:
            x, y = line.x[line.marked_index], line.y[line.marked_index]
            axis.plot(x, y, "o", color=line.color, markersize=6, markeredgecolor="white")
    for name, color in dict.fromkeys((line.name, line.color) for line in lines):
        axis.plot([], [], color=color, linewidth=2, label=_wrap_label(name))
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=TEXT_COLOR)
    axis.set_xlabel(f"epoch   ({caption})" if caption else "epoch", fontsize=7, color=TEXT_COLOR)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: format_short_number(value))
    _style_axis(axis)
    _save_figure(figure, path)


def plot_fraction_heatmap(path: Path, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Plot fractions, row name -> class -> fraction, as a heatmap. Raises the errors of `plot_image_grids`."""
    classes = list(dict.fromkeys(name for row in rows.values() for name in row))
    is_annotated = len(classes) <= MAX_ANNOTATED_CLASSES
    percentages = np.array([[100 * row.get(name, np.nan) for name in classes] for row in rows.values()])
    figure = _new_figure((2.6 + (0.6 if is_annotated else 0.12) * len(classes), 1.3 + 0.32 * len(rows)))
    axis = figure.subplots()
    heatmap = axis.imshow(percentages, cmap="Blues", aspect="auto")
    if is_annotated:
        for (row, column), percentage in np.ndenumerate(percentages):
            color = "white" if heatmap.norm(percentage) > 0.6 else TEXT_COLOR
            axis.text(column, row, f"{percentage:.1f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=TEXT_COLOR)
    size, rotation = (7, 30) if is_annotated else (4, 90)
    axis.set_xticks(range(len(classes)), classes, fontsize=size, rotation=rotation, ha="right")
    axis.set_yticks(range(len(rows)), [_wrap_label(name) for name in rows], fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _save_figure(figure, path)


def require_png(path: Path) -> None:
    """Check that a plot can be written to `path`.

    Raises `UsageError` if the suffix is not .png or matplotlib is not installed, and `DiskError` if the folder does
    not exist.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is not the name of a PNG file", "choose a file name that ends in .png")
    import_optional("matplotlib.figure", MATPLOTLIB_REMEDY)
    if not path.parent.is_dir():
        raise DiskError(f"cannot write {path}: there is no folder {path.parent}", "choose an existing folder")


def create_plots_dir(path: Path) -> None:
    """Create the folder `path` if it does not exist.

    Raises `UsageError` if matplotlib is not installed and `DiskError` if the folder cannot be created.
    """
    import_optional("matplotlib.figure", MATPLOTLIB_REMEDY)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot create the folder {path}: {error.strerror}", "choose another folder") from None


def _wrap_label(name: str) -> str:
    """Wrap a name into short lines, with dollar signs escaped so that they start no formula."""
    return "\n".join(textwrap.wrap(name, 34)).replace("$", r"\$")


def _style_axis(axis: Any) -> None:
    """Draw a light grid behind the data, and no frame."""
    axis.grid(color=GRID_COLOR, linewidth=0.5, alpha=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7, color=GRID_COLOR, labelcolor=TEXT_COLOR)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID_COLOR)


def _new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of `size` (width, height) in inches."""
    return import_optional("matplotlib.figure", MATPLOTLIB_REMEDY).Figure(figsize=size, dpi=DPI, layout="constrained")


def _save_figure(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", "choose an existing folder") from None


def tile_images(grid: np.ndarray) -> np.ndarray:
    """Tile images uint8 [rows, columns, height, width, 3] into one uint8 image, with white gaps between them."""
    rows, columns, height, width, _ = grid.shape
    tiled = np.full((rows, height + IMAGE_GAP, columns, width + IMAGE_GAP, 3), 255, np.uint8)
    tiled[:, :height, :, :width] = grid.transpose(0, 2, 1, 3, 4)
    return tiled.reshape(rows * (height + IMAGE_GAP), columns * (width + IMAGE_GAP), 3)[:-IMAGE_GAP, :-IMAGE_GAP]


def _image_centers(count: int, size: int) -> np.ndarray:
    return np.arange(count) * (size + IMAGE_GAP) + (size - 1) / 2
