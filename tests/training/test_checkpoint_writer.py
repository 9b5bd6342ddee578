"""Checkpoints that a thread writes: copies of the state, errors of the thread, and what a save costs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.errors import DiskError, NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.build import build_trainer
from fastcifar.training.checkpoint_writer import CheckpointWriter, CopyBuffers
from fastcifar.training.resolve import resolve
from fastcifar.training.run_dir import Clock
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.faults.runs import assert_same, last, rows
from tests.training.test_host_reads import HostReads

MakeRecipe = Callable[..., Recipe]


def make_state(value: float = 1.0, nonfinite_steps: int = 0) -> dict[str, Any]:
    weight = torch.full((3, 2), value)
    return {
        "recipe": {"arch": "custom"},
        "model": {"weight": weight, "num_batches": torch.tensor(4)},
        "ema": None,
        "optimizer": [{"momentum": weight + 1, "betas": (0.9, 0.99)}],
        "meter": torch.tensor([1.0, 1.0, 1.0, nonfinite_steps], dtype=torch.float64),
        "step": 7,
    }


TENSORS = {
    "weights": lambda: torch.randn(4, 3, 5, 5),
    "channels_last": lambda: torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 3).t(),
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 3),
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "integers": lambda: torch.arange(7),
    "bytes": lambda: torch.arange(5, dtype=torch.uint8),
    "bool": lambda: torch.tensor([True, False, True]),
    "double": lambda: torch.randn(3, dtype=torch.float64),
    "bf16": lambda: torch.randn(3).bfloat16(),
}


def test_copies_equal_the_tensors_and_are_saved_like_them(tmp_path: Path) -> None:
    tensors = {name: make() for name, make in TENSORS.items()}
    buffers = CopyBuffers(list(tensors.values()))
    for _ in range(2):
        copies = dict(zip(tensors, buffers.copy(list(tensors.values())), strict=True))
        buffers.synchronize()
        assert_same(copies, tensors, "copies")
        assert copies["channels_last"].is_contiguous(memory_format=torch.channels_last)
        assert copies["bytes"].untyped_storage().nbytes() == 5  # `torch.save` writes whole storages
        torch.save(copies, tmp_path / "copies.pt")
        assert_same(torch.load(tmp_path / "copies.pt"), tensors, "file")
        for tensor in tensors.values():
            if tensor.is_floating_point() and tensor.numel() and tensor is not tensors["expanded"]:
                tensor.add_(1)


def test_buffers_are_used_again_for_tensors_of_the_same_layout_only() -> None:
    writer = CheckpointWriter()
    writer.allocate(make_state())
    buffers = writer._buffers
    writer._copy(make_state(2.0))
    assert writer._buffers is buffers
    state = make_state()
    state["optimizer"].append({"momentum": torch.ones(2)})
    copied = writer._copy(state)
    assert writer._buffers is not buffers
    assert_same(copied, state, "state")


def test_a_copy_keeps_the_storages_that_parts_of_the_state_share() -> None:
    state = make_state()
    state["ema"] = dict(state["model"])
    copied = CheckpointWriter()._copy(state)
    assert copied["ema"]["num_batches"] is copied["model"]["num_batches"]


@pytest.mark.medium
def test_saved_state_is_that_of_the_call_although_training_goes_on(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread starts to write after three more steps, and still writes the state of the first step."""
    options = {"optimizer": "lookahead:sgd", "ema_decay": 0.9, "dropout": 0.1, "precision": "fp16"}
    trainer, clock = build_trainer(resolve(tiny(**options))), Clock()
    writer, go_on = CheckpointWriter(), threading.Event()
    save_checkpoint = checkpoint.save_checkpoint

    def save_later(*args: Any, **arguments: Any) -> None:
        assert go_on.wait(60)
        save_checkpoint(*args, **arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_later)
    batches = list(trainer.batches(0))
    trainer.train_step(batches[0])
    state = trainer.state_dict(clock)
    save_checkpoint(tmp_path / "expected.pt", state)
    writer.save([tmp_path / "last.pt"], state)
    for batch in batches[1:4]:
        trainer.train_step(batch)
    trainer.schedule.after_epoch(0.5)
    go_on.set()
    writer.wait()
    saved, expected = (checkpoint.read_checkpoint(tmp_path / name) for name in ("last.pt", "expected.pt"))
    saved["model"], expected["model"] = dict(saved["model"]), dict(expected["model"])
    assert_same(saved, expected, "state")
    assert saved["step"] == 1
    assert not torch.equal(saved["meter"], trainer.meter.sums)


