"""Arrays -> PNG. It knows nothing of data sets or runs.

matplotlib is imported when a picture is drawn, and without pyplot: no global state, no display, always Agg.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
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
ABREAST = 3  # at most so many grids beside each other
COLUMNS = 8  # of captioned images


def image_grids(
    path: Path, grids: Sequence[tuple[str, np.ndarray]], row_names: Sequence[str], column_names: Sequence[str]
) -> None:
    """Writes grids of images, each under its title, with the same names of rows and columns, to `path`.

    grids: title and uint8 [rows, columns, height, width, 3]. Errors: `UsageError` without matplotlib, `DiskError`.
    """
    stacked = math.ceil(len(grids) / ABREAST)
    abreast = math.ceil(len(grids) / stacked)
    size = (abreast * (CELL * len(column_names) + 0.3) + 1, stacked * (CELL * len(row_names) + 0.8))
    figure = _figure(size)
    axes = figure.subplots(stacked, abreast, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (title, grid) in enumerate(grids):
        axis = axes.flat[place]
        axis.set_axis_on()
        axis.imshow(tiled(grid), interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(title.replace(",", ", "), 34)), fontsize=9, fontweight="bold")
        axis.set_xticks(_centres(grid.shape[1], grid.shape[3]), column_names, fontsize=7)
        shown = row_names if place % abreast == 0 else [""] * len(grid)
        axis.set_yticks(_centres(grid.shape[0], grid.shape[2]), shown, fontsize=8)
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
