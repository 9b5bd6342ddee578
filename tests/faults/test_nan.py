"""A loss or a gradient that is not finite: nothing of it stays, and the run stops or goes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcifar.errors import NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training import trainer
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.step import loss_and_correct
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.faults.runs import assert_same, last, rows, summary

Make = Callable[..., Recipe]
OPTIMIZERS = ("lookahead:sgd", "adamw", "lookahead:lion", "ranger", "muon")


class Poison:
    """Stands in for `loss_and_hits`: in the steps `at` (from 1) the loss or the gradients, and the running
    statistics, are not finite."""

    def __init__(self, at: set[int], where: str = "loss") -> None:
        self.at, self.where, self.calls = at, where, 0
        self.before: list[Tensor] = []

    def __call__(self, forward: Any, smoothing: float) -> Any:
        plain = loss_and_correct(forward, smoothing)

        def function(*batch: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            bad = self.calls in self.at
            if bad and not self.before:
                self.before = [tensor.detach().clone() for tensor in self.parts.model.state_dict().values()]
            loss, hits = plain(*batch)
            if not bad:
                return loss, hits
            for buffer in self.parts.model.buffers():
                if buffer.is_floating_point():
                    buffer.data.fill_(math.nan)  # unseen by autograd, as when the forward pass itself does it
            if self.where == "loss":
                return loss * math.nan, hits
            weight = next(self.parts.model.parameters())
            return loss + (weight * 0).sum() * math.inf, hits

        return function

    parts: Trainer


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Poison], Poison]:
    """Puts the poison into every run from here on."""

    def put(poison: Poison) -> Poison:
        def assembled(*given: Any) -> Trainer:
            poison.parts = build_trainer(*given)
            return poison.parts

        monkeypatch.setattr("fastcifar.training.train.build_trainer", assembled)
        monkeypatch.setattr(trainer, "loss_and_correct", poison)
        return poison

    return put


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fault14_the_weights_are_those_before_the_step_and_the_checkpoint_stays(
    tiny: Make, tmp_path: Path, poisoned: Callable[[Poison], Poison], optimizer: str, where: str
) -> None:
    """Step 9 of 15 is bad, the sixth to last before the host looks; Lookahead's step 10 lies between."""
    train(tiny(optimizer=optimizer, lr=0.01, ema_decay=0.9, epochs=3, max_steps=8, out=str(tmp_path / "good")))
    poison = poisoned(Poison({9}, where))
    with pytest.raises(NonFiniteError, match="was not finite in step 9; use a smaller --lr") as caught:
        train(tiny(optimizer=optimizer, lr=0.01, ema_decay=0.9, epochs=3))
    assert caught.value.exit_code == 5
    model, good = poison.parts.model, last(tmp_path / "good")
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert all(map(torch.equal, floats, [tensor for tensor in poison.before if tensor.is_floating_point()]))
    assert poison.parts.ema is not None
    assert_same(poison.parts.ema.average, {key: good["ema"][key] for key in poison.parts.ema.average}, "average")
    if poison.parts.optimizer.spec.capturable:
        poison.parts.optimizer.set_lr(0.0)
        state = poison.parts.optimizer.state_dict()
        assert_same(state["slow"], good["optimizer"]["slow"], "slow")
        assert_same(state["inner"]["state"], good["optimizer"]["inner"]["state"], "optimizer")
    saved = last(tmp_path / "run")
    assert saved["step"] == 5
    assert all(value.isfinite().all() for value in [*saved["model"].values(), *saved["ema"].values()])
    assert len(rows(tmp_path / "run")) == 1


def test_fault14_in_fp16_an_overflow_is_no_failure_and_a_loss_that_is_not_finite_is(
    tiny: Make, tmp_path: Path, poisoned: Callable[[Poison], Poison]
) -> None:
    poison = poisoned(Poison({4}, "gradient"))
    poison.at = set()
    train(tiny(precision="fp16", optimizer="sgd", lr=0.01))
    poison.calls, poison.at = 0, {4}
    poison.where = "loss"
    with pytest.raises(NonFiniteError, match="in step 4"):
        train(tiny(precision="fp16", optimizer="sgd", lr=0.01, out=str(tmp_path / "bad")))
    floats = [tensor for tensor in poison.parts.model.state_dict().values() if tensor.is_floating_point()]
    assert all(map(torch.equal, floats, [tensor for tensor in poison.before if tensor.is_floating_point()]))


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", "adamw", "rmsprop", "ranger", "muon"])
def test_fault14_the_host_asks_nothing_of_the_device_in_a_step(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = tiny(optimizer=optimizer, ema_decay=0.9, clip_grad="norm:1.0")
    made = build_trainer(resolve(recipe))
    step, batches = made.build_step(loss_and_correct(made.forward, 0.0)), list(made.loader.batches(0))
    step(*batches[0])
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, lambda *_: pytest.fail("the host waits for the device"))
        for done, batch in enumerate(batches, start=1):
            made.optimizer.set_lr(0.01)
            step(*batch)
            made.optimizer.after_step(done, made.meter.found_inf)
    assert made.meter.compute().is_finite


@pytest.mark.parametrize(("bad", "epoch"), [(3, 0), (8, 1)])
def test_fault14_rollback_goes_back_to_the_checkpoint_at_half_the_rate(
    tiny: Make, tmp_path: Path, poisoned: Callable[[Poison], Poison], bad: int, epoch: int
) -> None:
    train(tiny(epochs=3, schedule="constant", out=str(tmp_path / "plain")))
    poisoned(Poison({bad}))
    found = train(tiny(epochs=3, schedule="constant", on_nan="rollback"))
    assert found["complete"]
    rates = [float(row["lr"]) for row in rows(tmp_path / "run")]
    assert rates == [0.1 if row < epoch else 0.05 for row in range(3)]
    assert rows(tmp_path / "run")[:epoch] == rows(tmp_path / "plain")[:epoch]
    assert last(tmp_path / "run")["rollbacks"] == last(tmp_path / "run")["schedule"]["halvings"] == 1


def test_fault14_rollback_is_repeatable_and_survives_a_stop(
    tiny: Make, tmp_path: Path, poisoned: Callable[[Poison], Poison]
) -> None:
    poison = poisoned(Poison({8, 14}))
    values = {"epochs": 3, "on_nan": "rollback", "dropout": 0.1}
    train(tiny(**values))
    assert last(tmp_path / "run")["rollbacks"] == 2
    poison.calls = 0
    train(tiny(**values, out=str(tmp_path / "again"), max_steps=7))
    train(tiny(**values, out=str(tmp_path / "again"), resume="auto"))
    mine, other = (last(tmp_path / name) for name in ("run", "again"))
    assert mine["rollbacks"] == other["rollbacks"] == 2
    assert summary(tmp_path / "run")["steps"] == summary(tmp_path / "again")["steps"] == 15


def test_fault14_three_rollbacks_and_no_more(tiny: Make, tmp_path: Path, poisoned: Callable[[Poison], Poison]) -> None:
    poison = poisoned(Poison(set(range(7, 100))))
    with pytest.raises(NonFiniteError, match="in step 6"):
        train(tiny(on_nan="rollback"))
    assert poison.calls == 10 + 3 * 5
    assert last(tmp_path / "run")["step"] == 5
    assert len(rows(tmp_path / "run")) == 1
