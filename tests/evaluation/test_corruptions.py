"""CORRUPTIONS against Pillow, colorsys, torchvision and plain loops; and all of them for range, seed and severity."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as images_as_torchvision

from fastcifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, apply_jpeg
from fastcifar.evaluation.robustness import apply_corruption

# saturate takes colour away at 1 and 2 and adds it from 3 on; pixelate's grids fall on other edges at each severity
LADDERS = [name for name in CORRUPTIONS if name not in ("saturate", "pixelate")]


def photographs(count: int = 24) -> Tensor:
    """uint8 [n,3,32,32] with edges, gradients, texture and colour, as photographs have."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=False)
    for index, image in enumerate(smooth):  # an object with edges, somewhere
        image[:, index % 17 : index % 17 + 9, index % 13 : index % 13 + 14] = image.flip(0)[:, :9, :14]
    rough = smooth + 0.03 * torch.randn(count, 3, 32, 32, generator=generator)
    return (rough.clamp(0, 1) * 255).round().to(torch.uint8)


IMAGES = photographs()
UNIT = IMAGES.double() / 255


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_range_type_and_seed(name: str) -> None:
    for severity in SEVERITIES:
        for images in (UNIT[:3], UNIT[:3].float()):
            found = CORRUPTIONS[name](images, severity, seeded())
            assert (found.shape, found.dtype) == (images.shape, images.dtype)
            assert 0 <= found.min() <= found.max() <= 1
            assert torch.equal(found, CORRUPTIONS[name](images, severity, seeded()))
            assert not torch.equal(found, images)
    edges = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]).double()
    assert torch.isfinite(CORRUPTIONS[name](edges, 5, seeded())).all()


@pytest.mark.parametrize("name", LADDERS)
def test_the_distance_grows_with_the_severity(name: str) -> None:
    distances = [(CORRUPTIONS[name](UNIT, severity, seeded()) - UNIT).abs().mean().item() for severity in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]


def test_levels_are_whole_and_an_image_left_alone_is_the_same() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32)
    same = apply_corruption(every, lambda images, severity, generator: images, 1, seeded())
    assert torch.equal(same, every)
    assert same.is_contiguous(memory_format=torch.channels_last)
    assert apply_corruption(
        every, lambda images, severity, generator: images + 0.99 / 255 * (images < 1), 1, seeded()
    ).equal(every), "cut, not rounded"


def as_pictures() -> list[Image.Image]:
    return [Image.fromarray(image) for image in IMAGES.permute(0, 2, 3, 1).numpy()]


def as_levels(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).double()


@pytest.mark.parametrize(("severity", "side"), [(1, 30), (2, 28), (3, 27), (4, 24), (5, 20)])
def test_pixelate_is_pillows(severity: int, side: int) -> None:
    box = Image.Resampling.BOX
    wanted = as_levels([picture.resize((side, side), box).resize((32, 32), box) for picture in as_pictures()])
    assert torch.equal((CORRUPTIONS["pixelate"](UNIT, severity, seeded()) * 255).round(), wanted)


@pytest.mark.parametrize("quality", [95, 80, 65, 58, 50, 40, 10])
def test_jpeg_is_pillows_to_within_its_integers(quality: int) -> None:
    pictures = []
    for picture in as_pictures():
        coded = io.BytesIO()
        picture.save(coded, "JPEG", quality=quality)
        pictures.append(Image.open(coded))
    wanted, found = as_levels(pictures), apply_jpeg(UNIT, quality) * 255
    difference = (found - wanted).abs().mean()
    assert difference < 0.5  # of a level; half of them are far above 4 from the original
    assert (found == wanted).double().mean() > 0.7


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturation_are_colorsyss(severity: int) -> None:
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    scale, shift = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    pixels = [*UNIT[0].flatten(1).T[:200].tolist(), (0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0)]
    image = torch.zeros(1, 3, 32 * 32, dtype=torch.float64)
    image[0, :, : len(pixels)] = torch.tensor(pixels).T
    image = image.view(1, 3, 32, 32)

    def limited(value: float) -> float:
        return min(max(value, 0), 1)

    for name, change in (
        ("brightness", lambda h, s, v: (h, s, limited(v + more))),
        ("saturate", lambda h, s, v: (h, limited(s * scale + shift), v)),
    ):
        wanted = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels]
        found = CORRUPTIONS[name](image, severity, seeded()).flatten(2)[0].T[: len(pixels)]
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)


