"""Arrays -> PNG. It knows nothing of data sets or runs.

matplotlib is imported when a picture is drawn, and without pyplot: no global state, no display, always Agg.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.device import optional
from fastcifar.errors import DiskError, UsageError
from fastcifar.training.checkpoint import write_atomically

REMEDY = "pip install 'matplotlib>=3.9'"
DPI = 150
GAP = 2  # pixels of white between images
CELL = 0.55  # inches of an image with its gap
NAMES = 1.1  # inches for the names of a grid's rows
TITLE = 0.9  # inches for a grid's title and the names of its columns
ABREAST = 3  # at most so many grids beside each other
COLUMNS = 8  # of captioned images
WIDTH, BAR = 8, 0.24  # inches of a chart, and of one bar's height
INK, GREY = "#1f2d3a", "#b8c0c8"
SHADES = ("#a9cce3", "#5b9bd0", "#2166a5")  # of as many groups; more begin again


@dataclass(frozen=True, eq=False)
class Grid:
    """Images uint8 [rows, columns, height, width, 3] under a title, and what their rows and columns are."""

    title: str
    images: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]


def image_grids(path: Path, grids: Sequence[Grid]) -> None:
    """Writes the grids, up to three beside each other, to `path`.

    Errors: `UsageError` without matplotlib, `DiskError`.
    """
    stacked = math.ceil(len(grids) / ABREAST)
    abreast = math.ceil(len(grids) / stacked)
    lines = [grids[start : start + abreast] for start in range(0, len(grids), abreast)]
    heights = [max(len(grid.images) for grid in line) for line in lines]
    width = abreast * (CELL * max(len(grid.columns) for grid in grids) + NAMES)
    size = (width, sum(CELL * rows + TITLE for rows in heights))
    figure = _figure(size)
    axes = figure.subplots(stacked, abreast, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, grid in zip(axes.flat, grids, strict=False):
        axis.set_axis_on()
        axis.set_anchor("N")
        axis.imshow(tiled(grid.images), interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(grid.title.replace(",", ", "), 34)), fontsize=9, fontweight="bold")
        axis.set_xticks(_centres(grid.images.shape[1], grid.images.shape[3]), grid.columns, fontsize=7)
        axis.set_yticks(_centres(grid.images.shape[0], grid.images.shape[2]), grid.rows, fontsize=7)
        axis.tick_params(length=0, labeltop=True, labelbottom=False)
        axis.spines[:].set_visible(False)
    _write(figure, path)


def captioned_images(path: Path, images: np.ndarray, captions: Sequence[str], marked: Sequence[bool]) -> None:
    """Writes a picture of images uint8 [n, height, width, 3], each above its caption, red where `marked`, to `path`.

    Errors: `UsageError` without matplotlib, `DiskError`.
    """
    columns = min(len(images), COLUMNS)
    rows = math.ceil(len(images) / columns)
    figure = _figure((1.2 * max(columns, 2), 1.45 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, caption, mark in zip(axes.flat, images, captions, marked, strict=False):
        axis.imshow(image, interpolation="nearest")
        colour = "tab:red" if mark else "black"
        axis.text(0.5, -0.05, caption, fontsize=8, color=colour, transform=axis.transAxes, ha="center", va="top")
    _write(figure, path)


@dataclass(frozen=True)
class Panel:
    """Bars, one for each label: the median as its length, its trials as dots, and a note behind it.

    groups: the bars of one name have one shade.
    """

    title: str
    labels: list[str]
    groups: list[str]
    medians: list[float]
    trials: list[list[float]]
    notes: list[str]


def bars(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Writes panels of horizontal bars, one below the other, to `path`. Errors: as `image_grids`."""
    heights = [len(panel.labels) + 1.2 for panel in panels]
    figure = _figure((WIDTH, 0.9 + BAR * sum(heights)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, color=INK)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _bars(axis, panel)
    _write(figure, path)


def _bars(axis: Any, panel: Panel) -> None:
    places = range(len(panel.labels))
    shades = dict(zip(dict.fromkeys(panel.groups), itertools.cycle(SHADES), strict=False))
    axis.barh(places, panel.medians, height=0.62, color=[shades[group] for group in panel.groups])
    for place, trials, median, note in zip(places, panel.trials, panel.medians, panel.notes, strict=True):
        axis.plot(trials, [place] * len(trials), "o", markersize=3, color=INK, alpha=0.6, markeredgewidth=0)
        text = f"{short(median)}  ({note})" if note else short(median)
        axis.annotate(text, (max(*trials, median), place), (6, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(places, panel.labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(itertools.chain(panel.medians, *panel.trials)))
    axis.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.tick_params(axis="x", labelsize=7, color=GREY, labelcolor=INK)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=GREY, linewidth=0.5, alpha=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color(GREY)


def short(value: float) -> str:
    """A figure to read: whole from a hundred on, three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def require_png(path: Path) -> None:
    """Errors: `UsageError` for another suffix and without matplotlib, `DiskError` without the folder."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is not named as a PNG", "give a name that ends in .png")
    optional("matplotlib.figure", REMEDY)
    if not path.parent.is_dir():
        raise DiskError(f"cannot write {path}: no folder {path.parent}", "name a folder that is there")


def _figure(size: tuple[float, float]) -> Any:
    """An empty figure of `size` in inches."""
    return optional("matplotlib.figure", REMEDY).Figure(figsize=size, dpi=DPI, layout="constrained")


def _write(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}", "give a folder that is there") from None


def tiled(grid: np.ndarray) -> np.ndarray:
    """uint8 [rows, columns, h, w, 3] -> one picture uint8, white between the images."""
    rows, columns, height, width, _ = grid.shape
    picture = np.full((rows, height + GAP, columns, width + GAP, 3), 255, np.uint8)
    picture[:, :height, :, :width] = grid.transpose(0, 2, 1, 3, 4)
    return picture.reshape(rows * (height + GAP), columns * (width + GAP), 3)[:-GAP, :-GAP]


def _centres(count: int, size: int) -> np.ndarray:
    return np.arange(count) * (size + GAP) + (size - 1) / 2
