"""Fused BatchNorm, squeeze-and-excitation (SE), shortcut addition and ReLU: `norm_relu`.

The forward pass reads its input twice, and so does the backward pass. Each of these reads is one custom operator,
written here in plain PyTorch for CPU tensors and in `triton_kernels` for CUDA tensors. Normalization is linear, so both
the batch statistics and the input of the SE follow from the mean and the squared deviations of each image's channels.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_TILE_ELEMENTS = 8192
MAX_TILE_CHANNELS = 64

# The operators. Feature maps are [n, C, H, W] in channels_last. Per-channel factors (scale, shift, slope, offset) are
# float32 [n, C], or [1, C] where all images share them. The H * W positions of an image are split into S chunks of
# `chunk` positions (the last one may be shorter); results per chunk are float32 [n, S, C]. A Triton program processes a
# tile: one chunk of one image, and some of its channels.


@torch.library.custom_op("fastcifar::chunk_moments", mutates_args=(), device_types="cpu")
def chunk_moments(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each chunk of x, and the sum of squared deviations from that mean; both [n, S, C]."""
    parts = [part.float() for part in x.flatten(2).split(chunk, 2)]
    means = [part.mean(2) for part in parts]
    squared_deviations = [(part - mean[..., None]).square().sum(2) for part, mean in zip(parts, means, strict=True)]
    return torch.stack(means, 1), torch.stack(squared_deviations, 1)


@torch.library.custom_op("fastcifar::scale_add_relu", mutates_args=(), device_types="cpu")
def scale_add_relu(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None) -> Tensor:
    """Return relu(x * scale + shift + shortcut), of x's shape and dtype."""
    y = x * scale[..., None, None] + shift[..., None, None]
    return F.relu(y if shortcut is None else y + shortcut).to(x.dtype, memory_format=torch.channels_last)


