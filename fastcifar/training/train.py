"""READ FIRST: one training run, from a recipe to its summary.

Everything is built before the run folder is created. The host reads the metrics at the end of each epoch and every few
steps; in a single process, the latter does not wait for the GPU.
"""

from pathlib import Path

from rich.console import Console

from fastcifar.device import choose_execution
from fastcifar.errors import NonFiniteError
from fastcifar.recipe import Recipe
from fastcifar.training import resume
from fastcifar.training.build import build_trainer
from fastcifar.training.distributed import process_group
from fastcifar.training.dry_run import autotune, fit_epochs_to_time_budget
from fastcifar.training.metrics_file import EpochRow, ValidationMetrics
from fastcifar.training.progress import TrainingDisplay, print_lines, show_compilation, show_preparation
from fastcifar.training.resolve import resolve
from fastcifar.training.run_dir import Clock, EpochCallbacks, Run
from fastcifar.training.signals import SignalHandler
from fastcifar.training.step import Metrics
from fastcifar.training.summary import RunSummary, summarize_epoch, summarize_run
from fastcifar.training.trainer import Trainer

DISPLAY_EVERY_STEPS = 10


def train(
    recipe: Recipe, recipe_name: str | None = None, console: Console | None = None, callbacks: EpochCallbacks = ()
) -> RunSummary:
    """Train as `recipe` specifies, evaluate once on the test set, and return the summary saved in the run folder.

    `recipe_name`: name or file of the recipe, for tables. `console`: where progress is shown, if anywhere. `callbacks`:
    called with each epoch's row of metrics; if one returns a string, the run ends. Raises a `UserError` (errors.py).
    """
    return train_network(recipe, recipe_name, console, callbacks)[0]


def train_network(
    recipe: Recipe, recipe_name: str | None = None, console: Console | None = None, callbacks: EpochCallbacks = ()
) -> tuple[RunSummary, Trainer]:
    """Train like `train`; return the trainer too, with the network, on rank 0 with the weights that were tested."""
    clock, recipe_name = Clock(), Path(recipe_name).stem if recipe_name else "custom"
    with (
        process_group(choose_execution(recipe).device) as world,
        resume.resume_point_on_all_ranks(recipe, recipe_name, world) as resume_point,
    ):
        show_preparation(console)
        with clock.phase("setup"):
            trainer = build_trainer(resolve(resume_point.recipe, is_resumed=resume_point.state is not None))
        print_lines(console, [*resume_point.messages, *trainer.summary_lines(), *trainer.execution.format_lines()])
        resume_point.require_same_data(trainer)
        with clock.phase("compile"), show_compilation(console, trainer.execution.compile):
            trainer.optimize(start_loader=False)
            if resume_point.is_new:
                fit_epochs_to_time_budget(trainer, clock.total_s())
            autotune(trainer)
            trainer.warm_up_loader()
        run = resume_point.open_run_on_all_ranks(trainer, clock, callbacks)
        print_lines(console, [f"run: {run.folder} (epochs: {trainer.recipe.epochs}, steps: {trainer.planned_steps:,})"])
        with TrainingDisplay(console, trainer) as display, SignalHandler() as signals:
            run_epochs(trainer, run, clock, display, signals)
        if signals.agreed_signal:
            raise signals.interruption(trainer.progress.step, run.folder)
        summary = None
        if world.is_main_process:
            with clock.phase("eval"):
                test_scores = trainer.test(run.checkpoint_path("best"))
            summary = summarize_run(trainer, run, clock, *test_scores)
            run.finish(summary, trainer.model.state_dict(), trainer.data.classes)
        return world.broadcast_object(summary), trainer


