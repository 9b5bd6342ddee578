"""The clock: images a second of the loader, of the training step, and of both together.

Build is free and reported, prepare (compilation, warm-up) is reported, measure is n timed trials, all of them kept.
What is measured is what `train` runs: the parts of `parts.assemble`. Nothing is downloaded, nothing is written but
the trace that was asked for.
"""

from __future__ import annotations

import inspect
import itertools
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from fastcifar.data import cifar
from fastcifar.data.loaders import LOADERS
from fastcifar.device import choose, describe, versions
from fastcifar.errors import DataError, DiskError, UsageError, pick
from fastcifar.models import macs
from fastcifar.recipe import Recipe
from fastcifar.training.capture import untouched
from fastcifar.training.parts import Parts, assemble
from fastcifar.training.progress import say
from fastcifar.training.step import Step
from fastcifar.training.train import require_finite

Work = Iterator[int]  # one unit of work (a batch, a step) each time it is asked; the number of its images comes out

TRIAL_S = 2.0  # seconds that a trial should take
WARM_UP = 3  # units of work before the first trial
PROFILED = 3  # units of work in a trace


@dataclass(frozen=True)
class Trial:
    """One timed stretch of work: its images, its seconds on the wall, and those of all threads together."""

    images: int
    seconds: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_us_per_image(self) -> float:
        return 1e6 * self.cpu_s / self.images


def loader_work(parts: Parts, _: Step | None) -> Work:
    """The loader's batches, epoch after epoch, with nothing done to them."""
    for epoch in itertools.count():
        for _images, labels in parts.loader.batches(epoch):
            yield len(labels)


