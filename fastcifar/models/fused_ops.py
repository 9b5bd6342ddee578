"""BatchNorm, squeeze-and-excitation, shortcut and ReLU in two reads of the map, forward and backward: `norm_relu`.

A map is touched by two passes forward and two backward, each an operator: in plain PyTorch here, for CPU tensors, and a
Triton kernel in `kernels.py`, for CUDA tensors. What lies between the passes is small and plain: the means and squared
deviations of every image's channels give the batch's statistics, and the squeeze of an SE too, for the mean of a
normalised channel follows from the channel's. No tensor is read back to the host.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The passes. A map is [n, C, H, W], channels_last; a factor float32 [n, C], or [1, C] for all images. Sums are over
# `chunk` positions of an image, S chunks to an image, the last perhaps shorter: float32 [n, S, C].


@torch.library.custom_op("fastcifar::chunk_moments", mutates_args=(), device_types="cpu")
def chunk_moments(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Means over each chunk, and sums of squared deviations from them."""
    parts = [part.float() for part in x.flatten(2).split(chunk, 2)]
    means = [part.mean(2) for part in parts]
    squares = [(part - mean[..., None]).square().sum(2) for part, mean in zip(parts, means, strict=True)]
    return torch.stack(means, 1), torch.stack(squares, 1)


@torch.library.custom_op("fastcifar::scale_add_relu", mutates_args=(), device_types="cpu")
def scale_add_relu(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None) -> Tensor:
    """relu(x * scale + shift + shortcut), a map of x's dtype."""
    y = x * scale[..., None, None] + shift[..., None, None]
    return F.relu(y if shortcut is None else y + shortcut).to(x.dtype, memory_format=torch.channels_last)


