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

from fastcifar.cli.exit import warned
from fastcifar.device import optional
from fastcifar.errors import DeviceError, Interrupted, UsageError, UserError, first_line, out_of_memory, pick
from fastcifar.recipe import option
from fastcifar.sweep.sweep_spec import Trial

RETRIES = 3  # of a Ray task whose worker died
SAVING_S = 30  # a trial that was told to stop writes a checkpoint; and so may one of a sweep that was killed
RAY_REMEDY = "pip install 'fastcifar[sweep]', or use --on processes"
SHIPPED = ("recipe.toml", "env.json", "metrics.csv", "events.jsonl", "summary.json")  # from another machine's disk


@dataclass(frozen=True)
class How:
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
class Told:
    """What happened to a trial: `state` "running", "done", "pruned" or "failed" with its `reason`; its `summary`.

    `files`: what its run folder on another machine holds, to be kept here too.
    """

    trial: Trial
    state: str
    reason: str | None = None
    summary: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)


Events = Generator[Told, None, None]
Runner = Callable[[Iterator[Trial]], Events]


def in_process(how: How) -> Runner:
    """One after the other, here. A signal ends the trial with a checkpoint, and the sweep with it."""
    return _one_by_one


def processes(how: How) -> Runner:
    """Each in a process of its own, `jobs` at a time."""
    jobs = how.jobs or max(1, (os.cpu_count() or 1) // (how.cpus or 1))
    return partial(_side_by_side, slots=[{}] * jobs, how=how)


def gpus(how: How) -> Runner:
    """The same, each with one of the GPUs of this machine. Errors: `DeviceError` where there is none."""
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(how.trials_per_gpu) for gpu in _visible_gpus()]
    return partial(_side_by_side, slots=slots[: how.jobs], how=how)


