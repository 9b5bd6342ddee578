"""Non-finite losses and gradients change no state; the run stops or rolls back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcifar.errors import NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training import trainer as trainer_module
from fastcifar.training.build import build_trainer
from fastcifar.training.evaluate import evaluate
from fastcifar.training.resolve import resolve
from fastcifar.training.step import loss_and_correct
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.faults.runs import assert_same, last, rows, summary

MakeRecipe = Callable[..., Recipe]
OPTIMIZERS = ("lookahead:sgd", "adamw", "lookahead:lion", "ranger", "muon")


class NanInjector:
    """Replaces `loss_and_correct`: in the given steps (from 1), the loss or gradients and the running statistics are
    not finite."""

    trainer: Trainer

    def __init__(self, steps: set[int], where: str = "loss") -> None:
        self.steps, self.where, self.calls = steps, where, 0
        self.state_before: list[Tensor] = []

    def __call__(self, *args: Any) -> Any:
        original = loss_and_correct(*args)

        def function(*batch: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            inject = self.calls in self.steps
            if inject and not self.state_before:
                self.state_before = [tensor.detach().clone() for tensor in self.trainer.model.state_dict().values()]
            loss, correct = original(*batch)
            if not inject:
                return loss, correct
            for buffer in self.trainer.model.buffers():
                if buffer.is_floating_point():
                    buffer.data.fill_(math.nan)  # hidden from autograd, as if the forward pass had done it
            if self.where == "loss":
                return loss * math.nan, correct
            weight = next(self.trainer.model.parameters())
            return loss + (weight * 0).sum() * math.inf, correct

        return function


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[NanInjector], NanInjector]:
    """Return a function that installs an injector in every later run."""

    def patch_training(injector: NanInjector) -> NanInjector:
        def build(*args: Any) -> Trainer:
            injector.trainer = build_trainer(*args)
            return injector.trainer

        monkeypatch.setattr("fastcifar.training.train.build_trainer", build)
        monkeypatch.setattr(trainer_module, "loss_and_correct", injector)
        return injector

    return patch_training


@pytest.mark.medium
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fault14_non_finite_step_changes_neither_weights_nor_checkpoint(
    tiny: MakeRecipe, tmp_path: Path, install: Callable[[NanInjector], NanInjector], optimizer: str, where: str
) -> None:
    """Step 9 of 15 is not finite; the host detects it later, after Lookahead's update in step 10."""
    train(tiny(optimizer=optimizer, lr=0.01, ema_decay=0.9, epochs=3, max_steps=8, out=str(tmp_path / "good")))
    injector = install(NanInjector({9}, where))
    with pytest.raises(NonFiniteError, match="was not finite in step 9; use a smaller --lr") as caught:
        train(tiny(optimizer=optimizer, lr=0.01, ema_decay=0.9, epochs=3))
    assert caught.value.exit_code == 5
    model, expected = injector.trainer.model, last(tmp_path / "good")
    float_tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert all(
        map(torch.equal, float_tensors, [tensor for tensor in injector.state_before if tensor.is_floating_point()])
    )
    assert injector.trainer.ema is not None
    assert_same(
        injector.trainer.ema.average, {key: expected["ema"][key] for key in injector.trainer.ema.average}, "average"
    )
    if injector.trainer.optimizer.spec.capturable:
        injector.trainer.optimizer.set_lr(0.0)
        state = injector.trainer.optimizer.state_dict()
        assert_same(state["slow"], expected["optimizer"]["slow"], "slow")
        assert_same(state["inner"]["state"], expected["optimizer"]["inner"]["state"], "optimizer")
    checkpoint = last(tmp_path / "run")
    assert checkpoint["step"] == 5
    assert all(value.isfinite().all() for value in [*checkpoint["model"].values(), *checkpoint["ema"].values()])
    assert len(rows(tmp_path / "run")) == 1


