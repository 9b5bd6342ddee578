"""What a network moves: bytes through memory an image, and its convolutions with their shapes.

Seen by recording the operations of one image on the meta device, where nothing is computed. A model of what well-fused
kernels must move, not of what a compiler does; it knows no architecture by name.
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
    """A convolution as it is called on one image: `input` [C, H, W], `weight` [out, C / groups, h, w], `output`."""

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
        grouped = f", {self.groups} groups" if self.groups > 1 else ""
        shapes = " -> ".join("x".join(map(str, shape)) for shape in (self.input_shape, self.output_shape))
        return f"{shapes}, {self.weight_shape[2]}x{self.weight_shape[3]}{grouped}"


def count_conv_calls(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> Counter[ConvCall]:
    """The convolutions of one image of `shape` [C, H, W] in forward order, each with how often it is called."""
    found: Counter[ConvCall] = Counter()
    for name, arguments, output in record_operations(model, shape):
        if name == CONV_OP:
            images, weight, _bias, stride, padding, _dilation, _transposed, _out_padding, groups = arguments
            sizes = (tuple(images.shape[1:]), tuple(weight.shape), tuple(output.shape[1:]))
            found[ConvCall(*sizes, tuple(stride), tuple(padding), groups)] += 1
    return found


def feature_map_bytes_per_image(
    model: nn.Module, training: bool, element_size: int = 2, shape: tuple[int, int, int] = (3, 32, 32)
) -> int:
    """Bytes that the feature maps of one image move through memory, of `element` bytes each.

    A step of training reads and writes, in whole feature maps:
    - a convolution: input and output, once forward, once for the input's gradient and once for the weight's;
    - a BatchNorm, in two passes, with what follows it element by element fused in: forward the output of the
      convolution twice (statistics, then application) and its result once; backward the gradient and that output twice,
      and the new gradient once: eight;
    - an addition: the shortcut forward, and its gradient in both backward passes of the norm before it: three.
    Evaluation: a convolution its input and output, a norm one read and one write, an addition one read. Activations,
    dropout, squeezes and gates ride along. Weights and optimizer, which a batch shares, are left out.
    """
    conv, norm, addition = (3, 8, 3) if training else (1, 2, 1)
    elements = 0
    for name, arguments, output in record_operations(model, shape):
        if name == CONV_OP:
            elements += conv * (arguments[0].numel() + output.numel())
        elif name == BATCH_NORM_OP:
            elements += norm * output[0].numel()
        elif name in ADD_OPS and output.dim() == 4:
            elements += addition * output.numel()
    return element_size * elements


def record_operations(model: nn.Module, shape: tuple[int, int, int]) -> list[tuple[str, tuple[Any, ...], Any]]:
    """Name, positional arguments and result of every operation on one image of `shape`, as meta tensors."""
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
