"""Where a run starts: anew, or at a checkpoint of the run that it goes on with.

What may differ between a run and its continuation is the table FREE, and only that: the rest is another experiment.
Nothing is trained here, and nothing is written before everything is known to fit.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fastcifar.errors import CheckpointError, Interrupted, NonFiniteError, UsageError, UserError
from fastcifar.files import FolderLock, lock_folder
from fastcifar.format import format_differences, format_option_value, option_flag
from fastcifar.recipe import Recipe, load_saved_recipe, section_fields
from fastcifar.training import checkpoint, trackers
from fastcifar.training.distributed import World
from fastcifar.training.run_dir import Clock, EpochCallbacks, Run, TrainingProgress, read_environment
from fastcifar.training.trainer import Trainer

DEFAULT_OPTIONS = Recipe().model_dump(mode="json")
MAX_ROLLBACKS = 3  # and then a run that is not finite stops after all

# what may differ -> what a difference means
RESUMABLE_OPTIONS: dict[str, str] = {
    "epochs": "the schedule is computed anew over the new length, from the current step on",
    "patience": "the epochs without a better one count on",
    "max_steps": "steps of the whole run, those before included",
    "max_params": "a limit, not a part of the network",
    "eval_weights": "which weights meet the test set at the end",
    "data": "the same images in another place; another number of them is refused",
    "out": "another folder: the run goes on there, and the old one stays as it is",
    "resume": "",
    "save_every_epochs": "",
    "save_every_steps": "",
    "track": "a tracker that is new gets the rows before too",
    "on_nan": "",
    "deterministic": "sums may round otherwise",
    **dict.fromkeys(section_fields("execution"), "sums may round otherwise: the same run, no longer bit for bit"),
}
# with --time-budget these were made to fit, so that the command says something else than the run's recipe
TIME_BUDGET_OPTIONS = ("epochs", "warmup_epochs", "schedule_epochs", "image_size")


@dataclass
class ResumePoint:
    """Where a run starts. A context: at its end the run is closed, and the lock on its folder let go.

    `recipe`: what to train by. `state`: the checkpoint to go on from, None from the beginning. `folder`: the run
    folder to go on in, None for a new one. `rows`: the folder whose rows and best weights are copied into a new one.
    """

    recipe: Recipe
    recipe_name: str
    state: dict[str, Any] | None = None
    folder: Path | None = None
    copy_from: Path | None = None
    lock: FolderLock | None = None
    messages: list[str] = field(default_factory=list)
    run: Run | None = None

    def __enter__(self) -> ResumePoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.run:
            stopped = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt | SystemExit)
            for tracker in self.run.trackers:
                tracker.close("KILLED" if stopped else "FAILED" if kind else "FINISHED")
        if self.lock:
            self.lock.release()

    def open_run_on_all_ranks(self, trainer: Trainer, clock: Clock, callbacks: EpochCallbacks = ()) -> Run:
        """`open` by rank 0, with more `sinks`; the others take its state, write nothing. Errors: those of `open`."""
        if not trainer.world.is_main_process and self.state:
            load_trainer_state(trainer, self.state)
        run = self.open_run(trainer, clock) if trainer.world.is_main_process else None
        folder, best = trainer.world.broadcast_object([str(run.folder), trainer.progress.best] if run else None)
        trainer.progress.best = best
        if trainer.recipe.on_nan == "rollback":
            state = trainer.checkpoint_state(clock)  # of all ranks
            if run and not run.checkpoint_path("last").is_file():
                checkpoint.save_checkpoint(run.checkpoint_path("last"), state)  # what the first epoch may go back to
        return run.with_callbacks(callbacks) if run else Run.for_other_rank(Path(folder), self.recipe_name)

    @property
    def is_new(self) -> bool:
        """Whether nothing of the run was there before, but perhaps a folder."""
        return self.state is None and not (self.folder and (self.folder / "recipe.toml").is_file())

    def open_run(self, trainer: Trainer, clock: Clock) -> Run:
        """The run's folder, locked and written to, with room for a checkpoint; the state is put into the parts.

        Errors: `DiskError`, `CheckpointError`.
        """
        done = 0
        if self.state:
            load_trainer_state(trainer, self.state)
            clock.load_state_dict(self.state["clock"])
            done = trainer.progress.epoch
        if self.folder and self.lock:
            run = Run.reopen(self.folder, self.lock, trainer.recipe, self.recipe_name, done)
        else:
            run = Run.create(trainer.recipe, self.recipe_name)
            self.lock = run.lock
            if self.copy_from:
                self._copy_rows_and_best(self.copy_from, run, done)
            if not run.checkpoint_path("best").is_file():
                trainer.progress.best = None
        self.run = run
        run.require_disk_space(trainer.checkpoint_bytes())
        return run

    def _copy_rows_and_best(self, source: Path, run: Run, done: int) -> None:
        """The rows of the finished epochs, and the best weights so far, from the folder that was left."""
        run.copy_rows_from(source, done)
        best = checkpoint.resolve_checkpoint_path(str(source), "best")
        if best.is_file():
            checkpoint.save_checkpoint(run.checkpoint_path("best"), checkpoint.load_checkpoint(best))


class RunFinishedError(UsageError):
    """A run that has nothing left to train and has been tested."""


def find_resume_point(recipe: Recipe, recipe_name: str) -> ResumePoint:
    """Where `recipe` asks to start. `name`: the recipe's, for tables.

    Errors: `CheckpointError` with what differs, `UsageError` for a run that is being trained, or is finished.
    """
    if recipe.resume is None:
        return ResumePoint(recipe, recipe_name)
    if recipe.resume == "auto":
        return _resume_auto(recipe, recipe_name)
    asked = Path(recipe.resume)
    if asked.is_dir() and (recipe.out is None or Path(recipe.out).resolve() == asked.resolve()):
        return _resume_in_place(recipe, recipe_name, asked)
    path = checkpoint.resolve_checkpoint_path(recipe.resume)
    if not path.exists():
        raise CheckpointError(f"no run or checkpoint {path}", "give a run folder, a .pt file or auto")
    folder = path.parent.parent
    is_a_run = path.parent.name == "checkpoints" and (folder / "recipe.toml").is_file()
    recipe_name = read_environment(folder).get("recipe", recipe_name) if is_a_run else recipe_name
    state = require_resumable_state(checkpoint.load_checkpoint(path), path)
    going_on = merge_resumed_recipe(recipe, {**DEFAULT_OPTIONS, **state["recipe"]}, path, state["epoch"])
    lines = [
        f"resume: from {path}, step {state['step']:,}, in a new folder",
        *describe_changed_options({**DEFAULT_OPTIONS, **state["recipe"]}, going_on),
    ]
    return ResumePoint(going_on, recipe_name, state, copy_from=folder if is_a_run else None, messages=lines)


def find_resume_point_on_all_ranks(recipe: Recipe, recipe_name: str, world: World) -> ResumePoint:
    """`find` by rank 0, which alone reads the disk; the others start where it does. Errors: those of `find`."""
    with ExitStack() as undo:
        origin = undo.enter_context(
            find_resume_point(recipe, recipe_name) if world.is_main_process else ResumePoint(recipe, recipe_name)
        )
        if world.is_main_process:
            trackers.require_trackers(origin.recipe)
        undo.pop_all()
    values, is_new = world.broadcast_object([origin.recipe.model_dump(mode="json"), origin.is_new])
    state = world.broadcast_tensors(origin.state)
    if world.is_main_process:
        return origin
    return ResumePoint(Recipe.from_dict(values), recipe_name, state, folder=None if is_new else Path())


def _resume_auto(recipe: Recipe, recipe_name: str) -> ResumePoint:
    """The newest run of this recipe and name that is neither finished nor being trained; otherwise a new one.

    With `--out` it is that folder or none: another recipe's run there, or a busy one, is an error.
    """
    new = ResumePoint(recipe.model_copy(update={"resume": None}), recipe_name)
    if recipe.out:
        folder = Path(recipe.out)
        why = f"no run in {folder}"
        if (folder / "recipe.toml").is_file():
            try:
                return _resume_in_place(recipe, recipe_name, folder)
            except RunFinishedError as error:
                why = error.problem
        elif folder.is_dir() and not _list_files(folder):  # of a process that was killed when it had just made it
            new.folder, new.lock = folder, lock_folder(folder)
    else:
        why = "no unfinished run of this recipe in runs"
        for folder in _run_folders_newest_first(Path("runs")):
            if read_environment(folder).get("recipe") != recipe_name or (folder / "summary.json").exists():
                continue
            try:
                return _resume_in_place(recipe, recipe_name, folder)
            except UserError:  # another recipe's, damaged, or being trained
                continue
    new.messages = [f"resume: {why}, so a new one starts"]
    return new


def _list_files(folder: Path) -> list[Path]:
    """The files below `folder`, without temporary ones that were left."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]


