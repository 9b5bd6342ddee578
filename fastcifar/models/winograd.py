"""3x3 convolutions by Winograd's algorithm, in float32 on a CPU, with about a third of the multiplications.

This is F(MxM, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). Overlapping tiles of
M + 2 by M + 2 inputs, filters, and tiles of MxM gradients of the output are transformed to (M + 2)^2 values each. A
convolution is then (M + 2)^2 matrix products over the channels, one for each of these values. With M = 4, these are 36
multiplications for 16 outputs, instead of 144. The output and the gradients of input and weight are all computed like
this, with the M that takes the fewest multiplications for the size of the images. The transforms are functions of
winograd.cpp. Rounding errors are larger than those of a direct convolution, but of the same order as those of a
reordered sum: relative 2e-6 to 5e-6 for 256 channels.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.models.cpp_library import call_cpp, empty_channels_last, is_exporting, load_cpp_library

LANES = 8  # channels that a transform processes at once
CHUNK_BYTES = 8 * 2**20  # transformed tiles are multiplied in chunks of this size, so that they remain in the cache
TILE_SIZES = (2, 3, 4, 5, 6)
POINTS = (0, 1, -1, 2, -2, 1 / 2, -1 / 2)  # the algorithm evaluates polynomials at M + 1 of these, and at infinity


class Image(ctypes.Structure):
    """The shape of the images of a batch, which are [n, H, W, C] in memory."""

    _fields_ = (("height", ctypes.c_int64), ("width", ctypes.c_int64), ("channels", ctypes.c_int64))

    @classmethod
    def of(cls, images: Tensor) -> Image:
        """Return the shape of `images` [n, C, H, W]."""
        return cls(images.shape[2], images.shape[3], images.shape[1])


class Tiles(ctypes.Structure):
    """`count` tiles of `size` x `size` pixels, from tile `first` of a batch on; an image has `th` x `tw` tiles."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("size", "th", "tw", "first", "count"))

    @property
    def num_values(self) -> int:
        """The number of values of a transformed tile."""
        return (self.size + 2) ** 2


