"""The clock: what this machine reaches at the loader, the step, training, inference and single convolutions.

Build is free and reported, prepare (compilation, warm-up) is reported, measure is n timed trials, all of them kept.
What is timed is in works.py, what the device could do at most in limits.py. Nothing is downloaded, nothing is written
but the trace that was asked for.
"""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from fastcifar.benchmark.roofline import Stopwatch, limits, state
from fastcifar.benchmark.workloads import STEPPING, WHATS, Job
from fastcifar.data import cifar
from fastcifar.device import Choice, choose, describe, versions
from fastcifar.errors import DataError, DiskError, NonFiniteError, UsageError, pick
from fastcifar.plotting import short
from fastcifar.recipe import Recipe
from fastcifar.training.cuda_graph import untouched
from fastcifar.training.progress import say
from fastcifar.training.summary import peak_memory
from fastcifar.training.trainer import Parts, assemble

DEFAULT = "loader,step,train"  # on two cores under three minutes
TRIAL_S = 2.0  # seconds that a trial should take
WARM_UP = 3  # units of work before the first trial
PROFILED = 3  # units of work in a trace

# name -> the machine's knobs that it stands for
MODES: dict[str, dict[str, bool]] = {
    "eager": {"compile": False, "cuda_graph": False},
    "compiled": {"compile": True, "cuda_graph": False},
    "captured": {"compile": True, "cuda_graph": True},
}


Grid = Mapping[str, Sequence[str]]  # "arch", "batch_size" and "mode" (a row of MODES) -> the values to go through


@dataclass(frozen=True)
class Trial:
    """One timed stretch of work: its images, its seconds on the device, and those of all threads together."""

    images: int
    seconds: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_us_per_image(self) -> float:
        return 1e6 * self.cpu_s / self.images


def bench(
    recipe: Recipe,
    what: str = DEFAULT,
    trials: int = 5,
    trace: Path | None = None,
    console: Console | None = None,
    trial_s: float = TRIAL_S,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Measures `recipe` on this machine: `{"device", "versions", "limits", "results"}`, rows of what was asked.

    what     rows of WHATS with commas between them, or "all"
    trace    where a chrome trace of a few units of the last of them is written, after the trials
    trial_s  about how many seconds a trial takes
    grid     knobs to go through, every value with every other
    Errors: `UserError`s as for a run; without a data set it warns and takes synthetic images.
    """
    assert trials > 0, trials
    names = list(WHATS) if what == "all" else what.split(",")
    for name in names:
        pick({**WHATS, "all": WHATS["train"]}, name, "benchmark")
    if trace and not trace.absolute().parent.is_dir():
        raise UsageError(f"--profile {trace}: no folder {trace.absolute().parent}", "make it first")
    points = over(on_some_data(recipe), grid or {})
    choices = [choose(point) for point in points]
    results: list[dict[str, Any]] = []
    for point, choice in zip(points, choices, strict=True):
        wanted = Wanted(names, trials, trial_s, trace if point is points[-1] else None)
        results += at(point, choice, wanted, results, console)
        if point is not points[-1]:
            forget()
    device = torch.device(choices[0].device)
    precisions = dict.fromkeys(row["precision"] for row in results if "precision" in row)
    found = {precision: limits(device, precision) for precision in precisions}
    results = [row | shares(row, found) for row in results]
    about = {"device": describe(device.type), "versions": {**versions(), **runtime(device)}}
    return {**about, **({"limits": found} if found else {}), "results": results}


@dataclass(frozen=True)
class Wanted:
    """What is to be measured at each point of a grid; `trace`: the file, at its last point."""

    names: list[str]
    trials: int
    trial_s: float
    trace: Path | None


def over(recipe: Recipe, grid: Grid) -> list[Recipe]:
    """`recipe` at every point of `grid`. Errors: `UsageError` for a value that a knob or MODES does not have."""
    axes = [[(axis, value) for value in values] for axis, values in grid.items() if values]
    points = []
    for point in itertools.product(*axes):
        changes: dict[str, Any] = dict(point)
        changes |= pick(MODES, changes.pop("mode"), "mode") if "mode" in changes else {}
        points.append(Recipe.checked({**recipe.model_dump(), **changes}))
    return points


def on_some_data(recipe: Recipe) -> Recipe:
    """`recipe` without a validation split, which nothing here reads, and with one size of image, to which the costs of
    `works` belong; on synthetic images where there is no data set.

    A data set that is named, by the recipe or by FASTCIFAR_DATA, has to be there: only the absence of any is made up
    for, and never by a download.
    """
    recipe = recipe.model_copy(update={"val_size": 0, "weights": "last", "image_size": "32"})
    if recipe.data or os.environ.get("FASTCIFAR_DATA"):
        return recipe
    try:
        with warnings.catch_warnings(action="ignore"):  # `assemble` loads it too, and warns
            cifar.load(None, recipe.dataset, download=False)
    except DataError as error:
        warnings.warn(f"{error.problem}: measuring on synthetic images", UserWarning, stacklevel=2)
        return recipe.model_copy(update={"data": "synthetic"})
    return recipe


def forget() -> None:
    """The last point's memory, and its compiled code: a compiler keeps only so many variants of one function."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def at(
    recipe: Recipe, choice: Choice, wanted: Wanted, known: Sequence[dict[str, Any]], console: Console | None
) -> list[dict[str, Any]]:
    """The rows of one point of the grid, without those that are `known` from another."""
    started = time.perf_counter()
    parts = assemble(recipe, choice)
    setup_s = time.perf_counter() - started
    say(console, [*parts.lines(), *parts.choice.lines(), "preparing (compilation, warm-up) ..."])
    found = []
    for row in rows(parts, wanted, known):
        found.append(row | {"setup_s": setup_s})
        say(console, [told(row)])
    return found


