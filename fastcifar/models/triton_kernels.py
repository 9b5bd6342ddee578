"""The operators of `fused_ops` as Triton kernels, one launch each, for CUDA tensors. Imported only where one runs.

One program processes a tile: the positions of one chunk of one image, and BLOCK channels. All arithmetic is in float32;
results are rounded once, when they are stored. P is the number of positions H * W, C that of channels, CHUNK that of
positions in a chunk; `stride` and `slope_stride` are the distances between the factors of consecutive images, 0 where
all images share them. The functions below the kernels take and return what the operators of the same names do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar.models.fused_ops_shapes import (
    choose_chunk_size,
    choose_tile_channels,
    empty_channels_last_like,
    empty_chunk_sums,
)

NUM_WARPS = 8  # a tile of 8,192 elements has 32 for each thread


@triton.jit
def _tile_offsets(P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of the tile's elements in a feature map, the mask of those that exist, and the tile's channels."""
    positions = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = (positions < P)[:, None] & (channels < C)[None, :]
    image = tl.program_id(1).to(tl.int64)
    return (image * P + positions[:, None]) * C + channels[None, :], exists, channels


@triton.jit
def _load_factors(pointer, stride, channels, C: tl.constexpr):
    """Per-channel factors of the tile's image, as a row."""
    return tl.load(pointer + tl.program_id(1) * stride + channels, mask=channels < C, other=0.0)[None, :]


@triton.jit
def _store_sums(pointer, values, channels, C: tl.constexpr):
    """Stores one value for each channel of the tile in a tensor [n, S, C]."""
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(pointer + row * C + channels, values, mask=channels < C)