def on_ray(how: How) -> Runner:
    """Each as a task of a Ray cluster, with its share of a GPU where the cluster has any.

    A task whose worker dies is tried again, and goes on from its checkpoint where the run folder is: on this machine,
    or on a file system that the machines share. Errors: `UsageError` without Ray, `DeviceError` without the cluster.
    """
    ray = optional("ray", RAY_REMEDY)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report itself to its makers
    asked: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if how.address == "local":
        cores = how.jobs and how.jobs * (how.cpus or 1)
        asked |= {"num_cpus": cores, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(how.address, **asked)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = first_line(error, type(error).__name__)
        raise DeviceError(
            f"--address {how.address}: {reason}", "start one by `ray start`, or --address local"
        ) from None
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, with another exit code
    return partial(_tasks, ray=ray, how=how)


# name -> what makes sure of the place, and returns what runs trials there: it tells of each that it is running, and
# then what came of it
PLACES: dict[str, Callable[[How], Runner]] = {
    "process": in_process,
    "processes": processes,
    "gpus": gpus,
    "ray": on_ray,
}
# field of How -> the places that have it
HAVING = {
    "jobs": ("processes", "gpus", "ray"),
    "cpus": ("processes", "gpus", "ray"),
    "trials_per_gpu": ("gpus", "ray"),
    "address": ("ray",),
}


def place(on: str, how: How) -> Runner:
    """What runs trials `on` a row of PLACES. Errors: `UsageError` for what the place does not have, and its own."""
    made = pick(PLACES, on, "place")
    for name, having in HAVING.items():
        if on not in having and getattr(how, name) != getattr(How(), name):
            raise UsageError(f"{option(name)}: --on {on} has none", f"leave it out, or use --on {' or '.join(having)}")
    return made(how)


def attempt(trial: Trial) -> Told:
    """Runs one trial from where it stands: anew, from its checkpoint, or not at all if it has its summary.

    What goes wrong is the trial's reason; only a signal's `Interrupted` is raised.
    """
    from fastcifar.sweep.study import reporter
    from fastcifar.training.run_dir import read_summary
    from fastcifar.training.train import train

    folder = Path(str(trial.recipe.out))
    try:
        _until_free(folder)
        sinks = [reporter(trial.ticket, trial.recipe.epochs)] if trial.ticket else []
        summary = read_summary(folder) or train(trial.recipe, trial.name, sinks=sinks)
    except Interrupted:
        raise
    except Exception as error:  # a bug in one trial is no reason to lose the others
        return Told(trial, "failed", _reason(error, folder))
    return Told(trial, "pruned" if summary["stop_reason"] == "pruned" else "done", summary=summary)


def _reason(error: Exception, folder: Path) -> str:
    """One line; of what is nobody's mistake, the traceback too, as error.txt in the run folder if it can be written."""
    known = error if isinstance(error, UserError) else out_of_memory(error)
    if known:
        return str(known)
    with suppress(OSError):
        (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"{type(error).__name__}: {first_line(error)}"


def _until_free(folder: Path) -> None:
    """Waits for a process that a killed sweep left behind, and that is writing its checkpoint."""
    from fastcifar.training.run_dir import hold

    until = time.monotonic() + SAVING_S
    while folder.is_dir():
        try:
            os.close(hold(folder))
            return
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _threads(how: How, at_a_time: int) -> int:
    """Threads of a trial: as asked, or an equal share of this process's."""
    import torch

    return how.cpus or max(1, torch.get_num_threads() // at_a_time)


def _one_by_one(trials: Iterator[Trial]) -> Events:
    from fastcifar.benchmark.bench import forget

    for trial in trials:
        yield Told(trial, "running")
        yield attempt(trial)
        forget()


def _side_by_side(trials: Iterator[Trial], slots: Sequence[dict[str, str]], how: How) -> Events:
    """A process for each trial, forked from a server that has imported torch. `slots`: the environment of each place.

    A process that dies is its trial's failure alone.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo", "fastcifar.training.train"])
    free, threads = list(slots), _threads(how, len(slots))
    busy: dict[Connection, tuple[Trial, Any, dict[str, str]]] = {}
    try:
        while True:
            while free and (trial := next(trials, None)):
                slot = free.pop(0)
                receiver, sender = server.Pipe(duplex=False)
                process = server.Process(target=_child, args=(trial, slot, threads, sender))
                process.start()
                sender.close()
                busy[receiver] = (trial, process, slot)
                yield Told(trial, "running")
            if not busy:
                return
            for receiver in wait(list(busy)):
                assert isinstance(receiver, Connection)
                trial, process, slot = busy.pop(receiver)
                free.append(slot)
                yield _received(trial, receiver, process)
    finally:
        for _, process, _ in busy.values():
            process.terminate()  # it writes a checkpoint
        for _, process, _ in busy.values():
            process.join(SAVING_S)


def _received(trial: Trial, receiver: Connection, process: Any) -> Told:
    """What the process of a trial said, or how it died."""
    try:
        state, reason, summary = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        state, reason, summary = "failed", f"its process ended by {how}", None
    process.join()
    return Told(trial, state, reason, summary)


def _child(trial: Trial, slot: dict[str, str], threads: int, sender: Connection) -> None:
    """A trial in a process of its own, which does not outlive the sweep's."""
    import torch

    os.environ.update(slot)
    torch.set_num_threads(threads)
    warnings.showwarning = warned
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        told = attempt(trial)
        sender.send((told.state, told.reason, told.summary))
    except Interrupted as error:
        sender.send(("failed", str(error), None))


def _end_with_parent() -> None:
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


def _tasks(trials: Iterator[Trial], ray: Any, how: How) -> Events:
    """As many tasks at a time as the cluster has room for, whose size is read anew as they end.

    Errors: `UsageError` for a cluster that has room for none, which Ray would wait for without end.
    """
    task = ray.remote(max_retries=RETRIES, retry_exceptions=[Interrupted])(_task)
    pending: dict[Any, Trial] = {}
    try:
        while True:
            cluster = ray.cluster_resources()
            share, room = _share(cluster, how)
            if not room and not pending:
                wanted = f"a trial takes {share['num_cpus']} cores, and the cluster has {cluster.get('CPU', 0):g}"
                raise UsageError(f"--on ray: {wanted}", "give fewer --cpus")
            while len(pending) < room and (trial := next(trials, None)):
                pending[task.options(**share).remote(_absolute(trial), how.cpus or 1, socket.gethostname())] = trial
                yield Told(trial, "running")
            if not pending:
                return
            (ready, *_), _ = ray.wait(list(pending), num_returns=1)
            trial = pending.pop(ready)
            try:
                told = ray.get(ready)
                yield replace(told, trial=trial)
            except ray.exceptions.RayError as error:
                yield Told(trial, "failed", f"{type(error).__name__} after {RETRIES} retries: {_last_line(error)}")
    finally:
        for reference in pending:
            ray.cancel(reference)  # SIGINT: it writes a checkpoint
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=SAVING_S)
        ray.shutdown()


def _share(resources: dict[str, float], how: How) -> tuple[dict[str, float], int]:
    """What a task takes of the cluster, and how many fit in at once."""
    share: dict[str, float] = {"num_cpus": how.cpus or 1}
    room = int(resources.get("CPU", 0) / share["num_cpus"])
    if resources.get("GPU"):
        share["num_gpus"] = 1 / how.trials_per_gpu
        room = min(room, int(resources["GPU"]) * how.trials_per_gpu)
    return share, min(room, how.jobs or room)


def _task(trial: Trial, threads: int, sweeps_host: str) -> Told:
    """A trial on a worker. Where its run folder is on another machine's disk, its small files travel."""
    import torch

    torch.set_num_threads(threads)
    told = attempt(trial)
    folder = Path(str(trial.recipe.out))
    if socket.gethostname() == sweeps_host:
        return told
    return replace(told, files={name: (folder / name).read_bytes() for name in SHIPPED if (folder / name).is_file()})


def _absolute(trial: Trial) -> Trial:
    """A worker may have another working directory."""
    out = str(Path(str(trial.recipe.out)).absolute())
    return replace(trial, recipe=trial.recipe.model_copy(update={"out": out}))


def _last_line(error: Exception) -> str:
    return next(reversed(str(error).strip().splitlines()), "")
