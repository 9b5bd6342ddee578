"""Estimates, from a few measured steps, of the time and memory of a whole run."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import TypedDict

import torch

from fastcifar.data.cifar import Split
from fastcifar.device import peak_memory_bytes
from fastcifar.errors import UsageError
from fastcifar.models import count_macs
from fastcifar.recipe import MAX_EPOCHS, Recipe
from fastcifar.training import trackers
from fastcifar.training.build import build_trainer
from fastcifar.training.evaluate import EVAL_BATCH_SIZE, predict_logits
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.resolve import resolve
from fastcifar.training.run_dir import Clock
from fastcifar.training.trainer import Trainer

TIMED_STEPS = 5  # the first of them is not counted
TIME_BUDGET_MARGIN = 0.05  # share of the budget kept for checkpoints and for steps slower than those measured

# Speedup (1 to 5 %) and extra compile time (100 s) of max-autotune-no-cudagraphs that others measured on convolutions
AUTOTUNE_SPEEDUP, AUTOTUNE_EXTRA_COMPILE_S = 0.03, 100
MAX_STEP_S = 1.0  # a step of a run that can profit from autotuning is assumed to take at most this long
# TorchInductor has its own kernels for convolutions and matrix products, between which autotuning chooses, only for
# GPUs with at least this many multiprocessors (torch._inductor.utils.is_big_gpu).
MIN_AUTOTUNE_MULTIPROCESSORS = 68


class DryRunEstimate(TypedDict):
    """The JSON output of `train --dry-run`. In `seconds`, `setup` and `compile` are measured, the others estimated."""

    dry_run: bool
    arch: str
    params: int
    macs: int
    epochs: int
    steps: int
    step_s: float
    images_per_s: float
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    chosen: list[str]  # lines that describe the run


@dataclass(frozen=True)
class StepTiming:
    """Seconds of a training step, averaged over all epochs, and of evaluating one image."""

    step_s: float
    eval_s_per_image: float

    def epoch_s(self, trainer: Trainer) -> float:  # including validation
        return trainer.loader.steps_per_epoch * self.step_s + trainer.images_per_validation * self.eval_s_per_image

    def test_s(self, trainer: Trainer) -> float:
        return trainer.images_per_test * self.eval_s_per_image


def measure_step_timing(trainer: Trainer) -> StepTiming:
    """Time training steps and the evaluation of training images, without the loader; the run's state is left as it was.

    The loader is not used, because leaving an epoch early would stop the threads of DALI.
    """
    few = Split(trainer.train_split.images[:EVAL_BATCH_SIZE], trainer.train_split.labels[:EVAL_BATCH_SIZE])
    phases = trainer.resolved.phases
    eval_s = []
    with trainer.preserve_state():
        step_s = {phase: _measure_step_s(trainer, phases.index(phase)) for phase in dict.fromkeys(phases)}
        for _ in range(3):
            start = time.perf_counter()
            predict_logits(trainer.model, trainer.eval_forward, few, trainer.device)
            eval_s.append(time.perf_counter() - start)
    mean_step_s = statistics.fmean(step_s[phase] for phase in phases)
    return StepTiming(mean_step_s, statistics.median(eval_s[1:]) / len(few.labels))


def _measure_step_s(trainer: Trainer, epoch: int) -> float:
    """Return the median seconds of a full step of `epoch`."""
    images, labels, *mixer_params = trainer.example_batch()
    images.copy_(torch.tensor(trainer.train_split.images[: len(images)]))
    labels.copy_(torch.tensor(trainer.train_split.labels[: len(labels)]))
    seconds = []
    for _ in range(TIMED_STEPS):
        trainer.progress.epoch, trainer.progress.epoch_step = epoch, 0
        start = time.perf_counter()
        trainer.train_step((images, labels, *mixer_params))
        trainer.meter.compute()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def autotune(trainer: Trainer) -> None:
    """On CUDA, compile the step with max-autotune if this is expected to save more time than the compilation takes.

    Nothing is measured if even steps of MAX_STEP_S would not save as much, or if the GPU is too small for autotuning.
    A resumed run counts all its steps, so that it uses the same kernels as before.
    """
    if (trainer.execution.device, trainer.execution.compile, trainer.recipe.compile_mode) != ("cuda", True, "auto"):
        return
    if torch.cuda.get_device_properties(trainer.device).multi_processor_count < MIN_AUTOTUNE_MULTIPROCESSORS:
        return
    steps = trainer.planned_steps
    if not _autotuning_saves_time(steps * MAX_STEP_S):
        return
    if _autotuning_saves_time(trainer.world.broadcast_object(steps * measure_step_timing(trainer).step_s)):
        trainer.optimize("max-autotune-no-cudagraphs", start_loader=False)


def _autotuning_saves_time(expected_s: float) -> bool:
    return AUTOTUNE_SPEEDUP * expected_s > AUTOTUNE_EXTRA_COMPILE_S


def fit_epochs_to_time_budget(trainer: Trainer, elapsed_s: float) -> None:
    """With `--time-budget`, choose how many epochs fit after `elapsed_s`, and scale options that depend on it."""
    recipe = trainer.recipe
    if recipe.time_budget is None:
        return
    timing, elapsed_s = trainer.world.broadcast_object((measure_step_timing(trainer), elapsed_s))
    epoch_s, test_s = timing.epoch_s(trainer), timing.test_s(trainer)
    epochs = math.floor((recipe.time_budget * 60 * (1 - TIME_BUDGET_MARGIN) - elapsed_s - test_s) / epoch_s)
    if epochs < 1:
        minutes = math.ceil((elapsed_s + test_s + epoch_s) / 60 / (1 - TIME_BUDGET_MARGIN))
        problem = f"--time-budget {recipe.time_budget:g} is too short for one epoch of {epoch_s:,.0f} s"
        raise UsageError(problem, f"give {minutes} minutes or more, or a smaller network")
    epochs = min(epochs, MAX_EPOCHS)
    compiled_phases = set(trainer.resolved.phases)
    trainer.resolved = resolve(recipe.scale_to_epochs(epochs), trainer.execution)
    trainer.schedule = LRSchedule(trainer.recipe, trainer.resolved.schedule, trainer.loader.steps_per_epoch)
    if not compiled_phases.issuperset(trainer.resolved.phases):  # rounding has made another one
        trainer.optimize(start_loader=False)


def dry_run(recipe: Recipe) -> DryRunEstimate:
    """Build everything, run a few steps, evaluate a batch, and estimate the whole run. Nothing is written."""
    if recipe.resume:
        raise UsageError("--dry-run cannot be combined with --resume", "leave one of them out")
    clock = Clock()
    trackers.require_trackers(recipe)
    with clock.phase("setup"):
        trainer = build_trainer(resolve(recipe))
    with clock.phase("compile"):
        trainer.optimize(start_loader=False)
        fit_epochs_to_time_budget(trainer, clock.total_s())
        trainer.warm_up_loader()
    timing = measure_step_timing(trainer)
    train_s = trainer.planned_steps * timing.step_s
    epochs = math.ceil(trainer.planned_steps / trainer.loader.steps_per_epoch)
    eval_s = epochs * trainer.images_per_validation * timing.eval_s_per_image + timing.test_s(trainer)
    seconds = {**clock.seconds, "train": train_s, "eval": eval_s}
    seconds["total"] = sum(seconds.values())
    return {
        "dry_run": True,
        "arch": recipe.arch,
        "params": trainer.num_params,
        "macs": count_macs(trainer.model),
        "epochs": trainer.recipe.epochs,
        "steps": trainer.planned_steps,
        "step_s": timing.step_s,
        "images_per_s": recipe.batch_size / timing.step_s,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "chosen": [*trainer.summary_lines(), *trainer.execution.format_lines()],
    }