def choose_tile_size(height: int, width: int) -> int:
    """Return the size of tiles with the fewest multiplications for outputs of `height` x `width`, if equal the smaller.

    Larger tiles have larger rounding errors.
    """
    return min(TILE_SIZES, key=lambda size: -(-height // size) * -(-width // size) * (size + 2) ** 2)


def _tile_chunks(outputs: Tensor, max_channels: int) -> Iterator[Tiles]:
    """Yield the tiles of `outputs` [n, K, H, W] in chunks of about `CHUNK_BYTES`.

    The number of tiles in a chunk is odd, so that its matrices do not begin at the same position of cache sets.
    """
    size = choose_tile_size(*outputs.shape[2:])
    th, tw = -(-outputs.shape[2] // size), -(-outputs.shape[3] // size)
    count, total = CHUNK_BYTES // ((size + 2) ** 2 * 4 * max_channels) | 1, outputs.shape[0] * th * tw
    for first in range(0, total, count):
        yield Tiles(size, th, tw, first, min(count, total - first))


def _transform_input(images: Tensor, padding: int, tiles: Tiles) -> Tensor:
    """Return the transformed tiles [N, count, C], N = (M + 2)^2, of channels_last images with a border of zeros."""
    result = images.new_empty(tiles.num_values, tiles.count, images.shape[1])
    call_cpp("winograd", "transform_input", images, Image.of(images), padding, tiles, result)
    return result


def _transform_gradient(grads: Tensor, tiles: Tiles) -> Tensor:
    """Return the transformed tiles [N, count, K] of the gradients of the output, channels_last."""
    result = grads.new_empty(tiles.num_values, tiles.count, grads.shape[1])
    call_cpp("winograd", "transform_gradient", grads, Image.of(grads), tiles, result)
    return result


def _write_output(products: Tensor, tiles: Tiles, outputs: Tensor) -> None:
    """Write the tiles of channels_last `outputs` whose transformed values [N, count, K] are `products`."""
    call_cpp("winograd", "transform_output", products, Image.of(outputs), tiles, outputs)


@functools.cache
def filter_transform(tile_size: int) -> Tensor:
    """Return the matrix [N, 9] that transforms a 3x3 filter."""
    points = POINTS[: tile_size + 1]
    rows = [[p**k / math.prod(p - q for q in points if q != p) for k in range(3)] for p in points]
    matrix = torch.tensor([*rows, [0.0, 0.0, 1.0]])
    return torch.kron(matrix, matrix)


@torch.library.custom_op("fastcifar::winograd_conv2d", mutates_args=())
def winograd_conv2d(images: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Convolve float32 images [n, C, H, W], with a border of `padding` zeros, with a weight [K, C, 3, 3].

    Return [n, K, H + 2 * padding - 2, W + 2 * padding - 2], channels_last. C and K must be multiples of `LANES`.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    out_channels, channels = weight.shape[:2]
    outputs = _empty_output(images, weight, padding)
    matrix = filter_transform(choose_tile_size(*outputs.shape[2:]))
    filters = (matrix @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(-1, channels, out_channels)
    for tiles in _tile_chunks(outputs, max(channels, out_channels)):
        _write_output(_transform_input(images, padding, tiles) @ filters, tiles, outputs)
    return outputs


@winograd_conv2d.register_fake
def _empty_output(images: Tensor, weight: Tensor, padding: int) -> Tensor:
    height, width = (size + 2 * padding - 2 for size in images.shape[2:])
    return empty_channels_last(images, images.shape[0], weight.shape[0], height, width)


@torch.library.custom_op("fastcifar::winograd_weight_gradient", mutates_args=())
def winograd_weight_gradient(images: Tensor, grads: Tensor, padding: int) -> Tensor:
    """Return the gradient [K, C, 3, 3] of the weight of `winograd_conv2d`; `grads` is the gradient of its output."""
    images, grads = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, grads))
    channels, out_channels = images.shape[1], grads.shape[1]
    matrix = filter_transform(choose_tile_size(*grads.shape[2:]))
    total = images.new_zeros(len(matrix), out_channels, channels)
    for tiles in _tile_chunks(grads, max(channels, out_channels)):
        total.baddbmm_(_transform_gradient(grads, tiles).transpose(1, 2), _transform_input(images, padding, tiles))
    gradient = (matrix.T @ total.flatten(1)).view(3, 3, out_channels, channels)
    return gradient.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


@winograd_weight_gradient.register_fake
def _empty_weight_gradient(images: Tensor, grads: Tensor, padding: int) -> Tensor:
    return empty_channels_last(images, grads.shape[1], images.shape[1], 3, 3)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, ctx.padding = inputs
    ctx.save_for_backward(images, weight)


def _backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
    images, weight = ctx.saved_tensors
    image_gradient = weight_gradient = None
    if ctx.needs_input_grad[0]:
        rotated = weight.flip(2, 3).transpose(0, 1)
        image_gradient = winograd_conv2d(grads, rotated, 2 - ctx.padding)
    if ctx.needs_input_grad[1]:
        weight_gradient = winograd_weight_gradient(images, grads, ctx.padding)
    return image_gradient, weight_gradient, None


winograd_conv2d.register_autograd(_backward, setup_context=_save_for_backward)


class WinogradConv2d(nn.Conv2d):
    """An `nn.Conv2d` that `is_suitable` for Winograd's algorithm. It uses it for batches of float32 images on a CPU.

    An exported program (`torch.export`, ONNX) has a direct convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_supported = input.device.type == "cpu" and input.dtype == torch.float32 and input.dim() == 4
        if not is_supported or is_exporting():
            return super().forward(input)
        outputs = winograd_conv2d(input, self.weight, int(self.padding[0]))
        return outputs if self.bias is None else outputs + self.bias.view(1, -1, 1, 1)


def use_winograd(model: nn.Module, enabled: bool = True) -> None:
    """Use Winograd's algorithm in all suitable convolutions of `model`, in place, or in none if not `enabled`.

    The state dict remains the same. Raises `RuntimeError` or `OSError` if the transforms cannot be compiled.
    """
    convs = [module for module in model.modules() if is_suitable(module)]
    if enabled and convs:
        load_cpp_library("winograd")
    for conv in convs:
        conv.__class__ = WinogradConv2d if enabled else nn.Conv2d


def is_suitable(module: nn.Module) -> bool:
    """Return whether `module` is a 3x3 convolution of stride 1 with multiples of `LANES` channels, without groups."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module) in (nn.Conv2d, WinogradConv2d)
        and module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding in ((0, 0), (1, 1))
        and module.padding_mode == "zeros"
        and module.groups == 1
        and module.in_channels % LANES == module.out_channels % LANES == 0
    )
