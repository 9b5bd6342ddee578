"""3x3 convolutions by Winograd's algorithm, in float32 on a CPU, with about a third of the multiplications.

This is F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). Overlapping tiles of
6x6 inputs, filters, and tiles of 4x4 gradients of the output are transformed to 6x6 values each. A convolution is then
36 matrix products over the channels, one for each of these values: 36 multiplications for 16 outputs, instead of 144.
The output and the gradients of input and weight are all computed like this. Rounding errors are larger than those of a
direct convolution, but of the same order as those of a reordered sum: relative 2e-6 to 5e-6 for 256 channels.

The transforms are functions of winograd.cpp, which is compiled when they are first used (about a second).
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.device import find_cpp_compiler

LANES = 8  # channels that a transform processes at once
CHUNK_BYTES = 8 * 2**20  # transformed tiles are multiplied in chunks of this size, so that they remain in the cache
COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
FILTER_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)  # of a column of three weights


class Image(ctypes.Structure):
    """The shape of the images of a batch, which are [n, H, W, C] in memory."""

    _fields_ = (("height", ctypes.c_int64), ("width", ctypes.c_int64), ("channels", ctypes.c_int64))

    @classmethod
    def of(cls, images: Tensor) -> Image:
        """Return the shape of `images` [n, C, H, W]."""
        return cls(images.shape[2], images.shape[3], images.shape[1])


class Tiles(ctypes.Structure):
    """`count` tiles of a batch, from tile `first` on; each image has `th` rows of `tw` tiles."""

    _fields_ = (("th", ctypes.c_int64), ("tw", ctypes.c_int64), ("first", ctypes.c_int64), ("count", ctypes.c_int64))


@functools.cache
def load_transforms() -> ctypes.CDLL:
    """Compile and load winograd.cpp. Raises `RuntimeError` or `OSError` if that fails."""
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory(prefix="fastcifar-winograd-") as folder:
        library = Path(folder) / "winograd.so"
        command = [find_cpp_compiler() or "g++", *COMPILER_FLAGS, str(source), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(result.stderr.strip() or f"{command[0]} ended with exit code {result.returncode}")
        return ctypes.CDLL(str(library))


def _tile_chunks(outputs: Tensor, max_channels: int) -> Iterator[Tiles]:
    """Yield the tiles of `outputs` [n, K, H, W] in chunks of about `CHUNK_BYTES`.

    The number of tiles in a chunk is odd, so that its 36 matrices do not begin at the same position of cache sets.
    """
    th, tw = -(-outputs.shape[2] // 4), -(-outputs.shape[3] // 4)
    count, total = CHUNK_BYTES // (36 * 4 * max_channels) | 1, outputs.shape[0] * th * tw
    for first in range(0, total, count):
        yield Tiles(th, tw, first, min(count, total - first))


def _transform_input(images: Tensor, padding: int, tiles: Tiles) -> Tensor:
    """Return the transformed 6x6 tiles [36, count, C] of channels_last images with a border of `padding` zeros."""
    result, shape = images.new_empty(36, tiles.count, images.shape[1]), Image.of(images)
    load_transforms().transform_input(_data(images), shape, ctypes.c_int64(padding), tiles, _data(result), _threads())
    return result


def _transform_gradient(grads: Tensor, tiles: Tiles) -> Tensor:
    """Return the transformed 4x4 tiles [36, count, K] of the gradients of the output, channels_last."""
    result = grads.new_empty(36, tiles.count, grads.shape[1])
    load_transforms().transform_gradient(_data(grads), Image.of(grads), tiles, _data(result), _threads())
    return result


def _write_output(products: Tensor, tiles: Tiles, outputs: Tensor) -> None:
    """Write the tiles of channels_last `outputs` whose transformed values [36, count, K] are `products`."""
    load_transforms().transform_output(_data(products), Image.of(outputs), tiles, _data(outputs), _threads())


def _data(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def _filter_transform(weight: Tensor) -> Tensor:
    """Return the matrix [36, 9] that transforms a 3x3 filter."""
    matrix = weight.new_tensor(FILTER_TRANSFORM)
    return torch.kron(matrix, matrix)


@torch.library.custom_op("fastcifar::winograd_conv2d", mutates_args=())
def winograd_conv2d(images: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Convolve float32 images [n, C, H, W], with a border of `padding` zeros, with a weight [K, C, 3, 3].

    Return [n, K, H + 2 * padding - 2, W + 2 * padding - 2], channels_last. C and K must be multiples of `LANES`.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    out_channels, channels = weight.shape[:2]
    filters = (_filter_transform(weight) @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, channels, out_channels)
    outputs = _empty_output(images, weight, padding)
    for tiles in _tile_chunks(outputs, max(channels, out_channels)):
        _write_output(_transform_input(images, padding, tiles) @ filters, tiles, outputs)
    return outputs


@winograd_conv2d.register_fake
def _empty_output(images: Tensor, weight: Tensor, padding: int) -> Tensor:
    height, width = (size + 2 * padding - 2 for size in images.shape[2:])
    return _empty_channels_last(images, images.shape[0], weight.shape[0], height, width)


@torch.library.custom_op("fastcifar::winograd_weight_gradient", mutates_args=())
def winograd_weight_gradient(images: Tensor, grads: Tensor, padding: int) -> Tensor:
    """Return the gradient [K, C, 3, 3] of the weight of `winograd_conv2d`; `grads` is the gradient of its output."""
    images, grads = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, grads))
    channels, out_channels = images.shape[1], grads.shape[1]
    total = images.new_zeros(36, out_channels, channels)
    for tiles in _tile_chunks(grads, max(channels, out_channels)):
        total.baddbmm_(_transform_gradient(grads, tiles).transpose(1, 2), _transform_input(images, padding, tiles))
    gradient = (_filter_transform(images).T @ total.view(36, -1)).view(3, 3, out_channels, channels)
    return gradient.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


@winograd_weight_gradient.register_fake
def _empty_weight_gradient(images: Tensor, grads: Tensor, padding: int) -> Tensor:
    return _empty_channels_last(images, grads.shape[1], images.shape[1], 3, 3)


def _empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


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
        if not is_supported or torch.compiler.is_exporting():
            return super().forward(input)
        outputs = winograd_conv2d(input, self.weight, int(self.padding[0]))
        return outputs if self.bias is None else outputs + self.bias.view(1, -1, 1, 1)


def use_winograd(model: nn.Module, enabled: bool = True) -> None:
    """Use Winograd's algorithm in all suitable convolutions of `model`, in place, or in none if not `enabled`.

    The state dict remains the same. Raises `RuntimeError` or `OSError` if the transforms cannot be compiled.
    """
    convs = [module for module in model.modules() if is_suitable(module)]
    if enabled and convs:
        load_transforms()
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
