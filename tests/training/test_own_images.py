"""Test training on own images: normalization from the images, --resize, and the classes that a run prints and keeps."""

from __future__ import annotations

import io
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastcifar.data import inspection
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.errors import CheckpointError, UsageError
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.evaluation.export import export_model
from fastcifar.evaluation.load_run import load_model
from fastcifar.evaluation.predict import predict_to_file
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return class folders of images of 40x48 pixels: 40 cats, 30 dogs."""
    rng = np.random.default_rng(0)
    for name, count, brightness in (("cat", 40, 0), ("dog", 30, 60)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, (250, 120, 60), (40, 48, 3)) // 2 + brightness
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def make(tiny: MakeRecipe, photos: Path) -> MakeRecipe:
    return lambda **changes: tiny(**{"data": str(photos), "resize": 32, "val_size": None, "batch_size": 16, **changes})


@pytest.mark.medium
def test_own_images_are_normalized_by_their_own_mean_and_std(make: MakeRecipe) -> None:
    trainer = build_trainer(resolve(make()))
    pixels = trainer.data.train.images.astype(np.float64) / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    assert trainer.resolved.mean == pytest.approx(mean, abs=1e-8)
    assert trainer.resolved.std == pytest.approx(std, abs=1e-8)
    assert normalization_mean_std(trainer.recipe) == (trainer.resolved.mean, trainer.resolved.std)
    logits = trainer.forward(torch.from_numpy(trainer.data.train.images[:4].copy()))
    normalized = (pixels[:4] - mean[:, None, None]) / std[:, None, None]
    expected = trainer.model(torch.from_numpy(normalized).float().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    described = inspection.verify_dataset(make())
    assert described["mean"] == pytest.approx(trainer.resolved.mean, abs=1e-8)


@pytest.mark.parametrize(
    "changes", [{"normalize": "cifar100"}, {"normalize": "0.5:0.25"}, {"data": "synthetic:200", "resize": None}]
)
def test_an_explicit_normalization_and_that_of_synthetic_images_stay(make: MakeRecipe, changes: Any) -> None:
    trainer = build_trainer(resolve(make(**changes)))
    assert trainer.recipe.normalize == changes.get("normalize", "auto")
    assert (trainer.resolved.mean, trainer.resolved.std) == normalization_mean_std(make(**changes))


def test_a_channel_with_a_single_value_is_not_scaled(make: MakeRecipe, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    images[..., 1] = 51
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40) % 2)
    trainer = build_trainer(resolve(make(data=str(tmp_path / "a.npz"))))
    assert (trainer.resolved.mean[1], trainer.resolved.std[1]) == (0.2, 1.0)


@pytest.mark.medium
def test_the_run_keeps_classes_and_normalization_and_is_used_without_the_images(
    make: MakeRecipe, photos: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=200)
    summary = train(make(), console=console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    kind = "class folders of images, resized to 32x32, split 80/10/10 by --val-seed 0"
    assert f"data: {kind} from {photos}: 56 training, 7 validation, 7 test images\n" in output
    assert "classes: 0 cat (32 images), 1 dog (24)\n" in output
    assert summary.classes == {"cat": 32, "dog": 24}
    saved = checkpoint.load_checkpoint(Path(summary.run) / "checkpoints" / "last.pt")
    recipe = tomllib.loads((Path(summary.run) / "recipe.toml").read_text())
    assert saved["classes"] == ["cat", "dog"]
    assert saved["recipe"]["normalize"] == recipe["normalize"] == summary.config["normalize"]
    assert len(recipe["normalize"].replace(":", ",").split(",")) == 6
    scores = evaluate_run(summary.run)
    assert (scores["correct"], scores["normalize"]) == (summary.correct, recipe["normalize"])
    assert evaluate_run(summary.run, normalize="auto")["test_loss"] == scores["test_loss"]
    assert evaluate_run(summary.run, normalize="cifar10")["test_loss"] != scores["test_loss"]
    card = Path(export_model(summary.run, "safetensors")["card"]).read_text()
    assert f"# resnet on {kind}\n" in card
    weights = load_model(str(Path(summary.run) / "weights.safetensors"))
    assert normalization_mean_std(weights.recipe) == normalization_mean_std(Recipe(normalize=recipe["normalize"]))
    from_data = predict_to_file(summary.run, "data:test", tmp_path / "test.csv")
    assert (from_data["images"], sum(from_data["counts"].values())) == (7, 7)
    np.save(tmp_path / "photos.npy", np.stack([np.asarray(Image.open(file)) for file in (photos / "cat").iterdir()]))
    assert predict_to_file(summary.run, str(tmp_path / "photos.npy"), tmp_path / "npy.csv")["images"] == 40
    photo = photos / "dog" / "0.png"
    photo.rename(tmp_path / "photo.png")
    result = predict_to_file(summary.run, str(tmp_path / "photo.png"), tmp_path / "a.csv", data=str(tmp_path / "gone"))
    assert list(result["counts"]) == ["cat", "dog"]


@pytest.mark.medium
def test_a_resumed_run_keeps_its_normalization(make: MakeRecipe, tmp_path: Path) -> None:
    whole = train(make(epochs=2))
    for number, resume in enumerate(("auto", "run")):
        out = str(tmp_path / f"part{number}")
        train(make(max_steps=4, out=out))
        if resume == "auto":
            summary = train(make(resume="auto", out=out))
        else:
            summary = train(Recipe.make(resume=out, device="cpu"))
        assert summary.config["normalize"] == whole.config["normalize"]
        assert (summary.test_loss, summary.val_acc) == (whole.test_loss, whole.val_acc)
    with pytest.raises(CheckpointError, match="trained with other options: --normalize"):
        train(Recipe.make(resume=whole.run, normalize="cifar10", epochs=3))


@pytest.mark.medium
def test_a_run_of_an_earlier_version_keeps_the_normalization_of_cifar(make: MakeRecipe, tmp_path: Path) -> None:
    named = train(make(normalize="cifar10", out=str(tmp_path / "named")))
    early = train(make(normalize="cifar10", max_steps=4, out=str(tmp_path / "early")))
    last = Path(early.run) / "checkpoints" / "last.pt"
    saved = checkpoint.load_checkpoint(last)
    saved["recipe"]["normalize"] = "auto"  # as such a run recorded it
    for file in last.parent.iterdir():
        file.unlink()
    torch.save(dict(saved), last)
    assert evaluate_run(early.run)["test_loss"] == early.test_loss
    assert train(Recipe.make(resume=early.run)).test_loss == named.test_loss


@pytest.mark.parametrize("size", [16, 64, "a"])
def test_fault15_resize_is_to_32_only(size: Any) -> None:
    with pytest.raises(UsageError, match="--resize should be"):
        Recipe(resize=size)


@pytest.mark.medium
def test_many_classes_are_shortened(make: MakeRecipe) -> None:
    trainer = build_trainer(resolve(make(data="synthetic:1000", dataset="cifar100", resize=None, val_size=100)))
    assert trainer.summary_lines()[1] == (
        "classes: 0 class_00 (9 images), 1 class_01 (9), 2 class_02 (9), 3 class_03 (9), 4 class_04 (9), ..., "
        "99 class_99 (9)"
    )
    assert json.dumps(trainer.data.count_by_class(trainer.train_split)).count("9") > 100
