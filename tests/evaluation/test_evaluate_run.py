"""Test the evaluation of a trained run: accuracy, corruptions, CIFAR-10.1, temperature scaling and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from fastcifar.cli.tables import scores_table
from fastcifar.data import cifar, splits
from fastcifar.data.cifar import Split
from fastcifar.errors import CheckpointError, DataError, DeviceError, DiskError
from fastcifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from fastcifar.evaluation.evaluate_run import apply_corruption, evaluate_run
from fastcifar.evaluation.load_run import load_model
from fastcifar.evaluation.published_test_sets import load_cifar10_1
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer

CLASSES = list(cifar.load_dataset("synthetic:100").classes)


@pytest.fixture
def run(tiny: Callable[..., Recipe]) -> str:
    return train(tiny()).run


def save_cifar10_1(folder: Path, images: np.ndarray, labels: np.ndarray, version: str = "v6") -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / f"cifar10.1_{version}_data.npy", images)
    np.save(folder / f"cifar10.1_{version}_labels.npy", labels)
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("eval_weights", ["last", "best", "ema"])
def test_evaluation_reproduces_the_test_results_of_training(tiny: Callable[..., Recipe], eval_weights: str) -> None:
    summary = train(tiny(eval_weights=eval_weights, ema_decay=0.8, epochs=3))
    scores = evaluate_run(summary.run)
    assert (scores["eval_weights"], scores["correct"]) == (eval_weights, summary.correct)
    assert scores["test_loss"] == pytest.approx(summary.test_loss, rel=1e-5)
    assert scores["per_class"] == summary.per_class


@pytest.mark.medium
def test_eval_weights_select_the_checkpoint(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter((0.9, 0.1, 0.2))
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_loss": 1.0, "val_acc": next(accuracies), "ema_val_acc": None}
    )
    summary = train(tiny(epochs=3))
    last, best = evaluate_run(summary.run), evaluate_run(summary.run, eval_weights="best")
    assert best["checkpoint"].endswith("best.pt")
    file = evaluate_run(best["checkpoint"])  # it is named after the file, not after the option of the recipe
    assert (file["eval_weights"], file["test_loss"]) == ("best", best["test_loss"])
    assert last["test_loss"] != best["test_loss"]
    with pytest.raises(CheckpointError, match="no EMA weights"):
        evaluate_run(summary.run, eval_weights="ema")
    with pytest.raises(DiskError, match="cannot create the folder"):
        evaluate_run(summary.run, plots_dir=Path(best["checkpoint"]) / "plots")


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


@pytest.mark.medium
def test_a_run_in_tf32_is_evaluated_in_fp32_where_tf32_is_not_available(run: str) -> None:
    saved = checkpoint.load_checkpoint(Path(run) / "checkpoints" / "last.pt")
    file = Path(run) / "tf32.pt"
    torch.save({**saved, "recipe": {**saved["recipe"], "precision": "tf32"}}, file)
    scores = evaluate_run(str(file))
    assert (scores["precision"], scores["test_loss"]) == ("fp32", evaluate_run(run)["test_loss"])
    with pytest.raises(DeviceError, match="--precision tf32 needs a GPU"):
        evaluate_run(str(file), precision="tf32")


@pytest.mark.medium
def test_evaluation_with_all_options(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def remember_seed(images: torch.Tensor, severity: int, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return images

    corruptions = {"identity": remember_seed, "noise": CORRUPTIONS["gaussian_noise"]}
    monkeypatch.setattr("fastcifar.evaluation.evaluate_run.CORRUPTIONS", corruptions)
    test = cifar.load_dataset("synthetic:200").test
    folder = save_cifar10_1(tmp_path / "shifted", test.images.transpose(0, 2, 3, 1), test.labels.astype(np.int32))
    plots_dir = tmp_path / "plots" / "deep"
    scores = evaluate_run(run, plots_dir=plots_dir, shifted_dir=folder, with_corruptions=True)
    assert json.loads(json.dumps(scores, allow_nan=False))["plots"] == str(plots_dir)
    assert scores["precision"] == "fp32", "the key must hold the numeric precision, not the metric"
    assert scores["recall_per_class"] == scores["per_class"]
    assert np.trace(scores["confusion"]) == scores["correct"]
    assert np.sum(scores["confusion"]) == scores["total"]
    assert scores["test_acc_interval"]
    low, high = scores["test_acc_interval"]
    assert scores["test_acc"]
    assert low < scores["test_acc"] < high
    # The shifted set is the test set in the layout of CIFAR-10.1, and one corruption is the identity.
    shifted, corrupted = scores["shifted"], scores["corruptions"]
    assert shifted
    assert corrupted
    expected = ("cifar10.1_v6", scores["test_acc"], scores["test_loss"])
    assert (shifted["name"], shifted["acc"], shifted["loss"]) == expected
    assert set(seeds) == {0} == {corrupted["seed"]}
    assert corrupted["acc"]["identity"] == [scores["test_acc"]] * len(SEVERITIES)
    assert corrupted["mean_acc"] == pytest.approx(np.mean(list(corrupted["acc"].values())))
    for name in ("reliability.png", "confusion.png"):
        assert min(Image.open(plots_dir / name).size) > 500
    console = Console(width=120, record=True, file=(tmp_path / "table").open("w"))
    console.print(scores_table(scores))
    text = console.export_text()
    assert all(word in text for word in ("F1", "cifar10.1_v6", "noise", "Brier", CLASSES[9]))


@pytest.mark.medium
def test_temperature_is_fitted_on_the_validation_split(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    with_split = evaluate_run(train(tiny()).run)
    without = evaluate_run(train(tiny(val_size=0, out=str(tmp_path / "all"))).run)
    assert without["temperature"] is without["ece_scaled"] is without["loss_scaled"] is None
    assert without["temperature_missing"] == "the run had no validation split"
    assert without["shifted"] is without["corruptions"] is without["corrupted"] is without["plots"] is None
    data = cifar.load_dataset("synthetic:200")
    _, validation_indices = splits.stratified_split(data.train.labels, 40, 0)
    loaded = load_model(with_split["checkpoint"])
    split = Split(data.train.images[validation_indices], np.arange(40))
    logits = loaded.predict_logits(split).double()
    labels = torch.from_numpy(data.train.labels[validation_indices])
    losses = {step / 50: F.cross_entropy(logits / math.exp(step / 50), labels).item() for step in range(-200, 201)}
    best = math.exp(min(losses, key=losses.__getitem__))
    assert with_split["temperature"] == pytest.approx(best, rel=0.021), "the grid has steps of 2 %"
    test = loaded.predict_logits(data.test)
    assert with_split["temperature"]
    scaled = F.cross_entropy(test / with_split["temperature"], torch.from_numpy(data.test.labels)).item()
    assert with_split["loss_scaled"] == pytest.approx(scaled, rel=1e-5)


def test_invalid_cifar10_1_files_are_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10
    name, split = load_cifar10_1(save_cifar10_1(tmp_path / "good", images, labels, "v4"), CLASSES)
    assert (name, split.images.shape, split.labels.dtype) == ("cifar10.1_v4", (20, 3, 32, 32), np.int64)
    for folder, bad_images, bad_labels, message in (
        ("floats", images.astype(np.float32), labels, "expected uint8"),
        ("28x28", images[:, :28, :28], labels, "images of 28x28 pixels"),
        ("none", images[:0], labels[:0], "contains no images"),
        ("fewer", images, labels[:19], "expected 20 integers"),
        ("fractions", images, labels / 2, "expected 20 integers"),
        ("eleven", images, labels + 1, "labels of 11 classes and 10 names"),
        ("below", images, labels - 1, "the label -1"),
        ("objects", images, np.array([{}] * 20), "can be read safely"),
    ):
        with pytest.raises(DataError, match=message):
            load_cifar10_1(save_cifar10_1(tmp_path / folder, bad_images, bad_labels), CLASSES)
    with pytest.raises(DataError, match=r"no cifar10.1_v6_data.npy"):
        load_cifar10_1(tmp_path, CLASSES)
    (tmp_path / "good" / "cifar10.1_v4_labels.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="can be read safely"):
        load_cifar10_1(tmp_path / "good", CLASSES)
    with pytest.raises(DataError, match="the run has other classes"):
        load_cifar10_1(tmp_path / "good", CLASSES[::-1])
    assert DataError.exit_code == 3


@pytest.mark.gpu
def test_deterministic_corruptions_match_on_cpu_and_gpu() -> None:
    images = torch.from_numpy(cifar.load_dataset("synthetic:100").test.images)
    for name in ("gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate", "pixelate",
                 "jpeg_compression"):  # fmt: skip
        on_cpu, on_gpu = (
            apply_corruption(images.to(device), CORRUPTIONS[name], 4, torch.Generator(device).manual_seed(0)).cpu()
            for device in ("cpu", "cuda")
        )
        assert (on_cpu != on_gpu).double().mean() < 1e-4, name
