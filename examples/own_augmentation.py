"""Augmentation of your own: a function of batches, or a transform of images, such as those of torchvision.

`batch_transform` is called on the device with a batch of images, uint8 [n, 3, 32, 32], after the list `augment` of the
recipe. `transform` is called with one PIL image, in the processes of a `DataLoader`, in place of the list `augment`.
The random generators of torch, NumPy and Python are seeded before each batch: equal seeds give equal runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from fastcifar import Recipe, batches, train


def random_gray(images: Tensor) -> Tensor:
    """Replace the color of every tenth image, on average, by its brightness; uint8 [n, 3, 32, 32] in and out."""
    gray = images.float().mean(1, keepdim=True).to(torch.uint8).expand_as(images)
    is_gray = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.1
    return torch.where(is_gray, gray, images)


def main(**options: Any) -> None:
    """Train with each of the two kinds, and look at batches. `options`: fields of `Recipe`."""
    recipe = Recipe.make("quick", **options)
    result = train(recipe, batch_transform=random_gray)
    print("augment:", result.summary.config["augment"])

    # For torchvision, a batch is one image: v2 transforms draw their random numbers once per call. So they are given as
    # `transform`, which is called for every image. Without ToTensor and Normalize: the training step normalizes.
    pipeline = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)])
    result = train(recipe, transform=pipeline, batch_transform=random_gray)
    print("augment:", result.summary.config["augment"])

    images, labels = next(iter(batches("synthetic:100", batch_size=10, augment="flip", batch_transform=random_gray)))
    print("a batch:", images.dtype, list(images.shape), labels.tolist())


if __name__ == "__main__":
    main()
