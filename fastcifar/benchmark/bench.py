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
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from fastcifar.benchmark.roofline import DeviceTimer, measure_roofline, read_device_state
from fastcifar.benchmark.workloads import BENCHMARKS, STEP_BENCHMARKS, BenchmarkCase
from fastcifar.data import cifar
from fastcifar.device import (
    ExecutionPlan,
    choose_execution,
    describe_device,
    package_versions,
    peak_memory_bytes,
    process_times,
)
from fastcifar.errors import DataError, DiskError, NonFiniteError, UsageError, lookup
from fastcifar.format import format_short_number
from fastcifar.recipe import Recipe
from fastcifar.reporting.benchmark_tables import setting_texts
from fastcifar.training.build import build_trainer
from fastcifar.training.progress import print_lines
from fastcifar.training.rng_state import preserve_state
from fastcifar.training.trainer import Trainer

DEFAULT_BENCHMARKS = "loader,step,train"  # on two cores under three minutes
DEFAULT_TRIAL_S = 2.0  # seconds that a trial should take
WARM_UP_UNITS = 3  # units of work before the first trial
PROFILED_UNITS = 3  # units of work in a trace

# name -> the machine's knobs that it stands for
EXECUTION_MODES: dict[str, dict[str, bool]] = {
    "eager": {"compile": False, "cuda_graph": False},
    "compiled": {"compile": True, "cuda_graph": False},
    "captured": {"compile": True, "cuda_graph": True},
}


BenchGrid = Mapping[str, Sequence[str]]  # "arch", "batch_size" and "mode" (a row of MODES) -> the values to go through


@dataclass(frozen=True)
class TimedTrial:
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
    what: str = DEFAULT_BENCHMARKS,
    trials: int = 5,
    trace: Path | None = None,
    console: Console | None = None,
    trial_s: float = DEFAULT_TRIAL_S,
    grid: BenchGrid | None = None,
) -> dict[str, Any]:
    """Measures `recipe` on this machine: `{"device", "versions", "limits", "results"}`, rows of what was asked.

    what     rows of WHATS with commas between them, or "all"
    trace    where a chrome trace of a few units of the last of them is written, after the trials
    trial_s  about how many seconds a trial takes
    grid     knobs to go through, every value with every other
    Errors: `UserError`s as for a run; without a data set it warns and takes synthetic images.
    """
    assert trials > 0, trials
    names = list(BENCHMARKS) if what == "all" else what.split(",")
    for name in names:
        lookup({**BENCHMARKS, "all": BENCHMARKS["train"]}, name, "benchmark")
    if trace and not trace.absolute().parent.is_dir():
        raise UsageError(f"--profile {trace}: no folder {trace.absolute().parent}", "make it first")
    points = expand_grid(prepare_bench_recipe(recipe), grid or {})
    choices = [choose_execution(point) for point in points]
    results: list[dict[str, Any]] = []
    for point, choice in zip(points, choices, strict=True):
        wanted = MeasurementOptions(names, trials, trial_s, trace if point is points[-1] else None)
        results += measure_point(point, choice, wanted, results, console)
        if point is not points[-1]:
            reset_compiler_and_memory()
    device = torch.device(choices[0].device)
    precisions = dict.fromkeys(row["precision"] for row in results if "precision" in row)
    found = {precision: measure_roofline(device, precision) for precision in precisions}
    results = [row | compute_utilization(row, found) for row in results]
    about = {"device": describe_device(device.type), "versions": {**package_versions(), **runtime_versions(device)}}
    return {**about, **({"limits": found} if found else {}), "results": results}


@dataclass(frozen=True)
class MeasurementOptions:
    """What is to be measured at each point of a grid; `trace`: the file, at its last point."""

    benchmarks: list[str]
    trials: int
    trial_s: float
    trace: Path | None


def expand_grid(recipe: Recipe, grid: BenchGrid) -> list[Recipe]:
    """`recipe` at every point of `grid`. Errors: `UsageError` for a value that a knob or MODES does not have."""
    axes = [[(axis, value) for value in values] for axis, values in grid.items() if values]
    points = []
    for point in itertools.product(*axes):
        changes: dict[str, Any] = dict(point)
        changes |= lookup(EXECUTION_MODES, changes.pop("mode"), "mode") if "mode" in changes else {}
        points.append(Recipe.from_dict({**recipe.model_dump(), **changes}))
    return points


