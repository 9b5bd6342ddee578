"""Killed by a signal, in a process of its own: what is left, and what the shell is told."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from tests.faults.children import checkpoint_state, ended, save_and_die, start, train, wait_for
from tests.faults.runs import assert_equal_runs, last, rows


def test_fault04_killed_at_twenty_points_of_a_checkpoint_write(tmp_path: Path) -> None:
    calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event == "c_call"

    (tmp_path / "counted").mkdir()
    checkpoint.save_checkpoint(tmp_path / "counted" / "last.pt", checkpoint_state(1.0))
    sys.setprofile(count)
    checkpoint.save_checkpoint(tmp_path / "counted" / "last.pt", checkpoint_state(1.0))
    sys.setprofile(None)
    draw = random.Random(0)
    points = sorted(draw.sample(range(1, calls[0]), 20))
    found = []
    for point in points:
        folder = tmp_path / str(point)
        folder.mkdir()
        for _ in range(2):
            checkpoint.save_checkpoint(folder / "last.pt", checkpoint_state(1.0))
        assert ended(start(save_and_die, folder, point)) == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # written, but not yet in the manifest: the one before it is used
            weight = checkpoint.load_checkpoint(folder / "last.pt")["model"]["weight"]
        found.append(weight[0, 0].item())
        assert torch.equal(weight, torch.full((30, 20), found[-1]))
        assert {entry.name for entry in folder.glob("*.pt")} == {"last.pt", "last.previous.pt"}
        checkpoint.save_checkpoint(folder / "last.pt", checkpoint_state(3.0))
        assert checkpoint.read_checkpoint(folder / "last.pt")["model"]["weight"][0, 0] == 3.0
    assert set(found) <= {1.0, 2.0}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault05_fault06_one_signal_is_a_checkpoint_of_the_step_and_resume_equals(
    tmp_path: Path, number: int, code: int
) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    whole = train(log, "--epochs", "3", "--out", str(tmp_path / "whole"))
    killed = train(log, "--epochs", "3", "--out", str(out), pause_s=0.05)
    wait_for(lambda: (out / "metrics.csv").exists() and len(rows(out)) == 1)
    time.sleep(0.1)
    os.kill(killed.pid, number)
    sent = time.monotonic()
    assert ended(killed, 30) == code
    assert time.monotonic() - sent < 10
    step = last(out)["step"]
    assert 5 <= step < 15
    words = f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is {out}/checkpoints/last.pt\n"
    assert words in log.read_text()
    assert ended(whole) == 0
    assert ended(train(log, "--resume", str(out))) == 0
    assert_equal_runs(out, tmp_path / "whole")


def test_fault06_a_second_sigint_stops_at_once_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    slow = train(
        log, "--out", str(out), "--epochs", "2", "--save-every-steps", "1", "--save-every-epochs", "0", pause_s=1.5
    )
    path = out / "checkpoints" / "last.pt"
    wait_for(path.exists)
    wait_for((path.parent / "manifest.json").exists)
    time.sleep(0.3)  # into the next step
    before = path.read_bytes()
    os.kill(slow.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(slow.pid, signal.SIGINT)
    assert ended(slow, 10) == 130
    assert log.read_text().endswith("fastcifar: stopped by SIGINT\n")
    assert path.read_bytes() == before
    assert last(out)["step"] == 1
    assert not list(out.rglob("*.tmp"))


def test_fault23_two_processes_at_once_have_a_folder_each(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [train(log, "--out", str(tmp_path / "run"), "--epochs", "3", pause_s=0.01) for _ in range(2)]
    wait_for(lambda: all((tmp_path / name / "checkpoints" / "last.pt").exists() for name in ("run", "run-2")))
    third = train(log, "--resume", str(tmp_path / "run"))
    code = ended(third)
    if any(process.exitcode is None for process in both):
        assert code == 2
        assert "is being trained by another process" in log.read_text()
    assert [ended(process) for process in both] == [0, 0]
    assert_equal_runs(tmp_path / "run", tmp_path / "run-2")
    assert len(rows(tmp_path / "run")) == 3


def test_fault21_a_process_of_its_own_is_the_same_run(tmp_path: Path, tiny: Callable[..., Recipe]) -> None:
    log = tmp_path / "log"
    names = {"a": "3", "b": "3", "c": "4"}
    runs = [
        train(log, "--out", str(tmp_path / name), "--seed", seed, "--deterministic", "--max-steps", "4")
        for name, seed in names.items()
    ]
    assert [ended(run) for run in runs] == [0, 0, 0]
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(*(last(tmp_path / name)["model"]["linear.weight"] for name in "ac"))
