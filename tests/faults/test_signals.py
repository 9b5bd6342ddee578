"""Signals to training in a separate process: checkpoints, messages and exit codes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.errors import DiskError, Interrupted
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.optimizers import OptimizerWrapper
from fastcifar.training.train import train
from tests.faults import children
from tests.faults.children import save, save_and_kill, start, wait_for, wait_for_exit
from tests.faults.runs import assert_equal_runs, last, rows

pytestmark = pytest.mark.xdist_group("processes")
ENDINGS = (".pt", ".previous.pt")


@pytest.mark.slow
@pytest.mark.parametrize("in_thread", [False, True], ids=["last", "best and last in a thread"])
def test_fault04_kill_at_twenty_points_of_a_checkpoint_write(tmp_path: Path, in_thread: bool) -> None:
    num_calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        num_calls[0] += event == "c_call"

    (tmp_path / "profiled").mkdir()
    save(tmp_path / "profiled", 1.0, in_thread)
    save(tmp_path / "profiled", 1.0, in_thread, count)
    rng = random.Random(0)
    points = sorted(rng.sample(range(1, num_calls[0]), 20))
    values = []
    for point in points:
        folder = tmp_path / str(point)
        folder.mkdir()
        for _ in range(2):
            save(folder, 1.0, in_thread)
        assert wait_for_exit(start(save_and_kill, folder, point, in_thread)) == -signal.SIGKILL
        names = ["best", "last"] if in_thread else ["last"]
        assert {entry.name for entry in folder.glob("*.pt")} == {f"{name}{end}" for name in names for end in ENDINGS}
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # not yet in the manifest: the previous checkpoint is used
                weight = checkpoint.load_checkpoint(folder / f"{name}.pt")["model"]["weight"]
            values.append(weight[0, 0].item())
            assert torch.equal(weight, torch.full((30, 20), values[-1]))
        save(folder, 3.0, in_thread)
        for name in names:
            assert checkpoint.read_checkpoint(folder / f"{name}.pt")["model"]["weight"][0, 0] == 3.0
    assert set(values) <= {1.0, 2.0}


class HeldSave:
    """Replaces `checkpoint.save_checkpoint`: the first save ends after SIGTERM in `step`; later ones raise `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, error: Exception | None = None) -> None:
        self.error, self.calls, self.is_sent = error, 0, threading.Event()
        self.save_checkpoint, after_step = checkpoint.save_checkpoint, OptimizerWrapper.after_step

        def after_step_with_signal(optimizer: OptimizerWrapper, completed_steps: int, *args: Any) -> None:
            after_step(optimizer, completed_steps, *args)
            if completed_steps == step and not self.is_sent.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                self.is_sent.set()

        monkeypatch.setattr(OptimizerWrapper, "after_step", after_step_with_signal)
        monkeypatch.setattr(checkpoint, "save_checkpoint", self)

    def __call__(self, *args: Any, **options: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            assert self.is_sent.wait(60)
        elif self.error:
            raise self.error
        self.save_checkpoint(*args, **options)


@pytest.mark.medium
@pytest.mark.parametrize(("options", "step"), [({}, 6), ({"save_every_steps": 2}, 3)], ids=str)
def test_fault05_signal_during_a_save(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], step: int
) -> None:
    save = HeldSave(monkeypatch, step)
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {step};") as caught:
        train(tiny(epochs=3, **options))
    assert caught.value.exit_code == 143
    assert save.calls == 2
    assert last(tmp_path / "run")["step"] == step
    train(Recipe(resume=str(tmp_path / "run")))
    train(tiny(epochs=3, **options, out=str(tmp_path / "uninterrupted")))
    assert_equal_runs(tmp_path / "run", tmp_path / "uninterrupted")


def test_fault07_the_save_after_a_signal_fails(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HeldSave(monkeypatch, 6, DiskError("cannot write last.pt"))
    with pytest.raises(DiskError, match=r"cannot write last\.pt"):
        train(tiny(epochs=3))
    assert last(tmp_path / "run")["step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault05_fault06_signal_saves_a_checkpoint_and_the_resumed_run_is_equal(
    tmp_path: Path, number: int, code: int
) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    uninterrupted = children.train(log, "--epochs", "3", "--out", str(tmp_path / "uninterrupted"))
    interrupted = children.train(log, "--epochs", "3", "--out", str(out), "--plots", pause_s=0.05)
    wait_for(lambda: (out / "metrics.csv").exists() and len(rows(out)) == 1)
    time.sleep(0.1)
    os.kill(interrupted.pid, number)
    signal_time = time.monotonic()
    assert wait_for_exit(interrupted, 30) == code
    assert time.monotonic() - signal_time < 10
    step = last(out)["step"]
    assert 5 <= step < 15
    message = (
        f"stopped by {signal.Signals(number).name} after step {step}; continue with: fastcifar train --resume {out}\n"
    )
    assert message in log.read_text()
    assert not (out / "plots").exists()
    assert wait_for_exit(uninterrupted) == 0
    assert wait_for_exit(children.train(log, "--resume", str(out), "--plots")) == 0
    assert (out / "plots" / "confusion.png").is_file()
    assert_equal_runs(out, tmp_path / "uninterrupted")


@pytest.mark.medium
def test_fault06_second_sigint_stops_immediately_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    process = children.train(
        log, "--out", str(out), "--epochs", "2", "--save-every-steps", "1", "--save-every-epochs", "0", pause_s=3
    )
    path = out / "checkpoints" / "last.pt"
    wait_for(path.exists)
    wait_for((path.parent / "manifest.json").exists)
    time.sleep(0.5)  # into the next step
    before = path.read_bytes()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)  # otherwise the system may deliver one signal instead of two
    os.kill(process.pid, signal.SIGINT)
    assert wait_for_exit(process, 60) == 130
    assert log.read_text().endswith("fastcifar: stopped by SIGINT\n")
    assert path.read_bytes() == before
    assert last(out)["step"] == 1
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_fault23_concurrent_processes_use_separate_folders(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [children.train(log, "--out", str(tmp_path / "run"), "--epochs", "3", pause_s=0.3) for _ in range(2)]
    wait_for((tmp_path / "run" / "checkpoints" / "last.pt").exists)
    for process in processes:  # the one that trains this run keeps its lock and does not end before it is continued
        os.kill(process.pid, signal.SIGSTOP)
    assert wait_for_exit(children.train(log, "--resume", str(tmp_path / "run"))) == 2
    assert "is being trained by another process" in log.read_text()
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    assert [wait_for_exit(process) for process in processes] == [0, 0]
    assert_equal_runs(tmp_path / "run", tmp_path / "run-2")
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.slow
def test_fault21_deterministic_runs_in_separate_processes_are_equal(
    tmp_path: Path, tiny: Callable[..., Recipe]
) -> None:
    log = tmp_path / "log"
    seeds = {"a": "3", "b": "3", "c": "4"}
    runs = [
        children.train(log, "--out", str(tmp_path / name), "--seed", seed, "--deterministic", "--max-steps", "4")
        for name, seed in seeds.items()
    ]
    assert [wait_for_exit(run) for run in runs] == [0, 0, 0]
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(*(last(tmp_path / name)["model"]["linear.weight"] for name in "ac"))