@pytest.mark.slow
def test_fault14_fp16_gradient_overflow_is_no_error_but_a_non_finite_loss_is(
    tiny: MakeRecipe, tmp_path: Path, install: Callable[[NanInjector], NanInjector]
) -> None:
    injector = install(NanInjector({4}, "gradient"))
    injector.steps = set()
    train(tiny(precision="fp16", optimizer="sgd", lr=0.01))
    injector.calls, injector.steps = 0, {4}
    injector.where = "loss"
    with pytest.raises(NonFiniteError, match="in step 4"):
        train(tiny(precision="fp16", optimizer="sgd", lr=0.01, out=str(tmp_path / "bad")))
    float_tensors = [tensor for tensor in injector.trainer.model.state_dict().values() if tensor.is_floating_point()]
    assert all(
        map(torch.equal, float_tensors, [tensor for tensor in injector.state_before if tensor.is_floating_point()])
    )


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", "adamw", "rmsprop", "ranger", "muon"])
def test_fault14_steps_do_not_synchronize_with_the_host(
    tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = tiny(optimizer=optimizer, ema_decay=0.9, clip_grad="norm:1.0")
    trainer = build_trainer(resolve(recipe))
    step, batches = trainer.build_step(loss_and_correct(trainer.forward, 0.0)), list(trainer.loader.batches(0))
    step(*batches[0])
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, lambda *_: pytest.fail("the step synchronizes with the host"))
        for completed_steps, batch in enumerate(batches, start=1):
            trainer.optimizer.set_lr(0.01)
            step(*batch)
            trainer.optimizer.after_step(completed_steps, trainer.meter.found_inf)
    assert trainer.meter.compute().all_finite


@pytest.mark.medium
@pytest.mark.parametrize(("nan_step", "epoch"), [(3, 0), (8, 1)])
def test_fault14_rollback_restores_the_checkpoint_and_halves_the_learning_rate(
    tiny: MakeRecipe, tmp_path: Path, install: Callable[[NanInjector], NanInjector], nan_step: int, epoch: int
) -> None:
    train(tiny(epochs=3, schedule="constant", out=str(tmp_path / "plain")))
    install(NanInjector({nan_step}))
    assert train(tiny(epochs=3, schedule="constant", on_nan="rollback")).complete
    rates = [float(row["lr"]) for row in rows(tmp_path / "run")]
    assert rates == [0.1 if index < epoch else 0.05 for index in range(3)]
    assert rows(tmp_path / "run")[:epoch] == rows(tmp_path / "plain")[:epoch]
    assert last(tmp_path / "run")["rollbacks"] == last(tmp_path / "run")["schedule"]["halvings"] == 1


@pytest.mark.medium
def test_fault14_rollback_after_a_save_of_the_same_nan(
    tiny: MakeRecipe, tmp_path: Path, install: Callable[[NanInjector], NanInjector]
) -> None:
    """The save in step 4 finds the NaN of step 3 as well, and writes nothing."""
    install(NanInjector({3}))
    assert train(tiny(on_nan="rollback", save_every_steps=4)).complete
    assert last(tmp_path / "run")["rollbacks"] == 1
    assert last(tmp_path / "run")["step"] == 10


@pytest.mark.medium
def test_fault14_rollback_is_reproducible_and_survives_an_interruption(
    tiny: MakeRecipe, tmp_path: Path, install: Callable[[NanInjector], NanInjector]
) -> None:
    injector = install(NanInjector({8, 14}))
    values = {"epochs": 3, "on_nan": "rollback", "dropout": 0.1}
    train(tiny(**values))
    assert last(tmp_path / "run")["rollbacks"] == 2
    injector.calls = 0
    train(tiny(**values, out=str(tmp_path / "again"), max_steps=7))
    train(tiny(**values, out=str(tmp_path / "again"), resume="auto"))
    uninterrupted, resumed = (last(tmp_path / name) for name in ("run", "again"))
    assert uninterrupted["rollbacks"] == resumed["rollbacks"] == 2
    assert summary(tmp_path / "run")["steps"] == summary(tmp_path / "again")["steps"] == 15


