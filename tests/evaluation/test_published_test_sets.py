"""Test `eval` on the official files of CIFAR-10.1, CIFAR-10-C and CIFAR-100-C, replaced by small files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastcifar.cli.tables import dataset_table, scores_table
from fastcifar.data import cifar, inspection
from fastcifar.errors import DataError
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.evaluation.published_test_sets import open_corrupted
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train

# The 19 corruptions of https://github.com/hendrycks/robustness, and those among them of the 15 in the published mean
BENCHMARK = [
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip
EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
CLASSES = list(cifar.load_dataset("synthetic:100").classes)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))


@pytest.fixture
def run(tiny: Callable[..., Recipe]) -> str:
    return train(tiny(epochs=8, batch_size=16, augment="none")).run


def write_corrupted(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Write files like those of CIFAR-10-C: severity 5 of every file is black, severities of fog are the images."""
    folder.mkdir()
    five = np.tile(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), (5, 1, 1, 1))
    for name in [*BENCHMARK, *EXTRA]:
        dark = five.copy()
        dark[(0 if name == "snow" else 5 if name == "fog" else 4) * len(images) :] = 0
        np.save(folder / f"{name}.npy", dark)
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return folder


@pytest.mark.medium
def test_corrupted_images_of_every_file_and_severity_are_evaluated(run: str, tmp_path: Path) -> None:
    test = cifar.load_dataset("synthetic:200").test
    folder = write_corrupted(tmp_path / "c", test.images, test.labels)
    scores = evaluate_run(run, corrupted_dir=folder)
    result, clean = scores["corrupted"], scores["test_acc"]
    assert result
    assert scores["corruptions"] is None
    assert (list(result["acc"]), result["source"], result["seed"]) == ([*BENCHMARK, *EXTRA], str(folder), None)
    black = result["acc"]["snow"][0]  # of the class that a black image is predicted as
    assert black in [count / 40 for count in np.bincount(test.labels, minlength=10)]
    assert clean != black
    for name, accuracies in result["acc"].items():
        severities = 0 if name == "snow" else 5 if name == "fog" else 4
        assert accuracies == [clean] * severities + [black] * (5 - severities)
    assert result["mean_acc"] == pytest.approx(np.mean([result["acc"][name] for name in BENCHMARK]))
    console = Console(width=80, record=True, file=(tmp_path / "table").open("w"))
    console.print(scores_table(scores))
    text = console.export_text()
    assert all(line in text for line in (str(folder)[:30], "gaussian_noise ", "spatter* ", "mean without * "))
    without_test_set: Any = {**scores, "test_acc": None, "test_acc_interval": None}
    console.print(scores_table(without_test_set))
    assert "gaussian_noise " in console.export_text()


def damage_files(folder: Path, kind: str) -> None:
    fog, labels = folder / "fog.npy", folder / "labels.npy"
    images = np.load(fog)
    {
        "missing file": fog.unlink,
        "missing labels": labels.unlink,
        "truncated": lambda: os.truncate(fog, 40_000),
        "fewer images": lambda: np.save(fog, images[:-40]),
        "floats": lambda: np.save(fog, images / 255),
        "pickled objects": lambda: np.save(labels, np.array([None] * len(images)), allow_pickle=True),
        "float labels": lambda: np.save(labels, np.load(labels) * 1.0),
        "100 classes": lambda: np.save(labels, np.arange(len(images)) % 100),
        "no labels": lambda: np.save(labels, np.empty(0, int)),
    }[kind]()


DAMAGED = {
    "missing file": r"missing in .*: fog.npy; unpack the official archive again",
    "missing labels": r"missing in .*: labels.npy",
    "truncated": r"fog.npy is not an .npy file that can be read safely",
    "fewer images": r"fog.npy has 160 images, expected 200, as many as labels",
    "floats": r"fog.npy is float64, expected uint8",
    "pickled objects": r"labels.npy is not an .npy file that can be read safely",
    "float labels": r"labels.npy is float64 \[200\], expected 200 integers",
    "100 classes": r"has 100 classes, which are not the 10 classes of the run; give CIFAR-10-C for",
    "no labels": r"labels.npy is int64 \[0\]",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_fault11_damaged_files_of_cifar10_c_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    test = cifar.load_dataset("synthetic:200").test
    folder = write_corrupted(tmp_path / "c", test.images, test.labels)
    assert open_corrupted(folder, CLASSES, "cifar10").split("fog", 5).labels.tolist() == test.labels.tolist()
    with pytest.raises(DataError, match="which are not the 10 classes of the run"):
        open_corrupted(folder, CLASSES[::-1], "cifar10")
    damage_files(folder, kind)
    with pytest.raises(DataError, match=DAMAGED[kind]) as caught:
        open_corrupted(folder, CLASSES, "cifar10")
    assert "\n" not in str(caught.value)


def test_cifar100_c_is_for_runs_with_100_classes(tmp_path: Path) -> None:
    test = cifar.load_dataset("synthetic:1000", "cifar100").test
    folder = write_corrupted(tmp_path / "c", test.images, test.labels)
    names = [f"name {label}" for label in range(100)]
    assert open_corrupted(folder, names, "cifar100").split("fog", 2).labels.tolist() == test.labels.tolist()
    with pytest.raises(DataError, match="has 100 classes, which are not the 20 classes"):
        open_corrupted(folder, names[:20], "cifar100-coarse")


@pytest.mark.medium
@pytest.mark.parametrize(("version", "label_type"), [("v4", np.int64), ("v6", np.int32)])
def test_cifar10_1_can_take_the_place_of_the_test_set(run: str, tmp_path: Path, version: str, label_type: Any) -> None:
    test = cifar.load_dataset("synthetic:200").test
    path = tmp_path / f"cifar10.1_{version}_data.npy"
    np.save(path, test.images.transpose(0, 2, 3, 1))
    np.save(tmp_path / f"cifar10.1_{version}_labels.npy", test.labels.astype(label_type))
    scores = evaluate_run(run, data=str(path))
    assert (scores["test_loss"], scores["total"], scores["val_acc"]) == (evaluate_run(run)["test_loss"], 40, None)
    assert scores["data"] == str(path)
    recipe = Recipe(data=str(path))
    described = inspection.verify_dataset(recipe)
    assert {name: split["shape"] for name, split in described["splits"].items()} == {"test": [40, 3, 32, 32]}
    console = Console(width=80, record=True, file=(tmp_path / "table").open("w"))
    console.print(dataset_table(described))
    assert "mean of test images" in console.export_text()
    for use in (
        lambda: build_trainer(resolve(recipe)),
        lambda: inspection.plot_augmentations(recipe, Path("a.png"), 1),
    ):
        with pytest.raises(DataError, match="has no training images; evaluate a run on it"):
            use()
    (tmp_path / f"cifar10.1_{version}_labels.npy").unlink()
    with pytest.raises(DataError, match=r"no such file: .*_labels.npy; give a copy of"):
        evaluate_run(run, data=str(path))
    np.save(tmp_path / "fog.npy", test.images)
    with pytest.raises(DataError, match=r"fog.npy is not NAME_data.npy; for CIFAR-10-C, give eval --corrupted"):
        evaluate_run(run, data=str(tmp_path / "fog.npy"))
    with pytest.raises(DataError, match=r"contains .npy files, which are not training images; give eval --corrupted"):
        cifar.load_dataset(str(tmp_path))