def rows(parts: Parts, wanted: Wanted, known: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each thing wanted of `parts`, as soon as it is measured."""
    parts.model.train()
    started = time.perf_counter()
    forget_peak(parts.device)
    step = parts.fast_step() if STEPPING & set(wanted.names) else None
    step_s, step_peak = time.perf_counter() - started, peak_memory(parts.device)
    for name in wanted.names:
        jobs = list(WHATS[name](parts, step))
        for job in jobs:
            named = {"what": name, **job.named}
            if any(named.items() <= row.items() for row in known):
                continue  # it does not depend on what differs: a loader has no network
            trace = wanted.trace if name == wanted.names[-1] and job is jobs[-1] else None
            measured, first_s = clocked(job, parts, wanted, trace)
            if name != "loader" or step is None:  # it was prepared with the step
                measured["compile_s"] = step_s if name in STEPPING else first_s
            if name in STEPPING and parts.choice.cuda_graph:  # a replay takes none: it was taken by the capture
                measured["peak_memory_bytes"] = max(step_peak, measured["peak_memory_bytes"])
            yield named | measured


def clocked(job: Job, parts: Parts, wanted: Wanted, trace: Path | None) -> tuple[dict[str, Any], float]:
    """The measured part of a row, and the seconds of its first unit of work. The run's state is left as it was."""
    with untouched(parts.tensors(), parts.device), closing(job.work) as work:
        parts.meter.reset()
        forget_peak(parts.device)
        started = time.perf_counter()
        next(work)
        synchronise(parts.device)
        first_s = time.perf_counter() - started
        trials = measure(work, wanted.trials, parts, wanted.trial_s * job.share)
        peak = peak_memory(parts.device)
        doing = state(parts.device, lambda: next(work))
        if trace:
            write_trace(work, trace, parts.device)
        if not parts.meter.read().finite:
            raise NonFiniteError("the loss or a gradient was not finite in a trial", "use --precision fp32")
    return figures(job, trials) | {"peak_memory_bytes": peak} | doing, first_s


def figures(job: Job, trials: list[Trial]) -> dict[str, Any]:
    """The median of the trials, every trial in images/s, and what the costs of an image make of it."""
    speed = statistics.median(trial.images_per_s for trial in trials)
    found: dict[str, Any] = {
        "images_per_s": speed,
        "cpu_us_per_image": statistics.median(trial.cpu_us_per_image for trial in trials),
        "trials": [trial.images_per_s for trial in trials],
    }
    if job.latency:
        found["latency_ms"] = 1e3 / speed
    if job.flop:
        found |= {"flop_per_image": job.flop, "tflop_per_s": job.flop * speed / 1e12}
    if job.bytes:
        found |= {"bytes_per_image": job.bytes, "gb_per_s": job.bytes * speed / 1e9}
    return found


def shares(row: dict[str, Any], found: dict[str, dict[str, float]]) -> dict[str, float]:
    """A row's shares of what the device was measured to reach: `mfu` of its matrix product, `mbu` of its copy."""
    of = {"mfu": ("tflop_per_s", "matmul_tflop_per_s"), "mbu": ("gb_per_s", "copy_gb_per_s")}
    return {
        name: row[reached] / found[row["precision"]][most] for name, (reached, most) in of.items() if reached in row
    }


def told(row: dict[str, Any]) -> str:
    """A row as progress: `step (se68, 128): 170 images/s`."""
    about = ", ".join(str(row[name]) for name in ("arch", "batch_size", "conv", "direction") if name in row)
    return f"{row['what']} ({about}): {short(row['images_per_s'])} images/s"


def runtime(device: torch.device) -> dict[str, str]:
    """Versions that no package has: Python's, and on a GPU those of CUDA and cuDNN."""
    gpu = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"python": platform.python_version(), **(gpu if device.type == "cuda" else {})}


