"""Full disks, limits, folders that cannot be written, memory that is not there: numbers, and nothing lost."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.device import as_memory_error
from fastcifar.errors import DiskError
from fastcifar.recipe import Recipe
from fastcifar.training import build, trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train
from tests.faults.runs import last

Make = Callable[..., Recipe]
NOBODY = 65534


@contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """The rights of a user who may read, but not write in `folder`; root may write anywhere and becomes another."""
    paths = [folder, *folder.rglob("*")]
    modes = [(path, path.stat().st_mode) for path in paths]
    above = [(path, path.stat().st_mode) for path in folder.parents if path.stat().st_uid == os.geteuid()]
    root = os.geteuid() == 0
    for path, mode in above:
        path.chmod(mode | 0o555)
    for path, mode in modes:
        path.chmod(mode & 0o555 | 0o444)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in [*modes, *above]:
            path.chmod(mode)


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_fault07_a_read_only_place_is_found_before_training(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(max_steps=3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(trainer.Trainer, "validate", lambda self: pytest.fail("it trained"))
    with nobody(tmp_path / "run"):
        for asked in (Recipe(resume=str(tmp_path / "run")), tiny(out=str(tmp_path / "run" / "new"))):
            with pytest.raises(DiskError, match=r"cannot write the run folder .*run.*: Permission denied") as caught:
                train(asked)
            assert caught.value.exit_code == 7
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_fault07_too_little_space_is_found_before_training(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.Trainer, "validate", lambda self: pytest.fail("it trained"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"a checkpoint needs \d\d,\d{3} bytes, and 1,000 are free in .*run"):
        train(tiny())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_fault07_a_limit_on_files_leaves_the_old_checkpoint(tiny: Make, tmp_path: Path, share: float) -> None:
    train(tiny())
    limit = int(share * (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_size)
    folder = tmp_path / "run" / "checkpoints"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    step = last(tmp_path / "run")["step"]
    with files_of_at_most(limit), pytest.raises(DiskError) as caught:
        train(Recipe(resume=str(tmp_path / "run"), epochs=3))
    assert caught.value.exit_code == 7
    assert "File too large" in str(caught.value)
    if share == 0.9:
        assert re.search(r"cannot write \S+(last|best)\.pt \([\d,]+ bytes, [\d,]+ are free\)", str(caught.value))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not list((tmp_path / "run").rglob("*.tmp"))
    train(Recipe(resume=str(tmp_path / "run"), epochs=3))
    assert last(tmp_path / "run")["step"] == step + 5


def test_fault07_the_estimate_of_a_checkpoint_is_near(tiny: Make, tmp_path: Path) -> None:

    recipe = tiny(ema_decay=0.9, width=4)
    train(recipe.model_copy(update={"epochs": 1}))
    size = (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_size
    assert 0.7 * size < build.build_trainer(resolve(recipe)).checkpoint_bytes() < size


def test_memory_that_is_not_there_is_told_with_numbers() -> None:
    for allocate in (lambda: torch.empty(2**50, dtype=torch.uint8), lambda: __import__("numpy").empty(2**50, "u1")):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        short = as_memory_error(caught.value)
        assert short is not None
        assert short.exit_code == 6
        assert "1125899906842624 bytes" in str(short) or "1.00 PiB" in str(short)
        assert "bytes are available; use a smaller --batch-size" in str(short)


def test_memory_of_a_gpu_that_is_not_there_is_told_with_numbers() -> None:
    words = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 3.2 GiB is "
        "free. Of the allocated memory 11.9 GiB is allocated by PyTorch. See documentation for Memory Management"
    )
    short: Any = as_memory_error(torch.OutOfMemoryError(words))
    assert str(short).startswith(
        "out of memory on the GPU: Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which "
        "3.2 GiB is free; use a smaller"
    )
    assert as_memory_error(RuntimeError("mat1 and mat2 cannot be multiplied")) is None
