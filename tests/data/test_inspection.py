"""`data verify` tells what is there; `data show` draws what the augmentations do."""

from __future__ import annotations

import os
import sys
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
from fastcifar.data import cifar, inspection, normalization
from fastcifar.data.augment import draw_epoch, draw_mixer_params, parse_augment
from fastcifar.data.mixers import MIXERS
from fastcifar.data.normalization import NORMALIZATIONS
from fastcifar.data.policies import STANDARD_SPACE
from fastcifar.errors import DataError, DiskError, UsageError
from fastcifar.recipe import Recipe


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders of ten images, 3 cats and 5 dogs to train, and a cache folder of the test's own."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for part, name, count in (("train", "cat", 3), ("train", "dog", 5), ("test", "cat", 1), ("test", "dog", 1)):
        folder = tmp_path / "mine" / part / name
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "mine"


def test_verify_says_what_is_there(folders: Path, tmp_path: Path) -> None:
    found = inspection.verify_dataset(Recipe(data=str(folders)))
    assert (found["kind"], found["source"], found["official"]) == ("class folders of images", str(folders), False)
    assert found["splits"]["train"]["per_class"] == {"cat": 3, "dog": 5}
    assert found["splits"]["test"]["shape"] == [2, 3, 32, 32]
    pixels = cifar.load_dataset(str(folders)).train.images / 255
    assert found["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert found["std"] == pytest.approx(pixels.std((0, 2, 3)).tolist(), rel=1e-12)
    assert Path(found["cache"]).parent == tmp_path / "cache"
    assert (Path(found["cache"]) / "meta.json").is_file()
    assert dataset_table(found)


def test_statistics_of_many_images_are_exact() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2100, 3, 2, 2), dtype=np.uint8)
    mean, std = normalization.channel_mean_std(images)
    assert mean == pytest.approx((images / 255).mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx((images / 255).std((0, 2, 3)).tolist(), rel=1e-12)


def test_fault11_verify_reads_the_files_though_they_are_cached(folders: Path) -> None:
    before = cifar.load_dataset(str(folders))
    file = folders / "train" / "dog" / "2.png"
    stat = file.stat()
    file.write_bytes(bytes(stat.st_size))  # the same size and time: the cache believes in it
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.array_equal(cifar.load_dataset(str(folders)).train.images, before.train.images)
    with pytest.raises(DataError, match=r"2\.png"):
        inspection.verify_dataset(Recipe(data=str(folders)))


def test_verify_mends_a_cache_that_holds_something_else(folders: Path) -> None:
    kept = Path(inspection.verify_dataset(Recipe(data=str(folders)))["cache"])
    true = np.array(cifar.load_dataset(str(folders)).train.images)
    wrong = np.load(kept / "train_images.npy", mmap_mode="r+")
    wrong[0] ^= 1
    wrong.flush()
    assert not np.array_equal(cifar.load_dataset(str(folders)).train.images, true)
    assert inspection.verify_dataset(Recipe(data=str(folders)))["cache"] == str(kept)
    assert np.array_equal(cifar.load_dataset(str(folders)).train.images, true)


@pytest.mark.filterwarnings("ignore:.*unofficial files")
def test_real_cifar10_has_its_known_statistics() -> None:
    data = os.environ.get("FASTCIFAR_DATA")
    if not data:
        pytest.skip("FASTCIFAR_DATA names no CIFAR-10")
    mean, std = normalization.channel_mean_std(cifar.load_dataset(data).train.images)
    assert (mean, std) == tuple(pytest.approx(values, abs=1e-7) for values in NORMALIZATIONS["cifar10"])


def captured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, **settings: Any
) -> tuple[dict[str, Any], list[plotting.ImageGrid]]:
    drawn: list[list[plotting.ImageGrid]] = []
    monkeypatch.setattr(plotting, "plot_image_grids", lambda _, grids: drawn.append(grids))
    shown = inspection.plot_augmentations(Recipe(data="synthetic:100", **settings), folder / "a.png", 5)
    assert shown["blocks"] == [grid.title for grid in drawn[0]]
    return shown, drawn[0]