def test_the_noises_have_their_deviations() -> None:
    gray = torch.full((50, 3, 32, 32), 0.5, dtype=torch.float64)
    for severity in SEVERITIES:
        std, photons = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1], (500, 250, 100, 75, 50)[severity - 1]
        speckle, share = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1], (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
        for name, wanted in (
            ("gaussian_noise", std),
            ("shot_noise", math.sqrt(0.5 / photons)),
            ("speckle_noise", 0.5 * speckle),
        ):
            found = CORRUPTIONS[name](gray, severity, seeded())
            assert found.std().item() == pytest.approx(wanted, rel=0.02), name
            assert found.mean().item() == pytest.approx(0.5, abs=0.002), name
        impulses = CORRUPTIONS["impulse_noise"](gray, severity, seeded())
        for value in (0, 1):
            assert (impulses == value).double().mean().item() == pytest.approx(share / 2, rel=0.08)


def test_the_blurs_are_those_of_plain_computations() -> None:
    for severity, (std, radius) in enumerate(((0.4, 2), (0.6, 2), (0.7, 3), (0.8, 3), (1.0, 4)), 1):
        inner = slice(radius, 32 - radius)  # torchvision mirrors at the edge
        wanted = images_as_torchvision.gaussian_blur(UNIT, [2 * radius + 1] * 2, [std, std])[:, :, inner, inner]
        found = CORRUPTIONS["gaussian_blur"](UNIT, severity, seeded())[:, :, inner, inner]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    point = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    point[:, :, 16, 16] = 1
    spread = CORRUPTIONS["defocus_blur"](point, 5, seeded())[0, 0, 12:21, 12:21]
    # radius 1.5 holds nine whole pixels; a deviation of 0.1 moves nothing
    plain = torch.zeros(9, 9, dtype=torch.float64)
    plain[3:6, 3:6] = 1 / 9
    torch.testing.assert_close(spread, plain, rtol=0, atol=1e-9)
    soft = CORRUPTIONS["defocus_blur"](point, 1, seeded())[0, 0, 14:19, 14:19]
    line = torch.tensor([0, math.exp(-1 / 0.32), 1, math.exp(-1 / 0.32), 0], dtype=torch.float64)
    torch.testing.assert_close(soft, torch.outer(line, line) / line.sum() ** 2, rtol=0, atol=1e-9)


def test_motion_blur_is_a_trail_to_one_side() -> None:
    points = torch.zeros(40, 3, 32, 32, dtype=torch.float64)
    points[:, :, 16, 24] = 1
    trails = CORRUPTIONS["motion_blur"](points, 4, seeded())[:, 0]
    torch.testing.assert_close(trails.sum((1, 2)), torch.ones(40, dtype=torch.float64))
    weights = [math.exp(-(step**2) / 8) for step in range(17)]
    assert trails[:, 16, 24].tolist() == pytest.approx([weights[0] / sum(weights)] * 40)
    rows, columns = trails.sum(2).gt(0).nonzero()[:, 1] - 16, trails.sum(1).gt(0).nonzero()[:, 1] - 24
    assert columns.max() == 0, "the trail is on the left of a point, as it comes from the right"
    assert columns.min() <= -16
    assert rows.min() < -3
    assert rows.max() > 3
    assert len({tuple(trail.flatten().tolist()) for trail in trails}) > 10, "every image has an angle of its own"


def test_fog_and_zoom_and_contrast_keep_what_they_should() -> None:
    flat = torch.full((4, 3, 32, 32), 0.3, dtype=torch.float64)
    for name in ("zoom_blur", "contrast", "gaussian_blur", "defocus_blur", "motion_blur"):
        torch.testing.assert_close(CORRUPTIONS[name](flat, 5, seeded()), flat, rtol=0, atol=1e-9)
    foggy = CORRUPTIONS["fog"](flat, 5, seeded())
    torch.testing.assert_close(foggy[:, 0], foggy[:, 2])  # a cloud is gray
    # from no cloud to all of it: (0.3 + c) 0.3 / (0.3 + 1.5) for c from 0 to 1.5
    torch.testing.assert_close(foggy.amin((1, 2, 3)), torch.full((4,), 0.05, dtype=torch.float64))
    torch.testing.assert_close(foggy.amax((1, 2, 3)), torch.full((4,), 0.3, dtype=torch.float64))
    assert not torch.equal(foggy[0], foggy[1])
    paler = CORRUPTIONS["contrast"](UNIT, 5, seeded())
    torch.testing.assert_close(paler.mean((2, 3)), UNIT.mean((2, 3)))
    torch.testing.assert_close(paler.std((2, 3)), 0.15 * UNIT.std((2, 3)))
