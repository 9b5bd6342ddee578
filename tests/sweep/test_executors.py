"""Executors: the results in one process, in processes and on Ray are equal, even if processes are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.errors import DiskError, UsageError
from fastcifar.recipe import Recipe
from fastcifar.sweep import executors
from fastcifar.sweep.executors import Executor, ExecutorOptions, TrialEvent, TrialEvents, gpu_executor
from fastcifar.sweep.sweep import prepare_sweep, run_sweep
from fastcifar.sweep.sweep_spec import SweepTrial
from tests.faults import children
from tests.faults.runs import rows
from tests.sweep.sweeps import assert_equal_sweeps, read_log_lines, trial_accuracies, trial_states, write_sweep_file

pytestmark = pytest.mark.xdist_group("processes")
TWO_LRS = "[grid]\nlr = [0.1, 0.02]\n"


def lock_owner(run: Path) -> int | None:
    """Return the process that has the run folder open, and thereby holds its lock."""
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == str(run):
                return int(entry.parts[2])
        except OSError:
            continue
    return None


def running_trial(folder: Path) -> tuple[str, int] | None:
    """Return a trial that has written a checkpoint and is still training, and its process ID."""
    for run in folder.glob("runs/*"):
        if (run / "checkpoints" / "last.pt").is_file() and not (run / "summary.json").is_file():
            process_id = lock_owner(run)
            if process_id:
                return run.name, process_id
    return None


@pytest.mark.slow
def test_processes_equal_one_process(tmp_path: Path) -> None:
    source = write_sweep_file(tmp_path, TWO_LRS)
    run_sweep(source, tmp_path / "one")
    document = run_sweep(source, tmp_path / "two", "processes", ExecutorOptions(jobs=2, cpus=1))
    assert_equal_sweeps(tmp_path / "two", tmp_path / "one")
    running = max_running = 0
    for line in read_log_lines(tmp_path / "two"):
        running += 1 if line["state"] == "running" else -1
        max_running = max(max_running, running)
    assert max_running == 2
    assert document.counts["done"] == 4


@pytest.mark.slow
def test_fault24_killed_trial_process_fails_only_its_trial_and_trials_end_with_the_sweep(tmp_path: Path) -> None:
    source, folder = write_sweep_file(tmp_path, TWO_LRS, epochs=9), tmp_path / "out"
    arguments = ("sweep", source, "--out", str(folder), "--executor", "processes", "--jobs", "2", "--cpus", "1")
    process = children.start(children.fastcifar, tmp_path / "log", 0, *arguments)
    children.wait_for(lambda: running_trial(folder))
    killed = running_trial(folder)
    assert killed is not None
    os.kill(killed[1], signal.SIGKILL)
    children.wait_for(lambda: "failed" in trial_states(folder).values())
    reasons = {line["trial"]: line["reason"] for line in read_log_lines(folder) if line["state"] == "failed"}
    assert reasons == {killed[0]: "the process ended with SIGKILL"}
    children.wait_for(lambda: running_trial(folder))
    second = running_trial(folder)
    assert second is not None
    os.kill(process.pid, signal.SIGKILL)
    children.wait_for_exit(process)
    children.wait_for(lambda: lock_owner(folder / "runs" / second[0]) is None, 30)  # terminated with its parent
    assert run_sweep(source, folder, retry_failed=True).counts["done"] == 4
    run_sweep(source, tmp_path / "one")
    assert_equal_sweeps(folder, tmp_path / "one")


def test_gpu_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpu_slots(**options: Any) -> list[str]:
        executor: Any = gpu_executor(ExecutorOptions(**options))
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in executor.keywords["slots"]]

    assert gpu_slots(trials_per_gpu=2) == ["0", "1", "0", "1"]
    assert gpu_slots(trials_per_gpu=2, jobs=3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert gpu_slots() == ["5", "GPU-ab"]


def test_as_many_trials_run_at_once_as_cores_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "usable_cpu_count", lambda: 6)
    cases = [
        (ExecutorOptions(), 6),
        (ExecutorOptions(cpus=4), 1),
        (ExecutorOptions(cpus=2), 3),
        (ExecutorOptions(jobs=7), 7),
    ]
    for options, jobs in cases:
        executor: Any = executors.multiprocess_executor(options)
        assert len(executor.keywords["slots"]) == jobs


def test_paths_for_a_worker_on_another_machine_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(out="sweep/run", data="images", init="runs/first")
    sent = executors._with_absolute_paths(SweepTrial("a", "a", {}, "custom", recipe)).recipe
    assert [sent.out, sent.data, sent.init] == [f"{tmp_path}/{path}" for path in ("sweep/run", "images", "runs/first")]
    names = Recipe(out="/run", data="synthetic:100", init="pretrained:speed94")
    assert executors._with_absolute_paths(SweepTrial("a", "a", {}, "custom", names)).recipe == names


def test_resources_of_a_ray_task() -> None:
    for cluster, options, resources, max_tasks in (
        ({"CPU": 8.0, "GPU": 2.0}, ExecutorOptions(trials_per_gpu=3), {"num_cpus": 1, "num_gpus": 1 / 3}, 6),
        ({"CPU": 8.0, "GPU": 2.0}, ExecutorOptions(cpus=4), {"num_cpus": 4, "num_gpus": 1.0}, 2),
        ({"CPU": 8.0}, ExecutorOptions(cpus=3), {"num_cpus": 3}, 2),
        ({"CPU": 8.0}, ExecutorOptions(jobs=5), {"num_cpus": 1}, 5),
    ):
        assert executors._resources_per_task(cluster, options) == (resources, max_tasks)


def test_fault24_cluster_that_is_too_small_for_a_trial_is_an_error(tmp_path: Path) -> None:
    class Cluster:
        """Stub of the part of Ray that is used before the first task."""

        shutdown_calls = 0

        def remote(self, **_: object) -> object:
            return lambda task: task

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 2.0}

        def shutdown(self) -> None:
            self.shutdown_calls += 1

    cluster, trials = Cluster(), iter(prepare_sweep(write_sweep_file(tmp_path), None, "ray", None, {})[2])
    with pytest.raises(UsageError, match="a trial needs 4 cores, and the cluster has 2; lower --cpus"):
        next(executors._run_on_ray(trials, cluster, ExecutorOptions(cpus=4, jobs=1)))
    assert cluster.shutdown_calls == 1


@pytest.mark.parametrize(
    ("executor", "option", "remedy"),
    [
        ("process", {"jobs": 2}, "processes or gpus or ray"),
        ("process", {"cpus": 1}, "processes or gpus or ray"),
        ("processes", {"trials_per_gpu": 2}, "gpus or ray"),
        ("gpus", {"address": "local"}, "ray"),
    ],
)
def test_fault15_options_that_an_executor_does_not_support_are_refused(
    tmp_path: Path, executor: str, option: dict[str, Any], remedy: str
) -> None:
    flag = "--" + next(iter(option)).replace("_", "-")
    words = f"{flag} is not supported by --executor {executor}; leave it out, or use --executor {remedy}$"
    with pytest.raises(UsageError, match=words):
        run_sweep(write_sweep_file(tmp_path), tmp_path / "out", executor, ExecutorOptions(**option))
    assert not (tmp_path / "out").exists()


def test_fault07_failure_reason_if_the_traceback_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "error.txt").mkdir()
    assert executors._failure_reason(RuntimeError("a bug\nin two lines"), tmp_path) == "RuntimeError: a bug"


@pytest.mark.slow
def test_files_of_a_run_on_another_machine_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remote_executor(options: ExecutorOptions) -> Executor:
        def run(trials: Iterator[SweepTrial]) -> TrialEvents:
            for trial in trials:
                recipe = trial.recipe.model_copy(update={"out": str(tmp_path / "remote" / trial.key)})
                yield TrialEvent(trial, "running")
                yield replace(executors._ray_task(replace(trial, recipe=recipe), [], 1, "another host"), trial=trial)

        return run

    monkeypatch.setitem(executors.EXECUTORS, "remote", remote_executor)
    source = write_sweep_file(tmp_path, TWO_LRS)
    remote, local = run_sweep(source, tmp_path / "copies", "remote"), run_sweep(source, tmp_path / "one")
    assert remote.counts["done"] == 4
    assert trial_accuracies(tmp_path / "copies") == trial_accuracies(tmp_path / "one")
    for row in local.trials:
        assert rows(tmp_path / "copies" / row.folder) == rows(tmp_path / "one" / row.folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "runs").write_text("a file instead of a folder")
    with pytest.raises(DiskError, match=r"cannot write .*full/runs"):  # fault07
        run_sweep(source, tmp_path / "full", "remote")


LISTEN = """
import glob, os, sys
from fastcifar.sweep.executors import ExecutorOptions, ray_executor
ray_executor(ExecutorOptions(jobs=1, address="local"))
import ray
pids = {}
for path in glob.glob("/proc/[0-9]*/fd/*"):
    try:
        pids[os.readlink(path)] = int(path.split("/")[2])
    except OSError:
        continue
