"""Mixers: each mixes images and labels with those of neighbors (image i - k of the batch is neighbor k of image i)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.image_ops import CIFAR_IMAGE_AREA, CIFAR_IMAGE_SIZE

# (images uint8 [b,3,32,32], parameters) -> mixed images, uint8 or float32 with values 0..255, and the weights float32
# [b,m] of their labels: column k belongs to the batch rolled by k, and rows sum to 1
MixerApplyFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MixerSpec:
    """One entry of `MIXERS`, with the fields of `AugmentSpec`; the value is the alpha of Beta(alpha, alpha)."""

    draw: Callable[[float, int, np.random.Generator], np.ndarray]  # (alpha, n, generator) -> parameters [n] or [n,k]
    apply: MixerApplyFn
    default_value: float
    help: str
    variants: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"": (0.01, 100.0)})
    build_policy: None = None
    accepts_file: bool = False


def apply_mixup(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return image * weight + neighbor * (1 - weight), float32 (Zhang et al., 2017); `weight` is float32 [b]."""
    pixel_weight = weight[:, None, None, None]
    mixed = images.roll(1, 0) * (1 - pixel_weight) + images * pixel_weight
    return mixed, torch.stack((weight, 1 - weight), 1)


def draw_cutmix(alpha: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes (top, left, bottom, right), uint8 [n,4], of relative area 1 - Beta(alpha, alpha) before clipping."""
    half = (0.5 * CIFAR_IMAGE_SIZE * np.sqrt(1 - rng.beta(alpha, alpha, n))).astype(np.int64)
    y, x = rng.integers(0, CIFAR_IMAGE_SIZE, size=(2, n))
    return np.stack((y - half, x - half, y + half, x + half), 1).clip(0, CIFAR_IMAGE_SIZE).astype(np.uint8)


def apply_cutmix(images: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of the neighbor into the image (Yun et al., 2019); labels are weighted by visible area."""
    top, left, bottom, right = box.int().unbind(1)
    index = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=images.device)
    rows = (index >= top[:, None]) & (index < bottom[:, None])
    columns = (index >= left[:, None]) & (index < right[:, None])
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    area = (bottom - top) * (right - left) / CIFAR_IMAGE_AREA
    # float32 is exact here, and on a CPU it is several times faster than torch.where on bytes (LOG.md).
    mixed = torch.where(inside, images.roll(1, 0).float(), images.float())
    return mixed, torch.stack((1 - area, area), 1)


def draw_ricap(alpha: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw uint8 [n,10]: height and width of the top left patch, then four y and four x of the source corners."""
    first_size = np.rint(CIFAR_IMAGE_SIZE * rng.beta(alpha, alpha, (n, 2))).astype(np.uint8)
    top, left = first_size.T
    bottom, right = CIFAR_IMAGE_SIZE - top, CIFAR_IMAGE_SIZE - left
    sizes = np.stack((top, top, bottom, bottom, left, right, left, right), 1)
    corners = rng.integers(0, CIFAR_IMAGE_SIZE - sizes, dtype=np.uint8, endpoint=True)
    return np.concatenate((first_size, corners), 1)


def apply_ricap(images: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Join patches of the image and of three neighbors (Takahashi et al., 2018); labels are weighted by area."""
    params = params.int()
    top, left = params[:, 0, None, None], params[:, 1, None, None]
    index = torch.arange(CIFAR_IMAGE_SIZE, dtype=torch.int32, device=images.device)
    sample = torch.arange(len(images), dtype=torch.int32, device=images.device)[:, None, None]
    in_bottom, in_right = index[:, None] >= top, index >= left
    patch = 2 * in_bottom.int() + in_right.int()
    # Select the corner by patch index: handling four patches in turn would read every image four times.
    y = index[:, None] - torch.where(in_bottom, top, 0) + params[sample, 2 + patch]
    x = index - torch.where(in_right, left, 0) + params[sample, 6 + patch]
    mixed = images.permute(0, 2, 3, 1)[(sample - patch) % len(images), y, x]
    heights = torch.stack((params[:, 0], CIFAR_IMAGE_SIZE - params[:, 0]), 1)
    widths = torch.stack((params[:, 1], CIFAR_IMAGE_SIZE - params[:, 1]), 1)
    areas = (heights[:, :, None] * widths[:, None, :]).flatten(1)
    return mixed.permute(0, 3, 1, 2), areas / CIFAR_IMAGE_AREA


MIXERS: dict[str, MixerSpec] = {
    "mixup": MixerSpec(
        lambda alpha, n, rng: rng.beta(alpha, alpha, n).astype(np.float32),
        apply_mixup,
        default_value=0.2,
        help="blend with another image, with weight Beta(VALUE, VALUE)",
    ),
    "cutmix": MixerSpec(draw_cutmix, apply_cutmix, 1.0, "paste a box of another image, of area Beta(VALUE, VALUE)"),
    "ricap": MixerSpec(draw_ricap, apply_ricap, 0.3, "join patches of four images, split at Beta(VALUE, VALUE)"),
}


def mix_labels(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Convert labels int64 [b] and the label weights [b,m] of a mixer to class probabilities float32 [b,classes]."""
    classes = torch.arange(num_classes, device=labels.device)
    rolled = torch.stack([labels.roll(k) for k in range(weights.shape[1])], 1)
    return (weights[:, :, None] * (rolled[:, :, None] == classes)).sum(1)
