"""Weight casts and BatchNorm counters of all layers in single kernels, instead of a kernel for each layer."""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.models.count import count_training_calls
from fastcifar.training.step import LossAndCorrect


class _CastWeights(torch.autograd.Function):
    """Cast float32 tensors to `dtype`, and their gradients to float32, in one multi-tensor kernel each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, weights)
        ctx.mark_non_differentiable(
            *(cast for cast, weight in zip(casts, weights, strict=True) if not weight.requires_grad)
        )
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        casts = [torch.empty_like(gradient, dtype=torch.float32) for gradient in given]
        if casts:
            torch._foreach_copy_(casts, given)
        remaining = iter(casts)
        return None, *(None if gradient is None else next(remaining) for gradient in gradients)


def _forward_with_cast_weight(layer: Any, input: Tensor) -> Tensor:
    """Replace the forward method of an `nn.Conv2d` or `nn.Linear`."""
    weight, bias = layer.cast_weight, layer.bias
    return F.linear(input, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(input, weight, bias)


def share_kernels_between_layers(
    function: LossAndCorrect, model: nn.Module, dtype: torch.dtype, device: torch.device
) -> LossAndCorrect:
    """Return `function`, which calls `model` under autocast to `dtype`, with the same results in fewer kernels.

    Autocast casts the weight of each layer, and then its gradient, in a kernel of its own, and so does each BatchNorm
    increment its `num_batches_tracked`. The returned function casts all weights, casts all gradients and increments all
    counters in one multi-tensor kernel each. Every call of `function` must call the same layers, as in a compiled
    function or a CUDA graph. Convolutions and linear layers that are called several times are left as they are.
    """
    calls = count_training_calls(model, device.type, dtype)
    modules: dict[str, Any] = dict(model.named_modules())
    layers = [module for name, module in modules.items() if calls.autocast[name] == 1 and _has_plain_weight(module)]
    weights = [layer.weight for layer in layers]
    norms = {modules[name]: count for name, count in calls.tracked_batches.items()}
    counters = [norm.num_batches_tracked for norm in norms]

    def run(*batch: Tensor) -> tuple[Tensor, Tensor]:
        casts = _CastWeights.apply(dtype, *weights) if weights else ()
        try:
            for layer, cast in zip(layers, casts, strict=True):
                layer.cast_weight, layer.forward = cast, types.MethodType(_forward_with_cast_weight, layer)
            for norm in norms:
                norm.num_batches_tracked = None
            result = function(*batch)
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)
                vars(layer).pop("cast_weight", None)
            for norm, counter in zip(norms, counters, strict=True):
                norm.num_batches_tracked = counter
        if counters:
            torch._foreach_add_(counters, list(norms.values()))
        return result

    return run


def _has_plain_weight(layer: Any) -> bool:
    """Return whether `layer` applies a float32 parameter as torch's own class does."""
    if type(layer) not in (nn.Conv2d, nn.Linear) or "forward" in vars(layer):
        return False
    return isinstance(layer.weight, nn.Parameter) and layer.weight.dtype == torch.float32