def _run_folders_newest_first(parent: Path) -> list[Path]:
    """The run folders in `parent`, by the time of their last checkpoint, or of their start."""

    def written(folder: Path) -> float:
        last = checkpoint.resolve_checkpoint_path(str(folder), "last")
        return (last if last.is_file() else folder / "recipe.toml").stat().st_mtime

    return sorted((file.parent for file in parent.glob("*/recipe.toml")), key=written, reverse=True)


def _resume_in_place(recipe: Recipe, recipe_name: str, folder: Path) -> ResumePoint:
    """`folder` goes on, from its last checkpoint or, where there is none yet, from the beginning; it is locked."""
    last = checkpoint.resolve_checkpoint_path(str(folder), "last")
    if not last.is_file() and not (folder / "recipe.toml").is_file():
        raise CheckpointError(f"no run or checkpoint in {folder}", "give a run folder, a .pt file or auto")
    lock = lock_folder(folder)
    try:
        state = require_resumable_state(checkpoint.load_checkpoint(last), last) if last.is_file() else None
        saved = state["recipe"] if state else load_saved_recipe(folder)
        done = TrainingProgress.from_checkpoint(state) if state else TrainingProgress()
        going_on = merge_resumed_recipe(recipe, {**DEFAULT_OPTIONS, **saved}, folder, done.epoch)
        if (folder / "summary.json").exists() and (reason := done.find_stop_reason(going_on)):
            problem = f"{folder} is finished: {done.epoch} epochs, {done.step:,} steps"
            raise RunFinishedError(problem, f"give more {option_flag(reason)} to go on with it")
    except BaseException:
        lock.release()
        raise
    where = f"from step {state['step']:,}" if state else "from the beginning, for it has no checkpoint yet"
    lines = [f"resume: {folder} {where}", *describe_changed_options({**DEFAULT_OPTIONS, **saved}, going_on)]
    return ResumePoint(
        going_on, read_environment(folder).get("recipe", recipe_name), state, folder, lock=lock, messages=lines
    )