def parents(pid):
    while pid > 1:
        yield pid
        pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in open(table).readlines()[1:]:
        columns = line.split()
        pid = pids.get(f"socket:[{columns[9]}]")
        if columns[3] == "0A" and pid and os.getpid() in parents(pid):
            print("listens", columns[1].split(":")[0])
ray.shutdown()
"""


@pytest.mark.slow
def test_fault35_a_local_ray_cluster_listens_on_loopback_only() -> None:
    """/proc/net prints addresses as words in the order of bytes of the machine: 127.0.0.1, also as IPv6."""
    pytest.importorskip("ray", reason="Ray is not installed")
    run = subprocess.run([sys.executable, "-c", LISTEN], capture_output=True, text=True, timeout=120, check=False)
    addresses = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("listens")]
    assert len(addresses) >= 2, run.stderr
    assert set(addresses) <= {"0100007F", "0000000000000000FFFF00000100007F"}


@pytest.mark.slow
def test_fault24_killed_ray_worker_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # with Ray's default of 15, other tests slow the trials down
    source, folder = write_sweep_file(tmp_path, TWO_LRS, epochs=15), tmp_path / "ray"
    arguments = ("sweep", source, "--out", str(folder), "--executor", "ray", "--address", "local", "--jobs", "2")
    process = children.start(children.fastcifar, tmp_path / "log", 0, *arguments)
    # a long timeout, because Ray starts slowly on a busy machine
    children.wait_for(lambda: running_trial(folder) or process.exitcode is not None, 900)
    killed = running_trial(folder)
    assert killed is not None
    os.kill(killed[1], signal.SIGKILL)
    assert children.wait_for_exit(process, 900) == 0, (tmp_path / "log").read_text()
    run_sweep(source, tmp_path / "one")
    assert_equal_sweeps(folder, tmp_path / "one")
    resumed = {run.parent.name: json.loads(run.read_text()).get("resumed") for run in folder.glob("runs/*/env.json")}
    assert [name for name, starts in resumed.items() if starts] == [killed[0]]
    assert "seed 1: done" in (tmp_path / "log").read_text()


def test_fault18_missing_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"ray cannot be imported .*; pip install '\.\[sweep\]'"):
        run_sweep(write_sweep_file(tmp_path), tmp_path / "out", "ray")
    assert not (tmp_path / "out").exists()
