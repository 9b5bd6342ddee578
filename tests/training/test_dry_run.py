"""Dry runs write nothing and change nothing; a time budget takes the epochs that fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcifar.device import choose_execution
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training import dry_run
from fastcifar.training.build import build_trainer
from fastcifar.training.dry_run import StepTiming, fit_epochs_to_time_budget, measure_step_timing
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer


def test_a_rehearsal_writes_nothing_and_adds_up(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    found = dry_run.dry_run(tiny(epochs=7))
    assert not list(tmp_path.iterdir())
    assert (found["epochs"], found["steps"]) == (7, 35)
    seconds = found["seconds"]
    assert seconds["train"] == pytest.approx(35 * found["step_s"], abs=1e-3)
    assert seconds["total"] == pytest.approx(sum(value for key, value in seconds.items() if key != "total"), abs=0.01)
    assert found["images_per_s"] == pytest.approx(32 / found["step_s"])
    assert json.dumps(found)


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", "adamw", "lion"])
def test_measuring_leaves_everything_as_it_was(tiny: Callable[..., Recipe], optimizer: str) -> None:
    recipe = tiny(optimizer=optimizer, lr=1e-3, ema_decay=0.9, dropout=0.1)
    parts = build_trainer(recipe, choose_execution(recipe))
    step = parts.build_train_step()
    kept = [tensor.detach().clone() for tensor in parts.state_tensors()]
    random_state = torch.get_rng_state()
    pace = measure_step_timing(parts, step)
    assert pace.step_s > 0
    assert pace.eval_s_per_image > 0
    assert all(torch.equal(before, after) for before, after in zip(kept, parts.state_tensors(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_budget_takes_the_epochs_that_fit_and_the_schedule_follows(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 5 steps of 2 s and 40 images of 0.05 s: 12 s an epoch; the test set 2 s; 95 % of 60 s less 7 s: 48 s, 4 epochs
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda parts, step: StepTiming(2.0, 0.05))
    recipe = tiny(time_budget=1.0, epochs=200)
    parts = build_trainer(recipe, choose_execution(recipe))
    fit_epochs_to_time_budget(parts, parts.build_train_step(), elapsed_s=7.0)
    assert (parts.recipe.epochs, parts.total_steps) == (4, 20)
    assert parts.schedule.lr_at(20) == 0.0
    assert parts.schedule.lr_at(10) == pytest.approx(0.05)
    recipe = tiny(time_budget=1.0, epochs=16, warmup_epochs=8, schedule_epochs=32)
    warm = build_trainer(recipe, choose_execution(recipe))
    fit_epochs_to_time_budget(warm, warm.build_train_step(), elapsed_s=7.0)
    assert (warm.recipe.epochs, warm.recipe.warmup_epochs, warm.recipe.schedule_epochs) == (4, 2.0, 8.0)
    with pytest.raises(UsageError, match=r"not one epoch of 12 s fits into --time-budget 1; give 2 minutes"):
        fit_epochs_to_time_budget(parts, parts.build_train_step(), elapsed_s=50.0)


def test_a_run_with_a_budget_ends_complete(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda parts, step: StepTiming(2.0, 0.05))
    summary = train(tiny(time_budget=0.75, epochs=200))
    assert summary["complete"]
    assert summary["epochs"] == summary["config"]["epochs"] == 3
    assert Recipe.make(str(Path(summary["run"]) / "recipe.toml")).epochs == 3


@pytest.mark.parametrize(("step_s", "mode"), [(1.0, "max-autotune-no-cudagraphs"), (0.001, "")])
def test_the_compiler_tries_harder_only_where_the_run_is_long_enough(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, step_s: float, mode: str
) -> None:
    """3 % of the expected training time against 100 s: 5,000 steps of a second, or of a millisecond."""
    recipe = tiny(epochs=1000)
    parts = build_trainer(recipe, choose_execution(recipe))
    tried: list[str] = []
    monkeypatch.setattr(Trainer, "build_train_step", lambda _, mode: tried.append(mode))
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda *_: StepTiming(step_s, 0.0))
    dry_run.autotune_step(parts, parts.build_step(parts.build_loss_function()))
    assert tried == [], "a CPU has nothing to tune"
    parts.execution = replace(parts.execution, device="cuda", compile=True)
    dry_run.autotune_step(parts, parts.build_step(parts.build_loss_function()))
    assert tried == ([mode] if mode else [])
    parts.recipe = parts.recipe.model_copy(update={"compile_mode": "default"})
    dry_run.autotune_step(parts, parts.build_step(parts.build_loss_function()))
    assert len(tried) <= 1
