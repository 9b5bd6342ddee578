"""fastcifar: train networks on CIFAR fast, under a parameter budget, and tell the truth about it.

The library's face: `Recipe`, `train`, `load`, `batches`, `MODELS`. Each is imported when it is first used, so that
`import fastcifar` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastcifar._version import __version__ as __version__

if TYPE_CHECKING:
    from fastcifar.data.cifar import load_dataset
    from fastcifar.data.loaders import batches
    from fastcifar.models import MODELS
    from fastcifar.recipe import Recipe
    from fastcifar.training.train import train

__all__ = ["MODELS", "Recipe", "batches", "load_dataset", "train"]

_LAZY_EXPORTS = {
    "MODELS": "fastcifar.models",
    "Recipe": "fastcifar.recipe",
    "batches": "fastcifar.data.loaders",
    "load_dataset": "fastcifar.data.cifar",
    "train": "fastcifar.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY_EXPORTS[name]), name)
