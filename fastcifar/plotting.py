"""Arrays -> PNG. It knows nothing of data sets or runs.

matplotlib is imported when a picture is drawn, and without pyplot: no global state, no display, always Agg.
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
IMAGE_GAP = 2  # pixels of white between images
CELL_INCHES = 0.55  # inches of an image with its gap
ROW_LABEL_INCHES = 1.1  # inches for the names of a grid's rows
TITLE_INCHES = 0.9  # inches for a grid's title and the names of its columns
MAX_GRIDS_PER_ROW = 3  # at most so many grids beside each other
CAPTIONED_IMAGES_PER_ROW = 8  # of captioned images
CHART_WIDTH_INCHES, BAR_INCHES = 8, 0.24  # inches of a chart, and of one bar's height
MAX_ANNOTATED_CLASSES = 20  # classes whose counts a confusion matrix shows
TEXT_COLOR, GRID_COLOR = "#1f2d3a", "#b8c0c8"
GROUP_COLORS = ("#a9cce3", "#5b9bd0", "#2166a5")  # of as many groups; more begin again


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Images uint8 [rows, columns, height, width, 3] under a title, and what their rows and columns are."""

    title: str
    images: np.ndarray
    row_labels: Sequence[str]
    column_labels: Sequence[str]


def plot_image_grids(path: Path, grids: Sequence[ImageGrid]) -> None:
    """Writes the grids, up to three beside each other, to `path`.

    Errors: `UsageError` without matplotlib, `DiskError`.
    """
    stacked = math.ceil(len(grids) / MAX_GRIDS_PER_ROW)
    abreast = math.ceil(len(grids) / stacked)
    lines = [grids[start : start + abreast] for start in range(0, len(grids), abreast)]
    heights = [max(len(grid.images) for grid in line) for line in lines]
    width = abreast * (CELL_INCHES * max(len(grid.column_labels) for grid in grids) + ROW_LABEL_INCHES)
    size = (width, sum(CELL_INCHES * rows + TITLE_INCHES for rows in heights))
    figure = _new_figure(size)
    axes = figure.subplots(stacked, abreast, squeeze=False, height_ratios=heights)
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
    """Writes a picture of images uint8 [n, height, width, 3], each above its caption, red where `marked`, to `path`.

    Errors: `UsageError` without matplotlib, `DiskError`.
    """
    columns = min(len(images), CAPTIONED_IMAGES_PER_ROW)
    rows = math.ceil(len(images) / columns)
    figure = _new_figure((1.2 * max(columns, 2), 1.45 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption, mark in zip(axes.flat, images, captions, highlighted, strict=False):
        axis.imshow(image, interpolation="nearest")
        colour = "tab:red" if mark else "black"
        axis.text(0.5, -0.05, caption, fontsize=8, color=colour, transform=axis.transAxes, ha="center", va="top")
    _save_figure(figure, path)


@dataclass(frozen=True)
class BarPanel:
    """Bars, one for each label: the median as its length, its trials as dots, and a note behind it.

    groups: the bars of one name have one shade.
    """

    title: str
    labels: list[str]
    groups: list[str]
    medians: list[float]
    trials: list[list[float]]
    notes: list[str]


def plot_bar_chart(path: Path, title: str, panels: Sequence[BarPanel]) -> None:
    """Writes panels of horizontal bars, one below the other, to `path`. Errors: as `image_grids`."""
    heights = [len(panel.labels) + 1.2 for panel in panels]
    figure = _new_figure((CHART_WIDTH_INCHES, 0.9 + BAR_INCHES * sum(heights)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, color=TEXT_COLOR)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_bar_panel(axis, panel)
    _save_figure(figure, path)


def _draw_bar_panel(axis: Any, panel: BarPanel) -> None:
    places = range(len(panel.labels))
    shades = dict(zip(dict.fromkeys(panel.groups), itertools.cycle(GROUP_COLORS), strict=False))
    axis.barh(places, panel.medians, height=0.62, color=[shades[group] for group in panel.groups])
    for place, trials, median, note in zip(places, panel.trials, panel.medians, panel.notes, strict=True):
        axis.plot(trials, [place] * len(trials), "o", markersize=3, color=TEXT_COLOR, alpha=0.6, markeredgewidth=0)
        text = f"{format_short_number(median)}  ({note})" if note else format_short_number(median)
        axis.annotate(text, (max(*trials, median), place), (6, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(places, panel.labels, fontsize=7)
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
    """Writes accuracy against confidence and, below it, where the images lie, to `path`. Errors: as `image_grids`.

    `curves`: name -> equal bins of (images, mean confidence, accuracy) from 0 to 1; the means are None without images.
    """
    figure = _new_figure((5, 6))
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), "--", color=GRID_COLOR, linewidth=1, label="as often right as it is sure")
    for (name, bins), shade, mark in zip(curves.items(), (GROUP_COLORS[2], "#d9822b", TEXT_COLOR), "os^", strict=False):
        total = sum(count for count, _, _ in bins)
        filled = [(count / total, sure, right) for count, sure, right in bins if sure is not None and right is not None]
        gap = sum(share * abs(a - b) for share, a, b in filled)
        _, sure, right = zip(*filled, strict=True)
        label = f"{name}, calibration error {gap:.4f}"
        above.plot(sure, right, f"-{mark}", color=shade, markersize=4, linewidth=1.2, label=label)
        edges = [index / len(bins) for index in range(len(bins) + 1)]
        below.stairs([count / total for count, _, _ in bins], edges, color=shade, linewidth=1.2)
    above.set(xlim=(0, 1), ylim=(0, 1))
    above.set_ylabel("accuracy", fontsize=8, color=TEXT_COLOR)
    above.legend(fontsize=7, frameon=False, loc="upper left")
    below.set(ylim=(0, None))
    below.set_xlabel("confidence", fontsize=8, color=TEXT_COLOR)
    below.set_ylabel("share of images", fontsize=8, color=TEXT_COLOR)
    for axis in (above, below):
        _style_axis(axis)
    _save_figure(figure, path)


def plot_confusion_matrix(path: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Writes counts [classes, classes], rows labels and columns predictions, or means of them, to `path`.

    The shade is the root of the share of the row: a linear one would not show the mistakes. Errors: as `image_grids`.
    """
    few = len(classes) <= MAX_ANNOTATED_CLASSES
    side = 1.6 + 0.5 * len(classes) if few else 11
    figure = _new_figure((side, side))
    axis = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axis.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1)
    if few:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.3 else TEXT_COLOR if count else GRID_COLOR
            axis.text(column, row, format_count(count), ha="center", va="center", fontsize=7, color=colour)
    size = 8 if few else 4
    turned: dict[str, Any] = {"rotation": 45, "ha": "left"} if few else {"rotation": 90}
    axis.set_xticks(range(len(classes)), classes, fontsize=size, **turned)
    axis.set_yticks(range(len(classes)), classes, fontsize=size)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_xlabel("the network says", fontsize=8, color=TEXT_COLOR)
    axis.set_ylabel("the label is", fontsize=8, color=TEXT_COLOR)
    axis.spines[:].set_visible(False)
    _save_figure(figure, path)


@dataclass(frozen=True)
class LineSeries:
    """A curve: x and y, in y's unit the standard deviation `std`, and the place in them of a point to mark.

    Lines of one `name` share a colour and an entry in the legend; `what` tells them apart.
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
    """Writes lines over the epochs to `path`, under their title and how they are read. Errors: as `image_grids`."""
    figure = _new_figure((CHART_WIDTH_INCHES, 4.2))
    axis = figure.subplots()
    for line in lines:
        look = {"color": line.color, "linewidth": 1 if line.is_dashed else 1.5}
        axis.plot(line.x, line.y, "--" if line.is_dashed else "-", **look, marker="." if len(line.x) == 1 else "")
        if line.std:
            low, high = ([y + sign * std for y, std in zip(line.y, line.std, strict=True)] for sign in (-1, 1))
            axis.fill_between(line.x, low, high, color=line.color, alpha=0.15, linewidth=0)
        if line.marked_index is not None:
            axis.plot(
                line.x[line.marked_index],
                line.y[line.marked_index],
                "o",
                color=line.color,
                markersize=6,
                markeredgecolor="white",
            )
    names = dict.fromkeys((line.name, line.color) for line in lines)
    for name, colour in names:
        axis.plot([], [], color=colour, linewidth=2, label=_wrap_label(name))
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=TEXT_COLOR)
    axis.set_xlabel(f"epoch   ({caption})" if caption else "epoch", fontsize=7, color=TEXT_COLOR)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: format_short_number(value))
    _style_axis(axis)
    _save_figure(figure, path)


def plot_fraction_heatmap(path: Path, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Writes fractions, row name -> class -> fraction, as shaded cells to `path`. Errors: as `image_grids`."""
    classes = list(dict.fromkeys(name for row in rows.values() for name in row))
    few = len(classes) <= MAX_ANNOTATED_CLASSES
    values = np.array([[100 * row.get(name, np.nan) for name in classes] for row in rows.values()])
    figure = _new_figure((2.6 + (0.6 if few else 0.12) * len(classes), 1.3 + 0.32 * len(rows)))
    axis = figure.subplots()
    shade = axis.imshow(values, cmap="Blues", aspect="auto")
    if few:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if shade.norm(value) > 0.6 else TEXT_COLOR
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=TEXT_COLOR)
    axis.set_xticks(range(len(classes)), classes, fontsize=7 if few else 4, rotation=30 if few else 90, ha="right")
    axis.set_yticks(range(len(rows)), [_wrap_label(name) for name in rows], fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _save_figure(figure, path)


def require_png(path: Path) -> None:
    """Errors: `UsageError` for another suffix and without matplotlib, `DiskError` without the folder."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is not named as a PNG", "give a name that ends in .png")
    import_optional("matplotlib.figure", MATPLOTLIB_REMEDY)
    if not path.parent.is_dir():
        raise DiskError(f"cannot write {path}: no folder {path.parent}", "name a folder that is there")


def create_plots_dir(path: Path) -> None:
    """Makes the folder `path` unless it is there. Errors: `UsageError` without matplotlib, `DiskError`."""
    import_optional("matplotlib.figure", MATPLOTLIB_REMEDY)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make the folder {path}: {error.strerror}", "give another folder") from None


def _wrap_label(name: str) -> str:
    """A name as a few short lines; a dollar in it begins no formula."""
    return "\n".join(textwrap.wrap(name, 34)).replace("$", r"\$")


def _style_axis(axis: Any) -> None:
    """A light grid behind, and no box around."""
    axis.grid(color=GRID_COLOR, linewidth=0.5, alpha=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7, color=GRID_COLOR, labelcolor=TEXT_COLOR)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID_COLOR)


def _new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of `size` in inches."""
    return import_optional("matplotlib.figure", MATPLOTLIB_REMEDY).Figure(figsize=size, dpi=DPI, layout="constrained")


def _save_figure(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", "give a folder that is there") from None


def tile_images(grid: np.ndarray) -> np.ndarray:
    """uint8 [rows, columns, h, w, 3] -> one picture uint8, white between the images."""
    rows, columns, height, width, _ = grid.shape
    picture = np.full((rows, height + IMAGE_GAP, columns, width + IMAGE_GAP, 3), 255, np.uint8)
    picture[:, :height, :, :width] = grid.transpose(0, 2, 1, 3, 4)
    return picture.reshape(rows * (height + IMAGE_GAP), columns * (width + IMAGE_GAP), 3)[:-IMAGE_GAP, :-IMAGE_GAP]


def _image_centers(count: int, size: int) -> np.ndarray:
    return np.arange(count) * (size + IMAGE_GAP) + (size - 1) / 2
