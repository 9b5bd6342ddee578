"""Measure the throughput of the workloads in `workloads.py`, relative to the limits of the device in `roofline.py`."""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from fastcifar.benchmark.roofline import measure_environment, measure_roofline, read_device_state
from fastcifar.benchmark.workloads import BENCHMARKS, STEP_BENCHMARKS, BenchmarkCase
from fastcifar.data import cifar
from fastcifar.device import peak_memory_bytes, process_times
from fastcifar.errors import DataError, DiskError, NonFiniteError, UsageError, lookup
from fastcifar.files import write_atomically
from fastcifar.format import format_short_number
from fastcifar.recipe import Recipe
from fastcifar.reporting.benchmark_tables import MACHINE_FIELDS, BenchDocument, BenchRow, DeviceLimits
from fastcifar.training.build import build_trainer
from fastcifar.training.fallback import reported_failures
from fastcifar.training.progress import print_lines
from fastcifar.training.resolve import Resolved, resolve
from fastcifar.training.trainer import Trainer

DEFAULT_BENCHMARKS = "loader,step,train"  # takes less than three minutes on two cores
DEFAULT_TRIAL_S = 2.0  # target duration of a trial, in seconds
WARM_UP_UNITS = 3  # units of work that run before the first trial
PROFILED_UNITS = 3  # units of work that a trace records

# execution mode -> the recipe options that it sets
EXECUTION_MODES: dict[str, dict[str, bool]] = {
    "eager": {"compile": False, "cuda_graph": False},
    "compiled": {"compile": True, "cuda_graph": False},
    "captured": {"compile": True, "cuda_graph": True},
}

# "arch", "batch_size" or "mode" (a key of `EXECUTION_MODES`) -> the values to measure
BenchGrid = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class TimedTrial:
    """One timed trial: number of images, elapsed seconds, and CPU seconds of all threads and worker processes."""

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
) -> BenchDocument:
    """Measure the throughput of `recipe` on this machine.

    Args:
        recipe: the recipe to measure; it trains on synthetic images, with a warning, if no data set is available.
        what: comma-separated keys of `BENCHMARKS`, or "all" for all of them.
        trials: number of timed trials of each benchmark.
        trace: file for a Chrome trace of a few units of work of the last benchmark, recorded after its trials.
        console: console for progress lines; None prints nothing.
        trial_s: approximate duration of a trial, in seconds.
        grid: option values to measure; all combinations are measured.

    Nothing is downloaded, and no file is written except `trace`. Raises `NonFiniteError` if the loss or a gradient is
    NaN or Inf, and the other `UserError`s of a training run.
    """
    assert trials > 0, trials
    for name in (names := what.split(",")):
        lookup({**BENCHMARKS, "all": BENCHMARKS["train"]}, name, "benchmark")
    names = list(BENCHMARKS) if "all" in names else names
    if trace and not trace.absolute().parent.is_dir():
        raise UsageError(f"--profile {trace}: the folder {trace.absolute().parent} does not exist", "create it first")
    if trace and trace.is_dir():
        raise UsageError(f"--profile {trace} is a folder", f"give the name of a file, such as {trace / 'trace.json'}")
    base = prepare_bench_recipe(recipe).model_dump()
    axes = [[(axis, value) for value in values] for axis, values in (grid or {}).items() if values]
    points = []
    for point in itertools.product(*axes):
        changes: dict[str, Any] = dict(point)
        changes |= lookup(EXECUTION_MODES, changes.pop("mode"), "mode") if "mode" in changes else {}
        points.append(resolve_without_validation(Recipe(**{**base, **changes})))
    rows: list[BenchRow] = []
    for resolved in points:
        measure_point(resolved, names, trials, trial_s, trace, rows, console)
        if resolved is not points[-1]:
            reset_compiler_and_memory()
    device = torch.device(points[0].execution.device)
    limits: dict[str, DeviceLimits] = {}
    for index, row in enumerate(rows):
        if row.precision:
            limits[row.precision] = limit = measure_roofline(device, row.precision)
            if row.tflop_per_s and row.gb_per_s:
                mfu, mbu = row.tflop_per_s / limit.matmul_tflop_per_s, row.gb_per_s / limit.copy_gb_per_s
                rows[index] = row.model_copy(update={"mfu": mfu, "mbu": mbu})
    environment = measure_environment(device.type)
    versions = {"python": environment.python, "cuda": environment.cuda, "cudnn": environment.cudnn}
    return BenchDocument(
        **environment.model_dump(include=set(MACHINE_FIELDS)),
        matmul_tflop_per_s=environment.matmul_tflop_per_s,
        versions=environment.versions | {name: str(version) for name, version in versions.items() if version},
        limits=limits or None,
        results=rows,
    )