def prepare_bench_recipe(recipe: Recipe) -> Recipe:
    """`recipe` without a validation split, which nothing here reads, and with one size of image, to which the costs of
    `works` belong; on synthetic images where there is no data set.

    A data set that is named, by the recipe or by FASTCIFAR_DATA, has to be there: only the absence of any is made up
    for, and never by a download.
    """
    recipe = recipe.model_copy(update={"val_size": 0, "eval_weights": "last", "image_size": "32"})
    if recipe.data or os.environ.get("FASTCIFAR_DATA"):
        return recipe
    try:
        with warnings.catch_warnings(action="ignore"):  # `assemble` loads it too, and warns
            cifar.load_dataset(None, recipe.dataset, download=False)
    except DataError as error:
        warnings.warn(f"{error.problem}: measuring on synthetic images", UserWarning, stacklevel=2)
        return recipe.model_copy(update={"data": "synthetic"})
    return recipe


def reset_compiler_and_memory() -> None:
    """The last point's memory, and its compiled code: a compiler keeps only so many variants of one function."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_point(
    recipe: Recipe,
    execution: ExecutionPlan,
    options: MeasurementOptions,
    known_rows: Sequence[dict[str, Any]],
    console: Console | None,
) -> list[dict[str, Any]]:
    """The rows of one point of the grid, without those that are `known` from another."""
    started = time.perf_counter()
    parts = build_trainer(recipe, execution)
    setup_s = time.perf_counter() - started
    print_lines(
        console, [*parts.summary_lines(), *parts.execution.format_lines(), "preparing (compilation, warm-up) ..."]
    )
    found = []
    for row in measure_benchmarks(parts, options, known_rows):
        found.append(row | {"setup_s": setup_s})
        print_lines(console, [format_bench_row(row)])
    return found


def measure_benchmarks(
    trainer: Trainer, options: MeasurementOptions, known_rows: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each thing wanted of `parts`, as soon as it is measured."""
    trainer.model.train()
    started = time.perf_counter()
    reset_peak_memory(trainer.device)
    step = trainer.build_train_step() if STEP_BENCHMARKS & set(options.benchmarks) else None
    step_s, step_peak = time.perf_counter() - started, peak_memory_bytes(trainer.device)
    for name in options.benchmarks:
        jobs = list(BENCHMARKS[name](trainer, step))
        for job in jobs:
            named = {"what": name, **job.settings}
            if any(named.items() <= row.items() for row in known_rows):
                continue  # it does not depend on what differs: a loader has no network
            trace = options.trace if name == options.benchmarks[-1] and job is jobs[-1] else None
            measured, first_s = measure_case(job, trainer, options, trace)
            if name != "loader" or step is None:  # it was prepared with the step
                measured["compile_s"] = step_s if name in STEP_BENCHMARKS else first_s
            if (
                name in STEP_BENCHMARKS and trainer.execution.cuda_graph
            ):  # a replay takes none: it was taken by the capture
                measured["peak_memory_bytes"] = max(step_peak or 0, measured["peak_memory_bytes"])
            yield named | measured


def measure_case(
    case: BenchmarkCase, trainer: Trainer, options: MeasurementOptions, trace_file: Path | None
) -> tuple[dict[str, Any], float]:
    """The measured part of a row, and the seconds of its first unit of work. The run's state is left as it was."""
    with preserve_state(trainer.state_tensors(), trainer.device), closing(case.workload) as work:
        trainer.meter.reset()
        reset_peak_memory(trainer.device)
        started = time.perf_counter()
        next(work)
        synchronize(trainer.device)
        first_s = time.perf_counter() - started
        trials = run_trials(work, options.trials, trainer, options.trial_s * case.trial_s_factor)
        peak = peak_memory_bytes(trainer.device)
        doing = read_device_state(trainer.device, lambda: next(work))
        if trace_file:
            write_trace(work, trace_file, trainer.device)
        if not trainer.meter.compute().is_finite:
            raise NonFiniteError("the loss or a gradient was not finite in a trial", "use --precision fp32")
    return summarize_trials(case, trials) | {"peak_memory_bytes": peak} | doing, first_s


