"""Optimizers, Lookahead, clipping and the average of the weights.

What `step.py` calls here may be captured in a CUDA graph where the optimizer's row says so: state stands on the device
from the start, the learning rate is one device tensor, nothing reads back to the host. What happens between steps (a
new learning rate, Lookahead's slow weights every k steps) is called by the loop, outside the graph.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.errors import UsageError, suggest_name
from fastcifar.recipe import Recipe
from fastcifar.training.optimizer_classes import Muon, Ranger, RMSprop
from fastcifar.training.rng_state import preserve_state


@dataclass(frozen=True)
class OptimizerSpec:
    """A row of OPTIMIZERS: a class that `--optimizer-arg` argues with, and what a person should know of it.

    `fused`: torch updates all weights in one kernel. `capturable`: the update may stand in a CUDA graph; one that may
    not runs after it, and reads one flag on the host each step. `own_schedule`: it changes its learning rate itself.
    `lookahead`: the slow weights that are part of it, by their `k` and `alpha`.
    """

    build: Callable[..., torch.optim.Optimizer]
    defaults: dict[str, Any] = field(default_factory=dict)  # beside lr and weight decay
    fused: bool = False
    capturable: bool = False
    self_scheduled: bool = False
    lookahead: dict[str, Any] = field(default_factory=dict)


# Any other name is a class of pytorch_optimizer; see `library`.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": OptimizerSpec(torch.optim.SGD, {"momentum": 0.9}, fused=True, capturable=True),
    "adam": OptimizerSpec(torch.optim.Adam, fused=True, capturable=True),  # weight decay is an L2 term of the gradient
    "adamw": OptimizerSpec(torch.optim.AdamW, fused=True, capturable=True),  # decoupled: weights shrink by lr * decay
    "rmsprop": OptimizerSpec(RMSprop, capturable=True),  # L2; foreach on CUDA, torch has no fused one
    "ranger": OptimizerSpec(Ranger, capturable=True, lookahead={"k": 6, "alpha": 0.5}),  # decoupled
    "muon": OptimizerSpec(Muon, capturable=True),  # decoupled
}
# of pytorch_optimizer's: they set or scale their learning rate themselves
SELF_SCHEDULED_OPTIMIZERS = {
    "adafactor",
    "prodigy",
    "ranger21",
    *(f"dadapt{of}" for of in ("adagrad", "adam", "adan", "lion", "sgd")),
}
LOOKAHEAD_DEFAULTS = {"k": 5, "alpha": 0.5}
LR_MULT = "times"  # of a group: its learning rate over the optimizer's, where that is not 1
# set by a knob of their own, or by the machine
RESERVED_ARGUMENTS = {"params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"}


class OptimizerWrapper:
    """A torch optimizer whose learning rate is one device tensor, with Lookahead's slow weights around it.

    A group whose rate is a multiple of it (`bias_lr`, `head_lr`) has a tensor of its own, filled with it.

    `lookahead:NAME` (Zhang et al. 2019): every k steps slow += alpha * (fast - slow), then fast = slow; `k` and
    `alpha` are then Lookahead's, also where the inner optimizer has arguments of these names.
    Errors: `UsageError` for an unknown optimizer or argument, with the nearest name, and for an optimizer that this
    loop cannot step.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        prefix, _, self.name = recipe.optimizer.rpartition(":")
        if prefix not in ("", "lookahead"):
            raise UsageError(f"unknown optimizer {recipe.optimizer!r}", "spell it NAME or lookahead:NAME")
        self.spec = find_optimizer(self.name)
        if prefix and self.spec.lookahead:
            raise UsageError(f"{self.name} has Lookahead in it", f"--optimizer {self.name} --optimizer-arg k=6")
        around = LOOKAHEAD_DEFAULTS if prefix else self.spec.lookahead
        arguments = _validate_optimizer_args(recipe, self.name, self.spec, around)
        around = {key: arguments.pop(key, default) for key, default in around.items()}
        self.parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self.lr = torch.tensor(recipe.lr, dtype=torch.float32, device=self.parameters[0].device)
        groups = build_param_groups(
            model, recipe.weight_decay, recipe.bias_decay, recipe.bias_lr_mult, recipe.head_lr_mult
        )
        self.scaled_lrs = {group[LR_MULT]: self.lr * group[LR_MULT] for group in groups if LR_MULT in group}
        for group in groups:
            if LR_MULT in group:
                own = self.scaled_lrs[group[LR_MULT]]
                group["lr"] = own if self.spec.capturable else recipe.lr * group[LR_MULT]
        self.inner = self._build_inner(groups, {**self.spec.defaults, **arguments}, recipe)
        k, alpha = around.get("k", 0), around.get("alpha", 1.0)
        if around and not (isinstance(k, int) and k >= 1 and isinstance(alpha, int | float) and 0 < alpha <= 1):
            raise UsageError(f"lookahead needs a whole k >= 1 and 0 < alpha <= 1 (got {around})")
        self.lookahead_k, self.lookahead_alpha = k, float(alpha)
        self.slow_weights = [weight.detach().clone() for weight in self.parameters] if around else []

    def _build_inner(
        self, groups: list[dict[str, Any]], arguments: dict[str, Any], recipe: Recipe
    ) -> torch.optim.Optimizer:
        """The inner optimizer: its state there if it is capturable, tried out on copies if it is not."""
        expected = (ValueError, TypeError) if self.spec.capturable else Exception  # the library raises all kinds
        try:
            if self.spec.capturable:
                return self._build_capturable(groups, arguments)
            with preserve_state([], self.lr.device):
                _try_optimizer(self.spec.build, groups, {"lr": recipe.lr, **arguments})
            return self.spec.build(groups, lr=recipe.lr, **arguments)
        except torch.OutOfMemoryError:
            raise
        except expected as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"{self.name} cannot train this network with --optimizer-arg {recipe.optimizer_arg}: {reason}"
            ) from None

    def _build_capturable(self, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> torch.optim.Optimizer:
        """With every tensor of its state: the first step would create it, and a graph must not capture a first step."""
        build = self.spec.build
        machine = {"fused": self.spec.fused, "capturable": self.lr.is_cuda}  # torch asserts capturable off on a CPU
        machine = {key: value for key, value in machine.items() if key in inspect.signature(build).parameters}
        inner = build(groups, lr=self.lr, **machine, **arguments)
        with preserve_state(self.parameters, self.lr.device):
            _step_with_gradients(inner, torch.zeros_like)
        for tensor in _optimizer_state_tensors(inner):
            tensor.zero_()  # what each of them starts from
        return inner

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler, skip: Tensor) -> None:
        """One update on the gradients, through torch's `scaler`, which may be disabled.

        `skip`: float32 scalar on the device; 1 leaves weights and state alone.
        """
        if self.spec.capturable:
            self.inner.found_inf = skip  # type: ignore[attr-defined]  # the kernels' switch; an enabled scaler sets it
        elif skip.item():
            return
        scaler.step(self.inner)

    def after_step(self, completed_steps: int, skip: Tensor | None = None) -> None:
        """Called by the loop after step number `done` (from 1): Lookahead's slow weights, every k steps.

        `skip`: as in `step`; without a branch, which the host would have to wait for.
        """
        if not self.lookahead_k or completed_steps % self.lookahead_k:
            return
        fast = [weight.detach() for weight in self.parameters]
        skip = torch.zeros_like(self.lr) if skip is None else skip
        moved = torch._foreach_lerp(self.slow_weights, fast, self.lookahead_alpha)
        torch._foreach_mul_(moved, 1 - skip)
        for weights in (self.slow_weights, fast):
            torch._foreach_mul_(weights, skip)
            torch._foreach_add_(weights, moved)

    def set_lr(self, lr: float) -> None:
        """Fills the device tensors: no synchronisation, no recompilation, valid for a captured graph."""
        self.lr.fill_(lr)
        for times, rate in self.scaled_lrs.items():
            rate.fill_(lr * times)
        if not self.spec.capturable:
            for group in self.inner.param_groups:
                group["lr"] = lr * group.get(LR_MULT, 1.0)

    def state_tensors(self) -> list[Tensor]:
        """Everything a step or `between_steps` changes, but for the weights themselves.

        Of an optimizer that is not capturable only what its steps have created so far.
        """
        return [*_optimizer_state_tensors(self.inner), *self.slow_weights, self.lr, *self.scaled_lrs.values()]

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "slow": self.slow_weights, "lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies into the tensors that are there, so that the graph and the learning rate stay bound to them."""
        if self.spec.capturable:
            inner = state["inner"]["state"]
            for index, weight in enumerate(weight for group in self.inner.param_groups for weight in group["params"]):
                for key, value in self.inner.state[weight].items():
                    if isinstance(value, Tensor):
                        value.copy_(inner[index][key])
        else:  # torch keeps tensors that fit as they are: they must not be those of `state`
            self.inner.load_state_dict(copy.deepcopy(state["inner"]))
        for mine, saved in zip(self.slow_weights, state["slow"], strict=True):
            mine.copy_(saved)
        self.lr.copy_(state["lr"])
        for times, rate in self.scaled_lrs.items():
            rate.copy_(state["lr"] * times)


