"""Executors of a sweep, which run its trials in this process, in several processes, one per GPU, or on a Ray cluster.

An executor takes trials from an iterator as it has capacity, and yields two events for each: "running" and the result.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcifar.device import extra_remedy, import_optional, usable_cpu_count
from fastcifar.errors import (
    DeviceError,
    Interrupted,
    UsageError,
    UserError,
    as_memory_error,
    first_message_line,
    lookup,
    print_warning,
)
from fastcifar.files import is_locked, read_regular_file
from fastcifar.format import option_flag
from fastcifar.sweep.sweep_spec import SweepTrial

if TYPE_CHECKING:
    from fastcifar.models.imports import ModelSource
    from fastcifar.reporting.records import TrialState
    from fastcifar.training.summary import RunSummary

RAY_MAX_RETRIES = 3  # for a Ray task whose worker process dies
CHECKPOINT_TIMEOUT_S = 30  # time for a trial that is being terminated to write its checkpoint
# files of a run folder that are copied from the disk of another machine
RETURNED_FILES = ("recipe.toml", "env.json", "metrics.csv", "events.jsonl", "summary.json")


@dataclass(frozen=True)
class ExecutorOptions:
    """Resources that an executor may use."""

    jobs: int | None = None  # number of concurrent trials; None runs as many as fit
    cpus: int | None = None  # threads per trial; None divides the cores equally
    trials_per_gpu: int = 1
    address: str = "auto"  # address of a Ray cluster; "auto" finds a running one on this machine, "local" starts one


@dataclass(frozen=True)
class TrialEvent:
    """A change of the state of a trial."""

    trial: SweepTrial
    state: TrialState
    reason: str | None = None  # why the trial failed
    summary: RunSummary | None = None  # of a finished run
    files: dict[str, bytes] = field(default_factory=dict)  # of the run folder, if the trial ran on another machine


TrialEvents = Generator[TrialEvent, None, None]
Executor = Callable[[Iterator[SweepTrial]], TrialEvents]


def multiprocess_executor(options: ExecutorOptions) -> Executor:
    """Run each trial in its own process, `jobs` at a time."""
    jobs = options.jobs or max(1, usable_cpu_count() // (options.cpus or 1))
    return partial(_run_in_processes, slots=[{}] * jobs, cpus=options.cpus)


def gpu_executor(options: ExecutorOptions) -> Executor:
    """Run each trial in its own process on one of the GPUs of this machine. Raises `DeviceError` if there is none."""
    import torch

    if not torch.cuda.is_available():
        remedy = "use --executor processes, or see `fastcifar doctor`"
        raise DeviceError("--executor gpus: no CUDA device is visible", remedy)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus * options.trials_per_gpu]
    return partial(_run_in_processes, slots=slots[: options.jobs], cpus=options.cpus)


def ray_executor(options: ExecutorOptions) -> Executor:
    """Run each trial as a task of a Ray cluster, with its share of a GPU if the cluster has GPUs.

    A task whose worker process dies is retried; it resumes if it can read its run folder.
    """
    if options.address == "local":  # otherwise, Ray listens on all interfaces, and runs the code that it receives
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported, on every system
    ray = import_optional("ray", f"{extra_remedy('ray')}, or use --executor processes")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends usage statistics
    cores = options.jobs and options.jobs * (options.cpus or 1)
    local_options = {"num_cpus": cores, "include_dashboard": False} if options.address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(options.address, log_to_driver=False, logging_level="error", **local_options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = first_message_line(error, type(error).__name__)
        remedy = "start a cluster with `ray start`, or use --address local"
        raise DeviceError(f"--address {options.address}: {reason}", remedy) from None
    signal.signal(signal.SIGTERM, handler)  # Ray installs its own handler, which has another exit code
    return partial(_run_on_ray, ray=ray, options=options)


# name -> function that checks the options and returns an executor
EXECUTORS: dict[str, Callable[[ExecutorOptions], Executor]] = {
    "process": lambda options: _run_in_this_process,
    "processes": multiprocess_executor,
    "gpus": gpu_executor,
    "ray": ray_executor,
}
# field of `ExecutorOptions` -> the executors that support it
EXECUTORS_BY_OPTION = {
    "jobs": ("processes", "gpus", "ray"),
    "cpus": ("processes", "gpus", "ray"),
    "trials_per_gpu": ("gpus", "ray"),
    "address": ("ray",),
}


def build_executor(executor: str, options: ExecutorOptions) -> Executor:
    """Return the executor named `executor`. Raises `UsageError` if it does not support one of the options."""
    factory = lookup(EXECUTORS, executor, "executor")
    for name, supported in EXECUTORS_BY_OPTION.items():
        if executor not in supported and getattr(options, name) != getattr(ExecutorOptions(), name):
            problem = f"{option_flag(name)} is not supported by --executor {executor}"
            raise UsageError(problem, f"leave it out, or use --executor {' or '.join(supported)}")
    return factory(options)


def run_trial(trial: SweepTrial, sources: Sequence[ModelSource] = ()) -> TrialEvent:
    """Run one trial from the start or from its checkpoint, or only return its result if its run is finished.

    `sources`: what another process has imported, and this one has to import first. An error, except `Interrupted`,
    becomes the reason of a failed trial.
    """
    from fastcifar.models.imports import import_models
    from fastcifar.sweep.study import optuna_epoch_callback
    from fastcifar.training.summary import read_summary
    from fastcifar.training.train import train

    folder = Path(str(trial.recipe.out))
    deadline = time.monotonic() + CHECKPOINT_TIMEOUT_S
    try:
        for source in sources:
            import_models(*source)
        while is_locked(folder) and time.monotonic() < deadline:
            time.sleep(0.2)  # the trial process of a killed sweep may still be writing its checkpoint
        callbacks = [optuna_epoch_callback(trial.trial_ref, trial.recipe.epochs)] if trial.trial_ref else []
        summary = read_summary(folder) or train(trial.recipe, trial.recipe_name, callbacks=callbacks)
    except Interrupted:
        raise
    except Exception as error:  # a bug in one trial must not end the other trials
        return TrialEvent(trial, "failed", _failure_reason(error, folder))
    return TrialEvent(trial, "pruned" if summary.stop_reason == "pruned" else "done", summary=summary)


def _failure_reason(error: Exception, folder: Path) -> str:
    """Return the error as one line; write the traceback of an unexpected error to error.txt if possible."""
    user_error = error if isinstance(error, UserError) else as_memory_error(error)
    if user_error:
        return str(user_error)
    with suppress(OSError):
        (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{type(error).__name__}: {first_message_line(error)}"


def _run_in_this_process(trials: Iterator[SweepTrial]) -> TrialEvents:
    """Run trials one after the other; a signal writes a checkpoint and ends the sweep."""
    from fastcifar.benchmark.bench import reset_compiler_and_memory

    for trial in trials:
        yield TrialEvent(trial, "running")
        yield run_trial(trial)
        reset_compiler_and_memory()


def _run_in_processes(trials: Iterator[SweepTrial], slots: Sequence[dict[str, str]], cpus: int | None) -> TrialEvents:
    """Run each trial in a process. If the process dies, only its trial fails.

    `slots` holds the environment variables of each concurrent process.
    """
    import torch

    from fastcifar.models.imports import imported_sources

    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    server: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        server.set_forkserver_preload(["torch._dynamo", "fastcifar.training.train"])
    free_slots, threads = list(slots), cpus or max(1, torch.get_num_threads() // len(slots))
    running: dict[Connection, tuple[SweepTrial, Any, dict[str, str]]] = {}
    try:
        while True:
            while free_slots and (trial := next(trials, None)):
                slot = free_slots.pop(0)
                receiver, sender = server.Pipe(duplex=False)
                process = server.Process(target=_child_main, args=(trial, imported_sources(), slot, threads, sender))
                process.start()
                sender.close()
                running[receiver] = (trial, process, slot)
                yield TrialEvent(trial, "running")
            if not running:
                return
            for receiver in wait(list(running)):
                assert isinstance(receiver, Connection)
                trial, process, slot = running.pop(receiver)
                free_slots.append(slot)
                try:
                    event = receiver.recv()
                    process.join()
                except EOFError:
                    process.join()
                    code = process.exitcode
                    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    event = TrialEvent(trial, "failed", f"the process ended with {cause}")
                yield event
    finally:
        for _, process, _ in running.values():
            process.terminate()  # the process writes a checkpoint before it exits
        for _, process, _ in running.values():
            process.join(CHECKPOINT_TIMEOUT_S)


def _child_main(
    trial: SweepTrial, sources: Sequence[ModelSource], slot: dict[str, str], threads: int, sender: Connection
) -> None:
    """Run a trial in a child process, which terminates when its parent does."""
    import torch

    def terminate_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    os.environ.update(slot)
    torch.set_num_threads(threads)
    warnings.showwarning = print_warning
    threading.Thread(target=terminate_with_parent, daemon=True).start()
    try:
        sender.send(run_trial(trial, sources))
    except Interrupted as error:
        sender.send(TrialEvent(trial, "failed", str(error)))


def _with_absolute_paths(trial: SweepTrial) -> SweepTrial:
    """Return `trial` for a worker, which may have another working directory."""
    from fastcifar.data.cifar import absolute_data_path
    from fastcifar.training.fine_tuning import absolute_init_path

    recipe = trial.recipe
    paths = {
        "out": os.path.abspath(str(recipe.out)),
        "data": absolute_data_path(recipe.data),
        "init": absolute_init_path(recipe.init),
    }
    return replace(trial, recipe=recipe.model_copy(update=paths))


def _run_on_ray(trials: Iterator[SweepTrial], ray: Any, options: ExecutorOptions) -> TrialEvents:
    """Run as many concurrent tasks as fit, at most `jobs`. The cluster size is read again whenever a task ends."""
    from fastcifar.models.imports import imported_sources

    task = ray.remote(max_retries=RAY_MAX_RETRIES, retry_exceptions=[Interrupted])(_ray_task)
    pending: dict[Any, SweepTrial] = {}
    try:
        while True:
            cluster = ray.cluster_resources()
            resources, max_tasks = _resources_per_task(cluster, options)
            if not max_tasks and not pending:  # Ray would wait forever
                cores = f"a trial needs {resources['num_cpus']} cores, and the cluster has {cluster.get('CPU', 0):g}"
                raise UsageError(f"--executor ray: {cores}", "lower --cpus")
            while len(pending) < max_tasks and (trial := next(trials, None)):
                arguments = (_with_absolute_paths(trial), imported_sources(), options.cpus or 1, socket.gethostname())
                pending[task.options(**resources).remote(*arguments)] = trial
                yield TrialEvent(trial, "running")
            if not pending:
                return
            (ready, *_), _ = ray.wait(list(pending), num_returns=1)
            trial = pending.pop(ready)
            try:
                yield replace(ray.get(ready), trial=trial)
            except ray.exceptions.RayError as error:
                last_line = next(reversed(str(error).strip().splitlines()), "")
                reason = f"{type(error).__name__} after {RAY_MAX_RETRIES} retries: {last_line}"
                yield TrialEvent(trial, "failed", reason)
    finally:
        for reference in pending:
            ray.cancel(reference)  # sends SIGINT, on which the trial writes a checkpoint
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=CHECKPOINT_TIMEOUT_S)
        ray.shutdown()


def _resources_per_task(cluster: dict[str, float], options: ExecutorOptions) -> tuple[dict[str, float], int]:
    """Return the resources of a task and the number of concurrent tasks that fit on the cluster."""
    resources: dict[str, float] = {"num_cpus": options.cpus or 1}
    max_tasks = int(cluster.get("CPU", 0) / resources["num_cpus"])
    if cluster.get("GPU"):
        resources["num_gpus"] = 1 / options.trials_per_gpu
        max_tasks = min(max_tasks, int(cluster["GPU"]) * options.trials_per_gpu)
    return resources, min(max_tasks, options.jobs or max_tasks)


def _ray_task(trial: SweepTrial, sources: Sequence[ModelSource], threads: int, driver_host: str) -> TrialEvent:
    """Run a trial on a worker; on another machine, return the files of its run folder."""
    import torch

    torch.set_num_threads(threads)
    event = run_trial(trial, sources)
    if socket.gethostname() == driver_host:
        return event
    folder = Path(str(trial.recipe.out))
    files = {name: read_regular_file(folder / name) for name in RETURNED_FILES if os.path.isfile(folder / name)}
    return replace(event, files=files)
