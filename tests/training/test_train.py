"""Tests of complete runs of a tiny network: the files they write, the weights they evaluate, why they stop."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastcifar.errors import NonFiniteError, UsageError
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.metrics_file import EpochRow
from fastcifar.training.summary import read_summary
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.faults.runs import assert_equal_runs, last

SUMMARY_KEYS = {
    "run", "arch", "params", "macs", "recipe", "config", "seed", "epochs", "steps", "device", "loader", "compiled",
    "cuda_graph", "precision", "eval_weights", "val_acc", "test_acc", "test_acc_ema", "test_acc_tta", "test_loss",
    "ece", "per_class", "images_per_s", "seconds", "peak_memory_bytes", "stop_reason", "complete",
}  # fmt: skip


def patch_validation(
    monkeypatch: pytest.MonkeyPatch, accuracies: Sequence[float] = (), losses: Sequence[float] = ()
) -> None:
    """Replace the validation of each epoch by the given results."""
    results = itertools.zip_longest(losses, accuracies, fillvalue=0.5)
    keys = ("val_loss", "val_acc", "ema_val_acc")
    monkeypatch.setattr(Trainer, "validate", lambda self: dict(zip(keys, (*next(results), None), strict=True)))


def read_metrics(run: str) -> list[dict[str, str]]:
    """Return the rows of metrics.csv."""
    with (Path(run) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_training_reduces_the_loss_and_writes_all_files(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(epochs=8, ema_decay=0.9, data="synthetic:400", val_size=80, augment="none", optimizer="sgd"))
    folder = Path(summary.run)
    assert {entry.name for entry in folder.iterdir()} == {
        "recipe.toml", "env.json", "metrics.csv", "events.jsonl", "checkpoints", "weights.safetensors", "summary.json",
    }  # fmt: skip
    assert read_summary(folder) == summary
    assert json.loads((folder / "summary.json").read_text()).keys() >= {"schema_version", *SUMMARY_KEYS}
    assert summary.seconds.keys() == {"setup", "compile", "train", "eval", "total"}
    assert (summary.epochs, summary.steps, summary.stop_reason, summary.complete) == (8, 80, "epochs", True)
    assert summary.test_acc is not None
    assert summary.test_acc > 0.3
    assert summary.correct
    assert summary.total
    assert summary.test_acc == summary.correct / summary.total
    assert summary.test_acc_ema is not None
    rows = read_metrics(summary.run)
    assert [int(row["epoch"]) for row in rows] == list(range(8))
    assert float(rows[-1]["val_acc"]) == pytest.approx(summary.val_acc, rel=1e-5)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    weights = last(folder)["model"]
    assert all(torch.equal(value, weights[key]) for key, value in load_file(folder / "weights.safetensors").items())


@pytest.mark.medium
def test_fault21_equal_seeds_give_equal_runs_and_other_seeds_do_not(tiny: Callable[..., Recipe]) -> None:
    first, second, other = (train(tiny(seed=seed, dropout=0.1)).run for seed in (3, 3, 4))
    assert_equal_runs(first, second)
    assert not torch.equal(*(last(run)["model"]["linear.weight"] for run in (first, other)))


@pytest.mark.medium
def test_without_a_validation_split_all_images_train_and_no_epoch_is_best(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(val_size=0))
    assert summary.steps == 2 * 7
    assert summary.val_acc is None
    assert not (Path(summary.run) / "checkpoints" / "best.pt").exists()


@pytest.mark.medium
def test_best_weights_are_those_of_the_best_epoch(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    patch_validation(monkeypatch, accuracies=(0.2, 0.9, 0.3))
    summary = train(tiny(epochs=3, eval_weights="best"))
    assert (summary.best_val_acc, summary.val_acc) == (0.9, 0.3)
    best = checkpoint.load_checkpoint(Path(summary.run) / "checkpoints" / "best.pt")
    assert best["epoch"] == 2
    evaluated = load_file(Path(summary.run) / "weights.safetensors")
    assert all(torch.equal(value, best["model"][key]) for key, value in evaluated.items())


@pytest.mark.medium
def test_early_stopping_waits_for_patience(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    patch_validation(monkeypatch, accuracies=(0.2, 0.5, 0.5, 0.4, 0.6, 0.7))
    summary = train(tiny(epochs=6, patience=2))
    assert (summary.epochs, summary.stop_reason, summary.complete) == (4, "patience", True)


@pytest.mark.medium
def test_plateau_schedule_lowers_the_learning_rate_of_later_epochs(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_validation(monkeypatch, losses=(1.0, 1.0, 1.0, 0.5))
    summary = train(tiny(epochs=4, schedule="plateau:1"))
    learning_rates = [float(row["lr"]) for row in read_metrics(summary.run)]
    assert learning_rates == pytest.approx([0.1, 0.1, 0.1, 0.01])
    assert last(summary.run)["schedule"] == {"best": 0.5, "waited": 0, "factor": 0.1, "halvings": 0}


@pytest.mark.medium
def test_max_steps_ends_the_run_as_incomplete(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(max_steps=7))
    assert (summary.steps, summary.stop_reason, summary.complete) == (7, "max_steps", False)
    assert summary.test_acc is not None


@pytest.mark.medium
def test_eval_weights_ema_evaluates_the_averaged_weights(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(eval_weights="ema", ema_decay=0.5))
    assert summary.test_acc == summary.test_acc_ema
    saved = last(summary.run)
    evaluated = load_file(Path(summary.run) / "weights.safetensors")
    assert saved["ema"] is not None
    assert all(torch.equal(value, saved["ema"][key]) for key, value in evaluated.items())


@pytest.mark.medium
def test_test_set_is_evaluated_once(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcifar.training import trainer

    evaluated_sizes: list[int] = []
    evaluate = trainer.evaluate

    def recording_evaluate(model: Any, forward: Any, split: Any, *args: Any) -> Any:
        evaluated_sizes.append(len(split.labels))
        return evaluate(model, forward, split, *args)

    monkeypatch.setattr(trainer, "evaluate", recording_evaluate)
    train(tiny(epochs=3))
    assert evaluated_sizes == [40, 40, 40, 40]  # three validations on 40 images and one test on 40 images
    evaluated_sizes.clear()
    train(tiny(epochs=3, val_size=30))
    assert evaluated_sizes == [30, 30, 30, 40]


@pytest.mark.medium
def test_fault14_a_diverging_run_raises_non_finite_error(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(tiny(lr=100.0, clip_grad="none", epochs=60, augment="none", weight_decay=10.0))
    assert caught.value.exit_code == 5


def test_user_defined_architecture_trains(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def custom_model(num_classes: int) -> torch.nn.Module:
        layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Flatten(), torch.nn.LazyLinear(num_classes)]
        model = torch.nn.Sequential(*layers)
        model(torch.zeros(1, 3, 32, 32))
        return model

    monkeypatch.setitem(MODELS, "custom", custom_model)
    assert train(Recipe(arch="custom", data="synthetic:200", val_size=40, epochs=1, batch_size=32, device="cpu",
                        compile=False, out=tiny().out)).arch == "custom"  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 100000}, "--batch-size 100000"),
        ({"val_size": 400}, "--val-size"),
        ({"arch": "resnet18", "blocks": None, "channels": None}, "--max-params"),
    ],
)
def test_fault15_invalid_options_are_refused_before_files_are_written(
    tiny: Callable[..., Recipe], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(Recipe(**{**tiny().model_dump(), **options}))
    assert not Path(str(tiny().out)).exists()


def test_loss_of_an_untrained_network_is_that_of_chance(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(max_steps=1, lr=1e-6))
    assert summary.test_loss == pytest.approx(math.log(10), abs=0.5)


@pytest.mark.medium
def test_a_callback_can_stop_a_run_that_is_resumed_later(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    train(tiny(epochs=4))
    epochs: list[int] = []

    def stop_after_epoch_1(row: EpochRow) -> str | None:
        epochs.append(row["epoch"])
        return "enough" if row["epoch"] == 1 else None

    options = {"epochs": 4, "out": str(tmp_path / "stopped")}
    summary = train(tiny(**options), callbacks=[stop_after_epoch_1])
    assert (summary.epochs, summary.stop_reason, summary.complete, epochs) == (2, "enough", False, [0, 1])
    assert summary.test_acc is not None
    train(tiny(**options, resume="auto"))
    assert_equal_runs(tmp_path / "stopped", tmp_path / "run")
