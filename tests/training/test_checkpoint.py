"""Checkpoints: atomic, verified, strict, and never run anything."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastcifar.errors import CheckpointError, DiskError, NonFiniteError
from fastcifar.training import checkpoint


def state(value: float = 1.0) -> dict[str, Any]:
    return {"recipe": {"arch": "mine"}, "model": {"weight": torch.full((3, 2), value)}, "ema": None, "step": 7}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.pt"


def test_round_trip_with_manifest_and_previous(path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        checkpoint.save_checkpoint(path, state(value))
    assert torch.equal(checkpoint.load_checkpoint(path)["model"]["weight"], torch.full((3, 2), 3.0))
    assert torch.equal(
        checkpoint.read_checkpoint(path.with_suffix(".previous.pt"))["model"]["weight"], torch.full((3, 2), 2.0)
    )
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["last.pt"]["bytes"] == path.stat().st_size
    assert manifest.keys() == {"last.pt", "last.previous.pt"}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["last.previous.pt", "last.pt", "manifest.json"]


def test_fault04_the_first_of_its_name_is_whole_wherever_the_process_dies(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_checkpoint(
        path.with_name("best.pt"), state(1.0)
    )  # so that there is a manifest, which does not know `last`
    replace, left = os.replace, [0]

    def dying(*given: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*given)

    survived = 0
    for survived in range(4):
        with monkeypatch.context() as patch:
            left[0] = survived
            patch.setattr(os, "replace", dying)
            try:
                checkpoint.save_checkpoint(path, state(2.0))
            except KeyboardInterrupt:
                assert survived < 3
        if path.exists():
            assert torch.equal(checkpoint.load_checkpoint(path)["model"]["weight"], torch.full((3, 2), 2.0))
            path.unlink()
        else:
            assert survived < 2
        (path.parent / "manifest.json").unlink()
        checkpoint.save_checkpoint(path.with_name("best.pt"), state(1.0))
    assert survived == 3


def test_mode_follows_the_umask(path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint.save_checkpoint(path, state())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_fault07_a_failed_write_keeps_the_old_one_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_checkpoint(path, state(1.0))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"last\.pt.*bytes.*No space left"):
        checkpoint.save_checkpoint(path, state(2.0))
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
def test_fault08_a_damaged_file_gives_the_previous_with_one_warning_or_an_error(path: Path, damage: Any) -> None:
    checkpoint.save_checkpoint(path, state(1.0))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError):
        checkpoint.load_checkpoint(path)
    path.unlink()
    for value in (1.0, 2.0):
        checkpoint.save_checkpoint(path, state(value))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"last\.previous\.pt is used instead") as caught:
        loaded = checkpoint.load_checkpoint(path)
    assert len(caught) == 1
    assert torch.equal(loaded["model"]["weight"], torch.full((3, 2), 1.0))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch sentinel",)


def test_fault09_a_malicious_file_is_refused_and_runs_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"recipe": {}, "model": Evil()}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load_checkpoint(path)
    assert not (tmp_path / "sentinel").exists()


def test_another_torch_file_is_refused(path: Path) -> None:
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="no model and recipe"):
        checkpoint.load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load_checkpoint(path.with_name("none.pt"))


def test_fault14_what_is_not_finite_is_not_written(path: Path) -> None:
    checkpoint.save_checkpoint(path, state(1.0))
    with pytest.raises(NonFiniteError, match="weight is not finite"):
        checkpoint.save_checkpoint(path, state(float("nan")))
    assert torch.equal(checkpoint.load_checkpoint(path)["model"]["weight"], torch.full((3, 2), 1.0))


def test_weights_load_strictly_and_prefixes_go() -> None:
    model = nn.Linear(2, 3)
    weights = {f"module._orig_mod.{key}": value + 1 for key, value in model.state_dict().items()}
    expected = model.weight.detach() + 1
    checkpoint.load_weights(model, weights, "file")
    assert torch.equal(model.weight, expected)
    for wrong, words in (
        ({"weight": model.weight}, "lacks bias"),
        ({**model.state_dict(), "more": torch.ones(1)}, "has unknown more"),
        ({**model.state_dict(), "bias": torch.ones(4)}, "has other shapes for bias"),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load_weights(model, wrong, "file")


def test_find(tmp_path: Path) -> None:
    assert checkpoint.resolve_checkpoint_path(str(tmp_path), "best") == tmp_path / "checkpoints" / "best.pt"
    assert checkpoint.resolve_checkpoint_path(str(tmp_path / "file.pt")) == tmp_path / "file.pt"
