"""READ FIRST: one training run, from a recipe to its summary.

Everything is made before the run folder is, so that a mistake leaves nothing half-written. Inside an epoch the host
only launches work; it reads the meter at its end, and peeks at it, without waiting, for the eye.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from fastcifar.device import choose
from fastcifar.errors import NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.parts import Parts, assemble
from fastcifar.training.progress import Display, say
from fastcifar.training.rehearse import fit_into_budget
from fastcifar.training.run import Clock, Progress, Run, Stop
from fastcifar.training.step import Step
from fastcifar.training.summary import summarise

PEEK_EVERY = 10  # steps between two looks at the meter


def train(recipe: Recipe, name: str | None = None, console: Console | None = None) -> dict[str, Any]:
    """Trains by `recipe`, tests once, and returns the summary that the run folder keeps.

    `name`: the recipe's or its file's, for tables. `console`: where progress is shown; None is quiet.
    Errors: `UserError`s with the exit code of each kind; see errors.py.
    """
    clock = Clock()
    name = Path(name).stem if name else "custom"
    with clock.phase("setup"):
        choice = choose(recipe)
        parts = assemble(recipe, choice)
    say(console, [*parts.lines(), *parts.choice.lines()])
    with clock.phase("compile"):
        step = parts.fast_step()
        fit_into_budget(parts, step, clock.total())
    run = Run.create(parts.recipe, f"{recipe.arch}-{name}-s{recipe.seed}")
    say(console, [f"run: {run.folder}, {parts.recipe.epochs} epochs, {parts.steps:,} steps"])
    display = Display(console, parts.steps, parts.recipe.epochs, recipe.batch_size)
    with display, Stop() as stop:
        progress = fit(parts, step, run, clock, display, stop)
    if progress.stop_reason in Stop.CODES:
        raise stop.interruption(run, progress.step)
    with clock.phase("eval"):
        tested = parts.test(run.checkpoint("best"))
    summary = summarise(parts, run, clock, progress, tested, name)
    run.finish(summary, parts.model.state_dict())
    return summary


def fit(parts: Parts, step: Step, run: Run, clock: Clock, display: Display, stop: Stop) -> Progress:
    """The loop: epochs of steps, each epoch ended by a look at the validation split and a checkpoint."""
    progress = Progress()
    for epoch in range(parts.recipe.epochs):
        with clock.phase("train"):
            parts.meter.reset()
            parts.model.train()
            for batch in parts.batches(epoch):
                parts.optimizer.set_lr(parts.schedule.lr_at(progress.step))
                step(*batch)
                progress.step += 1
                parts.optimizer.between_steps(progress.step)
                if progress.step % PEEK_EVERY == 0:
                    seen = parts.meter.peek()
                    display.step(progress.step, epoch, seen)
                    require_finite(seen.finite, progress.step)
                if stop.signal or progress.step == parts.recipe.max_steps:
                    break
            seen = parts.meter.read()
            require_finite(seen.finite, progress.step)
            progress.images += seen.images
        progress.stop_reason = stop.signal or ("max_steps" if progress.step == parts.recipe.max_steps else "")
        if stop.signal:
            checkpoint.save(run.checkpoint("last"), parts.state(progress.step, progress.epoch, progress.best))
            return progress
        with clock.phase("eval"):
            validation = parts.validate()
        progress.epoch, progress.val_acc = epoch + 1, validation["val_acc"]
        row = {
            "epoch": epoch,
            "step": progress.step,
            "lr": parts.schedule.lr_at(progress.step - 1),
            "train_loss": seen.loss,
            "train_acc": seen.accuracy,
            **validation,
            "images_per_s": seen.images / clock.last["train"],
            "seconds": clock.total(),
        }
        run.log(row)
        display.epoch(row)
        parts.schedule.after_epoch(validation["val_loss"])
        keep(parts, run, progress)
        if progress.stop_reason:
            return progress
    progress.stop_reason = stop.signal or "epochs"
    return progress


def keep(parts: Parts, run: Run, progress: Progress) -> None:
    """The epoch's checkpoint, as best too if it is; early stopping after `patience` epochs that are not."""
    is_best = progress.val_acc is not None and (progress.best is None or progress.val_acc > progress.best)
    if is_best:
        progress.best, progress.epochs_since_best = progress.val_acc, 0
    else:
        progress.epochs_since_best += 1
    state = parts.state(progress.step, progress.epoch, progress.best)
    for name in ("last", "best") if is_best else ("last",):
        checkpoint.save(run.checkpoint(name), state)
    if parts.recipe.patience and progress.epochs_since_best >= parts.recipe.patience:
        progress.stop_reason = progress.stop_reason or "patience"


def require_finite(finite: bool, step: int) -> None:
    """Errors: `NonFiniteError`; the weights in the last checkpoint are from before it."""
    if not finite:
        raise NonFiniteError(
            f"the loss or a gradient was not finite by step {step}", "use a smaller --lr, a --clip, or --precision fp32"
        )
