"""Optimizers, Lookahead, parameter groups and gradient clipping."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.errors import UsageError, first_message_line, suggest_name
from fastcifar.recipe import Recipe
from fastcifar.training.optimizer_classes import Muon, Ranger, RMSprop
from fastcifar.training.rng_state import preserve_state


@dataclass(frozen=True)
class OptimizerSpec:
    """An entry of OPTIMIZERS; `parse_optimizer` adds its name and the arguments of the recipe."""

    build: Callable[..., torch.optim.Optimizer]
    arguments: dict[str, Any] = field(default_factory=dict)  # other than the learning rate and weight decay
    fused: bool = False  # torch updates all weights in one kernel
    capturable: bool = False  # a CUDA graph can capture its update; otherwise, each update reads a flag on the host
    self_scheduled: bool = False  # sets or scales its learning rate itself
    lookahead: dict[str, Any] = field(default_factory=dict)  # `k` and `alpha`; empty without Lookahead
    name: str = ""


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": OptimizerSpec(torch.optim.SGD, {"momentum": 0.9}, fused=True, capturable=True),
    "adam": OptimizerSpec(torch.optim.Adam, fused=True, capturable=True),  # weight decay as L2 penalty
    "adamw": OptimizerSpec(torch.optim.AdamW, fused=True, capturable=True),  # decoupled weight decay
    "rmsprop": OptimizerSpec(RMSprop, capturable=True),  # L2 penalty; torch has no fused kernel
    "ranger": OptimizerSpec(Ranger, capturable=True, lookahead={"k": 6, "alpha": 0.5}),  # decoupled weight decay
    "muon": OptimizerSpec(Muon, capturable=True),  # decoupled weight decay
}
# Classes of pytorch_optimizer that set or scale their learning rate themselves
SELF_SCHEDULED_OPTIMIZERS = {f"dadapt{name}" for name in ("adagrad", "adam", "adan", "lion", "sgd")}
SELF_SCHEDULED_OPTIMIZERS |= {"adafactor", "prodigy", "ranger21"}
LOOKAHEAD_DEFAULTS = {"k": 5, "alpha": 0.5}
LR_MULT = "times"  # key of a parameter group: the multiplier of its learning rate, if it is not 1
# Arguments that other options, or the device, determine
RESERVED_ARGUMENTS = {"params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"}


def find_optimizer(name: str) -> OptimizerSpec:
    """Return the entry `name` of OPTIMIZERS, else one for that class of pytorch_optimizer. Case is ignored."""
    name = name.lower()
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    try:
        import pytorch_optimizer
    except Exception as error:  # a broken installation can raise any exception
        raise UsageError(
            f"{', '.join(OPTIMIZERS)} are built in; other optimizers need pytorch_optimizer, which cannot be "
            f"imported ({type(error).__name__}: {error})",
            "pip install 'pytorch_optimizer>=4.1,<5'",
        ) from None
    names = pytorch_optimizer.get_supported_optimizers()
    if name not in names:
        raise UsageError(f"unknown optimizer {name!r}", suggest_name(name, {*OPTIMIZERS, *names}))
    return OptimizerSpec(pytorch_optimizer.load_optimizer(name), self_scheduled=name in SELF_SCHEDULED_OPTIMIZERS)


def parse_optimizer(recipe: Recipe) -> OptimizerSpec:
    """Parse `NAME` or `lookahead:NAME` and check `--optimizer-arg`, which may contain `k` and `alpha` of Lookahead."""
    prefix, _, name = recipe.optimizer.rpartition(":")
    if prefix not in ("", "lookahead"):
        raise UsageError(f"unknown optimizer {recipe.optimizer!r}", "use NAME or lookahead:NAME")
    spec = find_optimizer(name)
    if prefix and spec.lookahead:
        raise UsageError(f"{name} already includes Lookahead", f"use --optimizer {name}")
    lookahead = dict(LOOKAHEAD_DEFAULTS if prefix else spec.lookahead)
    parameters = inspect.signature(spec.build).parameters
    if not {"params", "lr"} <= parameters.keys():
        raise UsageError(f"{name} does not take parameters and a learning rate", "choose another optimizer")
    if hasattr(spec.build, "eval"):
        problem = f"{name} trains and evaluates different weights, which is not supported"
        raise UsageError(problem, "choose another optimizer")
    if recipe.weight_decay and "weight_decay" not in parameters:
        raise UsageError(f"{name} has no weight decay", "set --weight-decay 0")
    # libraries may ignore unknown arguments
    own = {key: parameter for key, parameter in parameters.items() if key not in RESERVED_ARGUMENTS}
    allowed = [*(key for key, parameter in own.items() if parameter.kind != parameter.VAR_KEYWORD), *lookahead]
    arguments = dict(recipe.optimizer_arg)
    for key in arguments:
        if key not in allowed:
            raise UsageError(f"{name} has no argument {key!r}", suggest_name(key, allowed))
    for key in allowed:
        if key in own and own[key].default is inspect.Parameter.empty and key not in arguments:
            raise UsageError(f"{name} needs {key}", f"set --optimizer-arg {key}=VALUE or choose another optimizer")
    lookahead |= {key: arguments.pop(key) for key in lookahead if key in arguments}
    if lookahead:
        k, alpha = lookahead["k"], lookahead["alpha"]
        if not (isinstance(k, int) and k >= 1 and isinstance(alpha, int | float) and 0 < alpha <= 1):
            raise UsageError(f"Lookahead needs an integer k >= 1 and 0 < alpha <= 1 (got {lookahead})")
    return replace(spec, name=name, arguments={**spec.arguments, **arguments}, lookahead=lookahead)


class OptimizerWrapper:
    """A torch optimizer with its learning rates in device tensors, optionally with Lookahead (Zhang et al. 2019).

    Every k steps, Lookahead sets slow += alpha * (fast - slow) and then fast = slow, after the captured step.
    Raises `UsageError` if the optimizer refuses an argument or cannot train the model.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, spec: OptimizerSpec) -> None:
        self.spec = spec
        self.parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self.lr = torch.tensor(recipe.lr, dtype=torch.float32, device=self.parameters[0].device)
        groups = build_param_groups(model, recipe)
        self.scaled_lrs: dict[float, Tensor] = {}  # multiplier -> learning rate
        for group in groups:
            if multiplier := group.get(LR_MULT):
                scaled_lr = self.scaled_lrs.setdefault(multiplier, self.lr * multiplier)
                group["lr"] = scaled_lr if spec.capturable else recipe.lr * multiplier
        self.inner = self._build_inner(groups, recipe)
        self.slow_weights = [weight.detach().clone() for weight in self.parameters] if spec.lookahead else []

    def _build_inner(self, groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
        """Build the inner optimizer. A capturable one gets all its state tensors; others are first tried on copies."""
        build, arguments = self.spec.build, {"lr": recipe.lr, **self.spec.arguments}
        if self.spec.capturable:
            flags = {"fused": self.spec.fused, "capturable": self.lr.is_cuda}  # torch refuses capturable=True on a CPU
            flags = {key: value for key, value in flags.items() if key in inspect.signature(build).parameters}
            arguments |= {"lr": self.lr, **flags}
        # pytorch_optimizer raises exceptions of many types
        expected = (ValueError, TypeError, LookupError) if self.spec.capturable else Exception
        try:
            if not self.spec.capturable:
                with preserve_state([], self.lr.device):
                    _try_optimizer(build, groups, arguments)
                return build(groups, **arguments)
            inner = build(groups, **arguments)
            with preserve_state(self.parameters, self.lr.device):
                _step_with_gradients(inner, torch.zeros_like)  # a CUDA graph must not capture the first step
        except torch.OutOfMemoryError:
            raise
        except expected as error:
            reason = first_message_line(error, type(error).__name__)
            problem = f"{self.spec.name} cannot train this network with --optimizer-arg {recipe.optimizer_arg}"
            raise UsageError(f"{problem}: {reason}") from None
        for tensor in _optimizer_state_tensors(inner):
            tensor.zero_()  # the initial value of every state tensor
        return inner

    def step(self, scaler: torch.amp.GradScaler, skip: Tensor) -> None:
        """Update the weights. `skip`: float32 scalar on the device; 1 leaves weights and state unchanged."""
        if self.spec.capturable:
            # the kernels skip the update if `found_inf` is 1; an enabled scaler overwrites `found_inf`
            self.inner.found_inf = skip  # type: ignore[attr-defined]
        elif skip.item():
            return
        scaler.step(self.inner)

    def after_step(self, completed_steps: int, skip: Tensor | None = None) -> None:
        """Update Lookahead's slow weights every k steps, except of parameters that require no gradient at present.

        For `skip`, see `step`; the host does not read it.
        """
        if not self.spec.lookahead or completed_steps % self.spec.lookahead["k"]:
            return
        pairs = zip(self.slow_weights, self.parameters, strict=True)
        slow, fast = zip(*((slow, weight.detach()) for slow, weight in pairs if weight.requires_grad), strict=True)
        skip = torch.zeros_like(self.lr) if skip is None else skip
        updated = torch._foreach_lerp(slow, fast, float(self.spec.lookahead["alpha"]))
        torch._foreach_mul_(updated, 1 - skip)
        for weights in (slow, fast):
            torch._foreach_mul_(weights, skip)
            torch._foreach_add_(weights, updated)

    def set_lr(self, lr: float) -> None:
        """Set the learning rates, without a synchronization; captured graphs use the new values."""
        self.lr.fill_(lr)
        for multiplier, scaled_lr in self.scaled_lrs.items():
            scaled_lr.fill_(lr * multiplier)
        if not self.spec.capturable:
            for group in self.inner.param_groups:
                group["lr"] = lr * group.get(LR_MULT, 1.0)

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors, except the weights, that steps change; if not capturable, only the existing ones."""
        return [*_optimizer_state_tensors(self.inner), *self.slow_weights, self.lr, *self.scaled_lrs.values()]

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "slow": self.slow_weights, "lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the result of `state_dict` to the existing tensors, which a captured graph refers to."""
        if self.spec.capturable:
            weights = [weight for group in self.inner.param_groups for weight in group["params"]]
            for index, weight in enumerate(weights):
                for key, value in self.inner.state[weight].items():
                    if isinstance(value, Tensor):
                        value.copy_(state["inner"]["state"][index][key])
        else:  # load_state_dict may keep tensors without a copy, and later steps would change those of `state`
            self.inner.load_state_dict(copy.deepcopy(state["inner"]))
        for slow_weight, saved in zip(self.slow_weights, state["slow"], strict=True):
            slow_weight.copy_(saved)
        self.set_lr(float(state["lr"]))


def _try_optimizer(
    build: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], arguments: dict[str, Any]
) -> None:
    """Make two steps on copies of the weights, save and load the state; raise what the optimizer raises."""
    copies = [{**group, "params": [p.detach().clone().requires_grad_() for p in group["params"]]} for group in groups]
    optimizer = build(copies, **arguments)
    for _ in range(2):
        _step_with_gradients(optimizer, torch.clone)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("its state is not limited to plain values and tensors, as checkpoints require") from None
    build(copies, **arguments).load_state_dict(state)