def find_optimizer(name: str) -> OptimizerSpec:
    """The row `name` of OPTIMIZERS, else a class of pytorch_optimizer, in any case of letters. Errors: `UsageError`."""
    name = name.lower()
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    classes = pytorch_optimizer_classes()
    if name not in classes:
        raise UsageError(f"unknown optimizer {name!r}", suggest_name(name, {**OPTIMIZERS, **classes}))
    return OptimizerSpec(classes[name], self_scheduled=name in SELF_SCHEDULED_OPTIMIZERS)


def pytorch_optimizer_classes() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """pytorch_optimizer's classes by lower-case name, imported now and not before.

    Errors: `UsageError` with the install line where it cannot be imported.
    """
    try:
        import pytorch_optimizer
    except Exception as error:  # a broken library raises what it likes
        raise UsageError(
            f"{', '.join(OPTIMIZERS)} are built in, any other optimizer needs pytorch_optimizer, which cannot be "
            f"imported ({type(error).__name__}: {error})",
            "pip install 'pytorch_optimizer>=4.1,<5'",
        ) from None
    return {name: pytorch_optimizer.load_optimizer(name) for name in pytorch_optimizer.get_supported_optimizers()}


def _validate_optimizer_args(
    recipe: Recipe, name: str, spec: OptimizerSpec, lookahead_defaults: dict[str, Any]
) -> dict[str, Any]:
    """--optimizer-arg if all of it is in the optimizer's signature or `around` it; libraries swallow unknown ones silently."""
    parameters = inspect.signature(spec.build).parameters
    if not {"params", "lr"} <= parameters.keys():
        raise UsageError(f"{name} is not made of parameters and a learning rate", "choose another optimizer")
    if hasattr(spec.build, "eval"):
        raise UsageError(f"{name} evaluates other weights than it trains, which a run cannot do", "choose another")
    if recipe.weight_decay and "weight_decay" not in parameters:
        raise UsageError(f"{name} has no weight decay", "set --weight-decay 0")
    own = [key for key, of in parameters.items() if key not in RESERVED_ARGUMENTS and of.kind != of.VAR_KEYWORD]
    known = [*own, *lookahead_defaults]
    for key in recipe.optimizer_arg:
        if key not in known:
            raise UsageError(f"{name} has no argument {key!r}", suggest_name(key, known))
    for key in own:
        if parameters[key].default is inspect.Parameter.empty and key not in recipe.optimizer_arg:
            raise UsageError(f"{name} needs {key}", f"give --optimizer-arg {key}=VALUE, or choose another optimizer")
    return dict(recipe.optimizer_arg)


