"""A process that is killed or stopped in a phase of a run: it can be resumed, and the result is the same."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcifar.reporting import records, runs
from fastcifar.training import checkpoint
from tests.faults import children
from tests.faults.children import TINY, wait_for, wait_for_exit
from tests.faults.runs import assert_equal_runs, rows
from tests.sweep.sweeps import assert_equal_sweeps, write_sweep_file

pytestmark = pytest.mark.xdist_group("processes")

# phase -> module, attribute in it, and the number of the call in which the process is killed
PHASES = {
    "setup": ("fastcifar.training.train", "build_trainer", 1),
    "compile": ("fastcifar.training.train", "autotune", 1),
    "run folder": ("fastcifar.training.run_dir", "collect_environment", 1),
    "first checkpoint": ("fastcifar.training.checkpoint", "_write_manifest", 1),
    "best checkpoint": ("fastcifar.training.checkpoint", "write_atomically", 2),
    "last checkpoint": ("fastcifar.training.checkpoint", "write_atomically", 5),
    "row": ("fastcifar.training.run_dir", "Run.log_epoch", 2),
    "test": ("fastcifar.training.trainer", "Trainer.test", 1),
    "summary": ("fastcifar.training.train", "summarize_run", 1),
    "finish": ("fastcifar.training.run_dir", "_write_json", 2),
}


# the same for the log of the trials of a sweep: the second entry says that a trial is done, the third begins the next
SWEEP_PHASES = {
    **{f"{phase} of a trial": PHASES[phase] for phase in ("setup", "best checkpoint", "row", "summary", "finish")},
    "first entry of the log": ("fastcifar.sweep.trial_log", "TrialLog.log_state", 1),
    "entry of a finished trial": ("fastcifar.sweep.trial_log", "TrialLog.log_state", 2),
    "entry of the next trial": ("fastcifar.sweep.trial_log", "TrialLog.log_state", 3),
}


def run_and_kill(output: Path, phase: tuple[str, str, int], *arguments: str) -> None:
    """Run a command; send SIGKILL to this process in the call that `phase` names."""
    module_name, attribute, call = phase
    owner: Any = importlib.import_module(module_name)
    *classes, name = attribute.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def kill_at_call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, kill_at_call)
    children.fastcifar(output, 0.0, *arguments)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of two epochs."""
    folder = tmp_path_factory.mktemp("full")
    assert wait_for_exit(children.train(folder / "log", "--epochs", "2", "--out", str(folder / "run"))) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_fault50_a_run_killed_in_a_phase_is_resumed_and_equal(phase: str, tmp_path: Path, full_run: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    arguments = ("--epochs", "2", "--out", str(out), "--resume", "auto")
    process = children.start(run_and_kill, log, PHASES[phase], "train", *TINY, *arguments)
    assert wait_for_exit(process, 60) == -signal.SIGKILL
    for path in out.glob("checkpoints/*.pt"):
        assert checkpoint.load_checkpoint(path)["step"] % 5 == 0
    if (out / "recipe.toml").exists():
        assert runs.list_runs(tmp_path)[0]["state"] == "interrupted"
        assert records.read_run_record(out).state == "unfinished"
    assert wait_for_exit(children.train(log, *arguments), 60) == 0, log.read_text()
    assert_equal_runs(out, full_run)
    assert not list(out.rglob("*.tmp"))


@pytest.fixture(scope="module")
def full_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted sweep of two trials; its sweep file is beside it."""
    folder = tmp_path_factory.mktemp("full_sweep")
    source = write_sweep_file(folder, "[grid]\nlr = [0.1, 0.02]\n")
    command = ("sweep", source, "--seeds", "1", "--out", str(folder / "sweep"))
    assert wait_for_exit(children.start(children.fastcifar, folder / "log", 0.0, *command), 60) == 0
    return folder / "sweep"


@pytest.mark.slow
@pytest.mark.parametrize("phase", SWEEP_PHASES)
def test_fault50_a_sweep_killed_in_a_phase_of_a_trial_is_continued_and_equal(
    phase: str, tmp_path: Path, full_sweep: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "sweep"
    command = ("sweep", str(full_sweep.parent / "tiny.toml"), "--seeds", "1", "--out", str(out))
    process = children.start(run_and_kill, log, SWEEP_PHASES[phase], *command)
    assert wait_for_exit(process, 60) == -signal.SIGKILL
    if (out / "trials.jsonl").exists():
        assert runs.list_runs(tmp_path)[0]["kind"] == "sweep"
    assert wait_for_exit(children.start(children.fastcifar, log, 0.0, *command), 60) == 0, log.read_text()
    assert_equal_sweeps(out, full_sweep)


@pytest.mark.medium
@pytest.mark.parametrize("stops", [1, 3])
def test_fault50_a_run_that_is_stopped_and_continued_is_equal(stops: int, tmp_path: Path, full_run: Path) -> None:
    out = tmp_path / "run"
    process = children.train(tmp_path / "log", "--epochs", "2", "--out", str(out), pause_s=0.02)
    wait_for((out / "recipe.toml").exists)
    for _ in range(stops):
        os.kill(process.pid, signal.SIGSTOP)
        before = rows(out) if (out / "metrics.csv").exists() else []
        time.sleep(0.3)
        assert (rows(out) if (out / "metrics.csv").exists() else []) == before
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.05)
    assert wait_for_exit(process, 60) == 0
    assert_equal_runs(out, full_run)


def export_and_kill(folder: Path, out: Path, where: str) -> None:
    """Export the run in `folder` as .safetensors; send SIGKILL to this process before or after the file is written."""
    from fastcifar.evaluation import export

    def kill(*_: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    replaced: dict[str, Callable[..., Any]] = {"_batch_sizes": kill, "_write_model_card": kill}
    setattr(export, where, replaced[where])
    export.export_model(str(folder), "safetensors", out)


@pytest.mark.medium
@pytest.mark.parametrize("where", ["_batch_sizes", "_write_model_card"])
def test_fault50_a_killed_export_leaves_a_valid_file_or_none(where: str, tmp_path: Path, full_run: Path) -> None:
    from fastcifar.evaluation.load_run import load_model

    out = tmp_path / "model.safetensors"
    assert wait_for_exit(children.start(export_and_kill, full_run, out, where), 60) == -signal.SIGKILL
    assert out.exists() == (where == "_write_model_card")
    if out.exists():
        assert load_model(str(out), device="cpu").recipe.arch == "resnet"