def test_an_error_of_the_thread_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for call in (CheckpointWriter.wait, lambda writer: writer.save([tmp_path / "last.pt"], make_state())):
        writer = CheckpointWriter()
        writer.save([tmp_path / "file" / "last.pt"], make_state())
        writer.join()
        with pytest.raises(DiskError, match=r"cannot write .*last\.pt"):
            call(writer)
        writer.wait()
        assert not (tmp_path / "last.pt").exists()


def test_the_content_is_released_after_an_error(tmp_path: Path) -> None:
    """Otherwise Python 3.12 crashes when it frees the traceback, which refers to the content."""
    (tmp_path / "file").touch()
    with pytest.raises(DiskError) as caught:
        checkpoint.save_checkpoint(tmp_path / "file" / "last.pt", make_state())
    views: list[memoryview] = []
    for error in (caught.value, caught.value.__context__):
        traceback = error and error.__traceback__
        while traceback:
            views += [value for value in traceback.tb_frame.f_locals.values() if isinstance(value, memoryview)]
            traceback = traceback.tb_next
    assert views
    for view in views:
        with pytest.raises(ValueError, match="released"):
            len(view)


@pytest.mark.parametrize(
    ("state", "message"),
    [(make_state(nonfinite_steps=3), "not finite in step 5"), (make_state(float("inf")), "weight is not finite")],
    ids=["meter", "weight"],
)
def test_fault14_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    writer, path = CheckpointWriter(), tmp_path / "last.pt"
    writer.save([path], make_state())
    writer.wait()
    before = path.read_bytes()
    writer.save([path], state)
    with pytest.raises(NonFiniteError, match=message):
        writer.wait()
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.medium
def test_an_improving_epoch_writes_its_checkpoint_once(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(
        Trainer, "validate", lambda _: {"val_loss": 1.0, "val_acc": next(accuracies), "ema_val_acc": None}
    )
    saves: list[str] = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (saves.append(threading.current_thread().name), save(*args)))
    train(tiny(epochs=2))
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best.pt").samefile(folder / "last.pt")
    assert (folder / "best.previous.pt").samefile(folder / "last.previous.pt")
    assert len(saves) == 2
    assert all(name.startswith("checkpoint") for name in saves)
    train(Recipe(resume=str(tmp_path / "run"), epochs=3))
    assert len(saves) == 3
    assert checkpoint.read_checkpoint(folder / "best.pt")["step"] == 10
    assert last(tmp_path / "run")["step"] == 15


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unsupported(*_: Any) -> None:
        raise OSError("hard links are not supported")

    monkeypatch.setattr(os, "link", raise_unsupported)
    best, path = tmp_path / "best.pt", tmp_path / "last.pt"
    for value in (1.0, 2.0):
        checkpoint.save_checkpoint(best, make_state(value), links=[path])
    assert not best.samefile(path)
    for file, expected in ((best, 2.0), (path, 2.0), (tmp_path / "last.previous.pt", 1.0)):
        assert torch.equal(checkpoint.read_checkpoint(file)["model"]["weight"], torch.full((3, 2), expected))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore:.*is used instead")
