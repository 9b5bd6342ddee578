"""Optimizers that torch lacks, or lacks in a form that a CUDA graph can capture: RMSprop, Ranger and Muon.

No step synchronizes with the host. Weights of equal shape are processed as one batch, to launch few kernels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcifar.device import has_native_bf16

# The coefficients of Jordan's quintic polynomial maximize its slope at 0. They bring singular values close to 1, which
# is enough (https://kellerjordan.github.io/posts/muon)
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class _CapturableOptimizer(torch.optim.Optimizer):
    """Base class of optimizers whose steps change neither weights nor state if `found_inf` is 1."""

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def _mask_skipped_step(self) -> Tensor:
        """Multiply the gradients by a float32 scalar, 0 if the step is to be skipped and 1 otherwise; return it."""
        weights = _all_params(self)
        if self.found_inf is None:
            return torch.ones((), device=weights[0].device)
        keep = 1 - self.found_inf.reshape(())
        _, gradients = _with_gradients(weights)
        # as integers, because NaN times 0 is NaN
        torch._foreach_mul_([gradient.view(torch.int32) for gradient in gradients], keep.int())
        return keep


class RMSprop(_CapturableOptimizer, torch.optim.RMSprop):
    """torch's RMSprop with the `found_inf` flag of torch's fused kernels."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's stubs: a loss
        tensors = [*_all_params(self), *(value for entry in self.state.values() for value in entry.values())]
        views = [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]  # of any memory format
        before = torch.cat(views)  # copied back below if the step is to be skipped
        super().step(closure)
        if self.found_inf is not None:
            result = torch.where(self.found_inf.bool(), before, torch.cat(views))
            torch._foreach_copy_(views, list(result.split([view.numel() for view in views])))


class Ranger(_CapturableOptimizer):
    """RAdam (Liu et al. 2020) on centralized gradients (Yong et al. 2020): Ranger (Wright 2019) without its Lookahead.

    The same as pytorch_optimizer's Ranger with `degenerated_to_sgd=True`.
    """

    def __init__(
        self,
        params: Any,
        lr: Tensor | float,
        betas: Sequence[float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        n_sma_threshold: float = 5,
        use_gc: bool = True,
    ) -> None:
        beta1, beta2 = betas
        if not (0 <= beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"betas must be in [0, 1) (got {betas})")
        if not (eps >= 0 and n_sma_threshold > 4):
            raise ValueError(f"eps must be >= 0 and n_sma_threshold > 4 (got {eps} and {n_sma_threshold})")
        if not isinstance(use_gc, bool):
            raise ValueError(f"use_gc must be true or false (got {use_gc!r})")
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (beta1, beta2), "eps": eps}
        super().__init__(params, {**defaults, "n_sma_threshold": n_sma_threshold, "use_gc": use_gc})
        for weight in _all_params(self):
            self.state[weight] = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        first = _all_params(self)[0]
        self.state[first]["step"] = torch.zeros((), device=first.device)  # shared by all weights

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's stubs: a loss
        keep = self._mask_skipped_step()
        num_steps = self.state[_all_params(self)[0]]["step"]
        num_steps += keep
        for group in self.param_groups:
            weights, gradients = _with_gradients(group["params"])
            if not weights:
                continue
            exp_avgs = [self.state[weight]["exp_avg"] for weight in weights]
            exp_avg_sqs = [self.state[weight]["exp_avg_sq"] for weight in weights]
            beta1, beta2 = group["betas"]
            lr = group["lr"] * keep
            if group["use_gc"]:  # subtract the mean of each output's gradient
                for (matrices,) in matrices_by_shape([gradient for gradient in gradients if gradient.ndim > 1]):
                    batch = torch.stack(matrices)
                    torch._foreach_copy_(matrices, list(batch - batch.mean(2, keepdim=True)))
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_mul_(exp_avgs, 1 - (1 - beta1) * keep)
            torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
            torch._foreach_mul_(exp_avg_sqs, 1 - (1 - beta2) * keep)
            torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)
            factor, rectified = radam_rectification(num_steps, beta1, beta2, group["n_sma_threshold"])
            divisors = torch._foreach_sqrt(exp_avg_sqs)  # sqrt(exp_avg_sq) + eps if rectified, else 1
            torch._foreach_mul_(divisors, rectified.float())
            # With `alpha`, the overload for a tensor is called; the one for a number would read the tensor on the host.
            torch._foreach_add_(divisors, torch.where(rectified, group["eps"], 1.0), alpha=1)
            updates = torch._foreach_div(exp_avgs, divisors)
            torch._foreach_mul_(updates, -lr * factor)
            torch._foreach_add_(weights, updates)


