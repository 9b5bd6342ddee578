"""Windows of a batch: cut from padded images, mirrored, or filled with one colour; where random erasing has its own.

On int32 rows [b,32,96], whose column is 3 * x + channel. Exact, and without a loop over images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.image_ops import CIFAR_IMAGE_SIZE

LAST_COLUMN = 3 * CIFAR_IMAGE_SIZE - 1  # the last column of a row

RGBColor = tuple[int, int, int]

# What a word fills with; "mean" is the data set's own. Mid-gray is 127.5, and 128 is its nearest even byte.
FILL_COLORS: dict[str, RGBColor] = {"zero": (0, 0, 0), "gray": (128, 128, 128)}

# torchvision's RandomErasing: the share of images, the smallest share of the area, aspects (height / width), tries
ERASE_PROBABILITY = 0.5
MIN_ERASE_AREA = 0.02
ERASE_ASPECT_RANGE = (0.3, 3.3)
MAX_ERASE_ATTEMPTS = 10


def draw_erasing_params(max_area: float, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A box for each of `n` images: its corner `y`, `x` and its size `h`, `w`, uint8; 0 for half of them, without one.

    As torchvision draws it: the area is uniform from SMALLEST to `largest` of the image and the aspect log-uniform, up
    to ten times until the box is smaller than the image both ways; then its place is uniform inside.
    """
    low, high = np.log(ERASE_ASPECT_RANGE)
    heights, widths = np.zeros((2, n), np.uint8)
    without = np.flatnonzero(rng.random(n) < ERASE_PROBABILITY)
    for _ in range(MAX_ERASE_ATTEMPTS):
        area = CIFAR_IMAGE_SIZE * CIFAR_IMAGE_SIZE * rng.uniform(MIN_ERASE_AREA, max_area, len(without))
        aspect = np.exp(rng.uniform(low, high, len(without)))
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (height < CIFAR_IMAGE_SIZE) & (width < CIFAR_IMAGE_SIZE)
        heights[without[fits]], widths[without[fits]] = height[fits], width[fits]
        without = without[~fits]
    y, x = (rng.integers(0, CIFAR_IMAGE_SIZE - size, dtype=np.uint8, endpoint=True) for size in (heights, widths))
    return {"y": y, "x": x, "h": heights, "w": widths}


def crop_rows(rows: Tensor, top: Tensor, left: Tensor, pad: int, reflect: bool) -> Tensor:
    """The 32x32 window at (top, left) int32 [b] of the image padded by `pad`, without building the padded image.

    Black outside, or mirrored without repeating the edge, as numpy's and torch's "reflect".
    """
    row, column = _row_column_indices(rows)
    y = row + (top[:, None] - pad)
    at = column + 3 * (left[:, None] - pad)
    if reflect:
        channel = _channel_of_column(column)
        y = (CIFAR_IMAGE_SIZE - 1) - ((CIFAR_IMAGE_SIZE - 1) - y.abs()).abs()
        at = torch.where(at < 0, 2 * channel - at, at)
        return _gather_at(rows, y, torch.where(at > LAST_COLUMN, 2 * (LAST_COLUMN - 2 + channel) - at, at))
    # The clamps keep the read inside the image where the mask discards what was read.
    inside = ((y >= 0) & (y < CIFAR_IMAGE_SIZE))[:, :, None] & ((at >= 0) & (at <= LAST_COLUMN))[:, None, :]
    return torch.where(inside, _gather_at(rows, y.clamp(0, CIFAR_IMAGE_SIZE - 1), at.clamp(0, LAST_COLUMN)), 0)


def flip_rows(rows: Tensor, flip: Tensor) -> Tensor:
    """Left and right exchanged where `flip`, bool [b], is set."""
    row, column = _row_column_indices(rows)
    mirrored = (LAST_COLUMN - 2) + 2 * _channel_of_column(column) - column  # 3 * (31 - x) + channel
    # One read at a chosen column, not a choice between two reads: a fused chain of ops would be computed twice.
    return _gather_at(rows, row[None, :], torch.where(flip[:, None], mirrored, column))


def fill_box(
    rows: Tensor, top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int, color: RGBColor
) -> Tensor:
    """int32 rows [b,32,96] with a box in one colour, as far as it is inside; each side of it int32 [b], sizes or one.

    A box of no size changes nothing.
    """
    row, column = _row_column_indices(rows)
    y, at = row - top[:, None], column - 3 * left[:, None]
    height, width = (size if isinstance(size, int) else size[:, None] for size in (height, width))
    inside = ((y >= 0) & (y < height))[:, :, None] & ((at >= 0) & (at < 3 * width))[:, None, :]
    # The colours ride in one integer, a byte each: torch.tensor(colour) would be an upload, which waits.
    packed = color[0] | color[1] << 8 | color[2] << 16
    return torch.where(inside, (packed >> (8 * _channel_of_column(column))) & 255, rows)


def _row_column_indices(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The row numbers int32 [32] and the column numbers int32 [96] (column = 3 * x + channel)."""
    row = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)
    return row, torch.arange(3 * CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)


def _channel_of_column(column: Tensor) -> Tensor:
    """column % 3 for columns below 256: a multiplication and a shift, since a division is not vectorised on a CPU."""
    return column - 3 * ((column * 171) >> 9)


def _gather_at(rows: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """rows[i, y[i, row], at[i, column]] for all i, rows and columns; y int32 [b or 1, 32], at int32 [b or 1, 96]."""
    sample = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return rows[sample[:, None, None], y[:, :, None], columns[:, None, :]]
