"""Whole runs on a tiny network: what is written, what is chosen by, what stops them."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastcifar.errors import Interrupted, NonFiniteError, UsageError
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.faults.runs import assert_equal_runs

KEYS = {
    "run", "arch", "params", "macs", "recipe", "config", "seed", "epochs", "steps", "device", "loader", "compiled",
    "cuda_graph", "precision", "eval_weights", "val_acc", "test_acc", "test_acc_ema", "test_acc_tta", "test_loss", "ece",
    "per_class", "images_per_s", "seconds", "peak_memory_bytes", "stop_reason", "complete",
}  # fmt: skip


def rows(run: str) -> list[dict[str, str]]:
    with (Path(run) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_leaves_a_whole_folder(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(epochs=8, ema_decay=0.9, data="synthetic:400", val_size=80, augment="none", optimizer="sgd"))
    folder = Path(summary["run"])
    assert {entry.name for entry in folder.iterdir()} == {
        "recipe.toml", "env.json", "metrics.csv", "events.jsonl", "checkpoints", "weights.safetensors", "summary.json",
    }  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary.keys() >= KEYS
    assert summary["seconds"].keys() == {"setup", "compile", "train", "eval", "total"}
    assert (summary["epochs"], summary["steps"], summary["stop_reason"], summary["complete"]) == (8, 80, "epochs", True)
    assert summary["test_acc"] > 0.3
    assert summary["test_acc"] == summary["correct"] / summary["total"]
    assert 0 <= summary["test_acc_ema"] <= 1
    table = rows(summary["run"])
    assert [int(row["epoch"]) for row in table] == list(range(8))
    assert float(table[-1]["val_acc"]) == pytest.approx(summary["val_acc"], rel=1e-5)
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    last = checkpoint.load_checkpoint(folder / "checkpoints" / "last.pt")
    for key, value in load_file(folder / "weights.safetensors").items():
        assert torch.equal(value, last["model"][key])


def test_fault21_the_same_seed_is_the_same_run_and_another_is_not(tiny: Callable[..., Recipe]) -> None:
    first, second, other = (train(tiny(seed=seed, dropout=0.1)) for seed in (3, 3, 4))
    weights = [
        checkpoint.load_checkpoint(Path(run["run"]) / "checkpoints" / "last.pt")["model"]
        for run in (first, second, other)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["linear.weight"], weights[2]["linear.weight"])
    times = ("images_per_s", "seconds")
    plain = [[{k: v for k, v in row.items() if k not in times} for row in rows(run["run"])] for run in (first, second)]
    assert plain[0] == plain[1]


def test_without_a_split_all_images_train_and_nothing_is_chosen(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(val_size=0))
    assert summary["steps"] == 2 * 7
    assert summary["val_acc"] is None
    assert not (Path(summary["run"]) / "checkpoints" / "best.pt").exists()


def test_best_weights_are_those_of_the_best_epoch(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter((0.2, 0.9, 0.3))
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_loss": 1.0, "val_acc": next(accuracies), "ema_val_acc": None}
    )
    summary = train(tiny(epochs=3, eval_weights="best"))
    assert (summary["best_val_acc"], summary["val_acc"]) == (0.9, 0.3)
    best = checkpoint.load_checkpoint(Path(summary["run"]) / "checkpoints" / "best.pt")
    assert best["epoch"] == 2
    tested = load_file(Path(summary["run"]) / "weights.safetensors")
    assert all(torch.equal(value, best["model"][key]) for key, value in tested.items())


def test_early_stopping_waits_for_patience(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter((0.2, 0.5, 0.5, 0.4, 0.6, 0.7))
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_loss": 1.0, "val_acc": next(accuracies), "ema_val_acc": None}
    )
    summary = train(tiny(epochs=6, patience=2))
    assert (summary["epochs"], summary["stop_reason"], summary["complete"]) == (4, "patience", True)


def test_plateau_lowers_the_rate_of_the_epochs_that_follow(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((1.0, 1.0, 1.0, 0.5))
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_loss": next(losses), "val_acc": 0.5, "ema_val_acc": None}
    )
    summary = train(tiny(epochs=4, schedule="plateau:1"))
    rates = [float(row["lr"]) for row in rows(summary["run"])]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01])
    last = checkpoint.load_checkpoint(Path(summary["run"]) / "checkpoints" / "last.pt")
    assert last["schedule"] == {"best": 0.5, "waited": 0, "factor": 0.1, "halvings": 0}


def test_max_steps_cuts_the_run_and_says_so(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(max_steps=7))
    assert (summary["steps"], summary["stop_reason"], summary["complete"]) == (7, "max_steps", False)
    assert 0 <= summary["test_acc"] <= 1


def test_weights_ema_tests_the_average(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(eval_weights="ema", ema_decay=0.5))
    assert summary["test_acc"] == summary["test_acc_ema"]
    saved = checkpoint.load_checkpoint(Path(summary["run"]) / "checkpoints" / "last.pt")
    tested = load_file(Path(summary["run"]) / "weights.safetensors")
    assert all(torch.equal(value, saved["ema"][key]) for key, value in tested.items())


def test_the_test_set_is_read_once(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcifar.training import trainer

    seen: list[int] = []
    evaluate = trainer.evaluate

    def counted(model: Any, forward: Any, split: Any, device: Any) -> Any:
        seen.append(len(split.labels))
        return evaluate(model, forward, split, device)

    monkeypatch.setattr(trainer, "evaluate", counted)
    train(tiny(epochs=3))
    assert seen == [40, 40, 40, 40]  # three validations of 40 images and one test of 40
    seen.clear()
    train(tiny(epochs=3, val_size=30))
    assert seen == [30, 30, 30, 40]


def test_fault14_a_run_that_diverges_stops_with_its_weights_safe(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(tiny(lr=100.0, clip_grad="none", epochs=60, augment="none", weight_decay=10.0))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_step(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    recipe = tiny()

    def interrupting(self: LRSchedule, step: int) -> float:
        if step == 6:
            os.kill(os.getpid(), number)
        return 0.1

    monkeypatch.setattr(LRSchedule, "lr_at", interrupting)
    with pytest.raises(Interrupted) as caught:
        train(recipe)
    assert caught.value.exit_code == code
    saved = checkpoint.load_checkpoint(Path(str(recipe.out)) / "checkpoints" / "last.pt")
    assert (saved["step"], saved["epoch"]) == (7, 1)


def test_a_users_own_architecture_trains(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(num_classes: int) -> torch.nn.Module:
        layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Flatten(), torch.nn.LazyLinear(num_classes)]
        model = torch.nn.Sequential(*layers)
        model(torch.zeros(1, 3, 32, 32))
        return model

    monkeypatch.setitem(MODELS, "mine", mine)
    assert train(Recipe(arch="mine", data="synthetic:200", val_size=40, epochs=1, batch_size=32, device="cpu",
                        compile=False, out=tiny().out))["arch"] == "mine"  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arch": "se86"}, "did you mean 'se68'"),
        ({"batch_size": 100000}, "--batch-size 100000"),
        ({"val_size": 400}, "--val-size"),
        ({"augment": "corp"}, "did you mean 'crop'"),
        ({"clip_grad": "0.1"}, "--clip-grad"),
        ({"loader": "tensr"}, "did you mean 'tensor'"),
        ({"arch": "resnet18", "blocks": None, "channels": None}, "--max-params"),
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "plateau", "val_size": 0}, "--val-size"),
    ],
)
def test_fault15_what_is_wrong_is_found_before_anything_is_written(
    tiny: Callable[..., Recipe], values: dict, words: str
) -> None:
    recipe = tiny(**values)
    recipe = Recipe.from_dict({**recipe.model_dump(), **values})
    with pytest.raises(UsageError, match=words):
        train(recipe)
    assert not Path(str(recipe.out)).exists()


def test_accuracies_of_an_untrained_network_are_chance(tiny: Callable[..., Recipe]) -> None:
    summary = train(tiny(max_steps=1, lr=1e-6))
    assert summary["test_loss"] == pytest.approx(math.log(10), abs=0.5)


def test_a_sinks_reason_ends_the_run_which_may_go_on(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    train(tiny(epochs=4))
    seen: list[int] = []

    def enough(row: dict[str, Any]) -> str | None:
        seen.append(row["epoch"])
        return "enough" if row["epoch"] == 1 else None

    asked = {"epochs": 4, "out": str(tmp_path / "ended")}
    ended = train(tiny(**asked), callbacks=[enough])
    assert (ended["epochs"], ended["stop_reason"], ended["complete"], seen) == (2, "enough", False, [0, 1])
    assert ended["test_acc"] is not None
    train(tiny(**asked, resume="auto"))
    assert_equal_runs(tmp_path / "ended", tmp_path / "run")
