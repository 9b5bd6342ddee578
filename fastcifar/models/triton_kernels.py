"""The passes of `ops.py` as Triton kernels, one launch each, for CUDA tensors. Imported only when one is to run.

A program works on one tile: the positions of one chunk of one image, and `block` channels. Everything is computed in
float32 and rounded once, when it is written. Nothing here knows of autograd, modules or statistics of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar.models.fused_ops import choose_chunk_size, empty_channels_last_like, empty_chunk_sums, next_power_of_two

NUM_WARPS = 8  # 32 elements of a full tile for a thread


@triton.jit
def _tile_offsets(P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of the tile's elements in a map, which of them exist, and the tile's channels."""
    positions = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (positions < P)[:, None] & (channels < C)[None, :]
    image = tl.program_id(1).to(tl.int64)
    return (image * P + positions[:, None]) * C + channels[None, :], inside, channels


@triton.jit
def _load_factor(pointer, stride, channels, C: tl.constexpr):
    """A factor of the tile's image and channels as a row."""
    return tl.load(pointer + tl.program_id(1) * stride + channels, mask=channels < C, other=0.0)[None, :]


@triton.jit
def _store_sums(pointer, values, channels, C: tl.constexpr):
    """One value for each of the tile's channels into [n, S, C]."""
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(pointer + row * C + channels, values, mask=channels < C)


@triton.jit
def chunk_moments_kernel(
    x_ptr, means_ptr, squares_ptr, P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """`ops.moments`."""
    offsets, inside, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(P - tl.program_id(0) * CHUNK, CHUNK)
    means = tl.sum(x, 0) / count
    deviations = tl.where(inside, x - means[None, :], 0.0)
    _store_sums(means_ptr, means, channels, C)
    _store_sums(squares_ptr, tl.sum(deviations * deviations, 0), channels, C)


@triton.jit
def scale_add_relu_kernel(
    x_ptr, scale_ptr, shift_ptr, shortcut_ptr, y_ptr, stride, P: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ops.scale_add_relu`; `stride`: from one image's factors to the next."""
    offsets, inside, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = x * _load_factor(scale_ptr, stride, channels, C) + _load_factor(shift_ptr, stride, channels, C)
    if shortcut_ptr is not None:
        y += tl.load(shortcut_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, tl.where(y <= 0, 0.0, y), mask=inside)  # a NaN stays one


@triton.jit
def relu_backward_with_sums_kernel(
    gradient_ptr, second_gradient_ptr, x_ptr, y_ptr, g_ptr, sums_ptr, products_ptr, P: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ops.gradient_before_relu`."""
    offsets, inside, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    g = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if second_gradient_ptr is not None:
        g += tl.load(second_gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    rounded = tl.where(y <= 0, 0.0, g).to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + offsets, rounded, mask=inside)
    g = rounded.to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    _store_sums(sums_ptr, tl.sum(g, 0), channels, C)
    _store_sums(products_ptr, tl.sum(g * x, 0), channels, C)


@triton.jit
def relu_backward_sums_kernel(
    gradient_ptr, x_ptr, scale_ptr, shift_ptr, sums_ptr, products_ptr, stride, P: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ops.gradient_sums`; `stride`: from one image's factors to the next."""
    offsets, inside, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    g = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = x * _load_factor(scale_ptr, stride, channels, C) + _load_factor(shift_ptr, stride, channels, C)
    g = tl.where(y <= 0, 0.0, g)
    _store_sums(sums_ptr, tl.sum(g, 0), channels, C)
    _store_sums(products_ptr, tl.sum(g * x, 0), channels, C)


@triton.jit
def norm_input_gradient_kernel(
    g_ptr, x_ptr, scale_ptr, shift_ptr, slope_ptr, offset_ptr, out_ptr, stride, slope_stride, P: tl.constexpr,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ops.gradient_map`; `stride`: from one image's factors to the next."""
    offsets, inside, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = _load_factor(scale_ptr, stride, channels, C)
    if shift_ptr is not None:
        g = tl.where(x * scale + _load_factor(shift_ptr, stride, channels, C) <= 0, 0.0, g)
    slope, offset = (
        _load_factor(slope_ptr, slope_stride, channels, C),
        _load_factor(offset_ptr, slope_stride, channels, C),
    )
    tl.store(out_ptr + offsets, g * scale + x * slope + offset, mask=inside)


KERNELS = (
    chunk_moments_kernel,
    scale_add_relu_kernel,
    relu_backward_with_sums_kernel,
    relu_backward_sums_kernel,
    norm_input_gradient_kernel,
)


def tile_sizes(channels: int, chunk: int) -> dict[str, int]:
    """A kernel's tile: `CHUNK` positions by `BLOCK` channels."""
    return {"CHUNK": chunk, "BLOCK": min(64, next_power_of_two(channels))}


def _launch_kernel(kernel: Any, x: Tensor, chunk: int, *arguments: Any) -> None:
    count, channels, height, width = x.shape
    tile = tile_sizes(channels, chunk)
    grid = (triton.cdiv(height * width, chunk), count, triton.cdiv(channels, tile["BLOCK"]))
    kernel[grid](*arguments, P=height * width, C=channels, **tile, num_warps=NUM_WARPS)


def _image_stride(factor: Tensor) -> int:
    """From one image's factors to the next one's: none if all images share them."""
    return factor.shape[1] if factor.shape[0] > 1 else 0


def _to_channels_last(*feature_maps: Tensor) -> list[Tensor]:
    return [a_map.contiguous(memory_format=torch.channels_last) for a_map in feature_maps]


def chunk_moments(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """`ops.moments`."""
    (x,) = _to_channels_last(x)
    means, squares = empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)
    _launch_kernel(chunk_moments_kernel, x, chunk, x, means, squares)
    return means, squares


def scale_add_relu(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None) -> Tensor:
    """`ops.scale_add_relu`."""
    x, *more = _to_channels_last(x, *(() if shortcut is None else (shortcut,)))
    y = empty_channels_last_like(x)
    arguments = (x, scale.contiguous(), shift.contiguous(), more[0] if more else None, y, _image_stride(scale))
    _launch_kernel(scale_add_relu_kernel, x, choose_chunk_size(x), *arguments)
    return y


def relu_backward_with_sums(
    gradient: Tensor, second_gradient: Tensor | None, x: Tensor, y: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.gradient_before_relu`."""
    gradient, x, y, *more = _to_channels_last(gradient, x, y, *(() if second_gradient is None else (second_gradient,)))
    g, sums, products = empty_channels_last_like(y), empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)
    arguments = (gradient, more[0] if more else None, x, y, g, sums, products)
    _launch_kernel(relu_backward_with_sums_kernel, x, chunk, *arguments)
    return g, sums, products


def relu_backward_sums(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """`ops.gradient_sums`."""
    gradient, x = _to_channels_last(gradient, x)
    sums, products = empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)
    arguments = (gradient, x, scale.contiguous(), shift.contiguous(), sums, products, _image_stride(scale))
    _launch_kernel(relu_backward_sums_kernel, x, chunk, *arguments)
    return sums, products


def norm_input_gradient(
    g: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor, offset: Tensor
) -> Tensor:
    """`ops.gradient_map`."""
    g, x = _to_channels_last(g, x)
    out = empty_channels_last_like(x)
    rows = [None if factor is None else factor.contiguous() for factor in (scale, shift, slope, offset)]
    _launch_kernel(
        norm_input_gradient_kernel,
        x,
        choose_chunk_size(x),
        g,
        x,
        *rows,
        out,
        _image_stride(scale),
        _image_stride(slope),
    )
    return out
