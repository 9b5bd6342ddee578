"""Fixtures and hooks of all tests: which are skipped, which share a process, and a recipe that trains in a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Skip the GPU tests if there is no GPU, and run the tests that share a fixture of their file in one process."""
    import torch

    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and none is visible")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
        fixtures = [fixture for group in item._fixtureinfo.name2fixturedefs.values() for fixture in group]
        if any(fixture.scope == "module" for fixture in fixtures) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def process_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use one thread in tests and in the processes they start, and one compile cache, which is empty at first.

    Networks this small are not faster with two threads, and many times slower if another process uses a core.
    """
    import torch

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled"))


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
