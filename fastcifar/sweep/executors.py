"""Where the trials of a sweep run: in this process, in several, one a GPU, or as tasks on a Ray cluster.

A place takes trials one by one, as it has room, and tells what happens to each. It decides nothing about a trial, and
the sweep's ledger is not its business; run folders alone say how far a trial has come.
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
from typing import Any

from fastcifar.device import as_memory_error, import_optional
from fastcifar.errors import (
    DeviceError,
    Interrupted,
    UsageError,
    UserError,
    first_message_line,
    lookup,
    print_warning,
)
from fastcifar.files import lock_folder
from fastcifar.format import option_flag
from fastcifar.sweep.sweep_spec import SweepTrial

RAY_MAX_RETRIES = 3  # of a Ray task whose worker died
CHECKPOINT_TIMEOUT_S = (
    30  # a trial that was told to stop writes a checkpoint; and so may one of a sweep that was killed
)
RAY_REMEDY = "pip install 'fastcifar[sweep]', or use --on processes"
RETURNED_FILES = (
    "recipe.toml",
    "env.json",
    "metrics.csv",
    "events.jsonl",
    "summary.json",
)  # from another machine's disk


@dataclass(frozen=True)
class ExecutorOptions:
    """How much of a place a sweep takes.

    jobs            trials at a time; None is as many as there is room for
    cpus            threads of a trial; None shares the cores out
    trials_per_gpu  trials that share a GPU
    address         of a Ray cluster: "auto" finds the one that runs here, "local" starts one
    """

    jobs: int | None = None
    cpus: int | None = None
    trials_per_gpu: int = 1
    address: str = "auto"


@dataclass(frozen=True)
class TrialEvent:
    """What happened to a trial: `state` "running", "done", "pruned" or "failed" with its `reason`; its `summary`.

    `files`: what its run folder on another machine holds, to be kept here too.
    """

    trial: SweepTrial
    state: str
    reason: str | None = None
    summary: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)


TrialEvents = Generator[TrialEvent, None, None]
Executor = Callable[[Iterator[SweepTrial]], TrialEvents]


def in_process_executor(options: ExecutorOptions) -> Executor:
    """One after the other, here. A signal ends the trial with a checkpoint, and the sweep with it."""
    return _run_sequentially


def multiprocess_executor(options: ExecutorOptions) -> Executor:
    """Each in a process of its own, `jobs` at a time."""
    jobs = options.jobs or max(1, (os.cpu_count() or 1) // (options.cpus or 1))
    return partial(_run_in_processes, slots=[{}] * jobs, options=options)


def gpu_executor(options: ExecutorOptions) -> Executor:
    """The same, each with one of the GPUs of this machine. Errors: `DeviceError` where there is none."""
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(options.trials_per_gpu) for gpu in _visible_gpus()]
    return partial(_run_in_processes, slots=slots[: options.jobs], options=options)


def ray_executor(options: ExecutorOptions) -> Executor:
    """Each as a task of a Ray cluster, with its share of a GPU where the cluster has any.

    A task whose worker dies is tried again, and goes on from its checkpoint where the run folder is: on this machine,
    or on a file system that the machines share. Errors: `UsageError` without Ray, `DeviceError` without the cluster.
    """
    ray = import_optional("ray", RAY_REMEDY)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report itself to its makers
    asked: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if options.address == "local":
        cores = options.jobs and options.jobs * (options.cpus or 1)
        asked |= {"num_cpus": cores, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(options.address, **asked)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = first_message_line(error, type(error).__name__)
        raise DeviceError(
            f"--address {options.address}: {reason}", "start one by `ray start`, or --address local"
        ) from None
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, with another exit code
    return partial(_run_on_ray, ray=ray, options=options)


# name -> what makes sure of the place, and returns what runs trials there: it tells of each that it is running, and
# then what came of it
EXECUTORS: dict[str, Callable[[ExecutorOptions], Executor]] = {
    "process": in_process_executor,
    "processes": multiprocess_executor,
    "gpus": gpu_executor,
    "ray": ray_executor,
}
# field of How -> the places that have it
EXECUTORS_BY_OPTION = {
    "jobs": ("processes", "gpus", "ray"),
    "cpus": ("processes", "gpus", "ray"),
    "trials_per_gpu": ("gpus", "ray"),
    "address": ("ray",),
}


def build_executor(executor: str, options: ExecutorOptions) -> Executor:
    """What runs trials `on` a row of PLACES. Errors: `UsageError` for what the place does not have, and its own."""
    made = lookup(EXECUTORS, executor, "place")
    for name, having in EXECUTORS_BY_OPTION.items():
        if executor not in having and getattr(options, name) != getattr(ExecutorOptions(), name):
            raise UsageError(
                f"{option_flag(name)}: --on {executor} has none", f"leave it out, or use --on {' or '.join(having)}"
            )
    return made(options)


def run_trial(trial: SweepTrial) -> TrialEvent:
    """Runs one trial from where it stands: anew, from its checkpoint, or not at all if it has its summary.

    What goes wrong is the trial's reason; only a signal's `Interrupted` is raised.
    """
    from fastcifar.sweep.study import optuna_epoch_callback
    from fastcifar.training.run_dir import read_summary
    from fastcifar.training.train import train

    folder = Path(str(trial.recipe.out))
    try:
        _wait_until_unlocked(folder)
        sinks = [optuna_epoch_callback(trial.trial_ref, trial.recipe.epochs)] if trial.trial_ref else []
        summary = read_summary(folder) or train(trial.recipe, trial.recipe_name, callbacks=sinks)
    except Interrupted:
        raise
    except Exception as error:  # a bug in one trial is no reason to lose the others
        return TrialEvent(trial, "failed", _failure_reason(error, folder))
    return TrialEvent(trial, "pruned" if summary["stop_reason"] == "pruned" else "done", summary=summary)


def _failure_reason(error: Exception, folder: Path) -> str:
    """One line; of what is nobody's mistake, the traceback too, as error.txt in the run folder if it can be written."""
    known = error if isinstance(error, UserError) else as_memory_error(error)
    if known:
        return str(known)
    with suppress(OSError):
        (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{type(error).__name__}: {first_message_line(error)}"


def _wait_until_unlocked(folder: Path) -> None:
    """Waits for a process that a killed sweep left behind, and that is writing its checkpoint."""
    until = time.monotonic() + CHECKPOINT_TIMEOUT_S
    while folder.is_dir():
        try:
            lock_folder(folder).release()
            return
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _threads_per_trial(options: ExecutorOptions, concurrent_trials: int) -> int:
    """Threads of a trial: as asked, or an equal share of this process's."""
    import torch

    return options.cpus or max(1, torch.get_num_threads() // concurrent_trials)


def _run_sequentially(trials: Iterator[SweepTrial]) -> TrialEvents:
    from fastcifar.benchmark.bench import reset_compiler_and_memory

    for trial in trials:
        yield TrialEvent(trial, "running")
        yield run_trial(trial)
        reset_compiler_and_memory()


def _run_in_processes(
    trials: Iterator[SweepTrial], slots: Sequence[dict[str, str]], options: ExecutorOptions
) -> TrialEvents:
    """A process for each trial, forked from a server that has imported torch, or where the system cannot fork started
    anew. `slots`: the environment of each place.

    A process that dies is its trial's failure alone.
    """
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    server: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        server.set_forkserver_preload(["torch._dynamo", "fastcifar.training.train"])
    free, threads = list(slots), _threads_per_trial(options, len(slots))
    busy: dict[Connection, tuple[SweepTrial, Any, dict[str, str]]] = {}
    try:
        while True:
            while free and (trial := next(trials, None)):
                slot = free.pop(0)
                receiver, sender = server.Pipe(duplex=False)
                process = server.Process(target=_child_main, args=(trial, slot, threads, sender))
                process.start()
                sender.close()
                busy[receiver] = (trial, process, slot)
                yield TrialEvent(trial, "running")
            if not busy:
                return
            for receiver in wait(list(busy)):
                assert isinstance(receiver, Connection)
                trial, process, slot = busy.pop(receiver)
                free.append(slot)
                yield _receive_event(trial, receiver, process)
    finally:
        for _, process, _ in busy.values():
            process.terminate()  # it writes a checkpoint
        for _, process, _ in busy.values():
            process.join(CHECKPOINT_TIMEOUT_S)


def _receive_event(trial: SweepTrial, receiver: Connection, process: Any) -> TrialEvent:
    """What the process of a trial said, or how it died."""
    try:
        state, reason, summary = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        state, reason, summary = "failed", f"its process ended by {how}", None
    process.join()
    return TrialEvent(trial, state, reason, summary)


def _child_main(trial: SweepTrial, slot: dict[str, str], threads: int, sender: Connection) -> None:
    """A trial in a process of its own, which does not outlive the sweep's."""
    import torch

    os.environ.update(slot)
    torch.set_num_threads(threads)
    warnings.showwarning = print_warning
    threading.Thread(target=_terminate_with_parent, daemon=True).start()
    try:
        told = run_trial(trial)
        sender.send((told.state, told.reason, told.summary))
    except Interrupted as error:
        sender.send(("failed", str(error), None))


def _terminate_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = listed.split(",") if listed else [str(index) for index in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        raise DeviceError("--on gpus: no CUDA device is visible", "use --on processes, or see `fastcifar doctor`")
    return found


def _run_on_ray(trials: Iterator[SweepTrial], ray: Any, options: ExecutorOptions) -> TrialEvents:
    """As many tasks at a time as the cluster has room for, whose size is read anew as they end.

    Errors: `UsageError` for a cluster that has room for none, which Ray would wait for without end.
    """
    task = ray.remote(max_retries=RAY_MAX_RETRIES, retry_exceptions=[Interrupted])(_ray_task)
    pending: dict[Any, SweepTrial] = {}
    try:
        while True:
            cluster = ray.cluster_resources()
            share, room = _resources_per_task(cluster, options)
            if not room and not pending:
                wanted = f"a trial takes {share['num_cpus']} cores, and the cluster has {cluster.get('CPU', 0):g}"
                raise UsageError(f"--on ray: {wanted}", "give fewer --cpus")
            while len(pending) < room and (trial := next(trials, None)):
                pending[
                    task.options(**share).remote(_with_absolute_out(trial), options.cpus or 1, socket.gethostname())
                ] = trial
                yield TrialEvent(trial, "running")
            if not pending:
                return
            (ready, *_), _ = ray.wait(list(pending), num_returns=1)
            trial = pending.pop(ready)
            try:
                told = ray.get(ready)
                yield replace(told, trial=trial)
            except ray.exceptions.RayError as error:
                yield TrialEvent(
                    trial,
                    "failed",
                    f"{type(error).__name__} after {RAY_MAX_RETRIES} retries: {_last_error_line(error)}",
                )
    finally:
        for reference in pending:
            ray.cancel(reference)  # SIGINT: it writes a checkpoint
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=CHECKPOINT_TIMEOUT_S)
        ray.shutdown()


def _resources_per_task(resources: dict[str, float], options: ExecutorOptions) -> tuple[dict[str, float], int]:
    """What a task takes of the cluster, and how many fit in at once."""
    share: dict[str, float] = {"num_cpus": options.cpus or 1}
    room = int(resources.get("CPU", 0) / share["num_cpus"])
    if resources.get("GPU"):
        share["num_gpus"] = 1 / options.trials_per_gpu
        room = min(room, int(resources["GPU"]) * options.trials_per_gpu)
    return share, min(room, options.jobs or room)


def _ray_task(trial: SweepTrial, threads: int, driver_host: str) -> TrialEvent:
    """A trial on a worker. Where its run folder is on another machine's disk, its small files travel."""
    import torch

    torch.set_num_threads(threads)
    told = run_trial(trial)
    folder = Path(str(trial.recipe.out))
    if socket.gethostname() == driver_host:
        return told
    return replace(
        told, files={name: (folder / name).read_bytes() for name in RETURNED_FILES if (folder / name).is_file()}
    )


def _with_absolute_out(trial: SweepTrial) -> SweepTrial:
    """A worker may have another working directory."""
    out = str(Path(str(trial.recipe.out)).absolute())
    return replace(trial, recipe=trial.recipe.model_copy(update={"out": out}))


def _last_error_line(error: Exception) -> str:
    return next(reversed(str(error).strip().splitlines()), "")
