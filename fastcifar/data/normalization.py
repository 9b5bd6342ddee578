"""Input normalization: named means and standard deviations, and the choice of a recipe. Does not import torch."""

from collections.abc import Sequence

import numpy as np

from fastcifar.data.cifar_files import Dataset
from fastcifar.errors import UsageError, lookup
from fastcifar.recipe import Recipe

ChannelValues = tuple[float, ...]

# (mean, std) of each channel of images scaled to [0, 1]. "cifar10" and "cifar100" are computed over all pixels of the
# training sets; the std of "kuangliu", in wide use, is the average std within an image, which is 18-23 % smaller.
NORMALIZATIONS: dict[str, tuple[ChannelValues, ChannelValues]] = {
    "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    "kuangliu": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}


def parse_normalization(spec: str) -> tuple[ChannelValues, ChannelValues]:
    """Return mean and std, three floats each; `spec` is a name or "MEAN:STD", where each has one or three numbers."""
    if ":" not in spec:
        return lookup(NORMALIZATIONS, spec, "normalization")
    try:
        mean, std = (tuple(float(value) for value in values.split(",")) for values in spec.split(":"))
    except ValueError:
        mean = std = ()
    mean, std = (values * 3 if len(values) == 1 else values for values in (mean, std))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        remedy = f"choose {', '.join(NORMALIZATIONS)}, or MEAN:STD with STD > 0, such as 0.5,0.5,0.5:0.25,0.25,0.25"
        raise UsageError(f"--normalize {spec!r} is not a normalization", remedy)
    return mean, std


def channel_mean_std(images: np.ndarray) -> tuple[ChannelValues, ChannelValues]:
    """Return mean and std of each channel of `images` uint8 [n,3,h,w] scaled to [0, 1], exactly, from histograms."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1000):  # bincount converts each pixel to eight bytes
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 1000, channel].ravel(), minlength=256)
    values, pixels = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / pixels
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / pixels)
    return tuple(mean.tolist()), tuple(std.tolist())


def with_own_normalization(recipe: Recipe, data: Dataset) -> Recipe:
    """Return `recipe` with the "MEAN:STD" of all training images for `auto`, if they are own images.

    Both have eight decimals, which are what the run uses. A channel with a single value has the standard deviation 1.
    """
    if recipe.normalize != "auto" or not data.own_images:
        return recipe
    mean, std = channel_mean_std(data.train.images)
    values = [round(value, 8) for value in mean], [round(value, 8) or 1.0 for value in std]
    return with_normalization(recipe, values)


def with_normalization(recipe: Recipe, mean_std: Sequence[Sequence[float]]) -> Recipe:
    """Return `recipe` with the "MEAN:STD" of these values."""
    return recipe.model_copy(update={"normalize": ":".join(",".join(map(str, numbers)) for numbers in mean_std)})


def normalization_mean_std(recipe: Recipe) -> tuple[ChannelValues, ChannelValues]:
    """Return the mean and standard deviation of each channel that a recipe uses, for pixels in [0, 1]."""
    return parse_normalization(normalization_name(recipe))


def normalization_name(recipe: Recipe) -> str:
    """Return the name or "MEAN:STD" that a recipe uses; `auto` is that of the CIFAR data set."""
    if recipe.normalize != "auto":
        return recipe.normalize
    # Coconut networks were published with "kuangliu".
    is_coconut = recipe.dataset == "cifar10" and recipe.arch.startswith("coconut")
    return "kuangliu" if is_coconut else recipe.dataset.removesuffix("-coarse")


def mean_color(mean: ChannelValues) -> tuple[int, int, int]:
    """Return the fill color of augmentations, 0..255 per channel: `mean`, which is about 0 after normalization."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue
