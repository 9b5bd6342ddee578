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
from fastcifar.device import choose
from fastcifar.errors import UsageError
from fastcifar.models import macs, parameters
from fastcifar.recipe import Recipe, image_sizes
from fastcifar.training import trackers
from fastcifar.training.evaluate import BATCH_SIZE, predict_logits
from fastcifar.training.lr_schedule import Schedule
from fastcifar.training.run_dir import Clock
from fastcifar.training.step import Step
from fastcifar.training.summary import peak_memory
from fastcifar.training.trainer import Parts, assemble

STEPS = 5  # the first of them is not counted
SPARE = 0.05  # of the budget, for checkpoints and for steps that are slower than those measured

# What max-autotune-no-cudagraphs gives and takes, as others measured it on convolutions: 1 to 5 %, about 100 s.
GAIN, EXTRA_COMPILE_S = 0.03, 100


@dataclass(frozen=True)
class Pace:
    """Seconds of a training step, the mean over the epochs' sizes of image, and of the evaluation of one image."""

    step_s: float
    image_s: float

    def epoch_s(self, parts: Parts) -> float:
        """An epoch with its validation."""
        return parts.loader.steps_per_epoch * self.step_s + parts.validation_images * self.image_s

    def test_s(self, parts: Parts) -> float:
        """The test set at the end."""
        return parts.test_images * self.image_s


def measure(parts: Parts, step: Step) -> Pace:
    """The pace of `step` on the run's own first batches, and of evaluation on training images: medians."""
    images = []
    few = Split(parts.train.images[:BATCH_SIZE], parts.train.labels[:BATCH_SIZE])
    sizes = [parts.recipe.size_at(epoch) for epoch in range(parts.recipe.epochs)]
    with parts.untouched():
        step_s = {size: _step_s(parts, step, sizes.index(size)) for size in dict.fromkeys(sizes)}
        for _ in range(3):
            started = time.perf_counter()
            predict_logits(parts.model, parts.inference, few, parts.device)
            images.append((time.perf_counter() - started) / len(few.labels))
    return Pace(statistics.fmean(step_s[size] for size in sizes), statistics.median(images[1:]))


def _step_s(parts: Parts, step: Step, epoch: int) -> float:
    """Seconds of a step as it is in `epoch`: the median over the run's first batches."""
    running, seconds = parts.progress.epoch, []
    parts.progress.epoch = epoch
    for batch in itertools.islice(itertools.cycle(parts.batches(0)), STEPS):
        started = time.perf_counter()
        step(*batch)
        parts.meter.read()
        seconds.append(time.perf_counter() - started)
    parts.progress.epoch = running
    return statistics.median(seconds[1:])


def tuned(parts: Parts, step: Step) -> Step:
    """`step`, or on CUDA one compiled with more effort, where the rest of the run is long enough to repay that."""
    if (parts.choice.device, parts.choice.compile, parts.recipe.compile_mode) != ("cuda", True, "auto"):
        return step
    left = parts.steps - parts.progress.step
    expected_s = parts.world.told(left * measure(parts, step).step_s)
    return parts.fast_step("max-autotune-no-cudagraphs") if GAIN * expected_s > EXTRA_COMPILE_S else step


def fit_into_budget(parts: Parts, step: Step, elapsed_s: float) -> None:
    """With a `time_budget`, sets the run's epochs, and its schedule, to as many as fit after `elapsed_s`.

    Errors: `UsageError` if not one epoch fits, with the budget that one would need.
    """
    if parts.recipe.time_budget is None:
        return
    pace = Pace(*parts.world.told(astuple(measure(parts, step))))
    elapsed_s = parts.world.told(elapsed_s)
    left_s = parts.recipe.time_budget * 60 * (1 - SPARE) - elapsed_s - pace.test_s(parts)
    epochs = math.floor(left_s / pace.epoch_s(parts))
    if epochs < 1:
        needed = (elapsed_s + pace.test_s(parts) + pace.epoch_s(parts)) / 60 / (1 - SPARE)
        problem = f"not one epoch of {pace.epoch_s(parts):,.0f} s fits into --time-budget {parts.recipe.time_budget:g}"
        raise UsageError(problem, f"give {math.ceil(needed)} minutes or more, or a smaller network")
    share = epochs / parts.recipe.epochs  # of warm-up and schedule too: the shape stays the recipe's
    length = parts.recipe.schedule_epochs
    changes = {
        "warmup_epochs": parts.recipe.warmup_epochs * share,
        "schedule_epochs": length and length * share,
        "image_size": shortened(parts.recipe.image_size, share),
    }
    parts.recipe = parts.recipe.model_copy(update={"epochs": epochs, **changes})
    parts.schedule = Schedule(parts.recipe, parts.loader.steps_per_epoch)


def shortened(sizes: str, share: float) -> str:
    """`image_size` for `share` of the epochs: whole ones, rounded down, so that none are missing at the full size."""
    kept = [(size, epochs and math.floor(epochs * share)) for size, epochs in image_sizes(sizes)]
    return ",".join(f"{size}:{epochs}" if epochs else str(size) for size, epochs in kept if epochs != 0)


def rehearse(recipe: Recipe) -> dict[str, Any]:
    """Builds everything, runs a few steps and evaluates a batch; what the whole run would take. Writes nothing.

    Returns seconds (`setup` and `compile` measured, `train`, `eval` and `total` expected), `step_s`, `images_per_s`,
    `peak_memory_bytes` and what was chosen. Errors: those of `train`.
    """
    if recipe.resume:
        raise UsageError("--dry-run starts nothing, so it resumes nothing", "leave --resume out")
    clock = Clock()
    trackers.require(recipe)
    with clock.phase("setup"):
        parts = assemble(recipe, choose(recipe))
    with clock.phase("compile"):
        step = parts.fast_step()
    fit_into_budget(parts, step, clock.total())
    pace = measure(parts, step)
    seconds = dict(clock.seconds)
    seconds["train"] = parts.steps * pace.step_s
    seconds["eval"] = parts.recipe.epochs * pace.epoch_s(parts) - seconds["train"] + pace.test_s(parts)
    seconds["total"] = sum(seconds.values())
    return {
        "dry_run": True,
        "arch": recipe.arch,
        "params": parameters(parts.model),
        "macs": macs(parts.model),
        "epochs": parts.recipe.epochs,
        "steps": parts.steps,
        "step_s": pace.step_s,
        "images_per_s": recipe.batch_size / pace.step_s,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_bytes": peak_memory(parts.device),
        "chosen": [*parts.lines(), *parts.choice.lines()],
    }
