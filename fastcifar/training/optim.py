"""Optimizers, schedules, clipping and the average of the weights.

Everything that `step.py` calls here may be captured in a CUDA graph: state stands on the device from the start, the
learning rate is one device tensor, nothing reads back to the host. What happens between steps (a new learning rate,
Lookahead's slow weights every k steps) is called by the loop, outside the graph.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.errors import UsageError, nearest, pick
from fastcifar.recipe import Recipe

# name -> torch class and what we ask of it beside lr and weight decay; --opt key=value overrides.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
}

# progress of the schedule in [0, 1] -> share of the peak learning rate in [0, 1]
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
}

LOOKAHEAD = {"k": 5, "alpha": 0.5}
# set by a knob of their own, or by the machine
NOT_ARGUMENTS = {"params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"}


class Optimizer:
    """A torch optimizer whose learning rate is one device tensor, with Lookahead's slow weights around it.

    `lookahead:NAME` (Zhang et al. 2019): every k steps slow += alpha * (fast - slow), then fast = slow.
    Errors: `UsageError` for an unknown optimizer or argument, with the nearest name.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        prefix, _, name = recipe.optimizer.rpartition(":")
        if prefix not in ("", "lookahead"):
            raise UsageError(f"unknown optimizer {recipe.optimizer!r}", "spell it NAME or lookahead:NAME")
        kind, defaults = pick(OPTIMIZERS, name, "optimizer")
        arguments = _checked(recipe.opt, kind, lookahead=prefix == "lookahead")
        around = {key: arguments.pop(key, default) for key, default in LOOKAHEAD.items()}
        self.parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self.lr = torch.tensor(recipe.lr, dtype=torch.float32, device=self.parameters[0].device)
        groups = parameter_groups(model, recipe.weight_decay, recipe.decay_on)
        try:
            self.inner = kind(groups, lr=self.lr, **{**defaults, **arguments})
        except (ValueError, TypeError) as error:
            raise UsageError(f"--opt {recipe.opt}: {error}") from None
        # The first step would create it, and a graph must not capture a first step. A first step from zero is equal.
        for group in self.inner.param_groups:
            if group["momentum"]:
                for weight in group["params"]:
                    self.inner.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        self.k = int(around["k"]) if prefix else 0
        self.alpha = float(around["alpha"])
        if prefix and not (self.k >= 1 and 0 < self.alpha <= 1):
            raise UsageError(f"lookahead needs k >= 1 and 0 < alpha <= 1 (got {around})")
        self.slow = [weight.detach().clone() for weight in self.parameters] if prefix else []

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler, skip: Tensor) -> None:
        """One update on the gradients, through torch's `scaler`, which may be disabled.

        `skip`: float32 scalar on the device; 1 leaves weights and state alone.
        """
        self.inner.found_inf = skip  # type: ignore[attr-defined]  # the fused kernels' switch; an enabled scaler sets it
        scaler.step(self.inner)

    def between_steps(self, done: int) -> None:
        """Called by the loop after step number `done` (from 1): Lookahead's slow weights, every k steps."""
        if self.k and done % self.k == 0:
            fast = [weight.detach() for weight in self.parameters]
            torch._foreach_lerp_(self.slow, fast, self.alpha)
            torch._foreach_copy_(fast, self.slow)

    def set_lr(self, lr: float) -> None:
        """Fills the device tensor: no synchronisation, no recompilation, valid for a captured graph."""
        self.lr.fill_(lr)

    def tensors(self) -> list[Tensor]:
        """Everything a step or `between_steps` changes, but for the weights themselves."""
        state = [value for entry in self.inner.state.values() for value in entry.values() if isinstance(value, Tensor)]
        return [*state, *self.slow, self.lr]

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies into the tensors that are there, so that the graph and the learning rate stay bound to them."""
        inner = state["inner"]["state"]
        for index, weight in enumerate(weight for group in self.inner.param_groups for weight in group["params"]):
            for key, value in self.inner.state[weight].items():
                if isinstance(value, Tensor):
                    value.copy_(inner[index][key])
        for mine, saved in zip(self.slow, state["slow"], strict=True):
            mine.copy_(saved)


def _checked(arguments: dict[str, Any], kind: Callable[..., Any], lookahead: bool) -> dict[str, Any]:
    """`arguments` if all of them are in the optimizer's signature; libraries swallow unknown ones silently."""
    known = [name for name in inspect.signature(kind).parameters if name not in NOT_ARGUMENTS]
    known += list(LOOKAHEAD) if lookahead else []
    for key in arguments:
        if key not in known:
            raise UsageError(f"{kind.__name__} has no argument {key!r}", nearest(key, known))
    return dict(arguments)