def _step_with_gradients(optimizer: torch.optim.Optimizer, gradient_fn: Callable[[Tensor], Tensor]) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = gradient_fn(weight.detach())
    optimizer.step()
    optimizer.zero_grad()


def _optimizer_state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]


def build_param_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer that contain every trainable parameter of `model` once.

    Parameters with at most one dimension count as biases, the last linear layer's weight as the head. Weight decay is
    divided by the learning-rate multiplier, so that the decay per step is unchanged.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if recipe.head_lr_mult != 1 and not linear:
        raise UsageError(f"--head-lr-mult {recipe.head_lr_mult:g}: the network has no linear layer", "remove it")
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        is_bias, is_head = weight.ndim <= 1, bool(linear) and weight is linear[-1]
        lr_mult = recipe.bias_lr_mult if is_bias else recipe.head_lr_mult if is_head else 1.0
        has_decay = recipe.bias_decay or not is_bias
        group = groups.setdefault((lr_mult, has_decay), {"params": []})
        group["params"].append(weight)
        group["weight_decay"] = recipe.weight_decay / lr_mult if has_decay else 0.0
        if lr_mult != 1:
            group[LR_MULT] = lr_mult
    return sorted(groups.values(), key=lambda group: group["params"][0].ndim <= 1)


def build_grad_clipper(clip_grad: tuple[str, float] | None, parameters: list[nn.Parameter]) -> Callable[[], object]:
    """Return a function that clips the gradients of `parameters` in place; it does nothing if `clip_grad` is None."""
    if clip_grad is None:
        return lambda: None
    kind, limit = clip_grad
    clip = nn.utils.clip_grad_value_ if kind == "value" else nn.utils.clip_grad_norm_
    return lambda: clip(parameters, limit)