@torch.library.custom_op("fastcifar::relu_backward_with_sums", mutates_args=(), device_types="cpu")
def relu_backward_with_sums(
    gradient: Tensor, second_gradient: Tensor | None, x: Tensor, y: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradient + second_gradient where y > 0 and 0 elsewhere, of y's shape and dtype; y is the ReLU's output.

    Also return the sums of that gradient over each chunk and the sums of its product with x, both [n, S, C].
    """
    total = gradient.float() if second_gradient is None else gradient.float() + second_gradient
    masked = total.masked_fill(y <= 0, 0).to(y.dtype, memory_format=torch.channels_last)
    return masked, _chunk_sums(masked.float(), chunk), _chunk_sums(masked.float() * x, chunk)


@torch.library.custom_op("fastcifar::relu_backward_sums", mutates_args=(), device_types="cpu")
def relu_backward_sums(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the sums of `relu_backward_with_sums`, both [n, S, C]; recompute y = relu(x * scale + shift)."""
    masked = _mask_relu_gradient(gradient, x, scale, shift)
    return _chunk_sums(masked, chunk), _chunk_sums(masked * x, chunk)


@torch.library.custom_op("fastcifar::norm_input_gradient", mutates_args=(), device_types="cpu")
def norm_input_gradient(
    gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor, offset: Tensor
) -> Tensor:
    """Return gradient * scale + x * slope + offset, of x's shape and dtype.

    If `shift` is given, set `gradient` to 0 first where relu(x * scale + shift) is 0. If not, the caller has done so.
    """
    masked = gradient.float() if shift is None else _mask_relu_gradient(gradient, x, scale, shift)
    input_gradient = masked * scale[..., None, None] + x * slope[..., None, None] + offset[..., None, None]
    return input_gradient.to(x.dtype, memory_format=torch.channels_last)


def _mask_relu_gradient(gradient: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return gradient.float().masked_fill(x * scale[..., None, None] + shift[..., None, None] <= 0, 0)


def _chunk_sums(feature_map: Tensor, chunk: int) -> Tensor:
    return torch.stack([part.sum(2) for part in feature_map.flatten(2).split(chunk, 2)], 1)


def choose_tile_sizes(x: Tensor) -> tuple[int, int]:
    """Return the numbers of positions in a chunk of x [n, C, H, W] and of channels in a tile, both powers of two."""
    positions, channels = (1 << (count - 1).bit_length() for count in (x.shape[2] * x.shape[3], x.shape[1]))
    tile_channels = min(MAX_TILE_CHANNELS, channels)
    return min(positions, MAX_TILE_ELEMENTS // tile_channels), tile_channels


def _empty_sums(x: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    num_chunks = math.ceil(x.shape[2] * x.shape[3] / chunk)
    sums = x.new_empty(x.shape[0], num_chunks, x.shape[1], dtype=torch.float32)
    return sums, torch.empty_like(sums)


def _empty_map(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


# Name of an operator -> function that takes the operator's arguments and allocates its results.
ALLOCATORS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "chunk_moments": _empty_sums,
    "scale_add_relu": lambda x, scale, shift, shortcut: _empty_map(x),
    "relu_backward_with_sums": lambda gradient, second_gradient, x, y, chunk: (_empty_map(y), *_empty_sums(x, chunk)),
    "relu_backward_sums": lambda gradient, x, scale, shift, chunk: _empty_sums(x, chunk),
    "norm_input_gradient": lambda gradient, x, scale, shift, slope, offset: _empty_map(x),
}


def run_triton_kernel(operator: str, *values: Any) -> Tensor | tuple[Tensor, ...]:
    """Return the results of an operator for the arguments `values`, computed by its Triton kernel."""
    from fastcifar.models import triton_kernels  # Triton is not available everywhere

    results = ALLOCATORS[operator](*values)
    arguments = dict(zip(inspect.signature(ALLOCATORS[operator]).parameters, values, strict=True))
    num_images, channels, height, width = arguments["x"].shape
    chunk, tile_channels = choose_tile_sizes(arguments["x"])
    chunk = arguments.pop("chunk", chunk)
    inputs = [_make_contiguous(value) for value in arguments.values()]
    # The distances between the factors of consecutive images: 0 for [1, C], which all images share.
    factors = [arguments[name] for name in ("scale", "slope") if name in arguments]
    strides = [channels if len(factor) > 1 else 0 for factor in factors]
    grid = (math.ceil(height * width / chunk), num_images, math.ceil(channels / tile_channels))
    sizes = {"P": height * width, "C": channels, "CHUNK": chunk, "BLOCK": tile_channels}
    outputs = results if isinstance(results, tuple) else (results,)
    kernel = getattr(triton_kernels, operator)
    kernel[grid](*inputs, *outputs, *strides, **sizes, num_warps=triton_kernels.NUM_WARPS)
    return results


def _make_contiguous(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


for _operator in (chunk_moments, scale_add_relu, relu_backward_with_sums, relu_backward_sums, norm_input_gradient):
    _name = _operator._opoverload._opname
    _operator.register_kernel("cuda", partial(run_triton_kernel, _name))
    _operator.register_fake(ALLOCATORS[_name])


# The small tensors between the operators.


def norm_scale_and_shift(
    means: Tensor, squared_deviations: Tensor, num_positions: int, eps: float, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return factors such that x * scale + shift is the training-mode BatchNorm of x, followed by the SE, if any.

    `means` [n, C], `squared_deviations` [n, C]: mean and sum of squared deviations of each channel of each image.
    `params`: weight and bias of the BatchNorm, then weights and biases of the SE's two layers, if any.
    Returns scale and shift, [n, C] with an SE and [1, C] without, and the batch's mean and biased variance, [C].
    """
    weight, bias, *se_params = params
    mean = means.mean(0)
    variance = (squared_deviations / num_positions + (means - mean).square()).mean(0)
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    if not se_params:
        return scale[None], shift[None], mean, variance
    reduce_weight, reduce_bias, expand_weight, expand_bias = se_params
    hidden = F.relu(F.linear(means * scale + shift, reduce_weight.flatten(1), reduce_bias))
    gates = F.linear(hidden, expand_weight.flatten(1), expand_bias).sigmoid()
    return scale * gates, shift * gates, mean, variance


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor | None, eps: float, *params: Tensor) -> tuple[Tensor, ...]:
        chunk, num_positions = choose_tile_sizes(x)[0], x.shape[2] * x.shape[3]
        chunk_means, chunk_deviations = chunk_moments(x, chunk)
        # Combine the moments of the chunks, [n, S, C], into those of the images, [n, C] (Chan et al., 1979).
        starts = chunk * torch.arange(chunk_means.shape[1], device=x.device)
        counts = (num_positions - starts).clamp(max=chunk)[:, None]
        means = (chunk_means * counts).sum(1) / num_positions
        squared_deviations = (chunk_deviations + counts * (chunk_means - means[:, None]).square()).sum(1)
        scale, shift, mean, variance = norm_scale_and_shift(means, squared_deviations, num_positions, eps, params)
        y = scale_add_relu(x, scale, shift, shortcut)
        saved_y = None if shortcut is None else y
        ctx.save_for_backward(x, saved_y, means, squared_deviations, scale, shift, *params)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, means, squared_deviations, scale, shift, *params = ctx.saved_tensors
        chunk, num_positions = choose_tile_sizes(x)[0], x.shape[2] * x.shape[3]
        gradient, *second = [output for output in gradients[:2] if output is not None]
        if y is None:
            gradient = gradient + second[0] if second else gradient
            sums, products = relu_backward_sums(gradient, x, scale, shift, chunk)
        else:
            gradient, sums, products = relu_backward_with_sums(gradient, second[0] if second else None, x, y, chunk)
        grad_shift, grad_scale = sums.sum(1).sum_to_size(shift.shape), products.sum(1).sum_to_size(scale.shape)
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (means, squared_deviations, *params)]
            outputs = norm_scale_and_shift(inputs[0], inputs[1], num_positions, ctx.eps, inputs[2:])[:2]
        grad_means, grad_deviations, *grad_params = torch.autograd.grad(outputs, inputs, (grad_scale, grad_shift))
        # The derivative of an image's squared deviations with respect to x is 2 (x - mean), that of its mean 1 / (H W).
        slope = 2 * grad_deviations
        offset = grad_means / num_positions - slope * means
        grad_x = norm_input_gradient(gradient, x, scale, shift if y is None else None, slope, offset)
        return grad_x, None if y is None else gradient, None, *grad_params


def allow_in_compiled_graphs() -> None:
    """Make torch.compile keep `norm_relu` as one call. This imports the compiler, which takes seconds."""
    torch.compiler.allow_in_graph(_norm_relu)


def _norm_relu(x: Tensor, shortcut: Tensor | None, eps: float, *params: Tensor) -> tuple[Tensor, ...]:
    device_type = "cpu" if x.is_meta else x.device.type  # there is no autocast on the meta device
    with torch.autocast(device_type, enabled=False):
        return _NormRelu.apply(x, shortcut, eps, *params)


def norm_relu(
    x: Tensor, bn: nn.BatchNorm2d, se_params: tuple[Tensor, ...] = (), shortcut: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute relu(SE(bn(x)) + shortcut) in training mode; update the running statistics of `bn` as BatchNorm does.

    x, shortcut: [n, C, H, W]. `se_params`: weight and bias of the SE's two layers, or () for no SE.
    Returns the result twice, so that two consumers can use one each: the backward kernel then adds both gradients.
    """
    y, second_y, mean, variance = _norm_relu(x, shortcut, bn.eps, bn.weight, bn.bias, *se_params)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.momentum is not None
    count = x.numel() / x.shape[1]
    with torch.no_grad():
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(variance * (count / (count - 1)), bn.momentum)
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
    return y, second_y