def measure(work: Iterator[int], trials: int, parts: Parts, trial_s: float) -> list[Trial]:
    """`trials` equal stretches of `work`, each of about `trial_s` seconds, after a warm-up."""
    for _ in range(WARM_UP):
        next(work)
    units = fitting(work, parts, trial_s)
    return [timed(work, units, parts.device) for _ in range(trials)]


def fitting(work: Iterator[int], parts: Parts, trial_s: float) -> int:
    """How many units of `work` take about `trial_s` seconds; beyond an epoch whole epochs, so that trials are equal."""
    units = 1
    while (seconds := timed(work, units, parts.device).seconds) < trial_s / 10:
        units *= 2
    units = math.ceil(units * trial_s / seconds)
    epoch = parts.loader.steps_per_epoch
    return units if units < epoch else round(units / epoch) * epoch


def timed(work: Iterator[int], units: int, device: torch.device) -> Trial:
    """`units` of `work` by the clock, from an idle device to an idle device."""
    clock, cpu = Stopwatch(device), cpu_seconds()
    images = sum(itertools.islice(work, units))
    return Trial(images, clock.seconds(), cpu_seconds() - cpu)


def forget_peak(device: torch.device) -> None:
    """`peak_memory` on a GPU begins anew; a process has but one peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronise(device: torch.device) -> None:
    """Waits until the device has nothing left to do; a CPU never has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """CPU seconds of all threads of this process, of its workers (a DataLoader's) that ended, and of those that live
    where /proc shows them."""
    ended, ticks = os.times(), 0
    for worker in multiprocessing.active_children():
        with suppress(OSError):
            fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, counted after the name
    return time.process_time() + ended.children_user + ended.children_system + ticks / os.sysconf("SC_CLK_TCK")


def write_trace(work: Iterator[int], file: Path, device: torch.device) -> None:
    """A few units of `work` as a chrome trace (open it in Perfetto). Errors: `DiskError`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        sum(itertools.islice(work, PROFILED))
        synchronise(device)
    try:
        seen.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        raise DiskError(f"cannot write the trace {file}: {error}", "give another --profile FILE") from None