@triton.jit
def chunk_moments_kernel(
    x_ptr, means_ptr, deviations_ptr, P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """`fused_ops.chunk_moments`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    count = tl.minimum(P - tl.program_id(0) * CHUNK, CHUNK)
    means = tl.sum(x, 0) / count
    deviations = tl.where(exists, x - means[None, :], 0.0)
    _store_sums(means_ptr, means, channels, C)
    _store_sums(deviations_ptr, tl.sum(deviations * deviations, 0), channels, C)


@triton.jit
def scale_add_relu_kernel(
    x_ptr, scale_ptr, shift_ptr, shortcut_ptr, y_ptr, stride, P: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`fused_ops.scale_add_relu`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    y = x * _load_factors(scale_ptr, stride, channels, C) + _load_factors(shift_ptr, stride, channels, C)
    if shortcut_ptr is not None:
        y += tl.load(shortcut_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, tl.where(y <= 0, 0.0, y), mask=exists)  # propagates NaN, unlike a maximum with 0


@triton.jit
def relu_backward_with_sums_kernel(
    gradient_ptr, second_gradient_ptr, x_ptr, y_ptr, masked_ptr, sums_ptr, products_ptr, P: tl.constexpr,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`fused_ops.relu_backward_with_sums`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    gradient = tl.load(gradient_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    if second_gradient_ptr is not None:
        gradient += tl.load(second_gradient_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    rounded = tl.where(y <= 0, 0.0, gradient).to(masked_ptr.dtype.element_ty)
    tl.store(masked_ptr + offsets, rounded, mask=exists)
    masked = rounded.to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    _store_sums(sums_ptr, tl.sum(masked, 0), channels, C)
    _store_sums(products_ptr, tl.sum(masked * x, 0), channels, C)


@triton.jit
def relu_backward_sums_kernel(
    gradient_ptr, x_ptr, scale_ptr, shift_ptr, sums_ptr, products_ptr, stride, P: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`fused_ops.relu_backward_sums`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    gradient = tl.load(gradient_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    y = x * _load_factors(scale_ptr, stride, channels, C) + _load_factors(shift_ptr, stride, channels, C)
    masked = tl.where(y <= 0, 0.0, gradient)
    _store_sums(sums_ptr, tl.sum(masked, 0), channels, C)
    _store_sums(products_ptr, tl.sum(masked * x, 0), channels, C)


@triton.jit
def norm_input_gradient_kernel(
    gradient_ptr, x_ptr, scale_ptr, shift_ptr, slope_ptr, offset_ptr, out_ptr, stride, slope_stride,
    P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`fused_ops.norm_input_gradient`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    gradient = tl.load(gradient_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    scale = _load_factors(scale_ptr, stride, channels, C)
    if shift_ptr is not None:
        y = x * scale + _load_factors(shift_ptr, stride, channels, C)
        gradient = tl.where(y <= 0, 0.0, gradient)
    slope = _load_factors(slope_ptr, slope_stride, channels, C)
    offset = _load_factors(offset_ptr, slope_stride, channels, C)
    tl.store(out_ptr + offsets, gradient * scale + x * slope + offset, mask=exists)


KERNELS = (
    chunk_moments_kernel,
    scale_add_relu_kernel,
    relu_backward_with_sums_kernel,
    relu_backward_sums_kernel,
    norm_input_gradient_kernel,
)


def tile_sizes(channels: int, chunk: int) -> dict[str, int]:
    """The compile-time sizes of a kernel's tile: CHUNK positions by BLOCK channels."""
    return {"CHUNK": chunk, "BLOCK": choose_tile_channels(channels)}


def _launch_kernel(kernel: Any, x: Tensor, chunk: int, *arguments: Any) -> None:
    num_images, channels, height, width = x.shape
    tile = tile_sizes(channels, chunk)
    grid = (triton.cdiv(height * width, chunk), num_images, triton.cdiv(channels, tile["BLOCK"]))
    kernel[grid](*arguments, P=height * width, C=channels, **tile, num_warps=NUM_WARPS)


def _image_stride(factor: Tensor) -> int:
    """Distance between the factors of consecutive images of a tensor [n, C]; 0 for [1, C], which all images share."""
    return factor.shape[1] if factor.shape[0] > 1 else 0


def _to_channels_last(*feature_maps: Tensor) -> list[Tensor]:
    return [feature_map.contiguous(memory_format=torch.channels_last) for feature_map in feature_maps]


def chunk_moments(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """`fused_ops.chunk_moments`: two tensors [n, S, C]."""
    (x,) = _to_channels_last(x)
    means, squared_deviations = empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)
    _launch_kernel(chunk_moments_kernel, x, chunk, x, means, squared_deviations)
    return means, squared_deviations


def scale_add_relu(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None) -> Tensor:
    """`fused_ops.scale_add_relu`: a tensor of x's shape and dtype."""
    x, *optional = _to_channels_last(x, *(() if shortcut is None else (shortcut,)))
    y = empty_channels_last_like(x)
    arguments = (x, scale.contiguous(), shift.contiguous(), optional[0] if optional else None, y, _image_stride(scale))
    _launch_kernel(scale_add_relu_kernel, x, choose_chunk_size(x), *arguments)
    return y


def relu_backward_with_sums(
    gradient: Tensor, second_gradient: Tensor | None, x: Tensor, y: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_ops.relu_backward_with_sums`: a tensor of y's shape and dtype and two tensors [n, S, C]."""
    second = () if second_gradient is None else (second_gradient,)
    gradient, x, y, *optional = _to_channels_last(gradient, x, y, *second)
    masked, sums, products = empty_channels_last_like(y), empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)
    arguments = (gradient, optional[0] if optional else None, x, y, masked, sums, products)
    _launch_kernel(relu_backward_with_sums_kernel, x, chunk, *arguments)
    return masked, sums, products


def relu_backward_sums(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """`fused_ops.relu_backward_sums`: two tensors [n, S, C]."""
    gradient, x = _to_channels_last(gradient, x)
    sums, products = empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)
    arguments = (gradient, x, scale.contiguous(), shift.contiguous(), sums, products, _image_stride(scale))
    _launch_kernel(relu_backward_sums_kernel, x, chunk, *arguments)
    return sums, products


def norm_input_gradient(
    gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor, offset: Tensor
) -> Tensor:
    """`fused_ops.norm_input_gradient`: a tensor of x's shape and dtype."""
    gradient, x = _to_channels_last(gradient, x)
    out = empty_channels_last_like(x)
    factors = [None if factor is None else factor.contiguous() for factor in (scale, shift, slope, offset)]
    arguments = (gradient, x, *factors, out, _image_stride(scale), _image_stride(slope))
    _launch_kernel(norm_input_gradient_kernel, x, choose_chunk_size(x), *arguments)
    return out
