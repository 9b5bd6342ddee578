"""Mixers: `MIXERS`, augmentations that make an image of several of its batch, and its label with it.

A position's partners are its neighbours, the batch rolled: the order is a random permutation already. So they work in
the training step, on whole batches, and what they draw is one array over the epoch's positions like all randomness.
It must not draw while applying, loop over images in Python or wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.image_ops import CIFAR_IMAGE_AREA, CIFAR_IMAGE_SIZE

MixerDrawFn = Callable[[float, int, np.random.Generator], np.ndarray]
MixerApplyFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MixerSpec:
    """One row of `MIXERS`.

    draw    (number, n, generator) -> what is drawn for each position, [n] or [n,k], uint8 or float32
    apply   (images uint8 [b,3,32,32], drawn) -> mixed images, uint8 or float32 of 0..255, and the weights float32 [b,m]
            of their labels: column k is that of the batch rolled by k, and a row's sum is 1
    number  the default, an alpha: each share is Beta(alpha, alpha)
    words, policy, files  as in a row of `AUGMENTS`: the bounds of the number, and nothing else to spell
    help    one line
    """

    draw: MixerDrawFn
    apply: MixerApplyFn
    default_value: float
    variants: Mapping[str, tuple[float, float]]
    help: str
    build_policy: None = None
    accepts_file: bool = False


def draw_mixup(alpha: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """The image's own share, float32 [n]."""
    return rng.beta(alpha, alpha, n).astype(np.float32)


def apply_mixup(images: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """A blend of an image and its neighbour (Zhang et al., 2017); pixels become float32.

    Mixed before they are normalised: normalising is affine and the shares sum to 1, so the order makes no difference.
    """
    own = share[:, None, None, None]
    return images.roll(1, 0) * (1 - own) + images * own, torch.stack((share, 1 - share), 1)


def draw_cutmix(alpha: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """The box that shows the neighbour: uint8 [n,4], its top, left, bottom and right, the last two excluded.

    Its centre is uniform over the pixels, its area the neighbour's share as far as the border does not cut it off.
    """
    half = (0.5 * CIFAR_IMAGE_SIZE * np.sqrt(1 - rng.beta(alpha, alpha, n))).astype(np.int64)
    y, x = rng.integers(0, CIFAR_IMAGE_SIZE, size=(2, n))
    return np.stack((y - half, x - half, y + half, x + half), 1).clip(0, CIFAR_IMAGE_SIZE).astype(np.uint8)


def apply_cutmix(images: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """A box of the neighbour in the image (Yun et al., 2019); labels are weighed by the pixels that can be seen."""
    top, left, bottom, right = box.int().unbind(1)
    at = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=images.device)
    rows = (at >= top[:, None]) & (at < bottom[:, None])
    columns = (at >= left[:, None]) & (at < right[:, None])
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    share = (bottom - top) * (right - left) / CIFAR_IMAGE_AREA
    # Exact in float32 too; a choice between bytes costs a CPU several times as much (LOG.md).
    mixed = torch.where(inside, images.roll(1, 0).float(), images.float())
    return mixed, torch.stack((1 - share, share), 1)


def draw_ricap(alpha: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n,10]: height and width of the upper left patch, then y and x of the corner that each patch is cut at.

    The patches, in this order: upper left, upper right, lower left, lower right.
    """
    cut = np.rint(CIFAR_IMAGE_SIZE * rng.beta(alpha, alpha, (n, 2))).astype(np.uint8)
    height, width = cut.T
    sizes = np.stack(
        (
            height,
            height,
            CIFAR_IMAGE_SIZE - height,
            CIFAR_IMAGE_SIZE - height,
            width,
            CIFAR_IMAGE_SIZE - width,
            width,
            CIFAR_IMAGE_SIZE - width,
        ),
        1,
    )
    return np.concatenate((cut, rng.integers(0, CIFAR_IMAGE_SIZE - sizes, dtype=np.uint8, endpoint=True)), 1)


def apply_ricap(images: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of the image and of three neighbours, put together (Takahashi et al., 2018); labels weighed by area."""
    drawn = drawn.int()
    height, width = drawn[:, 0, None, None], drawn[:, 1, None, None]
    at = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=images.device)
    sample = torch.arange(len(images), dtype=torch.int32, device=images.device)[:, None, None]
    lower, right = at[:, None] >= height, at >= width
    patch = 2 * lower.int() + right.int()
    # `drawn` is read at a chosen column: four patches in turn would read every image four times.
    y = at[:, None] - torch.where(lower, height, 0) + drawn[sample, 2 + patch]
    x = at - torch.where(right, width, 0) + drawn[sample, 6 + patch]
    mixed = images.permute(0, 2, 3, 1)[(sample - patch) % len(images), y, x]
    tall, wide = drawn[:, 0], drawn[:, 1]
    areas = (
        tall * wide,
        tall * (CIFAR_IMAGE_SIZE - wide),
        (CIFAR_IMAGE_SIZE - tall) * wide,
        (CIFAR_IMAGE_SIZE - tall) * (CIFAR_IMAGE_SIZE - wide),
    )
    return mixed.permute(0, 3, 1, 2), torch.stack(areas, 1) / CIFAR_IMAGE_AREA


MIXERS: dict[str, MixerSpec] = {
    "mixup": MixerSpec(
        draw_mixup, apply_mixup, 0.2, {"": (0.01, 100.0)}, "blend with a neighbour by Beta(VALUE, VALUE)"
    ),
    "cutmix": MixerSpec(
        draw_cutmix, apply_cutmix, 1.0, {"": (0.01, 100.0)}, "a box of a neighbour, of an area by Beta(VALUE, VALUE)"
    ),
    "ricap": MixerSpec(
        draw_ricap, apply_ricap, 0.3, {"": (0.01, 100.0)}, "patches of four images, cut at Beta(VALUE, VALUE)"
    ),
}


def mix_labels(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Labels int64 [b] and the weights [b,m] of a mixer -> the share of each class: float32 [b,classes]."""
    classes = torch.arange(num_classes, device=labels.device)
    rolled = torch.stack([labels.roll(k) for k in range(weights.shape[1])], 1)
    return (weights[:, :, None] * (rolled[:, :, None] == classes)).sum(1)