def step_work(parts: Parts, step: Step | None) -> Work:
    """The training step on one random batch that lies on the device.

    At a learning rate of 0: the work is the same, and a network that learnt its one batch by heart would compute with
    other numbers in the last trial than in the first.
    """
    assert step is not None
    size, random = parts.recipe.batch_size, torch.Generator().manual_seed(parts.recipe.seed)
    images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=random).to(parts.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(len(parts.data.classes), (size,), generator=random).to(parts.device)
    drawn = parts.example()[2:]
    parts.optimizer.set_lr(0.0)
    for done in itertools.count(1):
        step(images, labels, *drawn)
        parts.optimizer.between_steps(done)
        yield size


def train_work(parts: Parts, step: Step | None) -> Work:
    """Training, end to end: the loader's batches through the step, as the loop of `train` does it."""
    assert step is not None
    done = 0
    for epoch in itertools.count():
        for batch in parts.batches(epoch):
            parts.optimizer.set_lr(parts.schedule.lr_at(done))
            step(*batch)
            done += 1
            parts.optimizer.between_steps(done)
            yield len(batch[0])


# name -> the work, and the knobs that a row of results names because the figure depends on them
WHATS: dict[str, tuple[Callable[[Parts, Step | None], Work], tuple[str, ...]]] = {
    "loader": (loader_work, ("loader", "augment", "batch_size", "workers", "compiled", "data")),
    "step": (step_work, ("arch", "batch_size", "precision", "compiled", "cuda_graph")),
    "train": (
        train_work,
        ("arch", "loader", "augment", "batch_size", "workers", "precision", "compiled", "cuda_graph", "data"),
    ),
}


def bench(
    recipe: Recipe,
    what: str = "all",
    trials: int = 5,
    trace: Path | None = None,
    console: Console | None = None,
    trial_s: float = TRIAL_S,
) -> dict[str, Any]:
    """Measures `recipe` on this machine: `{"device", "versions", "results"}`, a row for each of what was asked.

    what     a row of WHATS, or "all"
    trace    where a chrome trace of a few units of the last of them is written, after the trials
    trial_s  about how many seconds a trial takes
    Errors: `UserError`s as for a run; without a data set it warns and takes synthetic images.
    """
    assert trials > 0, trials
    names = list(WHATS) if what == "all" else [what]
    works = {name: pick({**WHATS, "all": WHATS["train"]}, name, "benchmark") for name in names}
    if trace and not trace.absolute().parent.is_dir():
        raise UsageError(f"--profile {trace}: no folder {trace.absolute().parent}", "make it first")
    choice = choose(recipe)
    started = time.perf_counter()
    parts = assemble(on_some_data(recipe), choice)
    setup_s = time.perf_counter() - started
    say(console, [*parts.lines(), *parts.choice.lines(), "preparing (compilation, warm-up) ..."])
    parts.model.train()
    started = time.perf_counter()
    step = None if names == ["loader"] else parts.fast_step()
    if step is None:
        next(parts.loader.batches(0))
    compile_s = time.perf_counter() - started
    results = []
    for name, (work_of, knobs) in works.items():
        with untouched(parts.tensors(), parts.device):
            parts.meter.reset()
            work = work_of(parts, step)
            measured = measure(work, trials, parts, trial_s)
            if trace and name == names[-1]:
                write_trace(work, trace, parts.device)
            seen = parts.meter.read()
            require_finite(seen, parts)
        prepared = {"setup_s": setup_s} | ({"compile_s": compile_s} if name != "loader" or step is None else {})
        results.append(row(name, parts, knobs, measured) | prepared)
        say(console, [f"{name}: {results[-1]['images_per_s']:,.0f} images/s"])
    return {"device": describe(choice.device), "versions": versions(), "results": results}


def on_some_data(recipe: Recipe) -> Recipe:
    """`recipe` without a validation split, which nothing here reads; on synthetic images where there is no data set.

    A data set that is named, by the recipe or by FASTCIFAR_DATA, has to be there: only the absence of any is made up
    for, and never by a download.
    """
    recipe = recipe.model_copy(update={"val_size": 0, "weights": "last"})
    if recipe.data or os.environ.get("FASTCIFAR_DATA"):
        return recipe
    try:
        with warnings.catch_warnings(action="ignore"):  # `assemble` loads it too, and warns
            cifar.load(None, recipe.dataset, download=False)
    except DataError as error:
        warnings.warn(f"{error.problem}: measuring on synthetic images", UserWarning, stacklevel=2)
        return recipe.model_copy(update={"data": "synthetic"})
    return recipe


def row(name: str, parts: Parts, knobs: tuple[str, ...], trials: list[Trial]) -> dict[str, Any]:
    """One of the results: the `knobs` it depends on, the median of its trials, and every trial in images/s."""
    recipe, choice = parts.recipe, parts.choice
    known = {
        **recipe.model_dump(include={"arch", "augment", "batch_size"}),
        "loader": choice.loader,
        "precision": choice.precision,
        "compiled": choice.compile,
        "cuda_graph": choice.cuda_graph,
        "data": parts.data.source,
    }
    if "workers" in inspect.signature(LOADERS[choice.loader]).parameters:
        known["workers"] = recipe.workers
    speed = statistics.median(trial.images_per_s for trial in trials)
    measured: dict[str, Any] = {"what": name, **{knob: known[knob] for knob in knobs if knob in known}}
    measured["images_per_s"] = speed
    measured["cpu_us_per_image"] = statistics.median(trial.cpu_us_per_image for trial in trials)
    measured["trials"] = [trial.images_per_s for trial in trials]
    if name == "step":  # a backward pass costs two forward passes, and a multiply-accumulate is two operations
        measured["tflop_per_s"] = 6 * macs(parts.model) * speed / 1e12
    return measured


def measure(work: Work, trials: int, parts: Parts, trial_s: float) -> list[Trial]:
    """`trials` equal stretches of `work`, each of about `trial_s` seconds, after a warm-up."""
    for _ in range(WARM_UP):
        next(work)
    units = fitting(work, parts, trial_s)
    return [timed(work, units, parts.device) for _ in range(trials)]


def fitting(work: Work, parts: Parts, trial_s: float) -> int:
    """How many units of `work` take about `trial_s` seconds; beyond an epoch whole epochs, so that trials are equal."""
    units = 1
    while (seconds := timed(work, units, parts.device).seconds) < trial_s / 10:
        units *= 2
    units = math.ceil(units * trial_s / seconds)
    epoch = parts.loader.steps_per_epoch
    return units if units < epoch else round(units / epoch) * epoch


def timed(work: Work, units: int, device: torch.device) -> Trial:
    """`units` of `work` by the clock, from an idle device to an idle device."""
    synchronise(device)
    wall, cpu = time.perf_counter(), cpu_seconds()
    images = sum(itertools.islice(work, units))
    synchronise(device)
    return Trial(images, time.perf_counter() - wall, cpu_seconds() - cpu)


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


def write_trace(work: Work, file: Path, device: torch.device) -> None:
    """A few units of `work` as a chrome trace (open it in Perfetto). Errors: `DiskError`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        sum(itertools.islice(work, PROFILED))
        synchronise(device)
    try:
        seen.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        raise DiskError(f"cannot write the trace {file}: {error}", "give another --profile FILE") from None
