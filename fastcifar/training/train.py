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
from fastcifar.recipe import Recipe, period
from fastcifar.training import checkpoint, resume
from fastcifar.training.distributed import joined
from fastcifar.training.dry_run import fit_into_budget, tuned
from fastcifar.training.progress import Display, say
from fastcifar.training.run_dir import Clock, Run, Sinks
from fastcifar.training.signals import Stop
from fastcifar.training.step import Reading, Step
from fastcifar.training.summary import summarise
from fastcifar.training.trainer import Parts, assemble

PEEK_EVERY = 10  # steps between two looks at the meter


def train(recipe: Recipe, name: str | None = None, console: Console | None = None, sinks: Sinks = ()) -> dict[str, Any]:
    """Trains by `recipe`, tests once, and returns the summary that the run folder keeps.

    `name`: the recipe's or its file's, for tables. `console`: where progress is shown; None is quiet. `sinks`: take
    each epoch's row, beside SINKS; a reason that one returns ends the run.
    Errors: `UserError`s with the exit code of each kind; see errors.py.
    """
    clock, name = Clock(), Path(name).stem if name else "custom"
    with joined(choose(recipe).device) as here, resume.find_together(recipe, name, here) as origin:
        with clock.phase("setup"):
            parts = assemble(origin.recipe, choose(origin.recipe))
        say(console, [*origin.lines, *parts.lines(), *parts.choice.lines()])
        with clock.phase("compile"):
            step = parts.fast_step()
            if origin.is_new:
                fit_into_budget(parts, step, clock.total())
            step = tuned(parts, step)
        run = origin.open_together(parts, clock, sinks)
        say(console, [f"run: {run.folder}, {parts.recipe.epochs} epochs, {parts.steps:,} steps"])
        display = Display(console, parts.steps, parts.recipe.epochs, recipe.batch_size, parts.progress.step)
        with display, Stop() as stop:
            fit(parts, step, run, clock, display, stop)
        if stop.signal:
            raise stop.interruption(run, parts.progress.step)
        return here.told(finish(parts, run, clock) if here.leads else None)


def finish(parts: Parts, run: Run, clock: Clock) -> dict[str, Any]:
    """The test set, once, and what the run folder keeps of it."""
    with clock.phase("eval"):
        tested = parts.test(run.checkpoint("best"))
    summary = summarise(parts, run, clock, tested)
    run.finish(summary, parts.model.state_dict())
    return summary


def fit(parts: Parts, step: Step, run: Run, clock: Clock, display: Display, stop: Stop) -> None:
    """The loop: epochs until the recipe or a signal ends them. What is not finite ends it too, or turns it back."""
    while not stop.asked(parts.world) and not parts.progress.over(parts.recipe):
        try:
            run_epoch(parts, step, run, clock, display, stop)
        except NonFiniteError as error:
            say(display.console, [resume.roll_back(parts, run, error)])
    parts.progress.stop_reason = stop.signal or parts.progress.over(parts.recipe)


def run_epoch(parts: Parts, step: Step, run: Run, clock: Clock, display: Display, stop: Stop) -> None:
    """What is left of an epoch: its steps, a look at the validation split, a row, a checkpoint."""
    recipe, progress = parts.recipe, parts.progress
    every, unit = period(recipe.save_every)
    with clock.phase("train"):
        parts.model.train()
        for batch in parts.batches(progress.epoch, progress.epoch_step):
            parts.optimizer.set_lr(parts.schedule.lr_at(progress.step))
            step(*batch)
            progress.step += 1
            progress.epoch_step += 1
            parts.optimizer.between_steps(progress.step, parts.meter.bad)
            if progress.step % PEEK_EVERY == 0:
                seen = parts.meter.peek()
                display.step(progress.step, progress.epoch, seen)
                require_finite(seen, parts)
            if unit == "s" and progress.step % every == 0:
                save(parts, run, clock, "last")
            if stop.asked(parts.world, progress.step) or progress.step == recipe.max_steps:
                break
        seen = parts.meter.read()
        require_finite(seen, parts)
    is_whole = progress.epoch_step == parts.loader.steps_per_epoch
    if stop.signal or not is_whole:
        save(parts, run, clock, "last")  # before the validation: the run may go on from here as if never stopped
    if stop.signal:
        return
    with clock.phase("eval"):
        validation = parts.validate()
    row = {
        "epoch": progress.epoch,
        "step": progress.step,
        "lr": parts.schedule.lr_at(progress.step - 1),
        "train_loss": seen.loss,
        "train_acc": seen.accuracy,
        **validation,
        "images_per_s": seen.images / clock.epoch_s(),
        "seconds": clock.total(),
    }
    progress.stop_reason = parts.world.told(run.log(row))
    display.epoch(row)
    keep(parts, run, clock, seen, validation)


def keep(parts: Parts, run: Run, clock: Clock, seen: Reading, validation: dict[str, float | None]) -> None:
    """What an epoch that has ended changes, and its checkpoint, as best too if it is."""
    progress = parts.progress
    is_whole = progress.epoch_step == parts.loader.steps_per_epoch
    is_best = progress.after_epoch(seen.images, validation["val_acc"], is_whole)
    if is_whole:
        parts.meter.reset()
        clock.end_epoch()
        parts.schedule.after_epoch(validation["val_loss"])
    if is_best:  # first, so that `last` never knows of a best that is not there
        save(parts, run, clock, "best")
    every, unit = period(parts.recipe.save_every)
    if is_whole and (progress.over(parts.recipe) or (unit == "e" and progress.epoch % every == 0)):
        save(parts, run, clock, "last")


def save(parts: Parts, run: Run, clock: Clock, name: str) -> None:
    """The state of this step as checkpoint `name` ("last", "best"). Errors: `NonFiniteError`, `DiskError`."""
    require_finite(parts.meter.read(), parts)
    state = parts.state(clock)
    if parts.world.leads:
        checkpoint.save(run.checkpoint(name), state)


def require_finite(seen: Reading, parts: Parts) -> None:
    """Errors: `NonFiniteError` with the step; from it on nothing was updated, and the last checkpoint is older."""
    if seen.finite:
        return
    first = parts.progress.step - parts.meter.read().bad + 1
    remedy = "use a smaller --lr, a --clip, --precision fp32, or --on-nan rollback"
    raise NonFiniteError(f"the loss or a gradient was not finite in step {first}", remedy)
