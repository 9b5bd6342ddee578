"""Fast training of image classifiers on CIFAR under a parameter budget, with honest evaluation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastcifar._version import __version__ as __version__

if TYPE_CHECKING:
    from fastcifar.data.cifar import load_dataset
    from fastcifar.data.loaders import batches
    from fastcifar.models import MODELS
    from fastcifar.recipe import Recipe
    from fastcifar.training.train import train

__all__ = ["MODELS", "Recipe", "batches", "load_dataset", "train"]

_LAZY_EXPORTS = {  # imported on first use, because `import fastcifar` must not import torch
    "MODELS": "fastcifar.models",
    "Recipe": "fastcifar.recipe",
    "batches": "fastcifar.data.loaders",
    "load_dataset": "fastcifar.data.cifar",
    "train": "fastcifar.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")
    return getattr(import_module(_LAZY_EXPORTS[name]), name)
