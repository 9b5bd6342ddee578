"""Images of your own: arrays, data sets of PyTorch, class folders and .npz files, of any size with `resize`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fastcifar import Recipe, load_run, train

CLASSES = ["red", "green", "blue"]


def make_images(number: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images uint8 [number, size, size, 3], brighter in one color, and that color as labels [number]."""
    images = np.random.default_rng(seed).integers(0, 156, (number, size, size, 3), np.uint8)
    labels = np.arange(number) % 3
    for label in range(3):
        images[labels == label, :, :, label] += 99
    return images, labels


class Photos(Dataset[tuple[np.ndarray, int]]):
    """A map-style data set of PyTorch, such as those of torchvision: pairs of an image and a label."""

    def __init__(self, number: int, seed: int) -> None:
        self.images, self.labels = make_images(number, 32, seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def main(**options: Any) -> None:
    """Train on images in several forms. `options`: fields of `Recipe`."""
    recipe = Recipe.make("quick", **{"batch_size": 50, "epochs": 2, **options})

    # A pair of images and labels is split 80/10/10 into images for training, validation and testing.
    result = train(recipe, data=make_images(300, 32, seed=0))
    print("test accuracy of 30 images:", result.summary.test_acc)

    # Splits of your own; without "val", the validation split is taken from the training images.
    data = {"train": Photos(300, seed=0), "test": Photos(60, seed=1), "classes": CLASSES}
    result = train(recipe, data=data)
    print("per class:", result.summary.per_class)
    run = load_run(result.folder, data=data)  # the run records only that the data set was given from Python
    print("again:", run.evaluate()["test_acc"])
    print("new images:", [run.classes[label] for label in run.predict(make_images(3, 32, seed=2)[0]).labels])

    # Images of another size. Class folders and .npz files of any size too: data="photos", or --data photos --resize 32.
    result = train(recipe.model_copy(update={"resize": 32}), data=make_images(300, 48, seed=0))
    print("48x48 pixels, resized:", result.summary.test_acc)


if __name__ == "__main__":
    main()
