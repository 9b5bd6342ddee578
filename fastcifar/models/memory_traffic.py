"""Memory traffic of a network's feature maps, and its convolutions with their shapes.

The operations of one image are recorded on the meta device, where tensors have shapes but no data. The traffic is an
estimate for well-fused kernels, not a measurement of what a compiler generates.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.models.count import run_on_meta_device

CONV_OP = "aten.convolution.default"
BATCH_NORM_OP = "aten.native_batch_norm.default"
ADD_OPS = ("aten.add.Tensor", "aten.add_.Tensor")


class ConvCall(NamedTuple):
    """One call of a convolution with one image: input [C_in, H, W], weight [C_out, C_in / groups, h, w], output."""

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass of one image."""
        return math.prod(self.output_shape) * math.prod(self.weight_shape[1:])

    def __str__(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        shapes = " -> ".join("x".join(map(str, shape)) for shape in (self.input_shape, self.output_shape))
        return f"{shapes}, {self.weight_shape[2]}x{self.weight_shape[3]}{groups}"


def count_conv_calls(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> Counter[ConvCall]:
    """The convolutions of one image of `shape` [C, H, W] in forward order, each with its number of calls."""
    calls: Counter[ConvCall] = Counter()
    for name, arguments, output in record_operations(model, shape):
        if name == CONV_OP:
            images, weight, _bias, stride, padding, _dilation, _transposed, _out_padding, groups = arguments
            shapes = (tuple(images.shape[1:]), tuple(weight.shape), tuple(output.shape[1:]))
            calls[ConvCall(*shapes, tuple(stride), tuple(padding), groups)] += 1
    return calls


def feature_map_bytes_per_image(
    model: nn.Module, training: bool, element_size: int = 2, shape: tuple[int, int, int] = (3, 32, 32)
) -> int:
    """Bytes of feature maps that are read and written for one image of `shape` [C, H, W], `element_size` bytes each.

    Counted in whole feature maps, a training step reads and writes:
    - a convolution: its input and output three times: forward, gradient of the input, gradient of the weight;
    - a BatchNorm with the elementwise operations after it fused into it: eight times its size. Forward it reads its
      input twice (statistics, normalization) and writes its output; backward it reads gradient and input twice each
      and writes the new gradient;
    - an addition: three times its size: the shortcut forward, and its gradient in the two backward reads of the
      BatchNorm before it.
    In evaluation a convolution reads its input and writes its output, a BatchNorm reads and writes once, an addition
    reads once. Activations, dropout and squeeze-and-excitation are assumed to be fused. Weights and optimizer state are
    left out, because a batch shares them.
    """
    conv_factor, norm_factor, addition_factor = (3, 8, 3) if training else (1, 2, 1)
    elements = 0
    for name, arguments, output in record_operations(model, shape):
        if name == CONV_OP:
            elements += conv_factor * (arguments[0].numel() + output.numel())
        elif name == BATCH_NORM_OP:
            elements += norm_factor * output[0].numel()
        elif name in ADD_OPS and output.dim() == 4:
            elements += addition_factor * output.numel()
    return element_size * elements


def record_operations(model: nn.Module, shape: tuple[int, int, int]) -> list[tuple[str, tuple[Any, ...], Any]]:
    """Name, positional arguments and result (meta tensors) of every operation on one image of `shape` [C, H, W]."""
    recorder = _OperationRecorder()
    with recorder:
        run_on_meta_device(model, shape, lambda *_: None)
    return recorder.operations


class _OperationRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result: torch.Tensor = func(*args, **(kwargs or {}))
        self.operations.append((str(func), args, result))
        return result
