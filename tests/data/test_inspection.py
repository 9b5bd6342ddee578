"""Tests of `data verify`, which describes a data set, and `data show`, which plots augmentations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastcifar import plotting
from fastcifar.cli.tables import dataset_table
from fastcifar.data import cifar, class_folders, inspection, normalization
from fastcifar.data.augment import draw_epoch, draw_mixer_params, parse_augment
from fastcifar.data.mixers import MIXERS
from fastcifar.data.policies import STANDARD_SPACE
from fastcifar.errors import DataError, DiskError, UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create class folders of ten images, 3 cats and 5 dogs for training, and use a temporary cache folder."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, name, count in (("train", "cat", 3), ("train", "dog", 5), ("test", "cat", 1), ("test", "dog", 1)):
        folder = tmp_path / "folders" / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "folders"


def test_verify_describes_the_data_set(folders: Path, tmp_path: Path) -> None:
    document = inspection.verify_dataset(Recipe(data=str(folders)))
    source = (document["kind"], document["source"], document["official"])
    assert source == ("class folders of images", str(folders), False)
    assert document["splits"]["train"]["per_class"] == {"cat": 3, "dog": 5}
    assert document["splits"]["test"]["shape"] == [2, 3, 32, 32]
    pixels = cifar.load_dataset(str(folders)).train.images / 255
    assert document["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert document["std"] == pytest.approx(pixels.std((0, 2, 3)).tolist(), rel=1e-12)
    assert document["cache"] is not None
    assert Path(document["cache"]).parent == tmp_path / "cache"
    assert (Path(document["cache"]) / "meta.json").is_file()
    assert dataset_table(document)


def test_mean_and_std_of_many_images_are_exact() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2100, 3, 2, 2), dtype=np.uint8)
    mean, std = normalization.channel_mean_std(images)
    assert mean == pytest.approx((images / 255).mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx((images / 255).std((0, 2, 3)).tolist(), rel=1e-12)


def test_fault11_verify_reads_the_files_even_if_they_are_cached(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cifar.load_dataset(str(folders))

    def fail(file: Path, resize: bool) -> np.ndarray:
        raise DataError(f"{file} is damaged")

    monkeypatch.setattr(class_folders, "decode_image", fail)
    assert np.array_equal(cifar.load_dataset(str(folders)).train.images, before.train.images)
    with pytest.raises(DataError, match=r"cat/0\.png is damaged"):
        inspection.verify_dataset(Recipe(data=str(folders)))


def test_verify_repairs_a_cache_entry_with_other_contents(folders: Path) -> None:
    entry = Path(inspection.verify_dataset(Recipe(data=str(folders)))["cache"] or "")
    expected = np.array(cifar.load_dataset(str(folders)).train.images)
    damaged = np.load(entry / "train_images.npy", mmap_mode="r+")
    damaged[0] ^= 1
    damaged.flush()
    assert not np.array_equal(cifar.load_dataset(str(folders)).train.images, expected)
    assert inspection.verify_dataset(Recipe(data=str(folders)))["cache"] == str(entry)
    assert np.array_equal(cifar.load_dataset(str(folders)).train.images, expected)


def capture_grids(
    monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any
) -> tuple[inspection.GridsDescription, list[plotting.ImageGrid]]:
    """Return the result of `plot_augmentations` for five images and the grids that it plots."""
    calls: list[list[plotting.ImageGrid]] = []
    monkeypatch.setattr(plotting, "plot_image_grids", lambda _, grids: calls.append(grids))
    result = inspection.plot_augmentations(Recipe(data="synthetic:100", **options), folder / "a.png", 5)
    assert result["blocks"] == [grid.title for grid in calls[0]]
    return result, calls[0]


@pytest.mark.medium
def test_show_has_a_grid_for_each_augmentation_and_one_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, grids = capture_grids(monkeypatch, tmp_path, augment="crop:3:zero,flip:1,cutout:6:zero")
    train = cifar.load_dataset("synthetic:100").train
    assert result["blocks"] == [
        "crop:3:zero",
        "flip:1.0:random",
        "cutout:6:zero",
        "crop:3:zero,flip:1.0:random,cutout:6:zero",
    ]
    originals = train.images[result["images"]].transpose(0, 2, 3, 1)
    for grid in grids:
        assert grid.row_labels == result["classes"]
        assert grid.column_labels == ["original", "epoch 0", "epoch 1", "epoch 2", "epoch 3"]
        assert grid.images.shape == (5, 5, 32, 32, 3)
        assert np.array_equal(grid.images[:, 0], originals)
    crop, flip, cutout, combined = (grid.images for grid in grids)
    assert np.array_equal(flip[:, 2], originals[:, :, ::-1])
    # All grids use the same random parameters: the filled squares of the combined grid are those of the cutout grid.
    filled = (cutout[:, 1:] == 0).all(-1)
    assert (filled.sum((2, 3)) >= 9).all()  # at a corner of the image, a quarter of the square remains
    assert (combined[:, 1:][filled] == 0).all()
    flipped_crop = crop[:, 1:, :, ::-1]
    assert np.array_equal(combined[:, 1:][~filled], flipped_crop[~filled])


def test_show_depends_on_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, grids = capture_grids(monkeypatch, tmp_path)
    repeated, repeated_grids = capture_grids(monkeypatch, tmp_path)
    other, _ = capture_grids(monkeypatch, tmp_path, seed=1)
    assert first == repeated
    assert all(np.array_equal(a.images, b.images) for a, b in zip(grids, repeated_grids, strict=True))
    assert first["images"] != other["images"]


def test_show_has_a_row_for_each_operation_of_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, (_, _, _, grid) = capture_grids(monkeypatch, tmp_path, augment="flip,randaugment:9:2")
    assert grid.title == "randaugment:9:2 by operation and magnitude"
    rows = {name.split("\n")[0]: row for name, row in zip(grid.row_labels, grid.images, strict=True)}
    assert list(rows) == sorted(STANDARD_SPACE)
    assert "Solarize\n0.7" in grid.row_labels
    original = rows["Identity"][0]
    assert any(
        np.array_equal(original, cifar.load_dataset("synthetic:100").train.images[index].transpose(1, 2, 0))
        for index in result["images"]
    )
    assert np.array_equal(rows["Identity"][1], original)
    assert (rows["Identity"][2:] == 255).all(), "blank where there is no magnitude"
    image = torch.from_numpy(original).permute(2, 0, 1)
    assert np.array_equal(rows["Equalize"][1], v2.functional.equalize(image).permute(1, 2, 0).numpy())
    assert np.array_equal(
        rows["Rotate"][1:3], np.stack([v2.functional.rotate(image, angle).permute(1, 2, 0) for angle in (-9, 9)])
    )


@pytest.mark.parametrize("name", MIXERS)
def test_show_mixes_the_images_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec = f"flip:1,{name}"
    _, (flip, mix, combined) = capture_grids(monkeypatch, tmp_path, augment=spec)
    for epoch in range(4):
        order = draw_epoch((), 5, epoch, 0).permutation
        params = torch.from_numpy(draw_mixer_params(parse_augment(spec), 5, epoch, 0))
        for before, after in ((mix.images[:, 0], mix), (flip.images[:, 0, :, ::-1], combined)):
            batch = torch.from_numpy(before[order]).permute(0, 3, 1, 2)
            mixed = MIXERS[name].apply(batch, params)[0].permute(0, 2, 3, 1).float()
            plotted = after.images[:, 1 + epoch][order]
            assert np.abs(plotted - mixed.numpy()).max() <= 0.5
            assert not np.array_equal(plotted, before[order])


@pytest.mark.parametrize("mixer", ["", ",mixup:0.5", ",cutmix", ",ricap"])
def test_first_batch_is_the_one_that_the_loader_gives(tiny: Callable[..., Recipe], mixer: str) -> None:
    trainer = build_trainer(resolve(tiny(augment=f"crop:4:zero,flip,cutout:8{mixer}", seed=3)))
    images, labels, *mixer_params = next(iter(trainer.batches(0)))
    first_labels, stages = inspection.first_batch_stages(trainer.recipe, trainer.train_split)
    assert first_labels.tolist() == labels.tolist()
    assert torch.equal(stages["augmented"], images)
    train = trainer.train_split
    originals = stages["original"].numpy()
    indices = np.concatenate([(train.images == image).all((1, 2, 3)).nonzero()[0] for image in originals])
    assert train.labels[indices].tolist() == labels.tolist()
    name = mixer.strip(",").partition(":")[0]
    assert list(stages) == ["original", "augmented", *([name] if name else [])]
    if mixer:
        mixed, _ = MIXERS[name].apply(images, *mixer_params)
        assert torch.equal(stages[name], mixed.float().round().to(torch.uint8))


def test_first_batch_is_plotted_in_grids_of_eight_images(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[plotting.ImageGrid], str]] = []
    monkeypatch.setattr(plotting, "plot_image_grids", lambda _, grids, title: calls.append((grids, title)))
    train = cifar.load_dataset("synthetic:100").train
    classes = [f"class {label}" for label in range(10)]
    for batch_size, augment, num_rows, columns in (
        (50, "flip,mixup", [8, 8, 8], ["original", "augmented", "mixup"]),
        (11, "none", [8, 3], ["original"]),
    ):
        recipe = tiny(batch_size=batch_size, augment=augment)
        inspection.plot_first_batch(tmp_path / "a.png", recipe, train, classes)
        grids, title = calls.pop()
        assert title == f"first batch of the run: {augment}"
        assert [len(grid.images) for grid in grids] == num_rows
        assert all(grid.column_labels == columns and grid.images.shape[1] == len(columns) for grid in grids)
        labels, stages = inspection.first_batch_stages(recipe, train)
        assert [name for grid in grids for name in grid.row_labels] == [classes[label] for label in labels[:24]]
        last_stage = np.concatenate([grid.images[:, -1] for grid in grids]).transpose(0, 3, 1, 2)
        assert np.array_equal(last_stage, stages[columns[-1]][:24].numpy())


@pytest.mark.medium
@pytest.mark.parametrize("augment", ["none", "flip", "flip,flip", "crop,flip,cutout,trivialaugment,mixup"])
def test_show_writes_a_png_and_overwrites_it(tmp_path: Path, augment: str) -> None:
    file = tmp_path / "a.png"
    file.write_text("old")
    pyplot_was_imported = "matplotlib.pyplot" in sys.modules  # by torchmetrics in another test
    inspection.plot_augmentations(Recipe(data="synthetic:100", augment=augment), file, 2)
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_was_imported


def test_tiles_are_upright_and_in_order() -> None:
    grid = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 5, 3), dtype=np.uint8)
    tiled = plotting.tile_images(grid)
    step_y, step_x = 4 + plotting.IMAGE_GAP, 5 + plotting.IMAGE_GAP
    assert tiled.shape == (2 * step_y - plotting.IMAGE_GAP, 3 * step_x - plotting.IMAGE_GAP, 3)
    for row in range(2):
        for column in range(3):
            y, x = row * step_y, column * step_x
            assert np.array_equal(tiled[y : y + 4, x : x + 5], grid[row, column])
    assert (tiled[4 : 4 + plotting.IMAGE_GAP] == 255).all()


def test_invalid_output_and_count_are_refused(tmp_path: Path) -> None:
    recipe = Recipe(data="synthetic:100")
    for name, count, message in (("a.jpg", 2, r"\.png"), ("a.png", 0, "--count 0"), ("a.png", 101, "1 to 100")):
        with pytest.raises(UsageError, match=message):
            inspection.plot_augmentations(recipe, tmp_path / name, count)
    with pytest.raises(DiskError, match="no folder"):
        inspection.plot_augmentations(recipe, tmp_path / "no" / "a.png", 2)
    assert not list(tmp_path.iterdir())


def test_fault18_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(UsageError, match=r"matplotlib.* cannot be imported.*pip install 'matplotlib") as caught:
        inspection.plot_augmentations(Recipe(data="synthetic:100"), tmp_path / "a.png", 2)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)
