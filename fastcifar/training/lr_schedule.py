"""SCHEDULES: the learning rate over a run, as shapes between the floor and the peak.

A shape is a pure function of the progress; only `plateau` remembers anything, and what it remembers is in checkpoints.
No torch here: the optimizer turns the number into its device tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastcifar.errors import UsageError, lookup
from fastcifar.recipe import Recipe

PLATEAU_FACTOR = 0.1  # of plateau
PLATEAU_THRESHOLD = 1e-4  # relative: a validation loss that falls by less is no better


@dataclass(frozen=True)
class ScheduleSpec:
    """A row of SCHEDULES.

    `share`: (progress in [0, 1], number) -> share of the way from the floor to the peak, in [0, 1]. `number`: the
    default of the number that `NAME:NUMBER` sets, None where there is none; `bounds`, both allowed. `watches`: it
    follows the validation loss.
    """

    lr_fraction: Callable[[float, float], float]
    default_arg: float | None = None
    arg_bounds: tuple[float, float] = (0.0, 0.0)
    arg_is_integer: bool = False
    uses_val_loss: bool = False


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _cosine_restarts(progress: float, cycles: float) -> float:
    """Loshchilov and Hutter 2017, equal cycles; the end of the last is an end, not a restart."""
    rounding = 1e-9  # 3 / 7 * 7 may fall short of 3, and a cycle would begin a step late
    return _half_cosine((progress * cycles + rounding) % 1.0 if progress < 1 else 1.0)


def _triangular(progress: float, peak: float) -> float:
    """Up to the peak at `peak` of the way, then down; one cycle of Smith 2017."""
    return progress / peak if progress < peak else (1 - progress) / (1 - peak)


def _one_cycle(progress: float, peak: float) -> float:
    """Smith and Topin 2018 as torch spells it: cosines from 1/25 up to 1, then down to 1/250,000."""
    start, end = 1 / 25, 1 / 25e4
    if progress < peak:
        return start + (1 - start) * _half_cosine(1 - progress / peak)
    return end + (1 - end) * _half_cosine((progress - peak) / (1 - peak))


SCHEDULES: dict[str, ScheduleSpec] = {
    "constant": ScheduleSpec(lambda progress, _: 1.0),
    "cosine": ScheduleSpec(lambda progress, _: _half_cosine(progress)),
    "linear": ScheduleSpec(lambda progress, _: 1 - progress),
    "cosine_restarts": ScheduleSpec(
        _cosine_restarts, default_arg=4, arg_bounds=(1, 1000), arg_is_integer=True
    ),  # cycles
    "triangular": ScheduleSpec(_triangular, default_arg=0.25, arg_bounds=(0.001, 0.999)),  # where the peak is
    "one_cycle": ScheduleSpec(_one_cycle, default_arg=0.3, arg_bounds=(0.001, 0.999)),  # where the peak is
    "multi_step": ScheduleSpec(  # factor, at half and at three quarters of the way
        lambda progress, factor: factor ** ((progress >= 0.5) + (progress >= 0.75)), default_arg=0.1, arg_bounds=(0, 1)
    ),
    "exponential": ScheduleSpec(
        lambda progress, end: end**progress, default_arg=0.01, arg_bounds=(1e-9, 1)
    ),  # share at the end
    "plateau": ScheduleSpec(
        lambda progress, _: 1.0, default_arg=10, arg_bounds=(0, 10_000), arg_is_integer=True, uses_val_loss=True
    ),  # patience
}


class LRSchedule:
    """The learning rate of each step, from `NAME` or `NAME:NUMBER`.

    Linear warm-up from 0, then the shape between `lr` and `lr_min` over `schedule_epochs` (default: the epochs), and
    after that what it ended at. `plateau:PATIENCE` instead takes a tenth of what is left above the floor whenever
    the validation loss has not fallen for more than PATIENCE epochs.
    Errors: `UsageError` for an unknown schedule, a wrong number, a plateau without a validation split.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.spec, self.arg = _parse_schedule(recipe.schedule)
        self.peak_lr, self.min_lr = recipe.lr, recipe.min_lr
        self.total_steps = (recipe.schedule_epochs or recipe.epochs) * steps_per_epoch
        self.warmup_steps = recipe.warmup_epochs * steps_per_epoch
        if self.warmup_steps >= self.total_steps:
            raise UsageError(f"--warmup-epochs {recipe.warmup_epochs:g} is not shorter than the schedule")
        if self.spec.uses_val_loss and recipe.val_size == 0:
            raise UsageError(f"--schedule {recipe.schedule} watches the validation loss", "set --val-size")
        self.best_val_loss, self.num_bad_epochs, self.plateau_scale = math.inf, 0, 1.0
        self.halvings = 0  # of the whole curve, by `--on-nan rollback`

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        return self._lr_before_halving(step) * 0.5**self.halvings

    def _lr_before_halving(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / (math.floor(self.warmup_steps) + 1)
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return (
            self.min_lr + (self.peak_lr - self.min_lr) * self.spec.lr_fraction(progress, self.arg) * self.plateau_scale
        )

    def after_epoch(self, val_loss: float | None) -> None:
        """Shown the validation loss of each epoch; only a schedule that watches it takes note."""
        if not self.spec.uses_val_loss:
            return
        assert val_loss is not None
        if val_loss < self.best_val_loss * (1 - PLATEAU_THRESHOLD):
            self.best_val_loss, self.num_bad_epochs = val_loss, 0
        else:
            self.num_bad_epochs += 1
        if self.num_bad_epochs > self.arg:
            self.plateau_scale, self.num_bad_epochs = self.plateau_scale * PLATEAU_FACTOR, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best_val_loss,
            "waited": self.num_bad_epochs,
            "factor": self.plateau_scale,
            "halvings": self.halvings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_val_loss, self.num_bad_epochs, self.plateau_scale = state["best"], state["waited"], state["factor"]
        self.halvings = state["halvings"]


def _parse_schedule(spec: str) -> tuple[ScheduleSpec, float]:
    """`NAME` or `NAME:NUMBER` as a row and its number (0.0 for a row without one)."""
    name, colon, text = spec.partition(":")
    shape = lookup(SCHEDULES, name, "schedule")
    if shape.default_arg is None:
        if colon:
            raise UsageError(f"--schedule {spec!r}: {name} takes no number", f"write {name}")
        return shape, 0.0
    if not colon:
        return shape, shape.default_arg
    low, high = shape.arg_bounds
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high or (shape.arg_is_integer and number != int(number)):
        kind = "a whole number" if shape.arg_is_integer else "a number"
        raise UsageError(
            f"--schedule {spec!r}: {text!r} is not {kind} from {low:g} to {high:g}",
            f"such as {name}:{shape.default_arg:g}",
        )
    return shape, number