def _try_optimizer(
    build: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], arguments: dict[str, Any]
) -> None:
    """Two steps and a checkpoint on copies of the weights, so that what cannot train fails before anything is written.

    Raises what the optimizer raises: it may want a closure, second derivatives or matrices, or keep state that a
    checkpoint cannot hold.
    """
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
        raise ValueError("its state is not only plain values and tensors, as a checkpoint's is") from None
    build(copies, **arguments).load_state_dict(state)


def _step_with_gradients(optimizer: torch.optim.Optimizer, gradient_fn: Callable[[Tensor], Tensor]) -> None:
    """One step on the gradients that `gradient` makes of the weights; none are left."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = gradient_fn(weight.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer_state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]


def build_param_groups(
    model: nn.Module, weight_decay: float, bias_decay: bool, bias_lr_mult: float = 1.0, head_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer that cover every trainable parameter exactly once.

    `bias_decay`: whether weight decay applies to biases and normalization (parameters of one dimension) too.
    `bias_lr`, `head_lr`: multiples of the learning rate, for these and for the last linear layer's weight. They leave
    the decay of a step as it is: a group's `weight_decay` is divided by its multiple.
    Errors: `UsageError` for a `head_lr` without a linear layer.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if head_lr_mult != 1 and not linear:
        raise UsageError(f"--head-lr-mult {head_lr_mult:g}: the network has no linear layer", "leave it out")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in weights:
        is_bias = weight.ndim <= 1
        times = bias_lr_mult if is_bias else head_lr_mult if linear and weight is linear[-1] else 1.0
        share = 0.0 if is_bias and not bias_decay else 1.0
        found.setdefault((times, share), []).append(weight)
    groups = [
        {"params": params, "weight_decay": weight_decay * share / times, **({LR_MULT: times} if times != 1 else {})}
        for (times, share), params in sorted(found.items(), key=lambda item: item[1][0].ndim <= 1)
    ]
    assert sum(len(group["params"]) for group in groups) == len(weights)
    return groups


def build_grad_clipper(spec: str, parameters: list[nn.Parameter]) -> Callable[[], object]:
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
        raise UsageError(f"--clip-grad {spec!r} is not value:LIMIT, norm:LIMIT or none", "such as value:0.1")
    if kind == "value":
        return lambda: nn.utils.clip_grad_value_(parameters, limit)
    return lambda: nn.utils.clip_grad_norm_(parameters, limit)
