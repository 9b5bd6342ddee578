"""Two networks of your own, in Python and for every command of fastcifar.

An architecture is a function or class that takes `num_classes` and returns a module: float images [n, 3, 32, 32],
normalized, to logits [n, num_classes]. A recipe and a checkpoint record only its name, so `load_run` gets the network
again, and each command that builds it gets `--import` again:

    fastcifar models --import examples/own_network.py --arch plain_cnn
    fastcifar train --import examples/own_network.py --arch plain_cnn --width 0.5 --epochs 10 --out runs/own
    fastcifar eval runs/own --import examples/own_network.py
    fastcifar predict runs/own data:test --out labels.csv --import examples/own_network.py
    fastcifar export runs/own --format onnx --import examples/own_network.py
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fastcifar import MODELS, Recipe, load_run, train


def plain_cnn(num_classes: int, width: float = 1.0, dropout: float = 0.0) -> nn.Module:
    """Return three convolutions; `width` and `dropout` are the options --width and --dropout."""
    channels = [3, *(max(1, round(width * n)) for n in (32, 64, 128))]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels[-1], num_classes)]
    return nn.Sequential(*layers, *head)


class PatchMixer(nn.Module):
    """Layers on 4x4 patches: one that mixes the 64 patches of an image, and one that mixes the channels of a patch."""

    def __init__(self, num_classes: int, dim: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.mix_patches = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())
        self.mix_channels = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2)  # [n, dim, 64]
        tokens = (tokens + self.mix_patches(tokens)).transpose(1, 2)
        return self.head((tokens + self.mix_channels(tokens)).mean(1))


# An entry of MODELS gives a network a name of its own: --arch tiny_mixer
MODELS["tiny_mixer"] = lambda num_classes: PatchMixer(num_classes, dim=16)


def main(**options: Any) -> None:
    """Train a network and load it again. `options`: fields of `Recipe`."""
    recipe = Recipe.make("quick", **options)
    result = train(recipe, model=PatchMixer)  # or model=PatchMixer(10, dim=32), a module, which is trained in place
    print(f"{result.summary.params:,} parameters, test accuracy {result.summary.test_acc:.4f}")
    run = load_run(result.folder, model=PatchMixer)
    print("predicted classes of the test images:", run.predict("data:test").labels[:10])


if __name__ == "__main__":
    main()
