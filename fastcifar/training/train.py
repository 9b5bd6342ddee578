"""READ FIRST: one training run, from a recipe to its summary.

Everything is made before the run folder is, so that a mistake leaves nothing half-written. Inside an epoch the host
only launches work; it reads the meter at its end, and peeks at it, without waiting, for the eye.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from fastcifar.device import choose_execution
from fastcifar.errors import NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, resume
from fastcifar.training.build import build_trainer
from fastcifar.training.distributed import process_group
from fastcifar.training.dry_run import autotune_step, fit_epochs_to_time_budget
from fastcifar.training.progress import TrainingDisplay, print_lines
from fastcifar.training.run_dir import Clock, EpochCallbacks, Run
from fastcifar.training.signals import SignalHandler
from fastcifar.training.step import Metrics, TrainStep
from fastcifar.training.summary import summarize_run
from fastcifar.training.trainer import Trainer

PEEK_EVERY_STEPS = 10  # steps between two looks at the meter


def train(
    recipe: Recipe, recipe_name: str | None = None, console: Console | None = None, callbacks: EpochCallbacks = ()
) -> dict[str, Any]:
    """Trains by `recipe`, tests once, and returns the summary that the run folder keeps.

    `name`: the recipe's or its file's, for tables. `console`: where progress is shown; None is quiet. `sinks`: take
    each epoch's row, beside SINKS; a reason that one returns ends the run.
    Errors: `UserError`s with the exit code of each kind; see errors.py.
    """
    clock, recipe_name = Clock(), Path(recipe_name).stem if recipe_name else "custom"
    with (
        process_group(choose_execution(recipe).device) as here,
        resume.find_resume_point_on_all_ranks(recipe, recipe_name, here) as origin,
    ):
        with clock.phase("setup"):
            parts = build_trainer(origin.recipe, choose_execution(origin.recipe))
        print_lines(console, [*origin.messages, *parts.summary_lines(), *parts.execution.format_lines()])
        with clock.phase("compile"):
            step = parts.build_train_step()
            if origin.is_new:
                fit_epochs_to_time_budget(parts, step, clock.total_s())
            step = autotune_step(parts, step)
        run = origin.open_run_on_all_ranks(parts, clock, callbacks)
        print_lines(console, [f"run: {run.folder}, {parts.recipe.epochs} epochs, {parts.total_steps:,} steps"])
        display = TrainingDisplay(
            console, parts.total_steps, parts.recipe.epochs, recipe.batch_size, parts.progress.step
        )
        with display, SignalHandler() as stop:
            run_epochs(parts, step, run, clock, display, stop)
        if stop.agreed_signal:
            raise stop.interrupted_error(run, parts.progress.step)
        return here.broadcast_object(test_and_summarize(parts, run, clock) if here.is_main_process else None)


def test_and_summarize(trainer: Trainer, run: Run, clock: Clock) -> dict[str, Any]:
    """The test set, once, and what the run folder keeps of it."""
    with clock.phase("eval"):
        tested = trainer.evaluate_test_set(run.checkpoint_path("best"))
    summary = summarize_run(trainer, run, clock, tested)
    run.finish(summary, trainer.model.state_dict())
    return summary


def run_epochs(
    trainer: Trainer, step: TrainStep, run: Run, clock: Clock, display: TrainingDisplay, stop: SignalHandler
) -> None:
    """The loop: epochs until the recipe or a signal ends them. What is not finite ends it too, or turns it back."""
    while not stop.sync_signal(trainer.world) and not trainer.progress.find_stop_reason(trainer.recipe):
        try:
            run_epoch(trainer, step, run, clock, display, stop)
        except NonFiniteError as error:
            print_lines(display.console, [resume.roll_back(trainer, run, error)])
    trainer.progress.stop_reason = stop.agreed_signal or trainer.progress.find_stop_reason(trainer.recipe)


def run_epoch(
    trainer: Trainer, step: TrainStep, run: Run, clock: Clock, display: TrainingDisplay, stop: SignalHandler
) -> None:
    """What is left of an epoch: its steps, a look at the validation split, a row, a checkpoint."""
    recipe, progress = trainer.recipe, trainer.progress
    with clock.phase("train"):
        trainer.model.train()
        for batch in trainer.batches(progress.epoch, progress.epoch_step):
            trainer.optimizer.set_lr(trainer.schedule.lr_at(progress.step))
            step(*batch)
            progress.step += 1
            progress.epoch_step += 1
            trainer.optimizer.after_step(progress.step, trainer.meter.found_inf)
            if progress.step % PEEK_EVERY_STEPS == 0:
                seen = trainer.meter.compute_delayed()
                display.show_step(progress.step, progress.epoch, seen)
                require_finite(seen, trainer)
            if recipe.save_every_steps and progress.step % recipe.save_every_steps == 0:
                save_run_checkpoint(trainer, run, clock, "last")
            if stop.sync_signal(trainer.world, progress.step) or progress.step == recipe.max_steps:
                break
        seen = trainer.meter.compute()
        require_finite(seen, trainer)
    is_whole = progress.epoch_step == trainer.loader.steps_per_epoch
    if stop.agreed_signal or not is_whole:
        save_run_checkpoint(
            trainer, run, clock, "last"
        )  # before the validation: the run may go on from here as if never stopped
    if stop.agreed_signal:
        return
    with clock.phase("eval"):
        validation = trainer.validate()
    row = {
        "epoch": progress.epoch,
        "step": progress.step,
        "lr": trainer.schedule.lr_at(progress.step - 1),
        "train_loss": seen.loss,
        "train_acc": seen.accuracy,
        **validation,
        "images_per_s": seen.images / clock.epoch_train_s(),
        "seconds": clock.total_s(),
    }
    progress.stop_reason = trainer.world.broadcast_object(run.log_epoch(row))
    display.show_epoch(row)
    finish_epoch(trainer, run, clock, seen, validation)


def finish_epoch(
    trainer: Trainer, run: Run, clock: Clock, metrics: Metrics, validation: dict[str, float | None]
) -> None:
    """What an epoch that has ended changes, and its checkpoint, as best too if it is."""
    progress = trainer.progress
    is_whole = progress.epoch_step == trainer.loader.steps_per_epoch
    is_best = progress.record_epoch(metrics.images, validation["val_acc"], is_whole)
    if is_whole:
        trainer.meter.reset()
        clock.end_epoch()
        trainer.schedule.after_epoch(validation["val_loss"])
    if is_best:  # first, so that `last` never knows of a best that is not there
        save_run_checkpoint(trainer, run, clock, "best")
    every = trainer.recipe.save_every_epochs
    if is_whole and (progress.find_stop_reason(trainer.recipe) or (every and progress.epoch % every == 0)):
        save_run_checkpoint(trainer, run, clock, "last")


def save_run_checkpoint(trainer: Trainer, run: Run, clock: Clock, checkpoint_name: str) -> None:
    """The state of this step as checkpoint `name` ("last", "best"). Errors: `NonFiniteError`, `DiskError`."""
    require_finite(trainer.meter.compute(), trainer)
    state = trainer.checkpoint_state(clock)
    if trainer.world.is_main_process:
        checkpoint.save_checkpoint(run.checkpoint_path(checkpoint_name), state)


def require_finite(metrics: Metrics, trainer: Trainer) -> None:
    """Errors: `NonFiniteError` with the step; from it on nothing was updated, and the last checkpoint is older."""
    if metrics.is_finite:
        return
    first = trainer.progress.step - trainer.meter.compute().nonfinite_steps + 1
    remedy = "use a smaller --lr, a --clip-grad, --precision fp32, or --on-nan rollback"
    raise NonFiniteError(f"the loss or a gradient was not finite in step {first}", remedy)
