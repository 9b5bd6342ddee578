"""Windows of a batch: cut from padded images, mirrored, or filled with one colour; where random erasing has its own.

On int32 rows [b,32,96], whose column is 3 * x + channel. Exact, and without a loop over images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.image_ops import SIDE

LAST = 3 * SIDE - 1  # the last column of a row

Colour = tuple[int, int, int]

# What a word fills with; "mean" is the data set's own. Mid-grey is 127.5, and 128 is its nearest even byte.
COLOURS: dict[str, Colour] = {"zero": (0, 0, 0), "grey": (128, 128, 128)}

# torchvision's RandomErasing: the share of images, the smallest share of the area, aspects (height / width), tries
ERASED = 0.5
SMALLEST = 0.02
ASPECTS = (0.3, 3.3)
TRIES = 10


def draw_erasing(largest: float, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """A box for each of `n` images: its corner `y`, `x` and its size `h`, `w`, uint8; 0 for half of them, without one.

    As torchvision draws it: the area is uniform from SMALLEST to `largest` of the image and the aspect log-uniform, up
    to ten times until the box is smaller than the image both ways; then its place is uniform inside.
    """
    low, high = np.log(ASPECTS)
    heights, widths = np.zeros((2, n), np.uint8)
    without = np.flatnonzero(random.random(n) < ERASED)
    for _ in range(TRIES):
        area = SIDE * SIDE * random.uniform(SMALLEST, largest, len(without))
        aspect = np.exp(random.uniform(low, high, len(without)))
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (height < SIDE) & (width < SIDE)
        heights[without[fits]], widths[without[fits]] = height[fits], width[fits]
        without = without[~fits]
    y, x = (random.integers(0, SIDE - size, dtype=np.uint8, endpoint=True) for size in (heights, widths))
    return {"y": y, "x": x, "h": heights, "w": widths}


def cut(rows: Tensor, top: Tensor, left: Tensor, pad: int, reflect: bool) -> Tensor:
    """The 32x32 window at (top, left) int32 [b] of the image padded by `pad`, without building the padded image.

    Black outside, or mirrored without repeating the edge, as numpy's and torch's "reflect".
    """
    row, column = _axes(rows)
    y = row + (top[:, None] - pad)
    at = column + 3 * (left[:, None] - pad)
    if reflect:
        channel = _channel(column)
        y = (SIDE - 1) - ((SIDE - 1) - y.abs()).abs()
        at = torch.where(at < 0, 2 * channel - at, at)
        return _take(rows, y, torch.where(at > LAST, 2 * (LAST - 2 + channel) - at, at))
    # The clamps keep the read inside the image where the mask discards what was read.
    inside = ((y >= 0) & (y < SIDE))[:, :, None] & ((at >= 0) & (at <= LAST))[:, None, :]
    return torch.where(inside, _take(rows, y.clamp(0, SIDE - 1), at.clamp(0, LAST)), 0)


def mirror(rows: Tensor, flip: Tensor) -> Tensor:
    """Left and right exchanged where `flip`, bool [b], is set."""
    row, column = _axes(rows)
    mirrored = (LAST - 2) + 2 * _channel(column) - column  # 3 * (31 - x) + channel
    # One read at a chosen column, not a choice between two reads: a fused chain of ops would be computed twice.
    return _take(rows, row[None, :], torch.where(flip[:, None], mirrored, column))


def fill_box(
    rows: Tensor, top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int, colour: Colour
) -> Tensor:
    """int32 rows [b,32,96] with a box in one colour, as far as it is inside; each side of it int32 [b], sizes or one.

    A box of no size changes nothing.
    """
    row, column = _axes(rows)
    y, at = row - top[:, None], column - 3 * left[:, None]
    height, width = (size if isinstance(size, int) else size[:, None] for size in (height, width))
    inside = ((y >= 0) & (y < height))[:, :, None] & ((at >= 0) & (at < 3 * width))[:, None, :]
    # The colours ride in one integer, a byte each: torch.tensor(colour) would be an upload, which waits.
    packed = colour[0] | colour[1] << 8 | colour[2] << 16
    return torch.where(inside, (packed >> (8 * _channel(column))) & 255, rows)


def _axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The row numbers int32 [32] and the column numbers int32 [96] (column = 3 * x + channel)."""
    row = torch.arange(SIDE, dtype=torch.int32, device=rows.device)
    return row, torch.arange(3 * SIDE, dtype=torch.int32, device=rows.device)


def _channel(column: Tensor) -> Tensor:
    """column % 3 for columns below 256: a multiplication and a shift, since a division is not vectorised on a CPU."""
    return column - 3 * ((column * 171) >> 9)


def _take(rows: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """rows[i, y[i, row], at[i, column]] for all i, rows and columns; y int32 [b or 1, 32], at int32 [b or 1, 96]."""
    sample = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return rows[sample[:, None, None], y[:, :, None], at[:, None, :]]
