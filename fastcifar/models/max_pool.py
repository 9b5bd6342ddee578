"""2x2 max pooling on a CPU, with the results of `torch.nn.functional.max_pool2d` and a fast backward pass.

The backward pass that torch.compile generates for `max_pool2d` is not vectorized and computes an index for each pixel.
The functions of max_pool.cpp are limited by the bandwidth of memory only. If they cannot be compiled, those of PyTorch
are used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.models.cpp_library import call_cpp, can_load_cpp_library, empty_channels_last, is_exporting

FUNCTIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # suffixes of the functions in max_pool.cpp


@torch.library.custom_op("fastcifar::max_pool2x2", mutates_args=())
def max_pool2x2(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each 2x2 window of images [n, C, H, W], channels_last, and its offset in the window.

    H and W must be even, and the type that of a key of `FUNCTIONS`. Offsets are int8, 2 * row + column.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    values, offsets = _empty_outputs(images)
    if can_load_cpp_library("max_pool"):
        call_cpp("max_pool", f"max_pool_{FUNCTIONS[images.dtype]}", images, *_sizes(values), values, offsets)
    else:
        maxima, indices = F.max_pool2d(images, 2, return_indices=True)
        values.copy_(maxima)
        offsets.copy_(indices // images.shape[3] % 2 * 2 + indices % 2)
    return values, offsets


@max_pool2x2.register_fake
def _empty_outputs(images: Tensor) -> tuple[Tensor, Tensor]:
    n, channels, height, width = images.shape
    values = empty_channels_last(images, n, channels, height // 2, width // 2)
    return values, torch.empty_like(values, dtype=torch.int8)


@torch.library.custom_op("fastcifar::max_pool2x2_backward", mutates_args=())
def max_pool2x2_backward(grads: Tensor, offsets: Tensor) -> Tensor:
    """Return the gradient of the images of `max_pool2x2`; `grads` is that of the values."""
    grads = grads.contiguous(memory_format=torch.channels_last)
    result = _empty_images(grads, offsets)
    if can_load_cpp_library("max_pool"):
        call_cpp("max_pool", f"max_pool_backward_{FUNCTIONS[grads.dtype]}", grads, offsets, *_sizes(grads), result)
    else:
        for offset in range(4):
            result[:, :, offset // 2 :: 2, offset % 2 :: 2] = torch.where(offsets == offset, grads, 0)
    return result


@max_pool2x2_backward.register_fake
def _empty_images(grads: Tensor, offsets: Tensor) -> Tensor:
    n, channels, height, width = offsets.shape
    return empty_channels_last(grads, n, channels, 2 * height, 2 * width)


def _sizes(values: Tensor) -> tuple[int, int, int]:
    """Return the rows of all images, their width, and the channels of `values` [n, C, H, W]."""
    n, channels, height, width = values.shape
    return n * height, width, channels


def _save_offsets(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grads: Tensor, _: Tensor | None) -> Tensor:
    return max_pool2x2_backward(grads, *ctx.saved_tensors)


max_pool2x2.register_autograd(_backward, setup_context=_save_offsets)


class MaxPool2x2(nn.MaxPool2d):
    """`nn.MaxPool2d(2)`, which calls `max_pool2x2` in a compiled training step on a CPU."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:
        is_training_step = torch.compiler.is_compiling() and torch.is_grad_enabled()
        if not is_training_step or is_exporting() or not is_supported(input):
            return F.max_pool2d(input, 2)
        return max_pool2x2(input)[0]


def is_supported(images: Tensor) -> bool:
    """Return whether `images` have a type, a device and a shape that `max_pool2x2` supports."""
    is_even = images.dim() == 4 and images.shape[2] % 2 == images.shape[3] % 2 == 0
    return is_even and images.device.type == "cpu" and images.dtype in FUNCTIONS
