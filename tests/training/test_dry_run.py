"""Tests of dry runs, which change and write nothing, of time budgets and of autotuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training import dry_run
from fastcifar.training.dry_run import StepTiming, fit_epochs_to_time_budget, measure_step_timing
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.training.optimizer_helpers import make_trainer


def test_dry_run_writes_nothing_and_its_times_add_up(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    estimate = dry_run.dry_run(tiny(epochs=7))
    assert not list(tmp_path.iterdir())
    assert (estimate["epochs"], estimate["steps"]) == (7, 35)
    seconds = estimate["seconds"]
    assert seconds["train"] == pytest.approx(35 * estimate["step_s"], abs=1e-3)
    assert seconds["total"] == pytest.approx(sum(value for key, value in seconds.items() if key != "total"), abs=0.01)
    assert estimate["images_per_s"] == pytest.approx(32 / estimate["step_s"])
    assert json.dumps(estimate)


@pytest.mark.medium
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "lookahead:sgd", "augment": "flip,mixup"},
        {"optimizer": "adamw", "image_size": "24:1,32"},
        {"optimizer": "lion"},
    ],
    ids=str,
)
def test_timing_steps_preserves_the_training_state_and_does_not_use_the_loader(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    trainer = make_trainer(tiny(**options, lr=1e-3, ema_decay=0.9, dropout=0.1))
    trainer.optimize()
    monkeypatch.setattr(trainer.loader, "batches", None)
    state_before = [tensor.detach().clone() for tensor in trainer.state_tensors()]
    rng_state = torch.get_rng_state()
    timing = measure_step_timing(trainer)
    assert timing.step_s > 0
    assert timing.eval_s_per_image > 0
    assert all(torch.equal(*pair) for pair in zip(state_before, trainer.state_tensors(), strict=True))
    assert torch.equal(torch.get_rng_state(), rng_state)


def test_time_budget_scales_epochs_and_schedule(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    # An epoch takes 5 steps * 2 s + 40 validation images * 0.05 s = 12 s, and the test set 2 s.
    # The budget leaves 0.95 * 60 s - 7 s - 2 s = 48 s for training: 4 epochs.
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda trainer: StepTiming(2.0, 0.05))
    trainer = make_trainer(tiny(time_budget=1.0, epochs=200))
    fit_epochs_to_time_budget(trainer, elapsed_s=7.0)
    assert (trainer.recipe.epochs, trainer.total_steps) == (4, 20)
    assert trainer.schedule.lr_at(20) == 0.0
    assert trainer.schedule.lr_at(10) == pytest.approx(0.05)
    warmup_trainer = make_trainer(
        tiny(time_budget=1.0, epochs=16, warmup_epochs=8, schedule_epochs=32, image_size="16:3,24:8,32")
    )
    fit_epochs_to_time_budget(warmup_trainer, elapsed_s=7.0)
    scaled = Recipe(**warmup_trainer.recipe.model_dump())
    assert (scaled.epochs, scaled.warmup_epochs, scaled.schedule_epochs) == (4, 2.0, 8.0)
    assert scaled.image_size == "24:2,32"
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda trainer: StepTiming(1e-6, 1e-9))
    fit_epochs_to_time_budget(warmup_trainer, elapsed_s=7.0)
    assert Recipe(**warmup_trainer.recipe.model_dump()).epochs == 100_000  # the largest number that a recipe accepts
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda trainer: StepTiming(2.0, 0.05))
    with pytest.raises(UsageError, match=r"--time-budget 1 is too short for one epoch of 12 s; give 2 minutes"):
        fit_epochs_to_time_budget(trainer, elapsed_s=50.0)


@pytest.mark.medium
def test_run_with_a_time_budget_is_complete(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda trainer: StepTiming(2.0, 0.05))
    summary = train(tiny(time_budget=0.75, epochs=200))
    assert summary.complete
    assert summary.epochs == summary.config["epochs"] == 3
    assert Recipe.make(str(Path(summary.run) / "recipe.toml")).epochs == 3


@pytest.mark.parametrize(
    ("changes", "step_s", "multiprocessors", "is_measured", "is_chosen"),
    [
        ({"epochs": 1000}, 1.0, 132, True, True),
        ({"epochs": 1000}, 0.001, 132, True, False),
        ({"epochs": 600}, 1.0, 132, False, False),  # 3,000 steps of at most 1 s are less than 3,333 s
        ({"epochs": 1000, "max_steps": 3000}, 1.0, 132, False, False),
        ({"epochs": 1000}, 1.0, 46, False, False),  # TorchInductor chooses between kernels from 68 multiprocessors on
        ({"epochs": 1000, "compile_mode": "default"}, 1.0, 132, False, False),
    ],
)
def test_autotuning_only_for_long_runs_on_cuda(
    tiny: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    step_s: float,
    multiprocessors: int,
    is_measured: bool,
    is_chosen: bool,
) -> None:
    """Autotuning must save more than its 100 s: 3 % of 3,333 s. An epoch has 5 steps."""
    trainer = make_trainer(tiny(**changes))
    measured: list[Trainer] = []
    modes: list[str] = []
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(Trainer, "optimize", lambda _, mode, start_loader: modes.append(mode))
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda _: measured.append(trainer) or StepTiming(step_s, 0.0))
    dry_run.autotune(trainer)
    assert not measured, "autotuning needs CUDA"
    trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, device="cuda", compile=True))
    dry_run.autotune(trainer)
    assert bool(measured) == is_measured
    assert modes == (["max-autotune-no-cudagraphs"] if is_chosen else [])
