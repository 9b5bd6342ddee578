"""Tests of the image operations against torchvision's on uint8 tensors, over the full range of magnitudes."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastcifar.data import batch_loader
from fastcifar.data.image_ops import OPERATION_CODES, OperationStep, apply_operation, apply_operations, encode_operation


def linspace(low: float, high: float, count: int) -> list[float]:
    return np.linspace(low, high, count).astype(np.float32).tolist()


FACTORS = [*linspace(-1, 1, 21), 1 / 3, -0.0333, 0.0171]
MAGNITUDES: dict[str, list[float]] = {
    "Identity": [0.0],
    "ShearX": [*linspace(-0.99, 0.99, 23), 0.3, -0.3],
    "ShearY": [*linspace(-0.99, 0.99, 23), 0.3, -0.3],
    "TranslateX": [*range(-32, 33, 4), 1, -1, 14.5, -14.5],
    "TranslateY": [*range(-32, 33, 4), 1, -1, 14.5, -14.5],
    "Rotate": [*linspace(-180, 180, 37), 5.0, -0.25, 13.3],
    "Brightness": FACTORS,
    "Contrast": FACTORS,
    "Color": FACTORS,
    "Sharpness": FACTORS,
    "Hue": linspace(-0.5, 0.5, 21),
    "Posterize": [*range(9)],
    "Solarize": [*linspace(1, 0, 31), *linspace(1, 0, 10)],
    "Invert": [0.0],
    "AutoContrast": [0.0],
    "Equalize": [0.0],
}


def make_test_images() -> Tensor:
    """Return uint8 [14,3,32,32]: noise, smooth images, gray, black, white, and two values in several proportions."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    coarse = 255 * torch.rand(4, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)
    colors = torch.tensor([[77, 77, 77], [0, 0, 0], [255, 255, 255]], dtype=torch.uint8)
    proportions = torch.tensor([0.003, 0.2, 0.8])[:, None, None, None]
    two_values = torch.where(torch.rand(3, 3, 32, 32, generator=generator) < proportions, 200, 3).to(torch.uint8)
    return torch.cat([noise, smooth, colors[:, :, None, None].expand(3, 3, 32, 32), two_values])


TEST_IMAGES = make_test_images()


def apply_torchvision(image: Tensor, name: str, magnitude: float) -> Tensor:
    """Apply torchvision's operation to one image, uint8 [3,32,32]."""
    if name == "Hue":
        return F.adjust_hue(image, magnitude)
    result = v2.AutoAugment()._apply_image_or_video_transform(image, name, magnitude, InterpolationMode.NEAREST, {})
    assert isinstance(result, Tensor)
    return result


def distance_from_midpoint(name: str, magnitude: float) -> Tensor:
    """Return the distance of each pixel's source from the midpoint between two pixels, in pixels: [32,32]."""
    y, x = torch.meshgrid(torch.arange(32.0).double(), torch.arange(32.0).double(), indexing="ij")
    angle = math.radians(magnitude)
    sources = {
        "ShearX": [x + magnitude * (y + 0.5)],
        "ShearY": [y + magnitude * (x + 0.5)],
        "Rotate": [
            math.cos(angle) * (x - 15.5) - math.sin(angle) * (y - 15.5),
            math.sin(angle) * (x - 15.5) + math.cos(angle) * (y - 15.5),
        ],
    }
    half = 0.0 if name == "Rotate" else 0.5  # the image center is between pixels
    return torch.stack([(s - half - (s - half).round()).abs() for s in sources[name]]).amin(0)


def test_every_operation_is_tested() -> None:
    assert MAGNITUDES.keys() == OPERATION_CODES.keys()


