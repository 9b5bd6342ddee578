"""Full disks, file size limits, read-only folders and out-of-memory errors: clear messages, no lost data."""

from __future__ import annotations

import errno
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

from fastcifar import files
from fastcifar.errors import DiskError, as_memory_error
from fastcifar.evaluation import export
from fastcifar.recipe import Recipe
from fastcifar.training import build, trackers, trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train
from tests.faults.runs import contents, last

pytestmark = pytest.mark.xdist_group("processes")
MakeRecipe = Callable[..., Recipe]
NOBODY_UID = 65534


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make `folder` read-only; is_root, who could still write, temporarily becomes another user."""
    paths = [folder, *folder.rglob("*")]
    modes = [(path, path.stat().st_mode) for path in paths]
    parent_modes = [(path, path.stat().st_mode) for path in folder.parents if path.stat().st_uid == os.geteuid()]
    is_root = os.geteuid() == 0
    for path, mode in parent_modes:
        path.chmod(mode | 0o555)
    for path, mode in modes:
        path.chmod(mode & 0o555 | 0o444)
    if is_root:
        os.seteuid(NOBODY_UID)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in [*modes, *parent_modes]:
            path.chmod(mode)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Limit the size of files that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_fault07_read_only_folder_is_detected_before_training(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(max_steps=3))
    before = contents(tmp_path)
    monkeypatch.setattr(trainer.Trainer, "validate", lambda self: pytest.fail("training started"))
    with read_only(tmp_path / "run"):
        for recipe in (Recipe(resume=str(tmp_path / "run")), tiny(out=str(tmp_path / "run" / "new"))):
            with pytest.raises(DiskError, match=r"cannot write the run folder .*run.*: Permission denied") as caught:
                train(recipe)
            assert caught.value.exit_code == 7
    assert contents(tmp_path) == before


def test_fault07_insufficient_disk_space_is_detected_before_training(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.Trainer, "validate", lambda self: pytest.fail("training started"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match=r"a checkpoint needs \d\d,\d{3} bytes, and 1,000 are free in .*run"):
        train(tiny())


@pytest.mark.medium
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.9])
def test_fault07_failed_write_keeps_the_old_checkpoint(tiny: MakeRecipe, tmp_path: Path, fraction: float) -> None:
    train(tiny())
    limit = int(fraction * (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_size)
    folder = tmp_path / "run" / "checkpoints"
    before = contents(folder)
    step = last(tmp_path / "run")["step"]
    with file_size_limit(limit), pytest.raises(DiskError) as caught:
        train(Recipe(resume=str(tmp_path / "run"), epochs=3))
    assert caught.value.exit_code == 7
    assert "File too large" in str(caught.value)
    if fraction == 0.9:
        assert re.search(r"cannot write \S+(last|best)\.pt \([\d,]+ bytes, [\d,]+ bytes are free\)", str(caught.value))
    assert contents(folder) == before
    assert not list((tmp_path / "run").rglob("*.tmp"))
    train(Recipe(resume=str(tmp_path / "run"), epochs=3))
    assert last(tmp_path / "run")["step"] == step + 5


@pytest.mark.medium
@pytest.mark.parametrize("name", ["weights.safetensors", "summary.json"])
def test_fault41_full_disk_in_the_last_write_and_the_run_is_finished_later(
    name: str, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_durably = files._write_durably

    def write(path: Path, content: Any) -> None:
        if name in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_durably(path, content)

    monkeypatch.setattr(files, "_write_durably", write)
    with pytest.raises(DiskError, match=rf"cannot write \S+{re.escape(name)}: No space left on device") as caught:
        train(tiny())
    assert caught.value.exit_code == 7
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.undo()
    summary = train(Recipe(resume=str(tmp_path / "run")))
    assert (summary.complete, summary.steps) == (True, 10)
    assert (tmp_path / "run" / "weights.safetensors").is_file()


@pytest.mark.medium
@pytest.mark.parametrize("format", ["safetensors", "pt2", "onnx"])
def test_fault41_full_disk_in_export(format: str, tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny(max_steps=2))
    before = contents(tmp_path)
    out = tmp_path / f"model.{format}"
    with file_size_limit(5000), pytest.raises(DiskError, match=rf"cannot write {out}: File too large; ") as caught:
        export.export_model(str(tmp_path / "run"), format, out)
    assert caught.value.exit_code == 7
    assert contents(tmp_path) == before


@pytest.mark.medium
def test_fault41_full_disk_in_the_database_of_mlflow_at_the_end(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any tracker can be replaced by one whose last writes fail; `is_full` says when."""
    is_full = [True]

    def finish(_: Any) -> None:
        if is_full[0]:
            raise RuntimeError("(sqlite3.OperationalError) database or disk is full")

    session = trackers.TrackerSession(lambda *_: None, finish, lambda _: None, set())
    spec = trackers.TRACKERS["mlflow"]._replace(open=lambda *_: session, require_usable=lambda _: None)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", spec)
    with (
        pytest.warns(UserWarning, match="mlflow failed"),
        pytest.raises(DiskError, match=r"mlflow .*run.*disk is full") as caught,
    ):
        train(tiny(track="mlflow"))
    assert (caught.value.exit_code, (tmp_path / "run" / "summary.json").exists()) == (7, False)
    is_full[0] = False
    assert train(Recipe(resume=str(tmp_path / "run"))).complete


@pytest.mark.medium
def test_fault07_estimated_checkpoint_size_is_close(tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny(ema_decay=0.9, width=4)
    train(recipe.model_copy(update={"epochs": 1}))
    size = (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_size
    tensors = build.build_trainer(resolve(recipe)).state_tensors()
    assert 0.7 * size < sum(tensor.nbytes for tensor in tensors) < size


def test_out_of_memory_error_on_the_cpu_gives_sizes() -> None:
    for allocate in (lambda: torch.empty(2**50, dtype=torch.uint8), lambda: __import__("numpy").empty(2**50, "u1")):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        error = as_memory_error(caught.value)
        assert error is not None
        assert error.exit_code == 6
        assert "1125899906842624 bytes" in str(error) or "1.00 PiB" in str(error)
        assert "bytes are available; use a smaller --batch-size" in str(error)


def test_out_of_memory_error_on_a_gpu_gives_sizes() -> None:
    message = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 3.2 GiB is "
        "free. Of the allocated memory 11.9 GiB is allocated by PyTorch. See documentation for Memory Management"
    )
    error: Any = as_memory_error(torch.OutOfMemoryError(message))
    assert str(error).startswith(
        "out of memory on the GPU: Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which "
        "3.2 GiB is free; use a smaller"
    )
    assert as_memory_error(RuntimeError("mat1 and mat2 cannot be multiplied")) is None
