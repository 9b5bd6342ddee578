"""Update rules that torch lacks, or lacks in a form for a CUDA graph: RMSprop that can skip, Ranger, Muon.

Each is a torch optimizer whose state is there from the start, on the weights' device. Nothing reads back to the host,
and where `found_inf` is 1 a step changes nothing. Few kernels: lists of weights at once, equal shapes as one batch.
No table and no choice here; that is `optim.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Jordan's quintic: the steepest at 0, and it only comes near 1, which is enough (https://kellerjordan.github.io/posts/muon)
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class RMSprop(torch.optim.RMSprop):
    """torch's, with its fused kernels' switch: where `found_inf` is 1 a step changes nothing, and no host asks.

    All that it changes is gathered before and after, and one of the two is put back: copies, but few kernels.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        state = [value for entry in self.state.values() for value in entry.values()]
        flat = [_flat_view(value) for value in (*(p for group in self.param_groups for p in group["params"]), *state)]
        before = torch.cat(flat)
        super().step(closure)
        if self.found_inf is not None:
            chosen = torch.where(self.found_inf.bool(), before, torch.cat(flat))
            torch._foreach_copy_(flat, list(chosen.split([value.numel() for value in flat])))


class Ranger(torch.optim.Optimizer):
    """RAdam (Liu et al. 2020) on centralised gradients (Yong et al. 2020): Ranger (Wright 2019) but for its Lookahead.

    Until the variance of the second moment is defined, `n_sma_threshold` samples long, it takes plain momentum steps.
    Weight decay is decoupled. As pytorch_optimizer's with `degenerated_to_sgd=True`, whose names the arguments have.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

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
            raise ValueError(f"betas are in [0, 1) (got {betas})")
        if not (eps >= 0 and n_sma_threshold > 4):
            raise ValueError(f"eps >= 0 and n_sma_threshold > 4 (got {eps} and {n_sma_threshold})")
        if not isinstance(use_gc, bool):
            raise ValueError(f"use_gc is true or false (got {use_gc!r})")
        own = {"betas": (beta1, beta2), "eps": eps, "n_sma_threshold": n_sma_threshold, "use_gc": use_gc}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own})
        for weight in _all_params(self):
            self.state[weight] = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        first = _all_params(self)[0]
        self.state[first]["step"] = torch.zeros((), device=first.device)  # one count for all, kept with the first

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's stubs: a loss
        keep = _mask_skipped_step(self)
        count = self.state[_all_params(self)[0]]["step"]
        count += keep
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(group, weights, keep, count)

    def _update(self, group: dict[str, Any], weights: list[Tensor], keep: Tensor, count: Tensor) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        averages = [self.state[weight]["exp_avg"] for weight in weights]
        squares = [self.state[weight]["exp_avg_sq"] for weight in weights]
        beta1, beta2 = group["betas"]
        lr = group["lr"] * keep
        if group["use_gc"]:
            centralize(gradients)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_mul_(averages, 1 - (1 - beta1) * keep)
        torch._foreach_add_(averages, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, 1 - (1 - beta2) * keep)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        factor, rectified = radam_rectification(count, beta1, beta2, group["n_sma_threshold"])
        divisors = torch._foreach_sqrt(squares)  # sqrt(v) + eps, or 1 until it is rectified
        torch._foreach_mul_(divisors, rectified.float())
        torch._foreach_add_(divisors, torch.where(rectified, group["eps"], 1.0))
        changes = torch._foreach_div(averages, divisors)
        torch._foreach_mul_(changes, -lr * factor)
        torch._foreach_add_(weights, changes)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for convolutions: filters move by their momentum made orthogonal, the rest as in SGD.

    Filters are the weights of four dimensions, as matrices [out, in * height * width], and with `linear` those of two.
    All their singular values become about 1, times sqrt(out / in) where a matrix is tall. As in airbench94_muon linear
    layers, biases and normalisation take SGD steps with momentum `rest_momentum` and `rest_lr` times the learning rate.
    Weight decay is decoupled, by each one's own rate. `weight_norm`: before its update each convolution is rescaled to
    the norm sqrt(out), which replaces its decay.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

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
            raise ValueError(f"momentum is in [0, 1) (got {momentum} and {rest_momentum})")
        if not (isinstance(ns_steps, int) and 1 <= ns_steps < 100 and rest_lr >= 0):
            raise ValueError(f"ns_steps is a whole number from 1 to 99, rest_lr >= 0 (got {ns_steps} and {rest_lr})")
        if not all(isinstance(switch, bool) for switch in (nesterov, weight_norm, linear)):
            raise ValueError("nesterov, weight_norm and linear are true or false")
        own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "weight_norm": weight_norm}
        rest = {"linear": linear, "rest_lr": rest_lr, "rest_momentum": rest_momentum}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own, **rest})
        for weight in _all_params(self):
            self.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's stubs: a loss
        keep = _mask_skipped_step(self)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            turned = (2, 4) if group["linear"] else (4,)
            filters = [weight for weight in weights if weight.ndim in turned]
            rest = [weight for weight in weights if weight.ndim not in turned]
            if filters:
                self._muon_update(group, filters, keep)
            if rest:
                self._sgd_update(group, rest, keep)

    def _muon_update(self, group: dict[str, Any], filters: list[Tensor], keep: Tensor) -> None:
        """Muon's update of `filters`, matrices of equal shape at once."""
        lr = group["lr"] * keep
        directions = self._momentum_directions(filters, group["momentum"], group["nesterov"], keep)
        pairs = [
            (as_matrix(weight), as_matrix(direction)) for weight, direction in zip(filters, directions, strict=True)
        ]
        for same in group_by_shape(pairs):
            weights = torch.stack([weight for weight, _ in same])
            updates = orthogonalize(torch.stack([direction for _, direction in same]), group["ns_steps"])
            rows, columns = weights.shape[1:]
            if group["weight_norm"]:
                norms = weights.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                weights.mul_(torch.where(keep.bool(), math.sqrt(rows) / norms, 1.0))
            else:
                weights.mul_(1 - lr * group["weight_decay"])
            weights.sub_(updates.float() * (lr * math.sqrt(max(1.0, rows / columns))))
            torch._foreach_copy_([weight for weight, _ in same], list(weights))

    def _sgd_update(self, group: dict[str, Any], weights: list[Tensor], keep: Tensor) -> None:
        """A step of SGD with momentum."""
        lr = group["lr"] * group["rest_lr"] * keep
        directions = self._momentum_directions(weights, group["rest_momentum"], group["nesterov"], keep)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, torch._foreach_mul(directions, -lr))

    def _momentum_directions(
        self, weights: list[Tensor], momentum: float, nesterov: bool, keep: Tensor
    ) -> list[Tensor]:
        """The momentum after this step's gradients, in the memory format of the weights."""
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_mul_(buffers, 1 - (1 - momentum) * keep)
        torch._foreach_add_(buffers, gradients)
        if not nesterov:
            return buffers
        ahead = torch._foreach_mul(buffers, momentum)
        torch._foreach_add_(ahead, gradients)
        return list(ahead)