def parameter_groups(model: nn.Module, weight_decay: float, decay_on: str) -> list[dict[str, Any]]:
    """Groups for a torch optimizer that cover every trainable parameter exactly once.

    `decay_on`: "all", or "weights" to leave biases and normalisation (parameters of one dimension) undecayed.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if decay_on == "all":
        return [{"params": weights, "weight_decay": weight_decay}]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    assert sum(len(group["params"]) for group in groups) == len(weights)
    return [group for group in groups if group["params"]]


def schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the step (from 0).

    Linear warm-up from 0, then the shape from `lr` to `lr_min` over `schedule_epochs` (default: the epochs),
    and `lr_min` after that: it never rises again. Errors: `UsageError` for an unknown schedule.
    """
    shape = pick(SCHEDULES, recipe.schedule, "schedule")
    total = (recipe.schedule_epochs or recipe.epochs) * steps_per_epoch
    warm = recipe.warmup_epochs * steps_per_epoch
    if warm >= total:
        raise UsageError(f"--warmup-epochs {recipe.warmup_epochs:g} is not shorter than the schedule")

    def lr_at(step: int) -> float:
        if step < warm:
            return recipe.lr * (step + 1) / (math.floor(warm) + 1)
        progress = min((step - warm) / (total - warm), 1.0)
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * shape(progress)

    return lr_at


def clipper(spec: str, parameters: list[nn.Parameter]) -> Callable[[], object]:
    """`value:LIMIT`, `norm:LIMIT` or `none` as a function that clips the gradients in place.

    Errors: `UsageError`.
    """
    kind, _, number = spec.partition(":")
    if spec == "none":
        return lambda: None
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if kind not in ("value", "norm") or not 0 < limit < math.inf:
        raise UsageError(f"--clip {spec!r} is not value:LIMIT, norm:LIMIT or none", "such as value:0.1")
    if kind == "value":
        return lambda: nn.utils.clip_grad_value_(parameters, limit)
    return lambda: nn.utils.clip_grad_norm_(parameters, limit)


class Ema:
    """The exponential moving average of weights and running statistics, updated on the device.

    The first updates weigh more (9 / (10 + t), TensorFlow's rule), so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.live = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self.average = {name: value.clone() for name, value in self.live.items()}
        self.weight_min = 1 - decay
        self.updates = torch.zeros((), device=next(iter(self.live.values())).device)

    def update(self) -> None:
        self.updates += 1
        weight = (9 / (10 + self.updates)).clamp(min=self.weight_min)
        average = list(self.average.values())
        change = torch._foreach_sub(list(self.live.values()), average)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(average, change)

    def copy_to_live(self) -> None:
        """The average becomes the model's weights."""
        torch._foreach_copy_(list(self.live.values()), list(self.average.values()))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights stand in the model for as long as the context lasts."""
        kept = [value.clone() for value in self.live.values()]
        self.copy_to_live()
        try:
            yield
        finally:
            torch._foreach_copy_(list(self.live.values()), kept)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """A state dict of the model with the averaged weights in it (integer buffers are the model's)."""
        return {**model.state_dict(), **self.average}

    def tensors(self) -> list[Tensor]:
        return [*self.average.values(), self.updates]