class Muon(_CapturableOptimizer):
    """Muon (Jordan 2024) for convolutions: orthogonalized momentum for filters, SGD for all other parameters.

    Filters are the 4-dimensional weights, viewed as [out, in * height * width], and, with `linear`, the 2-dimensional
    weights. They are orthogonalized in bf16 where the hardware supports it, otherwise in float32. As in
    airbench94_muon, SGD multiplies the learning rate by `rest_lr`, and `weight_norm` replaces the decay of filters by
    rescaling them to the norm sqrt(out).
    """

    def __init__(
        self,
        params: Any,
        lr: Tensor | float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        weight_norm: bool = False,
        linear: bool = False,
        rest_lr: float = 1.0,
        rest_momentum: float = 0.9,
    ) -> None:
        if not (0 <= momentum < 1 and 0 <= rest_momentum < 1):
            raise ValueError(f"momentum and rest_momentum must be in [0, 1) (got {momentum} and {rest_momentum})")
        if not (isinstance(ns_steps, int) and 1 <= ns_steps < 100 and rest_lr >= 0):
            problem = "ns_steps must be an integer from 1 to 99 and rest_lr >= 0"
            raise ValueError(f"{problem} (got {ns_steps} and {rest_lr})")
        if not all(isinstance(flag, bool) for flag in (nesterov, weight_norm, linear)):
            raise ValueError("nesterov, weight_norm and linear must be true or false")
        muon_defaults = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "weight_norm": weight_norm}
        sgd_defaults = {"linear": linear, "rest_lr": rest_lr, "rest_momentum": rest_momentum}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **muon_defaults, **sgd_defaults})
        for weight in _all_params(self):
            self.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
        is_bf16 = has_native_bf16(_all_params(self)[0].device.type)
        self.matrix_dtype = torch.bfloat16 if is_bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's stubs: a loss
        keep = self._mask_skipped_step()
        for group in self.param_groups:
            filter_dims = (2, 4) if group["linear"] else (4,)
            filters = [weight for weight in group["params"] if weight.ndim in filter_dims]
            lr = group["lr"] * keep
            filters, directions = self._momentum_directions(filters, group["momentum"], group["nesterov"], keep)
            for matrices, matrix_directions in matrices_by_shape(filters, directions):
                weights = torch.stack(matrices)
                updates = orthogonalize(torch.stack(matrix_directions), group["ns_steps"], self.matrix_dtype)
                rows, columns = weights.shape[1:]
                if group["weight_norm"]:
                    norms = weights.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                    weights.mul_(torch.where(keep.bool(), math.sqrt(rows) / norms, 1.0))
                else:
                    weights.mul_(1 - lr * group["weight_decay"])
                weights.sub_(updates.float() * (lr * math.sqrt(max(1.0, rows / columns))))
                torch._foreach_copy_(matrices, list(weights))
            rest = [weight for weight in group["params"] if weight.ndim not in filter_dims]
            rest, directions = self._momentum_directions(rest, group["rest_momentum"], group["nesterov"], keep)
            if rest:
                lr = group["lr"] * group["rest_lr"] * keep
                torch._foreach_mul_(rest, 1 - lr * group["weight_decay"])
                torch._foreach_add_(rest, torch._foreach_mul(directions, -lr))

    def _momentum_directions(
        self, weights: list[Tensor], momentum: float, nesterov: bool, keep: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Update the momentum buffers; return the weights that have a gradient and their update directions."""
        weights, gradients = _with_gradients(weights)
        if not weights:
            return [], []
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(buffers, 1 - (1 - momentum) * keep)
        torch._foreach_add_(buffers, gradients)
        if not nesterov:
            return weights, buffers
        directions = torch._foreach_mul(buffers, momentum)
        torch._foreach_add_(directions, gradients)
        return weights, list(directions)


def radam_rectification(num_steps: Tensor, beta1: float, beta2: float, threshold: float) -> tuple[Tensor, Tensor]:
    """Return RAdam's multiplier of the learning rate, including bias correction, and whether the step is rectified."""
    # in float64: `length` is a small difference of large numbers
    steps = num_steps.double().clamp(min=1)  # a skipped first step multiplies the factor by 0, so it must be finite
    beta2_power = beta2**steps
    max_length = 2 / (1 - beta2) - 1
    length = max_length - 2 * steps * beta2_power / (1 - beta2_power)
    rectified = length >= threshold
    variance = (length - 4) * (length - 2) * max_length / ((max_length - 4) * (max_length - 2) * length)
    factor = torch.where(rectified, ((1 - beta2_power) * variance).sqrt(), 1.0) / (1 - beta1**steps)
    return factor.float(), rectified


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return matrices [n, rows, columns] with singular values of mostly 0.7 to 1.2, by `steps` Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    transpose = matrices.shape[1] > matrices.shape[2]  # so that the Gram matrix is the smaller one
    x = matrices.mT if transpose else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transpose else x


def matrices_by_shape(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """View the tensors [out, ...] of `lists` as matrices [out, inputs] in memory order; yield a group per shape."""
    groups: dict[torch.Size, list[list[Tensor]]] = {}
    for tensors in zip(*lists, strict=True):
        order = [sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True) for tensor in tensors]
        matrices = [tensor.permute(0, *dims).view(len(tensor), -1) for tensor, dims in zip(tensors, order, strict=True)]
        group = groups.setdefault(matrices[0].shape, [[] for _ in lists])
        for group_list, matrix in zip(group, matrices, strict=True):
            group_list.append(matrix)
    yield from groups.values()


def _all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [weight for weight in params if weight.grad is not None]
    return weights, [weight.grad for weight in weights if weight.grad is not None]
