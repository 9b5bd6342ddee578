"""Tests of the torchvision loader: its transforms match the augmentations, workers change nothing, and torchvision may
be missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastcifar.cli.exit import report_error
from fastcifar.data import loaders
from fastcifar.data.augment import AUGMENTS, AugmentOp, format_augment, parse_augment
from fastcifar.data.loaders import TORCHVISION_TRANSFORMS, TensorLoader, TorchvisionLoader, build_transform
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.train import train

IMAGES = np.random.default_rng(0).integers(1, 256, (60, 3, 32, 32), dtype=np.uint8)
FILL = (125, 7, 255)


def augment_repeatedly(spec: str, count: int = 40) -> list[np.ndarray]:
    """Return `count` augmented versions of the first image, [3,32,32] each."""
    torch.manual_seed(0)
    transform, pixels = build_transform(parse_augment(spec), FILL), IMAGES[0].transpose(1, 2, 0)
    return [transform(Image.fromarray(pixels)).numpy() for _ in range(count)]


@pytest.mark.parametrize(("variant", "mode"), [("zero", "constant"), ("reflect", "reflect")])
def test_crop_is_a_window_of_the_padded_image(variant: str, mode: str) -> None:
    padded = np.pad(IMAGES[0], ((0, 0), (3, 3), (3, 3)), mode=mode)  # type: ignore[call-overload]
    windows = {padded[:, y : y + 32, x : x + 32].tobytes() for y in range(7) for x in range(7)}
    crops = {image.tobytes() for image in augment_repeatedly(f"crop:3:{variant}")}
    assert crops <= windows
    assert len(crops) > 20


def test_flip_has_the_given_probability() -> None:
    flipped = IMAGES[0][:, :, ::-1]
    assert all(np.array_equal(image, flipped) for image in augment_repeatedly("flip:1"))
    assert all(np.array_equal(image, IMAGES[0]) for image in augment_repeatedly("flip:0"))
    count = sum(np.array_equal(image, flipped) for image in augment_repeatedly("flip", 200))
    assert 70 < count < 130


@pytest.mark.parametrize(("spec", "color"), [("cutout:8:mean", FILL), ("cutout:5:zero", (0, 0, 0))])
def test_cutout_fills_a_square_clipped_at_the_border(spec: str, color: tuple[int, int, int]) -> None:
    size, corners = parse_augment(spec)[0].value, set()
    assert isinstance(size, int)
    for image in augment_repeatedly(spec, 300):
        filled = (image != IMAGES[0]).any(0)
        ys, xs = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
        box = image[:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        assert (box == np.array(color)[:, None, None]).all()
        assert (image[:, ~filled] == IMAGES[0][:, ~filled]).all()
        for low, high in ((ys[0], ys[-1]), (xs[0], xs[-1])):
            assert high - low + 1 == size or low == 0 or high == 31
            corners |= {int(low), int(high)}
    assert {0, 31} <= corners


@pytest.mark.parametrize(("variant", "color"), [("gray", (128, 128, 128)), ("mean", FILL), ("zero", (0, 0, 0))])
def test_erase_fills_a_box_in_half_of_the_images(variant: str, color: tuple[int, int, int]) -> None:
    changed = 0
    for image in augment_repeatedly(f"erase:0.1:{variant}", 200):
        filled = (image != IMAGES[0]).any(0)
        changed += filled.any()
        assert filled.sum() <= 0.11 * 1024  # height and width are rounded
        assert (image[:, filled] == np.array(color)[:, None]).all()
    assert 70 < changed < 130


@pytest.mark.parametrize("name", AUGMENTS)
def test_every_augmentation_has_a_counterpart_or_is_refused_with_a_remedy(name: str) -> None:
    for variant in AUGMENTS[name].variants:
        ops = parse_augment(format_augment((AugmentOp(name, AUGMENTS[name].default_value, variant),)))
        if (name, variant) in TORCHVISION_TRANSFORMS:
            assert callable(build_transform(ops, FILL))
            continue
        with pytest.raises(UsageError, match=rf"--loader torchvision does not support {name}.*use --loader tensor"):
            build_transform(ops, FILL)


@pytest.mark.medium
@pytest.mark.parametrize(
    "spec", ["crop:4:zero,flip,rotate:5,autoaugment:cifar10", "crop:4:zero,flip,rotate:10,jitter:0.2"]
)
def test_both_loaders_agree_on_average_for_the_published_recipes(spec: str) -> None:
    """The random parameters differ, but brightness, contrast and the number of black pixels agree on average."""
    options = {"batch_size": 30, "augment": parse_augment(spec), "seed": 0, "device": "cpu"}
    images = IMAGES.repeat(20, 0)
    loaders = (
        TensorLoader(images, np.arange(1200), compile=False, **options),
        TorchvisionLoader(images, np.arange(1200), workers=0, **options),
    )
    a, b = (torch.cat([batch for batch, _ in loader.batches(0)]).float() for loader in loaders)
    for statistic in (lambda x: x.mean(), lambda x: x.std(), lambda x: (x == 0).float().mean() * 255):
        assert abs(float(statistic(a) - statistic(b))) < 3, (float(statistic(a)), float(statistic(b)))


def test_alternating_flip_is_refused_with_two_remedies() -> None:
    with pytest.raises(UsageError, match="use --loader tensor, or flip with random"):
        build_transform(parse_augment("crop,flip:0.5:alternating"), FILL)


def test_workers_change_nothing() -> None:
    def epoch(workers: int) -> list[tuple[torch.Tensor, ...]]:
        loader = TorchvisionLoader(
            IMAGES, np.arange(60), batch_size=25, augment=parse_augment("crop,flip,cutout"), seed=1, device="cpu",
            fill_color=FILL, workers=workers,
        )  # fmt: skip
        return list(loader.batches(1))

    without_workers, with_workers = epoch(0), epoch(2)
    assert [len(labels) for _, labels in with_workers] == [25, 25, 10]
    for a, b in zip(without_workers, with_workers, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


class KillProcess:
    """A transform that kills its process as the kernel does when memory runs out."""

    def __call__(self, _: Image.Image) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_fault24_a_worker_that_dies_ends_the_run(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loaders, "build_transform", lambda *_: KillProcess())
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        train(tiny(loader="torchvision", workers=2))
    assert time.perf_counter() - started < 30
    assert report_error(caught.value) == 6
    assert capsys.readouterr().err.endswith("use fewer --workers, or --loader tensor\n")


@pytest.mark.medium
@pytest.mark.parametrize("workers", [0, 2])
def test_without_augmentation_a_run_equals_one_with_the_tensor_loader(
    tiny: Callable[..., Recipe], workers: int
) -> None:
    expected = train(tiny(augment="none", epochs=1))
    summary = train(tiny(augment="none", epochs=1, loader="torchvision", workers=workers))
    assert (expected.loader, summary.loader) == ("tensor", "torchvision")
    assert (summary.test_loss, summary.val_acc) == (expected.test_loss, expected.val_acc)


def test_fault18_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(UsageError, match=r"use --loader tensor, or pip install 'torchvision") as caught:
        build_transform(parse_augment("crop"), FILL)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)


@pytest.mark.slow
def test_fault18_a_broken_torchvision_affects_its_loader_only(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist\\nand more')\n"
    )
    tiny = ("--data", "synthetic:100", "--val-size", "20", "--arch", "resnet", "--blocks", "1,1",
            "--channels", "8,8", "--batch-size", "20", "--max-steps", "1", "--no-compile",
            "--device", "cpu", "--precision", "fp32")  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path), str(Path(loaders.__file__).parents[2])])
        return subprocess.run(
            [sys.executable, "-m", "fastcifar", "train", *tiny, *arguments], capture_output=True, text=True,
            timeout=300, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    broken = run("--loader", "torchvision")
    assert (broken.returncode, broken.stderr.count("\n")) == (2, 1), broken.stderr
    assert "operator torchvision::nms does not exist); use --loader tensor" in broken.stderr
    assert not (tmp_path / "runs").exists()
    default = run()
    assert default.returncode == 0, default.stderr