def radam_rectification(count: Tensor, beta1: float, beta2: float, threshold: float) -> tuple[Tensor, Tensor]:
    """RAdam's factor of the learning rate (float32 scalar) after `count` steps, and whether it is rectified (bool).

    The bias of the first moment is in the factor. In float64: the length is a small difference of large numbers.
    """
    steps = count.double().clamp(min=1)  # a skipped first step multiplies the factor by 0: it must be finite
    power = beta2**steps
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * steps * power / (1 - power)
    rectified = length >= threshold
    variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    factor = torch.where(rectified, ((1 - power) * variance).sqrt(), 1.0) / (1 - beta1**steps)
    return factor.float(), rectified


def centralize(gradients: list[Tensor]) -> None:
    """Subtracts from every output's gradient its mean, in place; biases and normalisation are left alone."""
    matrices = [(as_matrix(gradient),) for gradient in gradients if gradient.ndim > 1]
    for same in group_by_shape(matrices):
        batch = torch.stack([gradient for (gradient,) in same])
        batch -= batch.mean(2, keepdim=True)
        torch._foreach_copy_([gradient for (gradient,) in same], list(batch))


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[n, rows, columns] -> the same with singular values of about 1 (0.7 to 1.2), by Newton-Schulz, in `dtype`."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def as_matrix(weight: Tensor) -> Tensor:
    """[out, ...] as a view [out, inputs], the inputs in the order of memory: what is done here does not mind theirs."""
    order = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
    return weight.permute(0, *order).view(len(weight), -1)


def group_by_shape(tuples: Iterable[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
    """`tuples` whose first tensors are of one shape together, in the order they came."""
    found: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
    for entry in tuples:
        found.setdefault(entry[0].shape, []).append(entry)
    return list(found.values())


def _mask_skipped_step(optimizer: Ranger | Muon) -> Tensor:
    """float32 scalar: 1, or 0 if this step is to be skipped, and then the gradients are made 0.

    Every change is multiplied by it, and what a NaN was in would stay NaN times 0; not so its bits as a whole number.
    """
    gradients = [weight.grad for weight in _all_params(optimizer) if weight.grad is not None]
    if optimizer.found_inf is None:
        return torch.ones((), device=_all_params(optimizer)[0].device)
    keep = 1 - optimizer.found_inf.reshape(())
    torch._foreach_mul_([gradient.view(torch.int32) for gradient in gradients], keep.int())
    return keep


def _all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _flat_view(value: Tensor) -> Tensor:
    """A dense tensor of any memory format as one dimension, in the same memory."""
    return value.detach().as_strided((value.numel(),), (1,))
