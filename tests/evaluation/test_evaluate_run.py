"""Test that a run loaded from its checkpoint alone has the accuracy that training measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.errors import CheckpointError, DataError
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer


@pytest.mark.parametrize("eval_weights", ["last", "best", "ema"])
def test_evaluation_reproduces_the_test_results_of_training(tiny: Callable[..., Recipe], eval_weights: str) -> None:
    summary = train(tiny(eval_weights=eval_weights, ema_decay=0.8, epochs=3))
    scores = evaluate_run(summary.run)
    assert (scores["eval_weights"], scores["correct"]) == (eval_weights, summary.correct)
    assert scores["test_loss"] == pytest.approx(summary.test_loss, rel=1e-5)
    assert scores["per_class"] == summary.per_class


def test_eval_weights_select_the_checkpoint(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter((0.9, 0.1, 0.2))
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_loss": 1.0, "val_acc": next(accuracies), "ema_val_acc": None}
    )
    summary = train(tiny(epochs=3))
    last, best = evaluate_run(summary.run), evaluate_run(summary.run, eval_weights="best")
    assert best["checkpoint"].endswith("best.pt")
    assert last["test_loss"] != best["test_loss"]
    assert evaluate_run(best["checkpoint"])["test_loss"] == best["test_loss"]
    with pytest.raises(CheckpointError, match="no EMA weights"):
        evaluate_run(summary.run, eval_weights="ema")


def test_mismatching_data_and_checkpoints_are_refused(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(max_steps=1))
    path = Path(summary.run) / "checkpoints" / "last.pt"
    saved = checkpoint.load_checkpoint(path)
    with pytest.raises(DataError, match=r"the classes of .* was trained on"):
        evaluate_run(summary.run, data="synthetic:200", dataset="cifar100")

    def save_changed(**changes: Any) -> str:
        folder = path.parents[1] / "other"
        folder.mkdir(exist_ok=True)
        torch.save({**saved, **changes}, folder / "changed.pt")
        return str(folder / "changed.pt")

    assert evaluate_run(save_changed())["correct"] == summary.correct
    with pytest.raises(CheckpointError, match="has other shapes for"):
        evaluate_run(save_changed(recipe={**saved["recipe"], "channels": [8, 24]}))
    with pytest.raises(CheckpointError, match="did you mean 'arch'"):
        evaluate_run(save_changed(recipe={**saved["recipe"], "arhc": "resnet"}))
