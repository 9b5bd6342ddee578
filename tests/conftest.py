"""Fixtures and hooks of all tests: the GPU marker, a recipe that trains in a second, and the number of threads."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from fastcifar.recipe import Recipe

# A shell makes background processes ignore SIGINT, which the processes that tests start and interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Every run of the tests tries the same examples, so that a change fails only for what it changed; scripts/fuzz_readers
# tries new ones. A time limit per example would fail on a busy machine.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and none is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def few_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use one thread in tests and the processes they start, except in tests/data, whose kernels are compiled for two.

    Networks this small are not faster with two threads, and many times slower if another process uses a core.
    """
    import torch

    num_threads, omp_num_threads = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    if request.path.parent.name != "data":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(num_threads)
    os.environ.pop("OMP_NUM_THREADS", None)
    if omp_num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = omp_num_threads


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that makes recipes of a network of 6,000 parameters on 160 synthetic images."""

    def make(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "arch": "resnet",
            "blocks": (1, 1),
            "channels": (8, 16),
            "data": "synthetic:200",
            "augment": "crop:4:zero,flip",
            "val_size": 40,
            "epochs": 2,
            "batch_size": 32,
            "device": "cpu",
            "precision": "fp32",
            "compile": False,
            "out": str(tmp_path / "run"),
        }
        return Recipe.make(**{**values, **changes})

    return make