def merge_resumed_recipe(recipe: Recipe, saved: dict[str, Any], source: Path, epochs_done: int) -> Recipe:
    """The recipe to go on by after `done` epochs: the saved one, with what was asked for now.

    With `auto` all of `recipe` is asked for, else the knobs that were set; `max_steps` is never taken over. Errors:
    `CheckpointError` that lists what differs and may not, `UsageError` for fewer epochs than were done.
    """
    asked = recipe.model_dump(mode="json")
    if recipe.resume != "auto":
        asked = {name: value for name, value in asked.items() if name in recipe.model_fields_set}
    saved = {**saved, "max_steps": None}
    if saved["time_budget"] is not None:
        if asked.get("time_budget") == saved["time_budget"]:
            asked = {name: value for name, value in asked.items() if name not in TIME_BUDGET_OPTIONS}
        elif "epochs" in asked and "time_budget" not in asked:
            saved = {**saved, "time_budget": None}
    wanted = {**saved, **asked}
    differing = [name for name in wanted if name not in RESUMABLE_OPTIONS and wanted[name] != saved.get(name)]
    if differing:
        listed = format_differences(saved, wanted, differing, option_flag)
        raise CheckpointError(f"{source} is another run: {listed}", "give what it has, or leave --resume out")
    if wanted["epochs"] < epochs_done:
        raise UsageError(f"--epochs {wanted['epochs']}: {source} has done {epochs_done}", "give more")
    try:
        return Recipe.from_dict({**wanted, "resume": None})
    except UsageError as error:
        raise CheckpointError(f"{source} does not go on: {error}") from None


def describe_changed_options(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """A line for each knob that changed and what that means."""
    now = recipe.model_dump(mode="json")
    differing = [name for name, meaning in RESUMABLE_OPTIONS.items() if meaning and now[name] != saved[name]]
    return [
        f"{option_flag(name)} {format_option_value(saved[name], 'unset')} -> "
        f"{format_option_value(now[name], 'unset')}: {RESUMABLE_OPTIONS[name]}"
        for name in differing
    ]


def require_resumable_state(state: dict[str, Any], source: Path) -> dict[str, Any]:
    """`state` if it holds all that a run needs. Errors: `CheckpointError`."""
    if not isinstance(state.get("step"), int) or not {"random", "meter", "clock", "optimizer"} <= state.keys():
        raise CheckpointError(f"{source} holds weights, but not the state of a run", "`fastcifar eval` can measure it")
    return state


def load_trainer_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """The state into the parts of the same run. Errors: `CheckpointError`."""
    found = (len(trainer.train_split.labels), list(trainer.data.classes))
    if found != (state["samples"], state["classes"]):
        problem = f"the checkpoint is of {state['samples']:,} training images in {len(state['classes'])} classes"
        raise CheckpointError(f"{problem}, not {found[0]:,} in {len(found[1])}", "give --data as it was")
    try:
        trainer.load_checkpoint_state(state)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the checkpoint does not fit this run: {reason}") from None


def roll_back(trainer: Trainer, run: Run, error: NonFiniteError) -> str:
    """The run back at its last checkpoint, from where on every learning rate is half of what it was; says so.

    Raises `error` where the recipe does not want that, and after ROLLBACKS times.
    """
    if trainer.recipe.on_nan != "rollback" or trainer.progress.rollbacks == MAX_ROLLBACKS:
        raise error
    rollbacks = trainer.progress.rollbacks + 1
    state = trainer.world.broadcast_tensors(
        checkpoint.load_checkpoint(run.checkpoint_path("last")) if trainer.world.is_main_process else None
    )
    assert state is not None
    load_trainer_state(trainer, state)
    trainer.progress.rollbacks = trainer.schedule.halvings = rollbacks
    if trainer.world.is_main_process:
        run.truncate_rows(trainer.progress.epoch)
    where = f"back to step {trainer.progress.step:,}, learning rate times {0.5**rollbacks:g}"
    return f"{error.problem}: {where} from there on (rollback {rollbacks} of {MAX_ROLLBACKS})"