class BadEvaluation:
    """Replaces `evaluate`: the losses of the calls with these numbers (from 1) are not finite."""

    def __init__(self, calls: set[int], value: float = math.nan) -> None:
        self.calls, self.value, self.count = calls, value, 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        scores = evaluate(*args)
        return replace(scores, loss=self.value) if self.count in self.calls else scores


# what is not finite -> calls of `evaluate`: validation of the weights and of their average, epoch by epoch, then tests
BAD_EVALUATIONS = {"validation": ({3}, math.nan), "infinite": ({3}, math.inf), "average": ({4}, math.nan)}


@pytest.mark.medium
@pytest.mark.parametrize("name", BAD_EVALUATIONS)
def test_fault42_a_loss_that_is_not_finite_in_the_validation_ends_or_rolls_back_the_run(
    name: str, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, value = BAD_EVALUATIONS[name]
    monkeypatch.setattr(trainer_module, "evaluate", BadEvaluation(calls, value))
    with pytest.raises(
        NonFiniteError, match="the loss on the validation images was not finite after step 10; "
    ) as caught:
        train(tiny(epochs=3, ema_decay=0.9))
    assert caught.value.exit_code == 5
    assert (last(tmp_path / "run")["step"], len(rows(tmp_path / "run"))) == (5, 1)
    monkeypatch.setattr(trainer_module, "evaluate", BadEvaluation(calls, value))
    assert train(tiny(epochs=3, ema_decay=0.9, on_nan="rollback", out=str(tmp_path / "back"))).complete
    assert last(tmp_path / "back")["rollbacks"] == 1
    assert len(rows(tmp_path / "back")) == 3
    for file in (tmp_path / "back").glob("*.json*"):
        assert "NaN" not in file.read_text()
        assert "Infinity" not in file.read_text()


@pytest.mark.medium
def test_fault42_a_test_loss_that_is_not_finite_is_an_error(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "evaluate", BadEvaluation({3}))
    with pytest.raises(NonFiniteError, match="the loss on the test images was not finite after step 10; "):
        train(tiny())
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    assert train(Recipe(resume=str(tmp_path / "run"))).complete


@pytest.mark.medium
@pytest.mark.parametrize("part", ["running_mean", "running_var", "average"])
@pytest.mark.parametrize("val_size", [0, 40])
def test_fault42_a_buffer_that_is_not_finite(
    part: str, val_size: int, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only running statistics, or the average of the weights, become NaN in step 8, without a NaN in the loss."""
    built: list[Trainer] = []

    def build(*args: Any) -> Trainer:
        built.append(build_trainer(*args))
        return built[-1]

    train_step = Trainer.train_step

    def step(trainer: Trainer, batch: Any) -> None:
        train_step(trainer, batch)
        if trainer.progress.step == 8 and not trainer.progress.rollbacks:
            assert trainer.ema
            tensors = trainer.ema.average if part == "average" else dict(trainer.model.named_buffers())
            next(value for key, value in tensors.items() if part == "average" or key.endswith(part)).fill_(math.nan)

    monkeypatch.setattr("fastcifar.training.train.build_trainer", build)
    monkeypatch.setattr(Trainer, "train_step", step)
    options = {"epochs": 3, "ema_decay": 0.9, "val_size": val_size, "batch_size": 32 if val_size else 40}
    with pytest.raises(NonFiniteError) as caught:
        train(tiny(**options))
    assert caught.value.exit_code == 5
    assert last(tmp_path / "run")["step"] == 5
    assert train(tiny(**options, on_nan="rollback", out=str(tmp_path / "back"))).complete
    assert last(tmp_path / "back")["rollbacks"] == 1


@pytest.mark.medium
def test_fault14_at_most_three_rollbacks(
    tiny: MakeRecipe, tmp_path: Path, install: Callable[[NanInjector], NanInjector]
) -> None:
    injector = install(NanInjector(set(range(7, 100))))
    with pytest.raises(NonFiniteError, match="in step 6"):
        train(tiny(on_nan="rollback"))
    assert injector.calls == 10 + 3 * 5
    assert last(tmp_path / "run")["step"] == 5
    assert len(rows(tmp_path / "run")) == 1
