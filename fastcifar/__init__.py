"""Fast training of image classifiers on CIFAR under a parameter budget, with honest evaluation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastcifar._version import __version__ as __version__

if TYPE_CHECKING:
    from fastcifar.api import LoadedRun, Predictions, Result, Trainer, batches, load_run, train
    from fastcifar.data.cifar import Dataset, Split, load_dataset
    from fastcifar.models import MODELS
    from fastcifar.recipe import Recipe

__all__ = [
    "MODELS", "Dataset", "LoadedRun", "Predictions", "Recipe", "Result", "Split", "Trainer", "batches", "load_dataset",
    "load_run", "train",
]  # fmt: skip

# imported on first use, because `import fastcifar` must not import torch
_LAZY_EXPORTS = {
    "MODELS": "fastcifar.models",
    "Recipe": "fastcifar.recipe",
    **dict.fromkeys(("Dataset", "Split", "load_dataset"), "fastcifar.data.cifar"),
    **dict.fromkeys(("LoadedRun", "Predictions", "Result", "Trainer", "batches", "load_run", "train"), "fastcifar.api"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")
    return getattr(import_module(_LAZY_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
