"""Schedules against torch's where the definitions coincide; minimum learning rate, warm-up, state of plateau."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.lr_schedule import SCHEDULES, LRSchedule, parse_schedule
from tests.training.optimizer_helpers import build_schedule

STEPS = 40  # 10 epochs of 4 steps


def schedule(spec: str, **values: Any) -> LRSchedule:
    return build_schedule(Recipe.make(schedule=spec, **{"lr": 0.4, "epochs": 10, **values}), 4)


def reference_rates(build_scheduler: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    """Return the learning rates of `STEPS` steps of one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    reference, rates = build_scheduler(optimizer), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    return rates


def one_cycle(optimizer: torch.optim.Optimizer, pct_start: float) -> lr_scheduler.OneCycleLR:
    """torch's phases end at integer steps, the last at STEPS; `pct_start` is the fraction of the STEPS + 1 steps."""
    return lr_scheduler.OneCycleLR(optimizer, 0.4, STEPS + 1, pct_start=pct_start, cycle_momentum=False)


@pytest.mark.parametrize(
    ("spec", "min_lr", "build_scheduler"),
    [
        ("constant", 0.0, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        ("cosine", 0.01, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.01)),
        ("cosine_restarts", 0.01, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, STEPS // 4, eta_min=0.01)),
        ("cosine_restarts:2", 0.0, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, STEPS // 2)),
        ("linear", 0.0, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS)),
        ("triangular", 0.01, lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.4, 10, 30, cycle_momentum=False)),
        ("one_cycle:0.25", 0.0, lambda o: one_cycle(o, 11 / 41)),
        ("one_cycle", 0.0, lambda o: one_cycle(o, 13 / 41)),
        ("multi_step", 0.0, lambda o: lr_scheduler.MultiStepLR(o, [STEPS // 2, STEPS * 3 // 4], 0.1)),
        ("multi_step:0.3", 0.0, lambda o: lr_scheduler.MultiStepLR(o, [STEPS // 2, STEPS * 3 // 4], 0.3)),
        ("exponential", 0.0, lambda o: lr_scheduler.ExponentialLR(o, 0.01 ** (1 / STEPS))),
    ],
)  # fmt: skip
def test_schedules_equal_torch(spec: str, min_lr: float, build_scheduler: Callable) -> None:
    lr_schedule = schedule(spec, min_lr=min_lr)
    expected = reference_rates(build_scheduler)
    assert [lr_schedule.lr_at(step) for step in range(STEPS)] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_equals_torch(patience: int) -> None:
    losses = [1.0, 0.8, 0.9, 0.79999, 0.85, 0.7, 0.7, 0.7, 0.7, math.nan, 0.6, 0.61, 0.62, 0.63, 0.64]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    reference = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=patience)
    plateau = schedule(f"plateau:{patience}", epochs=20)
    for epoch, loss in enumerate(losses):
        assert plateau.lr_at(4 * epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=2e-8)
        reference.step(loss)
        plateau.after_epoch(loss)
    assert plateau.lr_at(60) < 0.4


@pytest.mark.parametrize("epochs_before", range(1, 6))
def test_fault02_plateau_continues_with_its_counter_and_factor(epochs_before: int) -> None:
    losses = [1.0, 0.9, 0.95, 0.92, 0.91, 0.93, 0.94, 0.95]
    uninterrupted, stopped, resumed = (schedule("plateau:1", epochs=20) for _ in range(3))
    for loss in losses[:epochs_before]:
        uninterrupted.after_epoch(loss)
        stopped.after_epoch(loss)
    resumed.load_state_dict(stopped.state_dict())
    for loss in losses[epochs_before:]:
        assert resumed.lr_at(7) == uninterrupted.lr_at(7)
        uninterrupted.after_epoch(loss)
        resumed.after_epoch(loss)
    assert resumed.lr_at(7) == uninterrupted.lr_at(7)
    assert uninterrupted.lr_at(7) == pytest.approx(0.4 * 0.1**3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_between_the_minimum_and_the_peak(name: str) -> None:
    lr_schedule = schedule(name, min_lr=0.01)
    rates = [lr_schedule.lr_at(step) for step in range(STEPS + 20)]
    assert all(0.01 - 1e-12 <= rate <= 0.4 + 1e-12 for rate in rates)
    assert len(set(rates[STEPS:])) == 1  # constant after the end
    lr_schedule.after_epoch(None if not SCHEDULES[name].uses_val_loss else 1.0)
    assert lr_schedule.lr_at(3) == rates[3]


def test_length_of_the_schedule_may_differ_from_the_run() -> None:
    shorter = build_schedule(Recipe(lr=0.1, min_lr=0.01, epochs=21, schedule_epochs=20), 10)
    assert [shorter.lr_at(step) for step in (0, 100, 200, 209)] == pytest.approx([0.1, 0.055, 0.01, 0.01])
    longer = build_schedule(Recipe(lr=0.1, epochs=30, schedule_epochs=200), 1)
    assert longer.lr_at(29) == pytest.approx(0.095, abs=2e-4)


def test_warm_up_increases_linearly_to_the_peak() -> None:
    lr_at = build_schedule(Recipe(lr=0.4, epochs=10, warmup_epochs=2), 5).lr_at
    assert [lr_at(step) for step in range(10)] == pytest.approx([0.4 * (step + 1) / 11 for step in range(10)])
    assert lr_at(10) == pytest.approx(0.4)
    assert lr_at(11) < 0.4


@pytest.mark.parametrize("cycles", [3, 7, 11, 22, 49, 103, 1000])
def test_every_restart_begins_at_the_peak(cycles: int) -> None:
    lr_schedule = build_schedule(Recipe(lr=0.4, epochs=cycles, schedule=f"cosine_restarts:{cycles}"), 13)
    assert [lr_schedule.lr_at(13 * cycle) for cycle in range(cycles)] == pytest.approx([0.4] * cycles)
    assert [lr_schedule.lr_at(13 * cycles + step) for step in (0, 1, 13 * cycles)] == [0, 0, 0]  # the end


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosin", "did you mean 'cosine'"),
        ("multistep", "did you mean 'multi_step'"),
        ("cosine:3", "takes no number"),
        ("cosine_restarts:2.5", "an integer from 1 to 1000; use a value such as cosine_restarts:4"),
        ("triangular:1", "from 0.001 to 0.999"),
        ("one_cycle:", "NAME or NAME:VALUE"),
        ("multi_step:nan", "is not a number"),
        ("exponential:x", "'x' is not a number"),
        ("plateau:-1", "an integer"),
    ],
)
def test_fault15_invalid_schedules_are_rejected(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        schedule(spec)


def test_schedules_that_do_not_fit_the_recipe_are_rejected() -> None:
    with pytest.raises(UsageError, match="not shorter"):
        schedule("cosine", epochs=2, warmup_epochs=2)
    with pytest.raises(UsageError, match="--val-size"):
        schedule("plateau", val_size=0)


@pytest.mark.parametrize(
    ("schedule_text", "warmup", "remedy"),
    [
        ("one_cycle", 2, "one_cycle:0.2 to rise for 2 epochs"),
        ("one_cycle:0.5", 1, "one_cycle:0.1 to rise for 1 epochs"),
        ("triangular", 2.5, "triangular:0.25 to rise for 2.5 epochs"),
        ("triangular:0.9", 20, "triangular:0.999 to rise for 20 epochs"),
    ],
)
def test_fault45_no_warmup_before_a_schedule_that_rises(schedule_text: str, warmup: float, remedy: str) -> None:
    message = f"--schedule {schedule_text} already contains a warm-up; set --warmup-epochs 0 and "
    with pytest.raises(UsageError) as caught:
        parse_schedule(Recipe(schedule=schedule_text, epochs=10, warmup_epochs=warmup))
    assert str(caught.value) == f"{message}--schedule {remedy}"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_fault45_other_schedules_have_a_warmup(name: str) -> None:
    """The rate rises to its peak once: a schedule either starts at the peak, or refuses a warm-up."""
    recipe = Recipe(schedule=name, epochs=10, warmup_epochs=2)
    if name in ("one_cycle", "triangular"):
        with pytest.raises(UsageError, match="already contains a warm-up"):
            parse_schedule(recipe)
    else:
        rates = [LRSchedule(recipe, parse_schedule(recipe), 5).lr_at(step) for step in range(11)]
        assert rates[:10] == sorted(rates[:10])
        assert rates[10] == pytest.approx(0.1)