def run_epochs(trainer: Trainer, run: Run, clock: Clock, display: TrainingDisplay, signals: SignalHandler) -> None:
    """Train until the recipe, a signal, NaN or Inf ends the run, and the last checkpoint is written."""
    while True:
        try:
            if stop_reason := signals.sync_signal(trainer.world) or trainer.progress.find_stop_reason(trainer.recipe):
                if signals.agreed_signal and trainer.progress.lacks_checkpoint(trainer.recipe):
                    save_run_checkpoint(trainer, run, clock, "last")  # the signal came during or after the validation
                run.checkpoints.wait()
                trainer.progress.stop_reason = stop_reason
                return
            run_epoch(trainer, run, clock, display, signals)
        except NonFiniteError as error:
            print_lines(display.console, [resume.roll_back(trainer, run, error)])


def run_epoch(trainer: Trainer, run: Run, clock: Clock, display: TrainingDisplay, signals: SignalHandler) -> None:
    """Run the rest of an epoch: its steps, the validation, a row of metrics, a checkpoint."""
    recipe, progress = trainer.recipe, trainer.progress
    with clock.phase("train"):
        trainer.model.train()
        for batch in trainer.batches(progress.epoch, progress.epoch_step):
            trainer.train_step(batch)
            if progress.step % DISPLAY_EVERY_STEPS == 0:
                metrics = trainer.meter.compute_delayed()
                display.show_step(progress.step, progress.epoch, metrics)
                require_finite(metrics, trainer)
            if recipe.save_every_steps and progress.step % recipe.save_every_steps == 0:
                save_run_checkpoint(trainer, run, clock, "last")
            if signals.sync_signal(trainer.world, progress.step) or progress.step == recipe.max_steps:
                break
        metrics = trainer.meter.compute()
        require_finite(metrics, trainer)
        run.checkpoints.wait()  # raises the error of an earlier save, such as a full disk, within an epoch
    is_whole = progress.epoch_step == trainer.loader.steps_per_epoch
    if signals.agreed_signal or not is_whole:  # saved before the validation, so that resuming changes no result
        is_best = not signals.agreed_signal and progress.best is None and len(trainer.val_split.labels)
        save_run_checkpoint(trainer, run, clock, *(["best"] if is_best else []), "last")
        if signals.agreed_signal:
            return
    with clock.phase("eval"):
        validation = trainer.validate()
    row: EpochRow = {
        **summarize_epoch(trainer, metrics, validation),
        "images_per_s": metrics.images / clock.epoch_train_s(),
        "seconds": clock.total_s(),
    }
    progress.stop_reason = trainer.world.broadcast_object(run.log_epoch(row))
    display.show_epoch(row)
    finish_epoch(trainer, run, clock, metrics, validation)


def finish_epoch(trainer: Trainer, run: Run, clock: Clock, metrics: Metrics, validation: ValidationMetrics) -> None:
    """Update progress and schedule; save the checkpoints "best" and "last" if they are due."""
    progress = trainer.progress
    is_whole = progress.epoch_step == trainer.loader.steps_per_epoch
    is_best = progress.record_epoch(metrics.images, validation["val_acc"], is_whole)
    if is_whole:
        trainer.meter.reset()
        clock.end_epoch()
        trainer.schedule.after_epoch(validation["val_loss"])
    # "best" is written before "last", which must not refer to a missing best checkpoint
    due = (("best", is_best), ("last", progress.is_checkpoint_due(trainer.recipe)))
    if is_whole and (names := [name for name, is_due in due if is_due]):
        save_run_checkpoint(trainer, run, clock, *names)


def save_run_checkpoint(trainer: Trainer, run: Run, clock: Clock, *names: str) -> None:
    """Copy the current state, and save it as checkpoints "best" or "last" while training goes on."""
    run.checkpoints.save([run.checkpoint_path(name) for name in names], trainer.state_dict(clock))


def require_finite(metrics: Metrics, trainer: Trainer) -> None:
    """Raise `NonFiniteError` if a step had a NaN or Inf; its update and all later ones were skipped."""
    if not metrics.all_finite:  # `metrics` may be those of an earlier step
        trainer.meter.compute().require_finite(trainer.progress.step)
