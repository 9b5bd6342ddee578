"""The same sweep in process, in processes and on a local Ray cluster: the same results, whoever dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcifar.errors import DiskError, UsageError
from fastcifar.sweep import executors
from fastcifar.sweep.executors import Executor, ExecutorOptions, TrialEvent, TrialEvents, gpu_executor
from fastcifar.sweep.sweep import prepare_sweep, run_sweep
from fastcifar.sweep.sweep_spec import SweepTrial
from tests.faults import children
from tests.faults.runs import rows
from tests.sweep.sweeps import assert_equal_sweeps, file, lines, states, table

FEW = "[grid]\nlr = [0.1, 0.02]\n"


def holder(run: Path) -> int | None:
    """The process that has the run folder open, which is its lock."""
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == str(run):
                return int(entry.parts[2])
        except OSError:
            continue
    return None


def training(folder: Path) -> tuple[str, int] | None:
    """A trial that has written a checkpoint and is still being trained, and by which process."""
    for run in folder.glob("runs/*"):
        if (run / "checkpoints" / "last.pt").is_file() and not (run / "summary.json").is_file():
            process = holder(run)
            if process:
                return run.name, process
    return None


def test_processes_end_as_one_process_does(tmp_path: Path) -> None:
    source = file(tmp_path, FEW)
    run_sweep(source, tmp_path / "one")
    found = run_sweep(source, tmp_path / "two", "processes", ExecutorOptions(jobs=2, cpus=1))
    assert_equal_sweeps(tmp_path / "two", tmp_path / "one")
    running = most = 0
    for line in lines(tmp_path / "two"):
        running += 1 if line["state"] == "running" else -1
        most = max(most, running)
    assert most == 2
    assert found["counts"]["done"] == 4


def test_fault24_a_process_that_dies_fails_its_trial_alone_and_the_sweeps_end_is_theirs(tmp_path: Path) -> None:
    source, folder = file(tmp_path, FEW, epochs=9), tmp_path / "out"
    arguments = ("sweep", source, "--out", str(folder), "--executor", "processes", "--jobs", "2", "--cpus", "1")
    process = children.start(children.fastcifar, tmp_path / "log", 0, *arguments)
    children.wait_for(lambda: training(folder))
    found = training(folder)
    assert found is not None
    os.kill(found[1], signal.SIGKILL)
    children.wait_for(lambda: "failed" in states(folder).values())
    reasons = {line["trial"]: line["reason"] for line in lines(folder) if line["state"] == "failed"}
    assert reasons == {found[0]: "its process ended by SIGKILL"}
    children.wait_for(lambda: training(folder))
    other = training(folder)
    assert other is not None
    os.kill(process.pid, signal.SIGKILL)
    children.wait_for_exit(process)
    children.wait_for(lambda: holder(folder / "runs" / other[0]) is None, 30)  # it has followed its parent
    assert run_sweep(source, folder, retry_failed=True)["counts"]["done"] == 4
    run_sweep(source, tmp_path / "one")
    assert_equal_sweeps(folder, tmp_path / "one")


def test_gpus_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def slots(**how: int) -> list[str]:
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_executor(ExecutorOptions(**how)).keywords["slots"]]  # type: ignore[attr-defined]

    assert slots(trials_per_gpu=2) == ["0", "1", "0", "1"]
    assert slots(trials_per_gpu=2, jobs=3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert slots() == ["5", "GPU-ab"]


def test_a_rays_task_has_its_share_of_a_gpu_where_there_is_any() -> None:
    cluster = {"CPU": 8.0, "GPU": 2.0}
    assert executors._resources_per_task(cluster, ExecutorOptions(trials_per_gpu=3)) == (
        {"num_cpus": 1, "num_gpus": 1 / 3},
        6,
    )
    assert executors._resources_per_task(cluster, ExecutorOptions(cpus=4)) == ({"num_cpus": 4, "num_gpus": 1.0}, 2)
    assert executors._resources_per_task({"CPU": 8.0}, ExecutorOptions(cpus=3)) == ({"num_cpus": 3}, 2)
    assert executors._resources_per_task({"CPU": 8.0}, ExecutorOptions(jobs=5)) == ({"num_cpus": 1}, 5)


def test_fault24_a_cluster_without_room_for_a_trial_is_not_waited_for(tmp_path: Path) -> None:
    class Cluster:
        """As much of Ray as is asked before the first task."""

        ended = 0

        def remote(self, **_: object) -> object:
            return lambda task: task

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 2.0}

        def shutdown(self) -> None:
            self.ended += 1

    cluster, trials = Cluster(), iter(prepare_sweep(file(tmp_path), None, "ray", None, {})[2])
    with pytest.raises(UsageError, match="a trial takes 4 cores, and the cluster has 2; give fewer --cpus"):
        next(executors._run_on_ray(trials, cluster, ExecutorOptions(cpus=4, jobs=1)))
    assert cluster.ended == 1


@pytest.mark.parametrize(
    ("on", "how", "words"),
    [
        (
            "process",
            ExecutorOptions(jobs=2),
            "--jobs: --on process has none; leave it out, or use --on processes or gpus or ray",
        ),
        ("process", ExecutorOptions(cpus=1), "--cpus: --on process has none"),
        ("processes", ExecutorOptions(trials_per_gpu=2), "--trials-per-gpu: --on processes has none"),
        ("gpus", ExecutorOptions(address="local"), "--address: --on gpus has none; leave it out, or use --on ray"),
    ],
)
def test_fault15_what_a_place_does_not_have_is_refused(
    tmp_path: Path, on: str, how: ExecutorOptions, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        run_sweep(file(tmp_path), tmp_path / "out", on, how)
    assert not (tmp_path / "out").exists()


def test_fault07_a_reason_stands_where_its_traceback_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "error.txt").mkdir()
    assert executors._failure_reason(RuntimeError("a bug\nin two lines"), tmp_path) == "RuntimeError: a bug"


def test_what_ran_on_another_machines_disk_is_brought_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(how: ExecutorOptions) -> Executor:
        def run(trials: Iterator[SweepTrial]) -> TrialEvents:
            for trial in trials:
                there = trial.recipe.model_copy(update={"out": str(tmp_path / "there" / trial.key)})
                yield TrialEvent(trial, "running")
                yield replace(executors._ray_task(replace(trial, recipe=there), 1, "another host"), trial=trial)

        return run

    monkeypatch.setitem(executors.EXECUTORS, "elsewhere", elsewhere)
    source = file(tmp_path, FEW)
    found, other = run_sweep(source, tmp_path / "home", "elsewhere"), run_sweep(source, tmp_path / "one")
    assert found["counts"]["done"] == 4
    assert table(tmp_path / "home") == table(tmp_path / "one")
    for row in other["trials"]:
        assert rows(tmp_path / "home" / row["run"]) == rows(tmp_path / "one" / row["run"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "runs").write_text("in the way")
    with pytest.raises(DiskError, match=r"cannot write .*full/runs"):  # fault07
        run_sweep(source, tmp_path / "full", "elsewhere")


def test_fault24_on_two_ray_workers_one_of_which_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    source, folder = file(tmp_path, FEW, epochs=40), tmp_path / "ray"
    arguments = ("sweep", source, "--out", str(folder), "--executor", "ray", "--address", "local", "--jobs", "2")
    process = children.start(children.fastcifar, tmp_path / "log", 0, *arguments)
    children.wait_for(
        lambda: training(folder) or process.exitcode is not None, 300
    )  # Ray starts slowly where others work
    found = training(folder)
    assert found is not None
    os.kill(found[1], signal.SIGKILL)
    assert children.wait_for_exit(process, 300) == 0, (tmp_path / "log").read_text()
    run_sweep(source, tmp_path / "one")
    assert_equal_sweeps(folder, tmp_path / "one")
    resumed = {run.parent.name: json.loads(run.read_text()).get("resumed") for run in folder.glob("runs/*/env.json")}
    assert [name for name, starts in resumed.items() if starts] == [found[0]]
    assert "seed 1: done" in (tmp_path / "log").read_text()


def test_fault18_without_ray_or_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"ray cannot be imported .*; pip install 'fastcifar\[sweep\]'"):
        run_sweep(file(tmp_path), tmp_path / "out", "ray")
    assert not (tmp_path / "out").exists()