@pytest.mark.parametrize("name", MAGNITUDES)
def test_equals_torchvision(name: str) -> None:
    for magnitude in MAGNITUDES[name]:
        expected = torch.stack([apply_torchvision(image, name, magnitude) for image in TEST_IMAGES])
        actual = apply_operation(TEST_IMAGES, name, magnitude)
        is_different = actual != expected
        if name in ("ShearX", "ShearY", "Rotate"):
            # float32 and fixed-point coordinates may be on different sides of the midpoint between two pixels
            assert not (is_different & (distance_from_midpoint(name, magnitude) > 1e-4)).any(), magnitude
        elif name == "Hue":
            # float32 and fixed-point results may be on different sides of an integer
            assert int((actual.int() - expected.int()).abs().max()) <= 1, magnitude
            assert int(is_different.sum()) <= 1e-4 * is_different.numel(), magnitude
        else:
            assert not is_different.any(), (magnitude, int(is_different.sum()))


def encode_step(operations: list[tuple[str, float]]) -> OperationStep:
    """Encode one operation and magnitude per image as the three int32 tensors [b] of a step."""
    encoded = [encode_operation(*operation) for operation in operations]
    code, amount, cosine = torch.tensor(encoded, dtype=torch.int32).T.contiguous()
    return code, amount, cosine


NEUTRAL_MAGNITUDES = {"Posterize": 8, "Solarize": 1.0}
WITHOUT_NEUTRAL_MAGNITUDE = {"Invert", "AutoContrast", "Equalize"}


@pytest.mark.parametrize("name", sorted(OPERATION_CODES.keys() - WITHOUT_NEUTRAL_MAGNITUDE))
def test_neutral_magnitudes_change_nothing(name: str) -> None:
    images = TEST_IMAGES.clamp(max=254)  # the highest threshold of Solarize is 255, which inverts pixels of 255
    assert torch.equal(apply_operation(images, name, NEUTRAL_MAGNITUDES.get(name, 0.0)), images)


def test_each_image_has_its_own_operations() -> None:
    """Three steps on a batch with different operations equal the operations on each image separately."""
    rng = np.random.default_rng(0)
    names = sorted(OPERATION_CODES)
    images = TEST_IMAGES.repeat(6, 1, 1, 1)
    steps = [[(name, float(rng.choice(MAGNITUDES[name]))) for name in rng.choice(names, len(images))]
             for _ in range(3)]  # fmt: skip
    expected = images.clone()
    for step in steps:
        expected = torch.cat([apply_operation(image[None], *op) for image, op in zip(expected, step, strict=True)])
    rows = images.permute(0, 2, 3, 1).reshape(-1, 32, 96).int()
    actual = apply_operations(rows, [encode_step(step) for step in steps], [names] * 3).to(torch.uint8)
    assert torch.equal(actual.unflatten(2, (32, 3)).permute(0, 3, 1, 2), expected)
    assert torch.equal(rows, images.permute(0, 2, 3, 1).reshape(-1, 32, 96).int()), "the input was changed"


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_compiled_equals_eager_and_steps_are_separate_kernels() -> None:
    from torch._inductor import metrics

    metrics.reset()
    rng = np.random.default_rng(1)
    names = [sorted(OPERATION_CODES), ["Color", "Contrast", "Hue"]]
    images = TEST_IMAGES.repeat(12, 1, 1, 1)
    rows = images.permute(0, 2, 3, 1).reshape(-1, 32, 96)
    steps = [
        encode_step([(name, float(rng.choice(MAGNITUDES[name]))) for name in rng.choice(step_names, len(rows))])
        for step_names in names
    ]

    def apply_steps(rows: Tensor, steps: list[OperationStep]) -> Tensor:
        return apply_operations(rows.int(), steps, names).to(torch.uint8)

    compiled = torch.compile(apply_steps, fullgraph=True, dynamic=False, options=batch_loader.SINGLE_KERNEL_OPTIONS)
    assert torch.equal(compiled(rows, steps), apply_steps(rows, steps))
    # Without `_materialize` there is a single kernel, which computes every value again for each use.
    assert metrics.generated_kernel_count > 5
