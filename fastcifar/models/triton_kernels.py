"""The operators of `fused_ops` as Triton kernels for CUDA tensors, with pointers to the results after the inputs.

A program processes a tile of one image: CHUNK of its P = H * W positions, and BLOCK of its C channels, in float32.
`stride` and `slope_stride` are the distances between the factors of consecutive images.
"""

import triton
import triton.language as tl

NUM_WARPS = 8  # in a tile of 8,192 elements, each thread processes 32


@triton.jit
def _tile_offsets(P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Return the offsets of the tile's elements in a feature map, a mask of those that exist, and its channels."""
    positions = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = (positions < P)[:, None] & (channels < C)[None, :]
    image = tl.program_id(1).to(tl.int64)
    return (image * P + positions[:, None]) * C + channels[None, :], exists, channels


@triton.jit
def _load_factors(pointer, stride, channels, C: tl.constexpr):
    """Load the per-channel factors of the tile's image as a row."""
    return tl.load(pointer + tl.program_id(1) * stride + channels, mask=channels < C, other=0.0)[None, :]


@triton.jit
def _store_sums(pointer, values, channels, C: tl.constexpr):
    """Store one value for each channel of the tile in a tensor [n, S, C]."""
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(pointer + row * C + channels, values, mask=channels < C)


@triton.jit
def chunk_moments(
    x_ptr, means_ptr, deviations_ptr, P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """See `fused_ops.chunk_moments`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    count = tl.minimum(P - tl.program_id(0) * CHUNK, CHUNK)
    means = tl.sum(x, 0) / count
    deviations = tl.where(exists, x - means[None, :], 0.0)
    _store_sums(means_ptr, means, channels, C)
    _store_sums(deviations_ptr, tl.sum(deviations * deviations, 0), channels, C)


@triton.jit
def scale_add_relu(
    x_ptr, scale_ptr, shift_ptr, shortcut_ptr, y_ptr, stride, P: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `fused_ops.scale_add_relu`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    y = x * _load_factors(scale_ptr, stride, channels, C) + _load_factors(shift_ptr, stride, channels, C)
    if shortcut_ptr is not None:
        y += tl.load(shortcut_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, tl.where(y <= 0, 0.0, y), mask=exists)  # propagates NaN, unlike a maximum with 0


@triton.jit
def relu_backward_with_sums(
    gradient_ptr, second_gradient_ptr, x_ptr, y_ptr, masked_ptr, sums_ptr, products_ptr, P: tl.constexpr,
    C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `fused_ops.relu_backward_with_sums`."""
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
def relu_backward_sums(
    gradient_ptr, x_ptr, scale_ptr, shift_ptr, sums_ptr, products_ptr, stride, P: tl.constexpr, C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `fused_ops.relu_backward_sums`."""
    offsets, exists, channels = _tile_offsets(P, C, CHUNK, BLOCK)
    gradient = tl.load(gradient_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    y = x * _load_factors(scale_ptr, stride, channels, C) + _load_factors(shift_ptr, stride, channels, C)
    masked = tl.where(y <= 0, 0.0, gradient)
    _store_sums(sums_ptr, tl.sum(masked, 0), channels, C)
    _store_sums(products_ptr, tl.sum(masked * x, 0), channels, C)


@triton.jit
def norm_input_gradient(
    gradient_ptr, x_ptr, scale_ptr, shift_ptr, slope_ptr, offset_ptr, out_ptr, stride, slope_stride,
    P: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `fused_ops.norm_input_gradient`."""
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
