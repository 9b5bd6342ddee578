"""Chunk sizes and output tensors of the fused operators, for `fused_ops` and for their Triton kernels.

A feature map of H * W positions is processed in chunks of consecutive positions; the last chunk of an image may be
shorter. One program of a kernel processes a tile: one chunk of one image, and some of its channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_TILE_ELEMENTS = 8192
MAX_TILE_CHANNELS = 64


def choose_tile_channels(channels: int) -> int:
    """Channels of a kernel's tile: the smallest power of two that covers `channels`, at most 64."""
    return min(MAX_TILE_CHANNELS, _next_power_of_two(channels))


def choose_chunk_size(x: Tensor) -> int:
    """Positions of a chunk of x [n, C, H, W]: a power of two that limits a kernel's tile to 8,192 elements."""
    positions = _next_power_of_two(x.shape[2] * x.shape[3])
    return min(positions, MAX_TILE_ELEMENTS // choose_tile_channels(x.shape[1]))


def empty_chunk_sums(x: Tensor, chunk: int) -> Tensor:
    """Uninitialized float32 [n, S, C]: one value for each image, chunk and channel of x [n, C, H, W], S chunks each."""
    num_chunks = math.ceil(x.shape[2] * x.shape[3] / chunk)
    return torch.empty(x.shape[0], num_chunks, x.shape[1], dtype=torch.float32, device=x.device)


def empty_channels_last_like(x: Tensor) -> Tensor:
    """Uninitialized tensor with the shape, dtype and device of x [n, C, H, W], in channels_last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def _next_power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