def prepare_bench_recipe(recipe: Recipe) -> Recipe:
    """Return `recipe` with a fixed image size of 32x32.

    Synthetic images replace the default data set if it is not on disk. A data set specified by the recipe or by
    FASTCIFAR_DATA must exist.
    """
    recipe = recipe.model_copy(update={"image_size": "32"})
    if recipe.data or os.environ.get("FASTCIFAR_DATA"):
        return recipe
    try:
        with warnings.catch_warnings(action="ignore"):  # `build_trainer` loads the data set again, with warnings
            cifar.load_dataset(None, recipe.dataset, download=False)
    except DataError as error:
        warnings.warn(f"{error.problem}; using synthetic images instead", UserWarning, stacklevel=2)
        return recipe.model_copy(update={"data": "synthetic"})
    return recipe


def resolve_without_validation(recipe: Recipe) -> Resolved:
    """Resolve `recipe`, and leave out its validation split and the options that need one."""
    resolved = resolve(recipe)
    without_validation = {"val_size": 0, "eval_weights": "last", "patience": 0}
    return replace(resolved, recipe=resolved.recipe.model_copy(update=without_validation))


def reset_compiler_and_memory() -> None:
    """Free cached memory and compiled code; the compiler limits the number of variants it keeps of a function."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_point(
    resolved: Resolved,
    names: Sequence[str],
    trials: int,
    trial_s: float,
    trace: Path | None,
    rows: list[BenchRow],
    console: Console | None,
) -> None:
    """Measure the benchmarks `names` and append a row for each case whose settings are not yet in `rows`.

    The benchmark `loader`, for example, does not depend on the architecture, so it has a row for the first one only.
    """
    started = time.perf_counter()
    trainer = build_trainer(resolved, use_val_folder=False)
    setup_s = time.perf_counter() - started
    print_lines(console, [*trainer.summary_lines(), *trainer.execution.format_lines(), "compiling and warming up ..."])
    trainer.model.train()
    reset_peak_memory(trainer.device)
    needs_step = not STEP_BENCHMARKS.isdisjoint(names)
    started = time.perf_counter()
    if needs_step:
        trainer.optimize()
    step_s, step_peak = time.perf_counter() - started, peak_memory_bytes(trainer.device)
    for name in names:
        cases = list(BENCHMARKS[name](trainer))
        for case in cases:
            if case.settings in [row.settings for row in rows]:
                continue
            is_last = name == names[-1] and case is cases[-1]
            row, first_s = measure_case(case, trainer, trials, trial_s, trace if is_last else None)
            compile_s, peak = first_s, row.peak_memory_bytes
            if name in STEP_BENCHMARKS:
                compile_s = step_s
                if trainer.execution.cuda_graph:  # only the capture of the graph allocates memory, not its replays
                    peak = max(step_peak or 0, peak or 0)
            elif name == "loader" and needs_step:
                compile_s = None  # `optimize` also warms up the loader
            changes = {"setup_s": setup_s, "compile_s": compile_s, "peak_memory_bytes": peak}
            rows.append(row.model_copy(update=changes))
            print_lines(console, [f"{row.describe()}: {format_short_number(row.images_per_s)} images/s"])


def measure_case(
    case: BenchmarkCase, trainer: Trainer, num_trials: int, trial_s: float, trace: Path | None
) -> tuple[BenchRow, float]:
    """Return the result of a case and the seconds of its first unit of work; restore the state of the trainer."""
    with trainer.preserve_state(skip_updates=False), closing(case.workload) as work:
        trainer.meter.reset()
        reset_peak_memory(trainer.device)
        started = time.perf_counter()
        with reported_failures(trainer.execution, trainer.recipe):
            next(work)
        synchronize(trainer.device)
        first_s = time.perf_counter() - started
        trials = run_trials(work, num_trials, trainer, trial_s * case.relative_trial_s)
        peak = peak_memory_bytes(trainer.device)
        device_state = read_device_state(trainer.device, lambda: next(work))
        if trace:
            write_trace(work, trace, trainer.device)
        if not trainer.meter.compute().all_finite:
            raise NonFiniteError("the loss or a gradient became NaN or Inf in a trial", "use --precision fp32")
    images_per_s = statistics.median(trial.images_per_s for trial in trials)
    is_latency = case.settings.what == "infer" and case.settings.batch_size == 1
    values: dict[str, Any] = {**dict(case.settings), **device_state}
    flop, num_bytes = case.flop_per_image, case.bytes_per_image
    row = BenchRow(
        **values,
        images_per_s=images_per_s,
        cpu_us_per_image=statistics.median(trial.cpu_us_per_image for trial in trials),
        trials=[trial.images_per_s for trial in trials],
        latency_ms=1e3 / images_per_s if is_latency else None,
        flop_per_image=flop,
        tflop_per_s=flop and flop * images_per_s / 1e12,
        bytes_per_image=num_bytes,
        gb_per_s=num_bytes and num_bytes * images_per_s / 1e9,
        peak_memory_bytes=peak,
    )
    return row, first_s


def run_trials(workload: Iterator[int], trials: int, trainer: Trainer, trial_s: float) -> list[TimedTrial]:
    """Run `trials` trials of equal length, of about `trial_s` seconds each, after a warm-up."""
    for _ in range(WARM_UP_UNITS):
        next(workload)
    units = calibrate_units(workload, trainer, trial_s)
    return [time_units(workload, units, trainer.device) for _ in range(trials)]


def calibrate_units(workload: Iterator[int], trainer: Trainer, trial_s: float) -> int:
    """Return the number of units of `workload` that take about `trial_s` seconds.

    Numbers above one epoch are rounded to whole epochs, so that all trials do the same work.
    """
    units = 1
    while (seconds := time_units(workload, units, trainer.device).seconds) < trial_s / 10:
        units *= 2
    units = math.ceil(units * trial_s / seconds)
    epoch = trainer.loader.steps_per_epoch
    return units if units < epoch else round(units / epoch) * epoch


def time_units(workload: Iterator[int], units: int, device: torch.device) -> TimedTrial:
    """Time `units` units of `workload`; the device is idle at the start and at the end."""
    synchronize(device)
    started, cpu_start_s = time.perf_counter(), cpu_seconds()
    images = sum(itertools.islice(workload, units))
    synchronize(device)
    return TimedTrial(images, time.perf_counter() - started, cpu_seconds() - cpu_start_s)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory statistics of a GPU; those of a process on the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait until all kernels on a CUDA device have finished; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """Return the CPU seconds of all threads of this process and its workers; without /proc, of ended workers only."""
    os_times = os.times()
    worker_seconds = [
        times[0] for worker in multiprocessing.active_children() if (times := process_times(str(worker.pid)))
    ]
    return time.process_time() + os_times.children_user + os_times.children_system + sum(worker_seconds)


def write_trace(workload: Iterator[int], file: Path, device: torch.device) -> None:
    """Write a Chrome trace of a few units of `workload`, which Perfetto can open."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise a missing GPU is reported as an error
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        sum(itertools.islice(workload, PROFILED_UNITS))
        synchronize(device)
    try:
        with tempfile.TemporaryDirectory() as folder:  # `export_chrome_trace` ignores errors of the disk
            temporary_file = Path(folder) / file.name
            profiler.export_chrome_trace(str(temporary_file))
            write_atomically(file, temporary_file.read_bytes())
    except (OSError, RuntimeError) as error:
        raise DiskError(f"cannot write the trace {file}: {error}", "choose another --profile FILE") from None