def test_show_has_a_block_for_each_op_and_one_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, blocks = captured(monkeypatch, tmp_path, augment="crop:3:zero,flip:1,cutout:6:zero")
    train = cifar.load_dataset("synthetic:100").train
    assert shown["blocks"] == [
        "crop:3:zero",
        "flip:1.0:random",
        "cutout:6:zero",
        "crop:3:zero,flip:1.0:random,cutout:6:zero",
    ]
    originals = train.images[shown["images"]].transpose(0, 2, 3, 1)
    for block in blocks:
        assert block.row_labels == shown["classes"]
        assert block.column_labels == ["original", "epoch 0", "epoch 1", "epoch 2", "epoch 3"]
        assert block.images.shape == (5, 5, 32, 32, 3)
        assert np.array_equal(block.images[:, 0], originals)
    crop, flip, cutout, whole = (block.images for block in blocks)
    assert np.array_equal(flip[:, 2], originals[:, :, ::-1])
    # The same draws in the blocks as in the whole: the holes of the whole are those of the cutout block.
    hole = (cutout[:, 1:] == 0).all(-1)
    assert (hole.sum((2, 3)) >= 9).all()  # a corner's share of the square
    assert (whole[:, 1:][hole] == 0).all()
    mirrored = crop[:, 1:, :, ::-1]
    assert np.array_equal(whole[:, 1:][~hole], mirrored[~hole])


def test_show_follows_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, blocks = captured(monkeypatch, tmp_path)
    again, same = captured(monkeypatch, tmp_path)
    other, _ = captured(monkeypatch, tmp_path, seed=1)
    assert first == again
    assert all(np.array_equal(a.images, b.images) for a, b in zip(blocks, same, strict=True))
    assert first["images"] != other["images"]


def test_show_has_a_row_for_each_operation_of_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, (_, _, _, grid) = captured(monkeypatch, tmp_path, augment="flip,randaugment:9:2")
    assert grid.title == "randaugment:9:2 by operation and magnitude"
    rows = {name.split("\n")[0]: row for name, row in zip(grid.row_labels, grid.images, strict=True)}
    assert list(rows) == sorted(STANDARD_SPACE)
    assert "Solarize\n0.7" in grid.row_labels
    original = rows["Identity"][0]
    assert any(
        np.array_equal(original, cifar.load_dataset("synthetic:100").train.images[index].transpose(1, 2, 0))
        for index in shown["images"]
    )
    assert np.array_equal(rows["Identity"][1], original)
    assert (rows["Identity"][2:] == 255).all(), "blank where there is no magnitude"
    picture = torch.from_numpy(original).permute(2, 0, 1)
    assert np.array_equal(rows["Equalize"][1], v2.functional.equalize(picture).permute(1, 2, 0).numpy())
    assert np.array_equal(
        rows["Rotate"][1:3], np.stack([v2.functional.rotate(picture, angle).permute(1, 2, 0) for angle in (-9, 9)])
    )


@pytest.mark.parametrize("name", MIXERS)
def test_show_mixes_the_images_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec = f"flip:1,{name}"
    _, (flip, mix, whole) = captured(monkeypatch, tmp_path, augment=spec)
    for epoch in range(4):
        order = draw_epoch((), 5, epoch, 0).permutation
        drawn = torch.from_numpy(draw_mixer_params(parse_augment(spec), 5, epoch, 0))
        for before, after in ((mix.images[:, 0], mix), (flip.images[:, 0, :, ::-1], whole)):
            batch = torch.from_numpy(before[order]).permute(0, 3, 1, 2)
            mixed = MIXERS[name].apply(batch, drawn)[0].permute(0, 2, 3, 1).float()
            shown = after.images[:, 1 + epoch][order]
            assert np.abs(shown - mixed.numpy()).max() <= 0.5
            assert not np.array_equal(shown, before[order])


@pytest.mark.parametrize("augment", ["none", "flip", "flip,flip", "crop,flip,cutout,trivialaugment,mixup"])
def test_show_writes_a_png_and_overwrites_it(tmp_path: Path, augment: str) -> None:
    file = tmp_path / "a.png"
    file.write_text("old")
    pyplot = "matplotlib.pyplot" in sys.modules  # torchmetrics imports it, for a test
    inspection.plot_augmentations(Recipe(data="synthetic:100", augment=augment), file, 2)
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_tiles_stand_upright_in_their_order() -> None:
    grid = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 5, 3), dtype=np.uint8)
    picture = plotting.tile_images(grid)
    step_y, step_x = 4 + plotting.IMAGE_GAP, 5 + plotting.IMAGE_GAP
    assert picture.shape == (2 * step_y - plotting.IMAGE_GAP, 3 * step_x - plotting.IMAGE_GAP, 3)
    for row in range(2):
        for column in range(3):
            y, x = row * step_y, column * step_x
            assert np.array_equal(picture[y : y + 4, x : x + 5], grid[row, column])
    assert (picture[4 : 4 + plotting.IMAGE_GAP] == 255).all()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    recipe = Recipe(data="synthetic:100")
    for name, count, words in (("a.jpg", 2, r"\.png"), ("a.png", 0, "--count 0"), ("a.png", 101, "1 to 100")):
        with pytest.raises(UsageError, match=words):
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
