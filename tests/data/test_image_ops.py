"""Every image operation against torchvision's own on uint8 tensors, over the whole range of its magnitudes."""

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

from fastcifar.data import compiled_augment
from fastcifar.data.image_ops import OPERATION_CODES, OperationStep, apply_operation, apply_operations, encode_operation
from fastcifar.errors import UsageError


def spread(low: float, high: float, count: int) -> list[float]:
    return np.linspace(low, high, count).astype(np.float32).tolist()


FACTORS = [*spread(-1, 1, 21), 1 / 3, -0.0333, 0.0171]
MAGNITUDES: dict[str, list[float]] = {
    "Identity": [0.0],
    "ShearX": [*spread(-0.99, 0.99, 23), 0.3, -0.3],
    "ShearY": [*spread(-0.99, 0.99, 23), 0.3, -0.3],
    "TranslateX": [*range(-32, 33, 4), 1, -1, 14.5, -14.5],
    "TranslateY": [*range(-32, 33, 4), 1, -1, 14.5, -14.5],
    "Rotate": [*spread(-180, 180, 37), 5.0, -0.25, 13.3],
    "Brightness": FACTORS,
    "Contrast": FACTORS,
    "Color": FACTORS,
    "Sharpness": FACTORS,
    "Hue": spread(-0.5, 0.5, 21),
    "Posterize": [*range(9)],
    "Solarize": [*spread(1, 0, 31), *spread(1, 0, 10)],
    "Invert": [0.0],
    "AutoContrast": [0.0],
    "Equalize": [0.0],
}


def pictures() -> Tensor:
    """uint8 [14,3,32,32]: noise, smooth images, one colour, black, white, and two values in several shares."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=random)
    coarse = 255 * torch.rand(4, 3, 5, 5, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)
    colours = torch.tensor([[77, 77, 77], [0, 0, 0], [255, 255, 255]], dtype=torch.uint8)
    shares = torch.tensor([0.003, 0.2, 0.8])[:, None, None, None]
    two = torch.where(torch.rand(3, 3, 32, 32, generator=random) < shares, 200, 3).to(torch.uint8)
    return torch.cat([noise, smooth, colours[:, :, None, None].expand(3, 3, 32, 32), two])


PICTURES = pictures()


def oracle(image: Tensor, name: str, magnitude: float) -> Tensor:
    """torchvision's operation on one image, uint8 [3,32,32]."""
    if name == "Hue":
        return F.adjust_hue(image, magnitude)
    changed = v2.AutoAugment()._apply_image_or_video_transform(image, name, magnitude, InterpolationMode.NEAREST, {})
    assert isinstance(changed, Tensor)
    return changed


def from_middle(name: str, magnitude: float) -> Tensor:
    """How far each pixel's source is from the middle between two pixels, in pixels: [32,32]."""
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
    half = 0.0 if name == "Rotate" else 0.5  # the centre lies between pixels
    return torch.stack([(s - half - (s - half).round()).abs() for s in sources[name]]).amin(0)


def test_every_operation_is_tested_here() -> None:
    assert MAGNITUDES.keys() == OPERATION_CODES.keys()


@pytest.mark.parametrize("name", MAGNITUDES)
def test_equals_torchvision(name: str) -> None:
    for magnitude in MAGNITUDES[name]:
        wanted = torch.stack([oracle(image, name, magnitude) for image in PICTURES])
        given = apply_operation(PICTURES, name, magnitude)
        wrong = given != wanted
        if name in ("ShearX", "ShearY", "Rotate"):
            # float32 coordinates and ours may fall to different sides of the middle between two pixels
            assert not (wrong & (from_middle(name, magnitude) > 1e-4)).any(), magnitude
        elif name == "Hue":
            # float32 divisions and ours may fall to different sides of a whole number
            assert int((given.int() - wanted.int()).abs().max()) <= 1, magnitude
            assert int(wrong.sum()) <= 1e-4 * wrong.numel(), magnitude
        else:
            assert not wrong.any(), (magnitude, int(wrong.sum()))


def encoded(chosen: list[tuple[str, float]]) -> OperationStep:
    """One operation and magnitude for each image -> the three int32 tensors [b] of a step."""
    code, amount, cosine = torch.tensor([encode_operation(*what) for what in chosen], dtype=torch.int32).T.contiguous()
    return code, amount, cosine


NEUTRAL = {"Posterize": 8, "Solarize": 1.0}
ALWAYS = {"Invert", "AutoContrast", "Equalize"}


@pytest.mark.parametrize("name", sorted(OPERATION_CODES.keys() - ALWAYS))
def test_neutral_magnitudes_change_nothing(name: str) -> None:
    images = PICTURES.clamp(max=254)  # a solarized image's highest threshold is 255, and that is inverted
    assert torch.equal(apply_operation(images, name, NEUTRAL.get(name, 0.0)), images)


def test_each_image_has_its_own_operations() -> None:
    """A mixed batch in three steps is what each image gets by itself, whatever else the steps could hold."""
    random = np.random.default_rng(0)
    names = sorted(OPERATION_CODES)
    images = PICTURES.repeat(6, 1, 1, 1)
    chosen = [[(name, float(random.choice(MAGNITUDES[name]))) for name in random.choice(names, len(images))]
              for _ in range(3)]  # fmt: skip
    wanted = images.clone()
    for step in chosen:
        wanted = torch.cat([apply_operation(image[None], *what) for image, what in zip(wanted, step, strict=True)])
    rows = images.permute(0, 2, 3, 1).reshape(-1, 32, 96).int()
    codes = [encoded(step) for step in chosen]
    given = apply_operations(rows, codes, [names] * 3).to(torch.uint8)
    assert torch.equal(given.unflatten(2, (32, 3)).permute(0, 3, 1, 2), wanted)
    assert torch.equal(rows, images.permute(0, 2, 3, 1).reshape(-1, 32, 96).int()), "the input was changed"


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(UsageError, match=r"unknown operation 'Sharpnes'; did you mean 'Sharpness'\?"):
        encode_operation("Sharpnes", 0.0)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_compiled_equals_eager_and_stops_between_the_steps() -> None:
    from torch._inductor import metrics

    metrics.reset()
    random = np.random.default_rng(1)
    names = [sorted(OPERATION_CODES), ["Color", "Contrast", "Hue"]]
    images = PICTURES.repeat(12, 1, 1, 1)
    rows = images.permute(0, 2, 3, 1).reshape(-1, 32, 96)
    chosen = [[(name, float(random.choice(MAGNITUDES[name]))) for name in random.choice(may, len(rows))]
              for may in names]  # fmt: skip
    steps = [encoded(step) for step in chosen]

    def changed(rows: Tensor, steps: list[OperationStep]) -> Tensor:
        return apply_operations(rows.int(), steps, names).to(torch.uint8)

    compiled = torch.compile(changed, fullgraph=True, dynamic=False, options=compiled_augment.SINGLE_KERNEL_OPTIONS)
    assert torch.equal(compiled(rows, steps), changed(rows, steps))
    # Without a stop at what is settled all would be one kernel, which computes everything anew for every reader.
    assert metrics.generated_kernel_count > 5
