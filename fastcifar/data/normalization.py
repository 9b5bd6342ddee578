"""Input normalization: the named means and standard deviations, and which of them a recipe uses. No torch."""

from __future__ import annotations

import numpy as np

from fastcifar.errors import UsageError, lookup
from fastcifar.recipe import Recipe

ChannelValues = tuple[float, ...]


# Name -> (mean, std) of each channel of images scaled to [0, 1]. "cifar10" and "cifar100" are the true per-pixel values
# of the training sets; "kuangliu" is the mean of per-image deviations, 22-30 % too small and in wide use.
NORMALIZATIONS: dict[str, tuple[ChannelValues, ChannelValues]] = {
    "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}


def parse_normalization(spec: str) -> tuple[ChannelValues, ChannelValues]:
    """Mean and std, three floats each in units of [0, 1], of a name or "MEAN:STD" (one number, or three with commas).

    Raises `UsageError` for anything else, and for a std that is not positive.
    """
    if ":" not in spec:
        return lookup(NORMALIZATIONS, spec, "normalisation")
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in spec.split(":"))
    except ValueError:
        mean = std = ()
    mean, std = (part * 3 if len(part) == 1 else part for part in (mean, std))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        remedy = (
            f"choose from {', '.join(NORMALIZATIONS)}, or write MEAN:STD as 0.5,0.5,0.5:0.25,0.25,0.25 with std > 0"
        )
        raise UsageError(f"--normalize {spec!r} is no normalisation", remedy)
    return mean, std


def channel_mean_std(images: np.ndarray) -> tuple[ChannelValues, ChannelValues]:
    """Mean and std of each channel of `images` uint8 [n,3,h,w], scaled to [0, 1]: exact, from counts of the values."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1000):  # bincount takes eight bytes a pixel
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 1000, channel].ravel(), minlength=256)
    values, pixels = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / pixels
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / pixels)
    return tuple(mean.tolist()), tuple(std.tolist())


def normalization_mean_std(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""
    return parse_normalization(normalization_name(recipe))


def normalization_name(recipe: Recipe) -> str:
    """What `auto` means: the data set's own, but on CIFAR-10 what the coconut networks were published with."""
    if recipe.normalize != "auto":
        return recipe.normalize
    return "kuangliu" if recipe.dataset == "cifar10" and recipe.arch.startswith("coconut") else recipe.dataset


def mean_color(recipe: Recipe) -> tuple[int, int, int]:
    """What augmentations fill with, 0..255 for each channel: it is 0 after normalisation."""
    red, green, blue = (round(255 * value) for value in normalization_mean_std(recipe)[0])
    return red, green, blue
