"""Fine-tuning: train a network further on other images and classes, by options of the recipe or as a module.

On the command line:

    fastcifar train --recipe quick --out pretrained
    fastcifar train --recipe quick --init pretrained --freeze stem --data photos --resize 32 --out tuned
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from fastcifar import Recipe, load_run, train

NETWORK = {"arch": "resnet", "blocks": (1, 1, 1), "channels": (16, 32, 64)}


def make_images(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [number, 32, 32, 3] with a brighter left, upper or lower part, and labels [number]."""
    images = np.random.default_rng(seed).integers(0, 156, (number, 32, 32, 3), np.uint8)
    labels = np.arange(number) % 3
    images[labels == 0, :, :16] += 99
    images[labels == 1, :16] += 99
    images[labels == 2, 16:] += 99
    return images, labels


def main(**options: Any) -> None:
    """Train on CIFAR-10, then in two ways on three classes of other images. `options`: fields of `Recipe`."""
    recipe = Recipe.make("quick", **options)
    pretrained = train(recipe.model_copy(update={**NETWORK, "out": "pretrained"}))
    data = {"train": make_images(300, seed=0), "test": make_images(60, seed=1), "classes": ["left", "top", "bottom"]}

    # `init`: a run folder or a file of weights, also of another project. The last layer is new, because the classes are
    # others. `freeze`: names or patterns of layers that are not trained; `fastcifar models resnet` lists the names.
    tuning = {"init": str(pretrained.folder), "freeze": "conv1,bn1", "lr": 0.02}
    by_options = train(recipe.model_copy(update={**NETWORK, **tuning}), data=data)
    print("by options:", by_options.summary.test_acc)

    # The same as in any PyTorch program: a module with weights, of any origin, is trained in place.
    network = load_run(pretrained.folder).model
    network.get_submodule("conv1").requires_grad_(False)
    head = network.get_submodule("linear")
    assert isinstance(head, nn.Linear)
    network.linear = nn.Linear(head.in_features, 3)
    as_module = train(recipe.model_copy(update={"lr": 0.02}), model=network, data=data)
    print("as a module:", as_module.summary.test_acc)


if __name__ == "__main__":
    main()
