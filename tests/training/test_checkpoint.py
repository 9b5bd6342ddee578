"""Tests of checkpoints: atomic writes, checksums, strict loading, and no code executed from a file."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastcifar.errors import CheckpointError, DiskError, NonFiniteError
from fastcifar.training import checkpoint


def make_state(value: float = 1.0) -> dict[str, Any]:
    return {"recipe": {"arch": "custom"}, "model": {"weight": torch.full((3, 2), value)}, "ema": None, "step": 7}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.pt"


def test_saving_keeps_the_previous_checkpoint_and_a_manifest(path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        checkpoint.save_checkpoint(path, make_state(value))
    assert torch.equal(checkpoint.load_checkpoint(path)["model"]["weight"], torch.full((3, 2), 3.0))
    previous = checkpoint.read_checkpoint(path.with_suffix(".previous.pt"))
    assert torch.equal(previous["model"]["weight"], torch.full((3, 2), 2.0))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["last.pt"]["bytes"] == path.stat().st_size
    assert manifest.keys() == {"last.pt", "last.previous.pt"}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["last.previous.pt", "last.pt", "manifest.json"]


def test_fault04_the_first_checkpoint_is_valid_or_absent_after_any_crash(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "best" creates a manifest without an entry for "last".
    checkpoint.save_checkpoint(path.with_name("best.pt"), make_state(1.0))
    replace, remaining = os.replace, [0]

    def crashing_replace(*args: Any) -> None:
        if remaining[0] == 0:
            raise KeyboardInterrupt
        remaining[0] -= 1
        replace(*args)

    num_replaced = 0
    for num_replaced in range(4):
        with monkeypatch.context() as patch:
            remaining[0] = num_replaced
            patch.setattr(os, "replace", crashing_replace)
            try:
                checkpoint.save_checkpoint(path, make_state(2.0))
            except KeyboardInterrupt:
                assert num_replaced < 3
        if path.exists():
            assert torch.equal(checkpoint.load_checkpoint(path)["model"]["weight"], torch.full((3, 2), 2.0))
            path.unlink()
        else:
            assert num_replaced < 2
        (path.parent / "manifest.json").unlink()
        checkpoint.save_checkpoint(path.with_name("best.pt"), make_state(1.0))
    assert num_replaced == 3


def test_file_mode_follows_the_umask(path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save_checkpoint(path, make_state())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_fault07_a_failed_write_keeps_the_old_checkpoint_and_no_temporary_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_checkpoint(path, make_state(1.0))
    before = path.read_bytes()

    def raise_disk_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(DiskError, match=r"last\.pt.*bytes.*No space left"):
        checkpoint.save_checkpoint(path, make_state(2.0))
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: b"<html><body>404</body></html>",
        lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    ],
    ids=["truncated", "empty", "zeros", "html", "one bit"],
)
def test_fault08_a_damaged_file_is_replaced_by_the_previous_one_or_is_an_error(path: Path, damage: Any) -> None:
    checkpoint.save_checkpoint(path, make_state(1.0))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError):
        checkpoint.load_checkpoint(path)
    path.unlink()
    for value in (1.0, 2.0):
        checkpoint.save_checkpoint(path, make_state(value))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"last\.previous\.pt is used instead") as caught:
        loaded = checkpoint.load_checkpoint(path)
    assert len(caught) == 1
    assert torch.equal(loaded["model"]["weight"], torch.full((3, 2), 1.0))


def test_fault08_a_flipped_bit_anywhere_is_found(path: Path) -> None:
    checkpoint.save_checkpoint(path, make_state(1.0))
    content = path.read_bytes()
    generator = random.Random(0)
    for position in [0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(200))]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load_checkpoint(path)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch sentinel",)


def test_fault09_a_malicious_file_is_refused_and_not_executed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"recipe": {}, "model": Malicious()}
    for save in (lambda: torch.save(content, path), lambda: path.write_bytes(pickle.dumps(content, protocol=2))):
        save()
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            checkpoint.load_checkpoint(path)
    assert not (tmp_path / "sentinel").exists()


def test_a_file_that_is_no_checkpoint_is_refused(path: Path) -> None:
    for content, message in (([1, 2], "contains a list, not a dict of weights"), ({"a": 1}, "no model and recipe")):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_checkpoint(path)
    mixed: Any
    for mixed in ({"a": 1}, {"a": torch.zeros(1), "b": 2}, {1: torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="contains no weights"):
            checkpoint.find_weights(mixed, path)
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        checkpoint.load_checkpoint(path.with_name("none.pt"))


def test_fault10_a_file_of_more_than_2_gib_is_refused_before_it_is_read(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # takes no space on the disk
    with pytest.raises(CheckpointError, match=r"2,147,483,649 bytes are more than 2,147,483,648"):
        checkpoint.read_checkpoint(path)


def test_fault14_nonfinite_weights_are_not_saved(path: Path) -> None:
    checkpoint.save_checkpoint(path, make_state(1.0))
    with pytest.raises(NonFiniteError, match="weight is not finite"):
        checkpoint.save_checkpoint(path, make_state(float("nan")))
    with pytest.raises(NonFiniteError, match="weight is not finite"):  # only in the moving average
        checkpoint.save_checkpoint(path, {**make_state(1.0), "ema": {"weight": torch.tensor([1.0, math.inf])}})
    assert torch.equal(checkpoint.load_checkpoint(path)["model"]["weight"], torch.full((3, 2), 1.0))


def test_weights_load_strictly_without_wrapper_prefixes() -> None:
    model = nn.Linear(2, 3)
    weights = {f"module._orig_mod.{key}": value + 1 for key, value in model.state_dict().items()}
    expected = model.weight.detach() + 1
    checkpoint.load_weights(model, weights, "file")
    assert torch.equal(model.weight, expected)
    for wrong_weights, message in (
        ({"weight": model.weight}, "lacks bias"),
        ({**model.state_dict(), "more": torch.ones(1)}, "has unexpected more"),
        ({**model.state_dict(), "bias": torch.ones(4)}, "has other shapes for bias"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_weights(model, wrong_weights, "file")


def test_weights_of_old_versions_of_torch_have_no_batch_counters(path: Path) -> None:
    model, source = (nn.ModuleList(nn.BatchNorm2d(2) for _ in range(2)) for _ in range(2))
    nn.init.constant_(source.state_dict()["1.weight"], 3)
    weights = source.state_dict()
    del weights["0.num_batches_tracked"]
    with pytest.raises(CheckpointError, match=r"lacks 0\.num_batches_tracked"):
        checkpoint.load_weights(model, weights, path)
    del weights["1.num_batches_tracked"]
    checkpoint.load_weights(model, weights, path)
    assert torch.equal(model.state_dict()["1.weight"], torch.full((2,), 3.0))
    assert model.state_dict()["0.num_batches_tracked"] == 0


def test_resolve_checkpoint_path(tmp_path: Path) -> None:
    assert checkpoint.resolve_checkpoint_path(str(tmp_path), "best") == tmp_path / "checkpoints" / "best.pt"
    assert checkpoint.resolve_checkpoint_path(str(tmp_path / "file.pt")) == tmp_path / "file.pt"
