"""Parameters, multiply-accumulates (MACs), layers, convolutions and memory traffic, observed on the meta device.

A network that does not support it, because its forward pass reads values, is observed on the CPU instead.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ImageShape = tuple[int, int, int]  # [C, H, W]
T = TypeVar("T")

CIFAR_SHAPE: ImageShape = (3, 32, 32)
CONV_OP = "aten.convolution.default"
BATCH_NORM_OP = "aten.native_batch_norm.default"
BATCH_NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ADD_OPS = ("aten.add.Tensor", "aten.add_.Tensor")


class LayerRow(TypedDict):
    """One call of a layer with one image."""

    name: str
    kind: str  # class of the module
    output: list[int]  # [C, H, W] or [features]; [] for a module that is never called
    params: int  # trainable; a parameter counts in the first row it appears in
    macs: int


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, shape: ImageShape = CIFAR_SHAPE) -> int:
    """Return the forward multiply-accumulates of one image in `nn.Conv2d` and `nn.Linear` modules, without biases."""
    return sum(row["macs"] for row in layer_table(model, shape))


def layer_table(model: nn.Module, shape: ImageShape = CIFAR_SHAPE) -> list[LayerRow]:
    """Return one row for each call of a layer, in forward order; then modules with parameters that are never called.

    A layer is a module that has parameters of its own, or has no children and is not `nn.Identity`.
    """
    return _observe(model, _layer_rows, shape)


def _layer_rows(model: nn.Module, images: Tensor) -> list[LayerRow]:
    rows: list[LayerRow] = []
    counted: set[nn.Parameter] = set()

    def add_row(name: str, module: nn.Module, output: Any) -> None:
        own_params = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in counted]
        counted.update(own_params)
        macs = 0
        if isinstance(output, Tensor) and isinstance(module, nn.Conv2d | nn.Linear):
            macs = output.numel() * module.weight[0].numel()
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "output": list(output.shape[1:]) if isinstance(output, Tensor) else [],
                "params": sum(p.numel() for p in own_params),
                "macs": macs,
            }
        )

    for name, module in model.named_modules():
        is_leaf = not list(module.children()) and not isinstance(module, nn.Identity)
        if is_leaf or list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda module, _inputs, output, name=name: add_row(name, module, output))
    model(images)
    for name, module in model.named_modules():
        if any(p.requires_grad and p not in counted for p in module.parameters(recurse=False)):
            add_row(name, module, None)
    return rows


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

    def build_layer(self) -> nn.Conv2d:
        """Return a layer that computes this convolution."""
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        options["kernel_size"] = self.weight_shape[2:]
        return nn.Conv2d(self.input_shape[0], self.weight_shape[0], bias=False, **options)

    def __str__(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        shapes = " -> ".join("x".join(map(str, shape)) for shape in (self.input_shape, self.output_shape))
        return f"{shapes}, {self.weight_shape[2]}x{self.weight_shape[3]}{groups}"


def count_conv_calls(model: nn.Module) -> Counter[ConvCall]:
    """Return the convolutions of one 32x32 image in forward order, each with its number of calls."""
    calls: Counter[ConvCall] = Counter()
    for name, arguments, output in _record_operations(model):
        if name == CONV_OP:
            images, weight, _bias, stride, padding, *_, groups = arguments
            shapes = (tuple(images.shape[1:]), tuple(weight.shape), tuple(output.shape[1:]))
            calls[ConvCall(*shapes, tuple(stride), tuple(padding), groups)] += 1
    return calls


class TrainingCalls(NamedTuple):
    """What a forward pass in training mode calls, by the name of the module."""

    autocast: Counter[str]  # number of calls under autocast
    tracked_batches: dict[str, int]  # BatchNorm with a momentum -> increments of its `num_batches_tracked`, if any


def count_training_calls(model: nn.Module, device_type: str, dtype: torch.dtype) -> TrainingCalls:
    """Count the calls in a forward pass of `model` under autocast on `device_type` to `dtype` (none for float32).

    The counts are empty if the forward pass fails on the meta device.
    """
    meta_model = _eval_copy(model, "meta")
    calls: Counter[str] = Counter()
    norms: dict[str, Any] = {}
    for (name, module), original in zip(meta_model.named_modules(), model.modules(), strict=True):
        module.training = original.training
        module.register_forward_pre_hook(
            lambda _module, _inputs, name=name: calls.update([name] * torch.is_autocast_enabled(device_type))
        )
        if type(module) in BATCH_NORM_TYPES and module.num_batches_tracked is not None:
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64)  # not on the meta device, to count
            if module.momentum is not None:  # otherwise, its forward pass needs the counter
                norms[name] = module
    try:
        with torch.no_grad(), torch.autocast(device_type, dtype, enabled=dtype != torch.float32):
            meta_model(torch.empty(2, *CIFAR_SHAPE, device="meta"))
    except Exception:
        return TrainingCalls(Counter(), {})
    increments = {name: int(norm.num_batches_tracked) for name, norm in norms.items()}
    return TrainingCalls(calls, {name: count for name, count in increments.items() if count})


def feature_map_bytes_per_image(model: nn.Module, training: bool, element_size: int = 2) -> int:
    """Estimate the bytes of feature maps that well-fused kernels read and write for one 32x32 image.

    In training, a convolution reads or writes input and output three times (forward and two gradients). A BatchNorm,
    fused with the elementwise operations after it, reads or writes 3 maps forward (input twice, output) and 5 backward
    (gradient and input twice, new gradient). An addition adds 3 (shortcut, gradient in both BatchNorm reads).
    """
    conv_factor, norm_factor, addition_factor = (3, 8, 3) if training else (1, 2, 1)
    elements = 0
    for name, arguments, output in _record_operations(model):
        if name == CONV_OP:
            elements += conv_factor * (arguments[0].numel() + output.numel())
        elif name == BATCH_NORM_OP:
            elements += norm_factor * output[0].numel()
        elif name in ADD_OPS and output.dim() == 4:
            elements += addition_factor * output.numel()
    return element_size * elements


def _record_operations(model: nn.Module) -> list[tuple[str, tuple[Any, ...], Any]]:
    """Return the name, the arguments and the result of every operation on one 32x32 image."""
    operations: list[tuple[str, tuple[Any, ...], Any]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            operations.append((str(func), args, result))
            return result

    def record(model: nn.Module, images: Tensor) -> None:
        operations.clear()  # of a failed attempt on another device
        with Recorder():
            model(images)

    _observe(model, record)
    return operations


def _observe(model: nn.Module, observe: Callable[[nn.Module, Tensor], T], shape: ImageShape = CIFAR_SHAPE) -> T:
    """Return `observe(copy, image)` of a copy on the meta device, or if that fails of one on the CPU."""
    for device in ("meta", "cpu"):
        try:
            copied = _eval_copy(model, device)
            with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
                return observe(copied, torch.zeros(1, *shape))
        except Exception:
            if device == "cpu" or any(parameter.is_meta for parameter in model.parameters()):
                raise
    raise AssertionError("the CPU is the last device")


def _eval_copy(model: nn.Module, device: str) -> nn.Module:
    """Return a float32 copy in evaluation mode on `device`, without the wrapper of `torch.compile`."""
    return copy.deepcopy(getattr(model, "_orig_mod", model)).to(device, torch.float32).eval()
