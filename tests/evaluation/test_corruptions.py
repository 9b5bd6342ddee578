"""Test the corruptions against Pillow, colorsys, torchvision and simple reference computations."""

from __future__ import annotations

import colorsys
import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as torchvision_functional

from fastcifar.evaluation import corruptions
from fastcifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from fastcifar.evaluation.evaluate_run import apply_corruption

# saturate decreases the saturation at severities 1 and 2 and increases it from 3 on; the grid of pixelate aligns with
# different edges at each severity.
MONOTONIC_CORRUPTIONS = [name for name in CORRUPTIONS if name not in ("saturate", "pixelate")]


def photo_like_images(count: int = 24) -> Tensor:
    """Return uint8 images [n,3,32,32] with edges, gradients, texture and color, like photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=False)
    for index, image in enumerate(smooth):  # paste a rectangle with sharp edges
        image[:, index % 17 : index % 17 + 9, index % 13 : index % 13 + 14] = image.flip(0)[:, :9, :14]
    textured = smooth + 0.03 * torch.randn(count, 3, 32, 32, generator=generator)
    return (textured.clamp(0, 1) * 255).round().to(torch.uint8)


IMAGES = photo_like_images()
IMAGES_0_1 = IMAGES.double() / 255


def new_generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_range_dtype_and_reproducibility(name: str) -> None:
    for severity in SEVERITIES:
        for images in (IMAGES_0_1[:3], IMAGES_0_1[:3].float()):
            corrupted = CORRUPTIONS[name](images, severity, new_generator())
            assert (corrupted.shape, corrupted.dtype) == (images.shape, images.dtype)
            assert 0 <= corrupted.min() <= corrupted.max() <= 1
            assert torch.equal(corrupted, CORRUPTIONS[name](images, severity, new_generator()))
            assert not torch.equal(corrupted, images)
    black_and_white = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]).double()
    assert torch.isfinite(CORRUPTIONS[name](black_and_white, 5, new_generator())).all()


@pytest.mark.parametrize("name", MONOTONIC_CORRUPTIONS)
def test_distance_from_the_original_increases_with_severity(name: str) -> None:
    distances = [
        (CORRUPTIONS[name](IMAGES_0_1, severity, new_generator()) - IMAGES_0_1).abs().mean().item()
        for severity in SEVERITIES
    ]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]


def test_apply_corruption_truncates_to_integers() -> None:
    all_levels = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    unchanged = apply_corruption(all_levels, lambda images, severity, generator: images, 1, new_generator())
    assert torch.equal(unchanged, all_levels)
    assert unchanged.is_contiguous(memory_format=torch.channels_last)
    assert apply_corruption(
        all_levels, lambda images, severity, generator: images + 0.99 / 255 * (images < 1), 1, new_generator()
    ).equal(all_levels), "values must be truncated, not rounded"


def to_pil_images() -> list[Image.Image]:
    return [Image.fromarray(image) for image in IMAGES.permute(0, 2, 3, 1).numpy()]


def from_pil_images(pil_images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in pil_images])).permute(0, 3, 1, 2).double()


@pytest.mark.parametrize(("severity", "size"), [(1, 30), (2, 28), (3, 27), (4, 24), (5, 20)])
def test_pixelate_matches_pillow(severity: int, size: int) -> None:
    box = Image.Resampling.BOX
    expected = from_pil_images([image.resize((size, size), box).resize((32, 32), box) for image in to_pil_images()])
    assert torch.equal((CORRUPTIONS["pixelate"](IMAGES_0_1, severity, new_generator()) * 255).round(), expected)


@pytest.mark.parametrize(("severity", "quality"), [(1, 80), (2, 65), (3, 58), (4, 50), (5, 40)])
def test_jpeg_matches_pillow(severity: int, quality: int) -> None:
    decoded = []
    for image in to_pil_images():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        decoded.append(Image.open(buffer))
    expected = from_pil_images(decoded)
    actual = CORRUPTIONS["jpeg_compression"](IMAGES_0_1, severity, new_generator()) * 255
    assert torch.equal(actual.round(), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturate_match_colorsys(severity: int) -> None:
    increase = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    scale, shift = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    pixels = [*IMAGES_0_1[0].flatten(1).T[:200].tolist(), (0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0)]
    image = torch.zeros(1, 3, 32 * 32, dtype=torch.float64)
    image[0, :, : len(pixels)] = torch.tensor(pixels).T
    image = image.view(1, 3, 32, 32)

    def clamp(value: float) -> float:
        return min(max(value, 0), 1)

    for name, change in (
        ("brightness", lambda h, s, v: (h, s, clamp(v + increase))),
        ("saturate", lambda h, s, v: (h, clamp(s * scale + shift), v)),
    ):
        expected = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels]
        actual = CORRUPTIONS[name](image, severity, new_generator()).flatten(2)[0].T[: len(pixels)]
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_standard_deviations_of_the_noises() -> None:
    gray = torch.full((400, 3, 32, 32), 0.5, dtype=torch.float64)  # the relative error of a std is about 0.0006
    for severity in SEVERITIES:
        std, photons = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1], (500, 250, 100, 75, 50)[severity - 1]
        speckle_std, fraction = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1], (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
        for name, expected_std in (
            ("gaussian_noise", std),
            ("shot_noise", math.sqrt(0.5 / photons)),
            ("speckle_noise", 0.5 * speckle_std),
        ):
            noisy = CORRUPTIONS[name](gray, severity, new_generator())
            assert noisy.std().item() == pytest.approx(expected_std, rel=0.003), name
            assert noisy.mean().item() == pytest.approx(0.5, abs=0.001), name
        impulses = CORRUPTIONS["impulse_noise"](gray, severity, new_generator())
        for value in (0, 1):
            assert (impulses == value).double().mean().item() == pytest.approx(fraction / 2, rel=0.03)


def test_gaussian_and_defocus_blur_match_references() -> None:
    for severity, (std, radius) in enumerate(((0.4, 2), (0.6, 2), (0.7, 3), (0.8, 3), (1.0, 4)), 1):
        inner = slice(radius, 32 - radius)  # torchvision reflects the image at its edges
        expected = torchvision_functional.gaussian_blur(IMAGES_0_1, [2 * radius + 1] * 2, [std, std])[
            :, :, inner, inner
        ]
        actual = CORRUPTIONS["gaussian_blur"](IMAGES_0_1, severity, new_generator())[:, :, inner, inner]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    point = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    point[:, :, 16, 16] = 1
    blurred = CORRUPTIONS["defocus_blur"](point, 5, new_generator())[0, 0, 12:21, 12:21]
    # A disk of radius 1.5 covers nine pixels; smoothing with a standard deviation of 0.1 changes nothing.
    disk = torch.zeros(9, 9, dtype=torch.float64)
    disk[3:6, 3:6] = 1 / 9
    torch.testing.assert_close(blurred, disk, rtol=0, atol=1e-9)
    blurred = CORRUPTIONS["defocus_blur"](point, 1, new_generator())[0, 0, 14:19, 14:19]
    weights = torch.tensor([0, math.exp(-1 / 0.32), 1, math.exp(-1 / 0.32), 0], dtype=torch.float64)
    torch.testing.assert_close(blurred, torch.outer(weights, weights) / weights.sum() ** 2, rtol=0, atol=1e-9)


def test_motion_blur_is_one_sided_with_a_random_angle_per_image() -> None:
    points = torch.zeros(40, 3, 32, 32, dtype=torch.float64)
    points[:, :, 16, 24] = 1
    trails = CORRUPTIONS["motion_blur"](points, 4, new_generator())[:, 0]
    torch.testing.assert_close(trails.sum((1, 2)), torch.ones(40, dtype=torch.float64))
    weights = [math.exp(-(step**2) / 8) for step in range(17)]
    assert trails[:, 16, 24].tolist() == pytest.approx([weights[0] / sum(weights)] * 40)
    rows, columns = trails.sum(2).gt(0).nonzero()[:, 1] - 16, trails.sum(1).gt(0).nonzero()[:, 1] - 24
    assert columns.max() == 0, "a point must be blurred to its left only"
    assert columns.min() <= -16
    assert rows.min() < -3
    assert rows.max() > 3
    assert len({tuple(trail.flatten().tolist()) for trail in trails}) > 10, "every image must have its own angle"


def test_blurs_fog_and_contrast_preserve_constants_and_means() -> None:
    flat = torch.full((4, 3, 32, 32), 0.3, dtype=torch.float64)
    for name in ("zoom_blur", "contrast", "gaussian_blur", "defocus_blur", "motion_blur"):
        torch.testing.assert_close(CORRUPTIONS[name](flat, 5, new_generator()), flat, rtol=0, atol=1e-9)
    foggy = CORRUPTIONS["fog"](flat, 5, new_generator())
    torch.testing.assert_close(foggy[:, 0], foggy[:, 2])  # the cloud is gray
    # The result is (0.3 + c) * 0.3 / (0.3 + 1.5) for clouds c from 0 to 1.5.
    torch.testing.assert_close(foggy.amin((1, 2, 3)), torch.full((4,), 0.05, dtype=torch.float64))
    torch.testing.assert_close(foggy.amax((1, 2, 3)), torch.full((4,), 0.3, dtype=torch.float64))
    assert not torch.equal(foggy[0], foggy[1])
    low_contrast = CORRUPTIONS["contrast"](IMAGES_0_1, 5, new_generator())
    torch.testing.assert_close(low_contrast.mean((2, 3)), IMAGES_0_1.mean((2, 3)))
    torch.testing.assert_close(low_contrast.std((2, 3)), 0.15 * IMAGES_0_1.std((2, 3)))


def plasma_by_definition(n: int, decay: float, generator: torch.Generator) -> np.ndarray:
    """Return the clouds of `plasma_fractal` in make_cifar_c.py: diamond-square, one pixel at a time."""
    heights, step, wibble = np.zeros((n, 32, 32)), 32, 100.0
    while step >= 2:
        half = step // 2
        for target, neighbors in (
            ((half, half), [(0, 0), (0, step), (step, 0), (step, step)]),
            ((0, half), [(0, 0), (0, step), (half, half), (-half, half)]),
            ((half, 0), [(0, 0), (step, 0), (half, half), (half, -half)]),
        ):
            uniform = torch.rand(n, 32 // step, 32 // step, generator=generator).double().numpy() * 2 * wibble - wibble
            for row, column in itertools.product(range(32 // step), repeat=2):
                y, x = row * step, column * step
                mean = sum(heights[:, (y + dy) % 32, (x + dx) % 32] for dy, dx in neighbors) / 4
                heights[:, y + target[0], x + target[1]] = mean + wibble * uniform[:, row, column]
        step, wibble = half, wibble / decay
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True)


@pytest.mark.parametrize("decay", [3, 1.75])
def test_clouds_of_fog_equal_their_definition(decay: float) -> None:
    clouds = corruptions._plasma_fractal(3, decay, new_generator())
    np.testing.assert_allclose(clouds.numpy(), plasma_by_definition(3, decay, new_generator()), rtol=0, atol=1e-5)


def test_severities_of_fog(monkeypatch: pytest.MonkeyPatch) -> None:
    # `c` of `fog` in make_cifar_c.py of CIFAR-10-C: amount and decay of the cloud
    for severity, (amount, decay) in enumerate(((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), 1):
        decays: list[float] = []

        def clouds(n: int, decay: float, generator: torch.Generator, decays: list[float] = decays) -> Tensor:
            decays.append(decay)
            return torch.full((n, 32, 32), 0.5)

        monkeypatch.setattr(corruptions, "_plasma_fractal", clouds)
        foggy = CORRUPTIONS["fog"](IMAGES_0_1, severity, new_generator())
        maximum = IMAGES_0_1.amax((1, 2, 3), keepdim=True)
        torch.testing.assert_close(foggy, (IMAGES_0_1 + 0.5 * amount) * maximum / (maximum + amount))
        assert decays == [decay]


@pytest.mark.parametrize(("severity", "quality"), [(1, 80), (2, 65), (3, 58), (4, 50), (5, 40)])
def test_quality_of_jpeg(monkeypatch: pytest.MonkeyPatch, severity: int, quality: int) -> None:
    qualities: list[int] = []
    save = Image.Image.save

    def record(image: Image.Image, *arguments: Any, **options: Any) -> None:
        qualities.append(options["quality"])
        save(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", record)
    CORRUPTIONS["jpeg_compression"](IMAGES_0_1[:1], severity, new_generator())
    assert qualities == [quality]


def test_severities_of_motion_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    # `c` of `motion_blur` in make_cifar_c.py: radius and standard deviation of the kernel
    for severity, (radius, std) in enumerate(((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), 1):
        monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full((1, 1), 0.5))  # an angle of 0 degrees
        point = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        point[:, :, 16, 24] = 1
        row = CORRUPTIONS["motion_blur"](point, severity, new_generator())[0, 0, 16]
        weights = [math.exp(-(step**2) / (2 * std**2)) for step in range(2 * radius + 1)]
        expected = [weight / sum(weights) for weight in weights]
        assert row[:25].flip(0)[: len(expected)].tolist() == pytest.approx(expected, rel=1e-12)
        assert int((row > 0).sum()) == len(expected)


@pytest.mark.parametrize(("uniform", "direction"), [(0, 1), (1, -1)])
def test_angles_of_motion_blur_are_up_to_45_degrees(
    monkeypatch: pytest.MonkeyPatch, uniform: float, direction: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full((1, 1), uniform, dtype=torch.float64))
    point = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    point[:, :, 16, 24] = 1
    rows, columns = CORRUPTIONS["motion_blur"](point, 5, new_generator())[0, 0].nonzero().T.tolist()
    assert sorted(24 - column for column in columns) == list(range(14))  # 18 steps of cos(45 degrees) = 0.71 pixels
    assert [row - 16 for row in rows] == [direction * (24 - column) for column in columns]


def test_severities_of_zoom_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    # `c` of `zoom_blur` in make_cifar_c.py: np.arange from 1 to these factors, in steps of 0.01
    sizes: list[int] = []
    interpolate = torch.nn.functional.interpolate

    def record(images: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        sizes.append(size[0])
        return interpolate(images, size=size, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", record)
    for severity, end in enumerate((1.06, 1.11, 1.16, 1.21, 1.26), 1):
        sizes.clear()
        CORRUPTIONS["zoom_blur"](IMAGES_0_1[:1], severity, new_generator())
        assert sizes == [round(math.ceil(32 / factor) * factor) for factor in np.arange(1, end, 0.01)]


def test_severities_of_defocus_blur() -> None:
    # `c` of `defocus_blur` in make_cifar_c.py: radius of the disk and standard deviation of its smoothing
    point = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    point[:, :, 16, 16] = 1
    for severity, (radius, std) in enumerate(((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)), 1):
        expected = np.zeros((9, 9))
        disk = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if y * y + x * x <= radius * radius]
        smoothing = {step: math.exp(-(step**2) / (2 * std**2)) for step in (-1, 0, 1)}
        total = sum(smoothing.values())
        for y, x in disk:
            for dy, dx in itertools.product(smoothing, repeat=2):
                expected[4 + y + dy, 4 + x + dx] += smoothing[dy] * smoothing[dx] / total**2 / len(disk)
        blurred = CORRUPTIONS["defocus_blur"](point, severity, new_generator())[0, 0, 12:21, 12:21]
        # the kernel has five pixels on a side: what falls outside of it is lost
        np.testing.assert_allclose(blurred[2:7, 2:7].numpy(), expected[2:7, 2:7], rtol=0, atol=1e-12)