@torch.library.custom_op("fastcifar::relu_backward_with_sums", mutates_args=(), device_types="cpu")
def relu_backward_with_sums(
    gradient: Tensor, second_gradient: Tensor | None, x: Tensor, y: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """g = gradient + second where y > 0, a map of y's dtype; the sums of g, and those of g * x."""
    total = gradient.float() if second_gradient is None else gradient.float() + second_gradient
    g = total.masked_fill(y <= 0, 0).to(y.dtype, memory_format=torch.channels_last)
    return g, _chunk_sums(g.float(), chunk), _chunk_sums(g.float() * x, chunk)


@torch.library.custom_op("fastcifar::relu_backward_sums", mutates_args=(), device_types="cpu")
def relu_backward_sums(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The same sums where there is no shortcut, for x says then where the ReLU is open; g is not kept."""
    g = _mask_relu_gradient(gradient, x, scale, shift)
    return _chunk_sums(g, chunk), _chunk_sums(g * x, chunk)


@torch.library.custom_op("fastcifar::norm_input_gradient", mutates_args=(), device_types="cpu")
def norm_input_gradient(
    g: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor, offset: Tensor
) -> Tensor:
    """g * scale + x * slope + offset, a map of x's dtype. With a shift, g is still to be 0 where the ReLU is shut."""
    open_g = g.float() if shift is None else _mask_relu_gradient(g, x, scale, shift)
    moved = open_g * scale[..., None, None] + x * slope[..., None, None] + offset[..., None, None]
    return moved.to(x.dtype, memory_format=torch.channels_last)


def _mask_relu_gradient(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return gradient.float().masked_fill(x * scale[..., None, None] + shift[..., None, None] <= 0, 0)


def _chunk_sums(feature_map: Tensor, chunk: int) -> Tensor:
    return torch.stack([part.sum(2) for part in feature_map.flatten(2).split(chunk, 2)], 1)


def choose_chunk_size(x: Tensor) -> int:
    """Positions in a chunk of the map x: a power of two that keeps a kernel's tile at 8,192 elements or fewer."""
    return min(next_power_of_two(x.shape[2] * x.shape[3]), 8192 // min(64, next_power_of_two(x.shape[1])))


def next_power_of_two(count: int) -> int:
    """The smallest power of two that is `count` or more."""
    return 1 << max(0, count - 1).bit_length()


def empty_chunk_sums(x: Tensor, chunk: int) -> Tensor:
    """Room for sums over the map x."""
    chunks = math.ceil(x.shape[2] * x.shape[3] / chunk)
    return torch.empty(x.shape[0], chunks, x.shape[1], dtype=torch.float32, device=x.device)


def empty_channels_last_like(x: Tensor) -> Tensor:
    """Room for a map like x."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def _lazy_cuda_kernel(name: str) -> Any:
    """The kernel of that name in `kernels.py`, imported when it first runs: Triton is not everywhere."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module("fastcifar.models.triton_kernels"), name)(*arguments)

    return run


for _pass in (chunk_moments, scale_add_relu, relu_backward_with_sums, relu_backward_sums, norm_input_gradient):
    _pass.register_kernel("cuda", _lazy_cuda_kernel(_pass._opoverload._opname))


@chunk_moments.register_fake
def _(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    return empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)


@scale_add_relu.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None) -> Tensor:
    return empty_channels_last_like(x)


@relu_backward_with_sums.register_fake
def _(gradient: Tensor, second: Tensor | None, x: Tensor, y: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_channels_last_like(y), empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)


@relu_backward_sums.register_fake
def _(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    return empty_chunk_sums(x, chunk), empty_chunk_sums(x, chunk)


@norm_input_gradient.register_fake
def _(g: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor, offset: Tensor) -> Tensor:
    return empty_channels_last_like(x)


# Between the passes.


def norm_scale_and_shift(
    means: Tensor, squared_deviations: Tensor, num_positions: int, eps: float, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and shift that make a map its BatchNorm, gated by an SE if there are weights for one.

    `weights`: weight and bias of the BatchNorm, then perhaps of the SE's two layers. `means`, `squares`: of each
    image's channels, [n, C], the latter sums of squared deviations over the `positions`.
    Returns scale and shift, [n, C] with a gate and [1, C] without, then the batch's mean and biased variance, [C].
    """
    weight, bias, *gate = params
    mean = means.mean(0)
    variance = (squared_deviations / num_positions + (means - mean).square()).mean(0)
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    if not gate:
        return scale[None], shift[None], mean, variance
    down, down_bias, up, up_bias = gate
    hidden = F.relu(F.linear(means * scale + shift, down.flatten(1), down_bias))
    gates = F.linear(hidden, up.flatten(1), up_bias).sigmoid()
    return scale * gates, shift * gates, mean, variance


def merge_chunk_moments(
    means: Tensor, squared_deviations: Tensor, num_positions: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Means and squared deviations of chunks, [n, S, C], as those of whole images, [n, C]."""
    starts = chunk * torch.arange(means.shape[1], device=means.device)
    counts = (num_positions - starts).clamp(max=chunk)[:, None]
    mean = (means * counts).sum(1) / num_positions
    return mean, (squared_deviations + counts * (means - mean[:, None]).square()).sum(1)


class _NormRelu(torch.autograd.Function):
    """relu(gate * BatchNorm(x) + shortcut), twice: each use of the output hands its gradient back by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor | None, eps: float, *params: Tensor) -> tuple[Tensor, ...]:
        chunk, positions = choose_chunk_size(x), x.shape[2] * x.shape[3]
        means, squares = chunk_moments(x, chunk)
        means, squares = merge_chunk_moments(means, squares, positions, chunk)
        scale, shift, mean, variance = norm_scale_and_shift(means, squares, positions, eps, params)
        y = scale_add_relu(x, scale, shift, shortcut)
        ctx.save_for_backward(x, None if shortcut is None else y, means, squares, scale, shift, *params)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, means, squares, scale, shift, *small = ctx.saved_tensors
        chunk, positions = choose_chunk_size(x), x.shape[2] * x.shape[3]
        gradient, *second = [given for given in gradients[:2] if given is not None]
        if y is None:
            g = gradient + second[0] if second else gradient
            sums, products = relu_backward_sums(g, x, scale, shift, chunk)
        else:
            g, sums, products = relu_backward_with_sums(gradient, second[0] if second else None, x, y, chunk)
        of_shift, of_scale = sums.sum(1).sum_to_size(shift.shape), products.sum(1).sum_to_size(scale.shape)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (means, squares, *small)]
            outputs = norm_scale_and_shift(leaves[0], leaves[1], positions, ctx.eps, leaves[2:])[:2]
        of_means, of_squares, *of_small = torch.autograd.grad(outputs, leaves, (of_scale, of_shift))
        slope = 2 * of_squares  # x moves its image's squares by 2 (x - mean), and its mean by 1 / positions
        offset = of_means / positions - slope * means
        of_x = norm_input_gradient(g, x, scale, shift if y is None else None, slope, offset)
        return of_x, None if y is None else g, None, *of_small


@torch.compiler.allow_in_graph
def _norm_relu(x: Tensor, shortcut: Tensor | None, eps: float, *params: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast(x.device.type, enabled=False):
        return _NormRelu.apply(x, shortcut, eps, *params)


def norm_relu(
    x: Tensor, bn: nn.BatchNorm2d, se_params: tuple[Tensor, ...] = (), shortcut: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """relu(SE(bn(x)) + shortcut) in training mode, twice: where each of two uses takes its own, their gradients are
    added on the way instead of beforehand.

    x, shortcut, outputs: maps [n, C, H, W]. `gate`: weight and bias of the SE's two layers, or none of them. The
    running statistics of `bn` move as its own forward moves them.
    """
    y, again, mean, variance = _norm_relu(x, shortcut, bn.eps, bn.weight, bn.bias, *se_params)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.num_batches_tracked is not None
    assert bn.momentum is not None
    count = x.numel() / x.shape[1]
    with torch.no_grad():
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(variance * (count / (count - 1)), bn.momentum)
        bn.num_batches_tracked.add_(1)
    return y, again