def test_fault04_best_and_last_are_valid_after_a_crash_at_any_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, is_complete, num_renames = os.replace, False, 0
    for num_renames in range(12):
        folder = tmp_path / str(num_renames)
        folder.mkdir()
        best, path = folder / "best.pt", folder / "last.pt"
        for value in (1.0, 2.0):
            checkpoint.save_checkpoint(best, make_state(value), links=[path])
        remaining = [num_renames]

        def crashing_replace(*args: Any, remaining: list[int] = remaining) -> None:
            if remaining[0] == 0:
                raise KeyboardInterrupt
            remaining[0] -= 1
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crashing_replace)
            with suppress(KeyboardInterrupt):
                checkpoint.save_checkpoint(best, make_state(3.0), links=[path])
                is_complete = True
        values = [checkpoint.load_checkpoint(file)["model"]["weight"][0, 0] for file in (best, path)]
        assert values == [3.0 if is_complete else 2.0] * 2
        if is_complete:
            break
    assert num_renames == 5  # of the previous and the new file of "best" and "last", and of the manifest


class FailingSave:
    """Replaces `checkpoint.save_checkpoint`: the save number `failing` (from 1) raises `error`."""

    def __init__(self, failing: int, error: Exception) -> None:
        self.failing, self.error, self.calls, self.original = failing, error, 0, checkpoint.save_checkpoint

    def __call__(self, *args: Any, **options: Any) -> None:
        self.calls += 1
        if self.calls == self.failing:
            raise self.error
        self.original(*args, **options)


ONLY_IN_EPOCHS = {"save_every_epochs": 0, "val_size": 0}


@pytest.mark.parametrize(
    ("options", "failing", "num_rows", "saved_step"),
    [
        ({"epochs": 9}, 1, 1, 0),
        ({"epochs": 9}, 2, 2, 5),
        ({"epochs": 2}, 2, 2, 5),
        ({"epochs": 9, "save_every_steps": 3, **ONLY_IN_EPOCHS}, 2, 0, 3),
        ({"epochs": 9, "save_every_steps": 12, **ONLY_IN_EPOCHS}, 1, 1, 0),
    ],
    ids=["first epoch", "second epoch", "last epoch", "in an epoch", "no save in the next epoch"],
)
def test_fault07_an_error_of_the_thread_ends_the_run_within_an_epoch(
    tiny: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    failing: int,
    num_rows: int,
    saved_step: int,
) -> None:
    save = FailingSave(failing, DiskError("cannot write last.pt", "free disk space"))
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    with pytest.raises(DiskError, match=r"cannot write last\.pt; free disk space") as caught:
        train(tiny(**options))
    assert caught.value.exit_code == 7
    assert save.calls == failing
    assert not (tmp_path / "run" / "summary.json").exists()
    assert len(rows(tmp_path / "run")) == num_rows
    if saved_step:
        assert last(tmp_path / "run")["step"] == saved_step


@pytest.mark.medium
@pytest.mark.parametrize("failing", [2, 3])
def test_fault14_rollback_after_a_save_that_is_not_finite(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Save 1 is that of the initial state; the third of the four is that of the last epoch."""
    save = FailingSave(failing, NonFiniteError("weight is not finite"))
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert train(tiny(epochs=2, on_nan="rollback")).complete
    assert last(tmp_path / "run")["rollbacks"] == 1
    assert last(tmp_path / "run")["step"] == 10


def test_a_save_reads_nothing_on_the_host(tiny: MakeRecipe, tmp_path: Path) -> None:
    trainer = build_trainer(resolve(tiny(precision="fp16", ema_decay=0.9)))
    trainer.train_step(next(iter(trainer.batches(0))))
    writer = CheckpointWriter()
    with HostReads() as reads:  # in this thread
        writer.save([tmp_path / "last.pt"], trainer.state_dict())
    assert not reads.operations
    writer.wait()
    saved, expected = checkpoint.read_checkpoint(tmp_path / "last.pt")["scaler"], trainer.scaler.state_dict()
    assert {key: float(value) for key, value in saved.items()} == expected
