"""Where a run starts: at its first step, or at a checkpoint of the run that it resumes.

A resumed run may differ only in `RESUMABLE_OPTIONS`. All checks except that of free disk space precede any writing.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from fastcifar.data import cifar
from fastcifar.errors import (
    CheckpointError,
    DiskError,
    Interrupted,
    NonFiniteError,
    UsageError,
    UserError,
    first_message_line,
)
from fastcifar.files import FolderLock, lock_folder
from fastcifar.format import format_differences, format_option_value, option_flag
from fastcifar.recipe import Recipe, default_val_size, section_fields
from fastcifar.recipes import load_saved_recipe
from fastcifar.training import checkpoint, trackers
from fastcifar.training.checkpoint import TrainingCheckpoint
from fastcifar.training.distributed import World
from fastcifar.training.environment import read_environment
from fastcifar.training.fine_tuning import absolute_init_path
from fastcifar.training.resolve import require_fitting_network
from fastcifar.training.run_dir import Clock, EpochCallbacks, Run, TrainingProgress
from fastcifar.training.trainer import Trainer

MAX_ROLLBACKS = 3  # after this many rollbacks, the next NaN or Inf ends the run
RESUME_REMEDY = "give --resume a run folder, a .pt file or auto"

Count = Annotated[int, Field(ge=0, le=2**53)]

# option that may change on resume -> message about the effect; a change with an empty message is not reported
RESUMABLE_OPTIONS: dict[str, str] = {
    "epochs": "the schedule is recomputed for the new number of epochs, from the current step on",
    "patience": "the epochs without an improvement so far still count",
    "max_steps": "the steps before the run was resumed count too",
    "max_params": "the network does not change, it is only checked against the new limit",
    "eval_weights": "other weights of the run are evaluated on the test set",
    "data": "it must hold the same images for training and validation, with the same labels and in the same order",
    "out": "",
    "resume": "",
    "save_every_epochs": "",
    "save_every_steps": "",
    "track": "a new tracker also receives the rows of the earlier epochs",
    "on_nan": "",
    **dict.fromkeys(
        ("deterministic", *section_fields("execution")),
        "sums may be rounded differently, so the run is no longer bit-identical to an uninterrupted one",
    ),
}
# `--time-budget` changes these options of a run, so its saved recipe differs from its command line.
TIME_BUDGET_OPTIONS = (
    "epochs", "warmup_epochs", "schedule_epochs", "image_size", "whiten_bias_epochs", "freeze_stem_epochs"
)  # fmt: skip


@dataclass
class ResumePoint:
    """Where a run starts. On ranks other than 0, only `recipe`, `state` and `is_new` are set."""

    recipe: Recipe
    recipe_name: str
    state: TrainingCheckpoint | None = None  # checkpoint to resume from; None to start at the first step
    is_new: bool = False  # starts at the first step, in a folder without a recipe
    folder: Path | None = None  # run folder to continue in, which `lock` locks; None for a new one
    copy_from: Path | None = None  # run folder whose rows and best checkpoint are copied into the new one
    lock: FolderLock | None = None
    messages: list[str] = field(default_factory=list)  # lines for the user
    run: Run | None = None  # the run, once it is open

    def close(self, status: str) -> None:
        if self.run:
            self.run.checkpoints.join()
            for tracker in self.run.trackers:
                tracker.close(status)
        if self.lock:
            self.lock.release()

    def require_same_data(self, trainer: Trainer) -> None:
        """Raise `CheckpointError` if the run to be resumed was trained on other data than that of `trainer`."""
        if self.state:
            require_same_data(trainer, self.state)

    def open_run_on_all_ranks(self, trainer: Trainer, clock: Clock, callbacks: EpochCallbacks = ()) -> Run:
        """Load the checkpoint into `trainer` and `clock`, then create or reopen the run folder on rank 0.

        `callbacks` are called after those of the run. Other ranks write nothing. Raises `DiskError` if the folder
        cannot be written or has no space for a checkpoint, and `CheckpointError` if the checkpoint does not fit.
        """
        if self.state:
            load_trainer_state(trainer, self.state)
            clock.load_state_dict(self.state["clock"])
        run = self._open_run(trainer) if trainer.world.is_main_process else Run(Path(), self.recipe_name)
        folder, trainer.progress.best = trainer.world.broadcast_object((run.folder, trainer.progress.best))
        state = trainer.state_dict(clock)  # called on every rank, because it gathers the random states
        run.checkpoints.allocate(state)
        if trainer.recipe.on_nan == "rollback" and self.run and not run.checkpoint_path("last").is_file():
            # a rollback within the first epoch needs a checkpoint
            checkpoint.save_checkpoint(run.checkpoint_path("last"), state)
        return replace(run, folder=folder, user_callbacks=tuple(callbacks) if self.run else ())

    def _open_run(self, trainer: Trainer) -> Run:
        epochs_done, names = trainer.progress.epoch, trainer.resolved.trackers
        if self.folder and self.lock:
            stopped = Run(self.folder, self.recipe_name, self.lock)
            run = stopped.open(trainer.recipe, names, epochs_done, is_resumed=True)
        else:
            run = Run.create(trainer.recipe, self.recipe_name, names, epochs_done, self.copy_from)
            self.lock = run.lock
        best_path = (self.folder or self.copy_from or run.folder) / "checkpoints" / "best.pt"
        if (best := _read_best_or_forget(trainer.progress, best_path)) and self.copy_from:
            checkpoint.save_checkpoint(run.checkpoint_path("best"), best)
        self.run = run
        free_bytes, num_bytes = shutil.disk_usage(run.folder).free, sum(t.nbytes for t in trainer.state_tensors())
        if free_bytes < num_bytes:
            problem = f"a checkpoint needs {num_bytes:,} bytes, and {free_bytes:,} are free in {run.folder}"
            raise DiskError(problem, "free some space, or give --out on another disk")
        return run


def _read_best_or_forget(progress: TrainingProgress, path: Path) -> dict[str, Any] | None:
    """Return the checkpoint `path` of the best epoch, or reset the best validation accuracy and return None.

    The file may be missing, or that of a later epoch, which the resumed run has not reached.
    """
    with suppress(CheckpointError):
        if progress.best is not None and (state := checkpoint.read_checkpoint(path)).get("best") == progress.best:
            return state
    progress.best = None
    return None


class _SavedProgress(BaseModel, allow_inf_nan=False):
    """The numbers of a checkpoint that are used before a trainer loads it."""

    samples: Count
    classes: list[str]
    epoch: Count
    epoch_step: Count
    step: Count
    images: Count
    val_acc: float | None
    best: float | None
    epochs_since_best: Count
    rollbacks: Count
    clock: dict[Literal["setup", "compile", "train", "eval", "epoch", "total"], float] = Field(min_length=6)


class RunFinishedError(UsageError):
    """The run to resume has been trained to its end and evaluated on the test set."""


@contextmanager
def resume_point_on_all_ranks(recipe: Recipe, recipe_name: str, world: World) -> Iterator[ResumePoint]:
    """Find the resume point on rank 0, the only rank that reads the disk; broadcast it; close it after the block."""
    point = find_resume_point(recipe, recipe_name) if world.is_main_process else ResumePoint(recipe, recipe_name)
    status = "FAILED"
    try:
        if world.is_main_process:
            trackers.require_trackers(point.recipe)
        point.recipe, point.state, point.is_new = world.broadcast_object((point.recipe, point.state, point.is_new))
        yield point
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        point.close(status)


def find_resume_point(recipe: Recipe, recipe_name: str) -> ResumePoint:
    """Return where a run with `recipe` starts, as `recipe.resume` specifies.

    Raises `CheckpointError` if there is no such checkpoint or the recipe differs from the saved one, and `UsageError`
    if another process is training the run or the run is finished.
    """
    if recipe.resume is None:
        return ResumePoint(recipe, recipe_name, is_new=True)
    if recipe.resume == "auto":
        return _resume_auto(recipe, recipe_name)
    resumed_path = Path(recipe.resume)
    if os.path.isdir(resumed_path) and (recipe.out is None or Path(recipe.out).resolve() == resumed_path.resolve()):
        return _resume_in_place(recipe, recipe_name, resumed_path)
    path = checkpoint.resolve_checkpoint_path(recipe.resume)
    if not os.path.exists(path):
        raise CheckpointError(f"{path} is not a run folder or checkpoint", RESUME_REMEDY)
    folder = path.parent.parent
    is_in_run_folder = path.parent.name == "checkpoints" and os.path.isfile(folder / "recipe.toml")
    if is_in_run_folder:
        recipe_name = read_environment(folder).recipe or recipe_name
    state = require_resumable_state(checkpoint.load_checkpoint(path), path)
    # a checkpoint, perhaps of a stranger, determines neither where anything is written nor what is tracked
    saved = {**state["recipe"], "out": str(folder) if is_in_run_folder else None, "track": "none"}
    merged, changes = merge_resumed_recipe(recipe, saved, path, state["epoch"], state["samples"])
    require_fitting_network(merged, state["model"], len(state["classes"]), path)
    _require_steps_left(path, TrainingProgress.from_checkpoint(state), merged)
    messages = [f"resume: from step {state['step']:,} of {path}, in a new run folder", *changes]
    return ResumePoint(merged, recipe_name, state, copy_from=folder if is_in_run_folder else None, messages=messages)


def _resume_auto(recipe: Recipe, recipe_name: str) -> ResumePoint:
    """Resume the run in `--out`, or the newest unfinished run of this recipe and name; otherwise start a new run."""
    new = ResumePoint(recipe.model_copy(update={"resume": None}), recipe_name, is_new=True)
    if recipe.out:
        folder = Path(recipe.out)
        reason = f"no run in {folder}"
        if os.path.isfile(folder / "recipe.toml"):
            try:
                return _resume_in_place(recipe, recipe_name, folder)
            except RunFinishedError as error:
                reason = error.problem
        elif folder.is_dir() and not any(path.is_file() and path.suffix != ".tmp" for path in folder.rglob("*")):
            new.folder, new.lock = folder, lock_folder(folder)  # an empty folder, left by a killed process
    else:
        reason = "no unfinished run of this recipe in runs"
        folders = [file.parent for file in Path("runs").glob("*/recipe.toml")]

        def last_modified(folder: Path) -> float:  # time of the last checkpoint, or of the start if there is none
            last = folder / "checkpoints" / "last.pt"
            return (last if os.path.isfile(last) else folder / "recipe.toml").stat().st_mtime

        for folder in sorted(folders, key=last_modified, reverse=True):
            if read_environment(folder).recipe != recipe_name or (folder / "summary.json").exists():
                continue
            try:
                return _resume_in_place(recipe, recipe_name, folder)
            except UserError:  # a run with other options, a damaged one, or one that another process is training
                continue
    new.messages = [f"resume: {reason}; starting a new run"]
    return new


def _resume_in_place(recipe: Recipe, recipe_name: str, folder: Path) -> ResumePoint:
    """Lock `folder` and continue its run from the last checkpoint, or from the first step if there is none."""
    last = folder / "checkpoints" / "last.pt"
    if not os.path.isfile(last) and not os.path.isfile(folder / "recipe.toml"):
        raise CheckpointError(f"no run or checkpoint in {folder}", RESUME_REMEDY)
    lock = lock_folder(folder)
    try:
        state = require_resumable_state(checkpoint.load_checkpoint(last), last) if os.path.isfile(last) else None
        saved = {**(state["recipe"] if state else load_saved_recipe(folder)), "out": str(folder)}
        progress = TrainingProgress.from_checkpoint(state) if state else TrainingProgress()
        num_images = state["samples"] if state else None
        merged, changes = merge_resumed_recipe(recipe, saved, folder, progress.epoch, num_images)
        if state:
            require_fitting_network(merged, state["model"], len(state["classes"]), last)
        if (folder / "summary.json").exists():  # otherwise the run is evaluated on the test set
            _require_steps_left(folder, progress, merged)
    except BaseException:
        lock.release()
        raise
    start = f"from step {state['step']:,}" if state else "from the first step, because it has no checkpoint yet"
    recipe_name = read_environment(folder).recipe or recipe_name
    messages = [f"resume: {folder} {start}", *changes]
    return ResumePoint(merged, recipe_name, state, folder=folder, lock=lock, messages=messages)


def _require_steps_left(source: Path, progress: TrainingProgress, recipe: Recipe) -> None:
    """Raise `RunFinishedError` if `recipe` has no step after `progress`, which was read from `source`."""
    if stop_reason := progress.find_stop_reason(recipe):
        problem = f"{source} is finished: {progress.epoch} epochs, {progress.step:,} steps"
        raise RunFinishedError(problem, f"give a larger {option_flag(stop_reason)} to continue it")


def merge_resumed_recipe(
    recipe: Recipe, saved: dict[str, Any], source: Path, epochs_done: int, num_images: int | None = None
) -> tuple[Recipe, list[str]]:
    """Return the `saved` options, overridden by those of `recipe`, and a line for each change with its effect.

    With `--resume auto`, all options of `recipe` are used, otherwise only those that were set explicitly. The saved
    `max_steps` is ignored, so that a run that stopped there can continue. `num_images`: training images of the run,
    without the validation split, if a checkpoint records them.
    """
    requested = recipe.model_dump(mode="json", exclude_unset=recipe.resume != "auto")
    val_size = saved.get("val_size")
    was_default = val_size is None or num_images is None or val_size == default_val_size(num_images + val_size)
    if recipe.val_size is None and was_default:
        requested.pop("val_size", None)  # a run records the size that was the default for its data set
    if recipe.normalize == "auto" and ":" in str(saved.get("normalize")):
        requested.pop("normalize", None)  # a run records the values that were computed from its images
    original = {**Recipe().model_dump(mode="json"), **saved}
    saved = {**original, "max_steps": None, "data": cifar.saved_data_path(original["data"])}
    if "data" in requested:
        requested["data"] = cifar.absolute_data_path(requested["data"])
    if "init" in requested:
        requested["init"] = absolute_init_path(requested["init"])
    if saved["time_budget"] is not None:
        if requested.get("time_budget") == saved["time_budget"]:
            requested = {name: value for name, value in requested.items() if name not in TIME_BUDGET_OPTIONS}
        elif "epochs" in requested and "time_budget" not in requested:
            saved["time_budget"] = None
    merged = {**saved, **requested}
    differing = [name for name in merged if name not in RESUMABLE_OPTIONS and merged[name] != saved.get(name)]
    if differing:
        differences = format_differences(saved, merged, differing, option_flag)
        raise CheckpointError(
            f"{source} was trained with other options: {differences}", "give its options, or leave --resume out"
        )
    if merged["epochs"] < epochs_done:
        raise UsageError(
            f"--epochs {merged['epochs']}: {source} has already trained for {epochs_done} epochs",
            f"give --epochs {epochs_done} or more",
        )
    try:
        resumed = Recipe(**{**merged, "resume": None})
    except UsageError as error:
        raise CheckpointError(f"{source} cannot be resumed: {error}") from None
    options, effects = resumed.model_dump(mode="json"), dict(RESUMABLE_OPTIONS)
    if resumed.schedule_epochs is not None:
        effects["epochs"] = f"the schedule still ends after {resumed.schedule_epochs:g} epochs"
    return resumed, [
        f"{option_flag(name)} {format_option_value(original[name], 'unset')} -> "
        f"{format_option_value(options[name], 'unset')}: {effect}"
        for name, effect in effects.items()
        if effect and options[name] != original[name]
    ]


def require_resumable_state(state: TrainingCheckpoint, source: Path) -> TrainingCheckpoint:
    """Return `state`, which was read from `source`. Raises `CheckpointError` if it has no or an invalid training state.

    The methods that load a state check its other parts.
    """
    if not isinstance(state.get("step"), int) or not {"random", "meter", "clock", "optimizer"} <= state.keys():
        raise CheckpointError(
            f"{source} contains weights but no training state, so it cannot be resumed",
            "start another run from them with --init, or evaluate them with `fastcifar eval`",
        )
    try:
        _SavedProgress.model_validate(state, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{source} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return state


def require_same_data(trainer: Trainer, state: TrainingCheckpoint) -> None:
    """Raise `CheckpointError` unless `trainer` has the images and labels, in their order, of the run in `state`."""
    num_images, classes, source = len(trainer.train_split.labels), list(trainer.data.classes), trainer.data.source
    problem = ""
    if (num_images, len(classes)) != (state["samples"], len(state["classes"])):
        problem = (
            f"{state['samples']:,} images of {len(state['classes'])} classes, "
            f"not on {num_images:,} images of {len(classes)} classes"
        )
    elif classes != state["classes"]:
        problem = f"other classes than those of {source}"
    elif "data_digest" not in state:
        warnings.warn("the checkpoint does not identify its images, so only their number is checked", stacklevel=2)
    elif state["data_digest"] != trainer.data.digest:
        problem = f"other images or labels than those of {source}, or in another order"
    if problem:
        remedy = "give the --data that the run was trained on"
        raise CheckpointError(f"the checkpoint was trained on {problem}", remedy)


def load_trainer_state(trainer: Trainer, state: TrainingCheckpoint) -> None:
    """Load a checkpoint into `trainer`. Raises `CheckpointError` if it does not fit the network."""
    try:
        trainer.load_state_dict(state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        reason = first_message_line(error, type(error).__name__)
        raise CheckpointError(f"the checkpoint does not fit this run: {reason}") from None


def roll_back(trainer: Trainer, run: Run, error: NonFiniteError) -> str:
    """Return to the last checkpoint and halve the learning rate from there on; return a line for the user.

    Raises `error` if `--on-nan` is not "rollback", or if there were already `MAX_ROLLBACKS` rollbacks.
    """
    if trainer.recipe.on_nan != "rollback" or trainer.progress.rollbacks == MAX_ROLLBACKS:
        raise error
    with suppress(NonFiniteError):  # raised again by a save of the same NaN or Inf
        run.checkpoints.wait()
    rollbacks = trainer.progress.rollbacks + 1
    is_main_process = trainer.world.is_main_process
    state = checkpoint.load_checkpoint(run.checkpoint_path("last")) if is_main_process else None
    load_trainer_state(trainer, trainer.world.broadcast_object(state))
    trainer.progress.rollbacks = trainer.schedule.state["halvings"] = rollbacks
    if is_main_process:
        _read_best_or_forget(trainer.progress, run.checkpoint_path("best"))
        run.truncate_rows(trainer.progress.epoch)
    trainer.progress.best = trainer.world.broadcast_object(trainer.progress.best)
    return (
        f"{error.problem}: rolled back to step {trainer.progress.step:,}, with the learning rate scaled by "
        f"{0.5**rollbacks:g} from there on (rollback {rollbacks} of {MAX_ROLLBACKS})"
    )
