"""Crops, flips and filled boxes on a whole batch, and the random boxes of random erasing.

Images are int32 rows [b,32,96], where column 3 * x + channel holds that channel of pixel x. All operations are exact
and have no Python loop over images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.image_ops import CIFAR_IMAGE_SIZE

LAST_COLUMN = 3 * CIFAR_IMAGE_SIZE - 1

FillColor = tuple[int, int, int]  # 0..255 for each channel

# The fill color of a variant; the variant "mean", not listed, uses the mean color of the data set.
# Mid-gray is 127.5, which rounds to 128.
FILL_COLORS: dict[str, FillColor] = {"zero": (0, 0, 0), "gray": (128, 128, 128)}

# As in torchvision's RandomErasing; the area is a fraction of the image and the aspect ratio is height / width.
ERASE_PROBABILITY = 0.5
MIN_ERASE_AREA = 0.02
ERASE_ASPECT_RANGE = (0.3, 3.3)
MAX_ERASE_ATTEMPTS = 10


def draw_erasing_params(max_area: float, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a box for each of `n` images: corner `y`, `x` and size `h`, `w`, uint8; half of the images have size 0.
    As in torchvision, the area is uniform over MIN_ERASE_AREA..`max_area` of the image and the aspect ratio is
    log-uniform, with up to ten attempts to get a box that is lower and narrower than the image; its position is uniform
    inside the image.
    """
    low, high = np.log(ERASE_ASPECT_RANGE)
    heights, widths = np.zeros((2, n), np.uint8)
    pending = np.flatnonzero(rng.random(n) < ERASE_PROBABILITY)
    for _ in range(MAX_ERASE_ATTEMPTS):
        area = CIFAR_IMAGE_SIZE * CIFAR_IMAGE_SIZE * rng.uniform(MIN_ERASE_AREA, max_area, len(pending))
        aspect = np.exp(rng.uniform(low, high, len(pending)))
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (height < CIFAR_IMAGE_SIZE) & (width < CIFAR_IMAGE_SIZE)
        heights[pending[fits]], widths[pending[fits]] = height[fits], width[fits]
        pending = pending[~fits]
    y, x = (rng.integers(0, CIFAR_IMAGE_SIZE - size, dtype=np.uint8, endpoint=True) for size in (heights, widths))
    return {"y": y, "x": x, "h": heights, "w": widths}


def crop_rows(rows: Tensor, top: Tensor, left: Tensor, pad: int, reflect: bool) -> Tensor:
    """Crop the 32x32 window at (top, left) int32 [b] of the image padded by `pad` pixels, without building that image.

    The padding is black, or with `reflect` mirrored without repeating the edge, as the "reflect" mode of NumPy and
    torch.
    """
    row, column = _row_column_indices(rows)
    y = row + (top[:, None] - pad)
    source = column + 3 * (left[:, None] - pad)
    if reflect:
        channel = _channel_of_column(column)
        y = (CIFAR_IMAGE_SIZE - 1) - ((CIFAR_IMAGE_SIZE - 1) - y.abs()).abs()
        source = torch.where(source < 0, 2 * channel - source, source)
        mirrored = 2 * (LAST_COLUMN - 2 + channel) - source
        return _gather_at(rows, y, torch.where(source > LAST_COLUMN, mirrored, source))
    # The clamps keep reads inside the image; the mask discards the values that were read outside of the window.
    inside = ((y >= 0) & (y < CIFAR_IMAGE_SIZE))[:, :, None] & ((source >= 0) & (source <= LAST_COLUMN))[:, None, :]
    return torch.where(inside, _gather_at(rows, y.clamp(0, CIFAR_IMAGE_SIZE - 1), source.clamp(0, LAST_COLUMN)), 0)


def flip_rows(rows: Tensor, flip: Tensor) -> Tensor:
    """Flip horizontally where `flip`, bool [b], is set."""
    row, column = _row_column_indices(rows)
    mirrored = (LAST_COLUMN - 2) + 2 * _channel_of_column(column) - column  # 3 * (31 - x) + channel
    # Select the column and read once: selecting between two reads would compute a fused chain of operations twice.
    return _gather_at(rows, row[None, :], torch.where(flip[:, None], mirrored, column))


def fill_box(
    rows: Tensor, top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int, color: FillColor
) -> Tensor:
    """Fill a box with one color, as far as it is inside the image.

    `top` and `left` are int32 [b], `height` and `width` int32 [b] or one int. A box of size 0 changes nothing.
    """
    row, column = _row_column_indices(rows)
    box_y, box_column = row - top[:, None], column - 3 * left[:, None]
    height, width = (size if isinstance(size, int) else size[:, None] for size in (height, width))
    inside_rows, inside_columns = (box_y >= 0) & (box_y < height), (box_column >= 0) & (box_column < 3 * width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    # The channels are packed into one integer, a byte each: torch.tensor(color) would be an upload, which waits.
    packed = color[0] | color[1] << 8 | color[2] << 16
    return torch.where(inside, (packed >> (8 * _channel_of_column(column))) & 255, rows)


def _row_column_indices(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row indices int32 [32] and the column indices int32 [96]."""
    row = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)
    return row, torch.arange(3 * CIFAR_IMAGE_SIZE, dtype=torch.int32, device=rows.device)


def _channel_of_column(column: Tensor) -> Tensor:
    """Return column % 3 for columns below 256 by multiplication and shift; CPUs have no vectorized division."""
    return column - 3 * ((column * 171) >> 9)


def _gather_at(rows: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """Return rows[i, y[i, r], columns[i, c]] for all i, r and c; y int32 [b or 1, 32], columns int32 [b or 1, 96]."""
    sample = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return rows[sample[:, None, None], y[:, :, None], columns[:, None, :]]
