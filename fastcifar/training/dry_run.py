"""Before a run: how fast this machine takes its steps, what they need, and so how long the whole will take.

`--dry-run` ends here and writes nothing; `--time-budget` takes as many whole epochs as fit. What is measured leaves
weights, optimizer and random state as they were.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import astuple, dataclass
from typing import Any

from fastcifar.data.cifar import Split
from fastcifar.device import choose_execution, peak_memory_bytes
from fastcifar.errors import UsageError
from fastcifar.models import count_macs, count_parameters
from fastcifar.recipe import Recipe, parse_image_sizes
from fastcifar.training import trackers
from fastcifar.training.build import build_trainer
from fastcifar.training.evaluate import EVAL_BATCH_SIZE, predict_logits
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.run_dir import Clock
from fastcifar.training.step import TrainStep
from fastcifar.training.trainer import Trainer

TIMED_STEPS = 5  # the first of them is not counted
TIME_BUDGET_MARGIN = 0.05  # of the budget, for checkpoints and for steps that are slower than those measured

# What max-autotune-no-cudagraphs gives and takes, as others measured it on convolutions: 1 to 5 %, about 100 s.
AUTOTUNE_SPEEDUP, AUTOTUNE_EXTRA_COMPILE_S = 0.03, 100


@dataclass(frozen=True)
class StepTiming:
    """Seconds of a training step, the mean over the epochs' sizes of image, and of the evaluation of one image."""

    step_s: float
    eval_s_per_image: float

    def epoch_s(self, trainer: Trainer) -> float:
        """An epoch with its validation."""
        return trainer.loader.steps_per_epoch * self.step_s + trainer.images_per_validation * self.eval_s_per_image

    def test_s(self, trainer: Trainer) -> float:
        """The test set at the end."""
        return trainer.images_per_test * self.eval_s_per_image


def measure_step_timing(trainer: Trainer, step: TrainStep) -> StepTiming:
    """The pace of `step` on the run's own first batches, and of evaluation on training images: medians."""
    images = []
    few = Split(trainer.train_split.images[:EVAL_BATCH_SIZE], trainer.train_split.labels[:EVAL_BATCH_SIZE])
    sizes = [trainer.recipe.image_size_at(epoch) for epoch in range(trainer.recipe.epochs)]
    with trainer.preserve_state():
        step_s = {size: _measure_step_s(trainer, step, sizes.index(size)) for size in dict.fromkeys(sizes)}
        for _ in range(3):
            started = time.perf_counter()
            predict_logits(trainer.model, trainer.eval_forward, few, trainer.device)
            images.append((time.perf_counter() - started) / len(few.labels))
    return StepTiming(statistics.fmean(step_s[size] for size in sizes), statistics.median(images[1:]))


def _measure_step_s(trainer: Trainer, step: TrainStep, epoch: int) -> float:
    """Seconds of a step as it is in `epoch`: the median over the run's first batches."""
    running, seconds = trainer.progress.epoch, []
    trainer.progress.epoch = epoch
    for batch in itertools.islice(itertools.cycle(trainer.batches(0)), TIMED_STEPS):
        started = time.perf_counter()
        step(*batch)
        trainer.meter.compute()
        seconds.append(time.perf_counter() - started)
    trainer.progress.epoch = running
    return statistics.median(seconds[1:])


def autotune_step(trainer: Trainer, step: TrainStep) -> TrainStep:
    """`step`, or on CUDA one compiled with more effort, where the rest of the run is long enough to repay that."""
    if (trainer.execution.device, trainer.execution.compile, trainer.recipe.compile_mode) != ("cuda", True, "auto"):
        return step
    left = trainer.total_steps - trainer.progress.step
    expected_s = trainer.world.broadcast_object(left * measure_step_timing(trainer, step).step_s)
    return (
        trainer.build_train_step("max-autotune-no-cudagraphs")
        if AUTOTUNE_SPEEDUP * expected_s > AUTOTUNE_EXTRA_COMPILE_S
        else step
    )


def fit_epochs_to_time_budget(trainer: Trainer, step: TrainStep, elapsed_s: float) -> None:
    """With a `time_budget`, sets the run's epochs, and its schedule, to as many as fit after `elapsed_s`.

    Errors: `UsageError` if not one epoch fits, with the budget that one would need.
    """
    if trainer.recipe.time_budget is None:
        return
    pace = StepTiming(*trainer.world.broadcast_object(astuple(measure_step_timing(trainer, step))))
    elapsed_s = trainer.world.broadcast_object(elapsed_s)
    left_s = trainer.recipe.time_budget * 60 * (1 - TIME_BUDGET_MARGIN) - elapsed_s - pace.test_s(trainer)
    epochs = math.floor(left_s / pace.epoch_s(trainer))
    if epochs < 1:
        needed = (elapsed_s + pace.test_s(trainer) + pace.epoch_s(trainer)) / 60 / (1 - TIME_BUDGET_MARGIN)
        problem = (
            f"not one epoch of {pace.epoch_s(trainer):,.0f} s fits into --time-budget {trainer.recipe.time_budget:g}"
        )
        raise UsageError(problem, f"give {math.ceil(needed)} minutes or more, or a smaller network")
    share = epochs / trainer.recipe.epochs  # of warm-up and schedule too: the shape stays the recipe's
    length = trainer.recipe.schedule_epochs
    changes = {
        "warmup_epochs": trainer.recipe.warmup_epochs * share,
        "schedule_epochs": length and length * share,
        "image_size": scale_image_size_stages(trainer.recipe.image_size, share),
    }
    trainer.recipe = trainer.recipe.model_copy(update={"epochs": epochs, **changes})
    trainer.schedule = LRSchedule(trainer.recipe, trainer.loader.steps_per_epoch)


def scale_image_size_stages(image_size: str, factor: float) -> str:
    """`image_size` for `share` of the epochs: whole ones, rounded down, so that none are missing at the full size."""
    kept = [(size, epochs and math.floor(epochs * factor)) for size, epochs in parse_image_sizes(image_size)]
    return ",".join(f"{size}:{epochs}" if epochs else str(size) for size, epochs in kept if epochs != 0)


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Builds everything, runs a few steps and evaluates a batch; what the whole run would take. Writes nothing.

    Returns seconds (`setup` and `compile` measured, `train`, `eval` and `total` expected), `step_s`, `images_per_s`,
    `peak_memory_bytes` and what was chosen. Errors: those of `train`.
    """
    if recipe.resume:
        raise UsageError("--dry-run starts nothing, so it resumes nothing", "leave --resume out")
    clock = Clock()
    trackers.require_trackers(recipe)
    with clock.phase("setup"):
        parts = build_trainer(recipe, choose_execution(recipe))
    with clock.phase("compile"):
        step = parts.build_train_step()
    fit_epochs_to_time_budget(parts, step, clock.total_s())
    pace = measure_step_timing(parts, step)
    seconds = dict(clock.seconds)
    seconds["train"] = parts.total_steps * pace.step_s
    seconds["eval"] = parts.recipe.epochs * pace.epoch_s(parts) - seconds["train"] + pace.test_s(parts)
    seconds["total"] = sum(seconds.values())
    return {
        "dry_run": True,
        "arch": recipe.arch,
        "params": count_parameters(parts.model),
        "macs": count_macs(parts.model),
        "epochs": parts.recipe.epochs,
        "steps": parts.total_steps,
        "step_s": pace.step_s,
        "images_per_s": recipe.batch_size / pace.step_s,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(parts.device),
        "chosen": [*parts.summary_lines(), *parts.execution.format_lines()],
    }
