"""Learning-rate schedules as functions of training progress between the minimum and the peak learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypedDict

from fastcifar.errors import UsageError, lookup
from fastcifar.recipe import Recipe

PLATEAU_FACTOR = 0.1
PLATEAU_THRESHOLD = 1e-4  # relative: a smaller decrease of the validation loss is no improvement


@dataclass(frozen=True)
class ScheduleSpec:
    """An entry of SCHEDULES; `parse_schedule` sets the argument."""

    lr_fraction: Callable[[float, float], float]  # (progress in [0, 1], argument) -> 0 (minimum) to 1 (peak)
    arg: float = 0.0  # number in `NAME:NUMBER`; in SCHEDULES, the default
    arg_bounds: tuple[float, float] | None = None  # inclusive; None if the schedule has no argument
    arg_is_integer: bool = False
    uses_val_loss: bool = False


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _cosine_restarts(progress: float, cycles: float) -> float:
    """Cosine annealing with restarts (Loshchilov and Hutter 2017) and equal cycles; the last ends without a restart."""
    epsilon = 1e-9  # 3 / 7 * 7 may be less than 3, and a cycle would begin one step late
    return _half_cosine((progress * cycles + epsilon) % 1.0 if progress < 1 else 1.0)


def _one_cycle(progress: float, peak: float) -> float:
    """One-cycle schedule (Smith and Topin 2018) as in torch: cosines from 1/25 to 1 and then to 1/250,000."""
    start, end = 1 / 25, 1 / 25e4
    if progress < peak:
        return start + (1 - start) * _half_cosine(1 - progress / peak)
    return end + (1 - end) * _half_cosine((progress - peak) / (1 - peak))


SCHEDULES: dict[str, ScheduleSpec] = {
    "constant": ScheduleSpec(lambda progress, _: 1.0),
    "cosine": ScheduleSpec(lambda progress, _: _half_cosine(progress)),
    "linear": ScheduleSpec(lambda progress, _: 1 - progress),
    # argument: number of cycles
    "cosine_restarts": ScheduleSpec(_cosine_restarts, 4, (1, 1000), arg_is_integer=True),
    # argument: progress at the peak; "triangular" is one cycle of Smith 2017
    "triangular": ScheduleSpec(
        lambda progress, peak: progress / peak if progress < peak else (1 - progress) / (1 - peak), 0.25, (0.001, 0.999)
    ),
    "one_cycle": ScheduleSpec(_one_cycle, 0.3, (0.001, 0.999)),
    # argument: factor at progress 0.5 and 0.75
    "multi_step": ScheduleSpec(
        lambda progress, factor: factor ** ((progress >= 0.5) + (progress >= 0.75)), 0.1, (0, 1)
    ),
    # argument: fraction at the end
    "exponential": ScheduleSpec(lambda progress, end: end**progress, 0.01, (1e-9, 1)),
    # argument: patience in epochs
    "plateau": ScheduleSpec(lambda progress, _: 1.0, 10, (0, 10_000), arg_is_integer=True, uses_val_loss=True),
}


class ScheduleState(TypedDict):
    """The state of a schedule in a checkpoint. Only `plateau` changes the keys other than `halvings`."""

    best: float  # lowest validation loss
    waited: int  # epochs without improvement
    factor: float
    halvings: int  # how often `--on-nan rollback` has halved all learning rates


class LRSchedule:
    """The learning rate of each step, from the recipe's `schedule`: `NAME` or `NAME:NUMBER`.

    After a linear warm-up, the learning rate varies between `lr` and `min_lr` up to epoch `schedule_epochs` (default:
    `epochs`) and then stays constant. `plateau:PATIENCE` divides the difference to `min_lr` by 10 whenever the
    validation loss has not improved for more than PATIENCE epochs.
    """

    def __init__(self, recipe: Recipe, spec: ScheduleSpec, steps_per_epoch: int) -> None:
        self.spec = spec
        self.peak_lr, self.min_lr = recipe.lr, recipe.min_lr
        self.total_steps = (recipe.schedule_epochs or recipe.epochs) * steps_per_epoch
        self.warmup_steps = recipe.warmup_epochs * steps_per_epoch
        self.state: ScheduleState = {"best": math.inf, "waited": 0, "factor": 1.0, "halvings": 0}

    def lr_at(self, step: int) -> float:
        if step < self.warmup_steps:
            lr = self.peak_lr * (step + 1) / (math.floor(self.warmup_steps) + 1)
        else:
            progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
            fraction = self.spec.lr_fraction(progress, self.spec.arg)
            lr = self.min_lr + (self.peak_lr - self.min_lr) * fraction * self.state["factor"]
        return lr * 0.5 ** self.state["halvings"]

    def after_epoch(self, val_loss: float | None) -> None:
        if not self.spec.uses_val_loss:
            return
        assert val_loss is not None
        state = self.state
        if val_loss < state["best"] * (1 - PLATEAU_THRESHOLD):
            state["best"], state["waited"] = val_loss, 0
        else:
            state["waited"] += 1
        if state["waited"] > self.spec.arg:
            state["factor"], state["waited"] = state["factor"] * PLATEAU_FACTOR, 0

    def state_dict(self) -> ScheduleState:
        return self.state.copy()

    def load_state_dict(self, state: ScheduleState) -> None:
        self.state = ScheduleState(
            best=state["best"], waited=state["waited"], factor=state["factor"], halvings=state["halvings"]
        )


def constant_lr(recipe: Recipe, lr: float) -> LRSchedule:
    """Return a schedule with the learning rate `lr` at every step, instead of that of `recipe`."""
    constant = recipe.model_copy(update={"lr": lr, "min_lr": lr, "warmup_epochs": 0.0})
    return LRSchedule(constant, SCHEDULES["constant"], 1)


def parse_schedule(recipe: Recipe) -> ScheduleSpec:
    """Parse `NAME` or `NAME:NUMBER`, and check the warm-up and the validation split."""
    name, colon, text = recipe.schedule.partition(":")
    spec = lookup(SCHEDULES, name, "schedule")
    if colon:
        if not spec.arg_bounds:
            raise UsageError(f"--schedule {recipe.schedule!r}: {name} takes no number", f"use {name}")
        low, high = spec.arg_bounds
        try:
            arg = float(text)
        except ValueError:
            arg = math.nan
        if not low <= arg <= high or (spec.arg_is_integer and arg != int(arg)):
            kind = "an integer" if spec.arg_is_integer else "a number"
            problem = f"--schedule {recipe.schedule!r}: {text!r} is not {kind} from {low:g} to {high:g}"
            raise UsageError(problem, f"use a value such as {name}:{spec.arg:g}")
        spec = replace(spec, arg=arg)
    length = recipe.schedule_epochs or recipe.epochs
    if recipe.warmup_epochs and spec.lr_fraction(0, spec.arg) < 1:
        low, high = spec.arg_bounds or (0, 1)
        fraction = min(max(recipe.warmup_epochs / length, low), high)
        problem = f"--schedule {recipe.schedule} already contains a warm-up"
        remedy = (
            f"set --warmup-epochs 0 and --schedule {name}:{fraction:.4g} to rise for {recipe.warmup_epochs:g} epochs"
        )
        raise UsageError(problem, remedy)
    if recipe.warmup_epochs >= length:
        raise UsageError(f"--warmup-epochs {recipe.warmup_epochs:g} is not shorter than the schedule", "reduce it")
    if spec.uses_val_loss and recipe.val_size == 0:
        raise UsageError(f"--schedule {recipe.schedule} needs a validation split", "set --val-size")
    return spec
