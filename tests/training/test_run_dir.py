"""Tests of the run folder, the epoch callbacks, the clock and the signal handler."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastcifar.device import collect_environment
from fastcifar.errors import DiskError, UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.distributed import SINGLE_PROCESS
from fastcifar.training.metrics_file import METRICS_COLUMNS
from fastcifar.training.run_dir import METRICS_FILES, Clock, Run
from fastcifar.training.signals import SignalHandler
from tests.training.summaries import epoch_row


def test_run_folder_contains_recipe_and_environment(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the recipe trains on the CPU all the same
    run = Run.create(recipe, "name")
    assert Recipe.make(str(run.folder / "recipe.toml")) == recipe
    environment = json.loads((run.folder / "env.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["device"] == collect_environment("cpu").device


def test_fault23_concurrent_runs_of_the_same_name_get_numbered_folders(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(Run.create(recipe, "x").folder)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folder.name for folder in folders) == ["run", "run-2", "run-3", "run-4", "run-5", "run-6"]


def test_fault23_the_current_folder_and_its_parent_exist_as_well(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert [Run.create(tiny(out=out), "x").folder for out in (".", "..")] == [tmp_path / "a" / "b-2", tmp_path / "a-2"]
    with pytest.raises(UsageError, match="--out / is not a name for a run folder"):
        Run.create(tiny(out="/"), "x")


def test_fault07_a_file_at_the_path_of_a_folder_is_a_disk_error(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write the run folder"):
        Run.create(tiny(out=str(tmp_path / "file" / "run")), "x")


@pytest.mark.parametrize("name", METRICS_FILES)
def test_file_callbacks_write_one_row_per_call(name: str, tmp_path: Path) -> None:
    write = METRICS_FILES[name](tmp_path, 0)
    write(epoch_row(0, val_acc=None))
    write(epoch_row(1))
    text = next(tmp_path.iterdir()).read_text()
    assert text.count("\n") >= 2
    if name == "metrics.csv":
        rows = list(csv.DictReader(text.splitlines()))
        assert [row["epoch"] for row in rows] == ["0", "1"]
        assert tuple(rows[0]) == METRICS_COLUMNS
        assert rows[0]["val_acc"] == ""
    else:
        assert json.loads(text.splitlines()[1])["epoch"] == 1


def test_clock_sums_the_time_of_each_phase() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.phase("train"):
            pass
    assert clock.total_s() >= clock.seconds["train"] >= clock.epoch_train_s() > 0
    clock.end_epoch()
    assert clock.epoch_train_s() == 0


def test_clock_state_saved_within_a_phase_is_restored() -> None:
    before, after = Clock(), Clock()
    with before.phase("eval"):
        pass
    before.end_epoch()
    with before.phase("train"):
        saved = before.state_dict()
    with after.phase("eval"):
        pass
    eval_s = after.seconds["eval"]
    after.load_state_dict({**saved, "total": 1000.0})
    assert after.seconds["eval"] == pytest.approx(saved["eval"] + eval_s)
    assert after.epoch_train_s() == pytest.approx(saved["train"], abs=1e-4)
    assert after.total_s() > 1000


def test_first_signal_sets_a_flag_and_a_second_sigint_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with SignalHandler() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.sync_signal(SINGLE_PROCESS) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with SignalHandler() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.sync_signal(SINGLE_PROCESS) == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) is before