def summarize_trials(case: BenchmarkCase, trials: list[TimedTrial]) -> dict[str, Any]:
    """The median of the trials, every trial in images/s, and what the costs of an image make of it."""
    speed = statistics.median(trial.images_per_s for trial in trials)
    found: dict[str, Any] = {
        "images_per_s": speed,
        "cpu_us_per_image": statistics.median(trial.cpu_us_per_image for trial in trials),
        "trials": [trial.images_per_s for trial in trials],
    }
    if case.reports_latency:
        found["latency_ms"] = 1e3 / speed
    if case.flop_per_image:
        found |= {"flop_per_image": case.flop_per_image, "tflop_per_s": case.flop_per_image * speed / 1e12}
    if case.bytes_per_image:
        found |= {"bytes_per_image": case.bytes_per_image, "gb_per_s": case.bytes_per_image * speed / 1e9}
    return found


def compute_utilization(row: dict[str, Any], rooflines: dict[str, dict[str, float]]) -> dict[str, float]:
    """A row's shares of what the device was measured to reach: `mfu` of its matrix product, `mbu` of its copy."""
    of = {"mfu": ("tflop_per_s", "matmul_tflop_per_s"), "mbu": ("gb_per_s", "copy_gb_per_s")}
    return {
        name: row[reached] / rooflines[row["precision"]][most] for name, (reached, most) in of.items() if reached in row
    }


def format_bench_row(row: dict[str, Any]) -> str:
    """A row as progress: `step (se68, batch 128): 170 images/s`."""
    texts = setting_texts(row)
    about = ", ".join(texts[name] for name in ("arch", "batch_size", "conv", "direction") if name in texts)
    return f"{row['what']} ({about}): {format_short_number(row['images_per_s'])} images/s"


def runtime_versions(device: torch.device) -> dict[str, str]:
    """Versions that no package has: Python's, and on a GPU those of CUDA and cuDNN."""
    gpu = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"python": platform.python_version(), **(gpu if device.type == "cuda" else {})}


def run_trials(workload: Iterator[int], trials: int, trainer: Trainer, trial_s: float) -> list[TimedTrial]:
    """`trials` equal stretches of `work`, each of about `trial_s` seconds, after a warm-up."""
    for _ in range(WARM_UP_UNITS):
        next(workload)
    units = calibrate_units(workload, trainer, trial_s)
    return [time_units(workload, units, trainer.device) for _ in range(trials)]


def calibrate_units(workload: Iterator[int], trainer: Trainer, trial_s: float) -> int:
    """How many units of `work` take about `trial_s` seconds; beyond an epoch whole epochs, so that trials are equal."""
    units = 1
    while (seconds := time_units(workload, units, trainer.device).seconds) < trial_s / 10:
        units *= 2
    units = math.ceil(units * trial_s / seconds)
    epoch = trainer.loader.steps_per_epoch
    return units if units < epoch else round(units / epoch) * epoch


def time_units(workload: Iterator[int], units: int, device: torch.device) -> TimedTrial:
    """`units` of `work` by the clock, from an idle device to an idle device."""
    clock, cpu = DeviceTimer(device), cpu_seconds()
    images = sum(itertools.islice(workload, units))
    return TimedTrial(images, clock.elapsed_s(), cpu_seconds() - cpu)


def reset_peak_memory(device: torch.device) -> None:
    """`peak_memory` on a GPU begins anew; a process has but one peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Waits until the device has nothing left to do; a CPU never has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """CPU seconds of all threads of this process, of its workers (a DataLoader's) that ended, and of those that live
    where the system shows them."""
    ended = os.times()
    living = [times[0] for worker in multiprocessing.active_children() if (times := process_times(str(worker.pid)))]
    return time.process_time() + ended.children_user + ended.children_system + sum(living)


def write_trace(workload: Iterator[int], file: Path, device: torch.device) -> None:
    """A few units of `work` as a chrome trace (open it in Perfetto). Errors: `DiskError`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as seen:
        sum(itertools.islice(workload, PROFILED_UNITS))
        synchronize(device)
    try:
        seen.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        raise DiskError(f"cannot write the trace {file}: {error}", "give another --profile FILE") from None
