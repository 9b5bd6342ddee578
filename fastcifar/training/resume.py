"""Where a run starts: anew, or at a checkpoint of the run that it goes on with.

What may differ between a run and its continuation is the table FREE, and only that: the rest is another experiment.
Nothing is trained here, and nothing is written before everything is known to fit.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fastcifar.errors import CheckpointError, Interrupted, NonFiniteError, UsageError, UserError
from fastcifar.recipe import Recipe, option, read_toml, section
from fastcifar.training import checkpoint, trackers
from fastcifar.training.distributed import World
from fastcifar.training.run_dir import Clock, Progress, Run, Sinks, hold, read_environment
from fastcifar.training.trainer import Parts

DEFAULTS = Recipe().model_dump(mode="json")
ROLLBACKS = 3  # and then a run that is not finite stops after all

# what may differ -> what a difference means
FREE: dict[str, str] = {
    "epochs": "the schedule is computed anew over the new length, from the current step on",
    "patience": "the epochs without a better one count on",
    "max_steps": "steps of the whole run, those before included",
    "max_params": "a limit, not a part of the network",
    "weights": "which weights meet the test set at the end",
    "data": "the same images in another place; another number of them is refused",
    "out": "another folder: the run goes on there, and the old one stays as it is",
    "resume": "",
    "save_every": "",
    "track": "a tracker that is new gets the rows before too",
    "on_nan": "",
    "deterministic": "sums may round otherwise",
    **dict.fromkeys(section("machine"), "sums may round otherwise: the same run, no longer bit for bit"),
}
# with --time-budget these were made to fit, so that the command says something else than the run's recipe
FITTED = ("epochs", "warmup_epochs", "schedule_epochs", "image_size")


@dataclass
class Origin:
    """Where a run starts. A context: at its end the run is closed, and the lock on its folder let go.

    `recipe`: what to train by. `state`: the checkpoint to go on from, None from the beginning. `folder`: the run
    folder to go on in, None for a new one. `rows`: the folder whose rows and best weights are copied into a new one.
    """

    recipe: Recipe
    name: str
    state: dict[str, Any] | None = None
    folder: Path | None = None
    rows: Path | None = None
    lock: int | None = None
    lines: list[str] = field(default_factory=list)
    run: Run | None = None

    def __enter__(self) -> Origin:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.run:
            stopped = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt | SystemExit)
            for tracker in self.run.trackers:
                tracker.close("KILLED" if stopped else "FAILED" if kind else "FINISHED")
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def open_together(self, parts: Parts, clock: Clock, sinks: Sinks = ()) -> Run:
        """`open` by rank 0, with more `sinks`; the others take its state, write nothing. Errors: those of `open`."""
        if not parts.world.leads and self.state:
            load(parts, self.state)
        run = self.open(parts, clock) if parts.world.leads else None
        folder, best = parts.world.told([str(run.folder), parts.progress.best] if run else None)
        parts.progress.best = best
        if parts.recipe.on_nan == "rollback":
            state = parts.state(clock)  # of all ranks
            if run and not run.checkpoint("last").is_file():
                checkpoint.save(run.checkpoint("last"), state)  # what the first epoch may go back to
        return run.also(sinks) if run else Run.of_another_rank(Path(folder), self.name)

    @property
    def is_new(self) -> bool:
        """Whether nothing of the run was there before, but perhaps a folder."""
        return self.state is None and not (self.folder and (self.folder / "recipe.toml").is_file())

    def open(self, parts: Parts, clock: Clock) -> Run:
        """The run's folder, locked and written to, with room for a checkpoint; the state is put into the parts.

        Errors: `DiskError`, `CheckpointError`.
        """
        done = 0
        if self.state:
            load(parts, self.state)
            clock.load_state_dict(self.state["clock"])
            done = parts.progress.epoch
        if self.folder and self.lock is not None:
            run = Run.reopen(self.folder, self.lock, parts.recipe, self.name, done)
        else:
            run = Run.create(parts.recipe, self.name)
            self.lock = run.lock
            if self.rows:
                self._copy(self.rows, run, done)
            if not run.checkpoint("best").is_file():
                parts.progress.best = None
        self.run = run
        run.require_space(parts.checkpoint_bytes())
        return run

    def _copy(self, source: Path, run: Run, done: int) -> None:
        """The rows of the finished epochs, and the best weights so far, from the folder that was left."""
        run.take_rows(source, done)
        best = checkpoint.find(str(source), "best")
        if best.is_file():
            checkpoint.save(run.checkpoint("best"), checkpoint.load(best))


class Finished(UsageError):
    """A run that has nothing left to train and has been tested."""


def find(recipe: Recipe, name: str) -> Origin:
    """Where `recipe` asks to start. `name`: the recipe's, for tables.

    Errors: `CheckpointError` with what differs, `UsageError` for a run that is being trained, or is finished.
    """
    if recipe.resume is None:
        return Origin(recipe, name)
    if recipe.resume == "auto":
        return _automatic(recipe, name)
    asked = Path(recipe.resume)
    if asked.is_dir() and (recipe.out is None or Path(recipe.out).resolve() == asked.resolve()):
        return _in_place(recipe, name, asked)
    path = checkpoint.find(recipe.resume)
    if not path.exists():
        raise CheckpointError(f"no run or checkpoint {path}", "give a run folder, a .pt file or auto")
    folder = path.parent.parent
    is_a_run = path.parent.name == "checkpoints" and (folder / "recipe.toml").is_file()
    name = read_environment(folder).get("recipe", name) if is_a_run else name
    state = resumable(checkpoint.load(path), path)
    going_on = continuation(recipe, {**DEFAULTS, **state["recipe"]}, path, state["epoch"])
    lines = [
        f"resume: from {path}, step {state['step']:,}, in a new folder",
        *changes({**DEFAULTS, **state["recipe"]}, going_on),
    ]
    return Origin(going_on, name, state, rows=folder if is_a_run else None, lines=lines)


def find_together(recipe: Recipe, name: str, here: World) -> Origin:
    """`find` by rank 0, which alone reads the disk; the others start where it does. Errors: those of `find`."""
    with ExitStack() as undo:
        origin = undo.enter_context(find(recipe, name) if here.leads else Origin(recipe, name))
        if here.leads:
            trackers.require(origin.recipe)
        undo.pop_all()
    values, is_new = here.told([origin.recipe.model_dump(mode="json"), origin.is_new])
    state = here.shown(origin.state)
    if here.leads:
        return origin
    return Origin(Recipe.checked(values), name, state, folder=None if is_new else Path())


def _automatic(recipe: Recipe, name: str) -> Origin:
    """The newest run of this recipe and name that is neither finished nor being trained; otherwise a new one.

    With `--out` it is that folder or none: another recipe's run there, or a busy one, is an error.
    """
    new = Origin(recipe.model_copy(update={"resume": None}), name)
    if recipe.out:
        folder = Path(recipe.out)
        why = f"no run in {folder}"
        if (folder / "recipe.toml").is_file():
            try:
                return _in_place(recipe, name, folder)
            except Finished as error:
                why = error.problem
        elif folder.is_dir() and not _files(folder):  # of a process that was killed when it had just made it
            new.folder, new.lock = folder, hold(folder)
    else:
        why = "no unfinished run of this recipe in runs"
        for folder in _newest_first(Path("runs")):
            if read_environment(folder).get("recipe") != name or (folder / "summary.json").exists():
                continue
            try:
                return _in_place(recipe, name, folder)
            except UserError:  # another recipe's, damaged, or being trained
                continue
    new.lines = [f"resume: {why}, so a new one starts"]
    return new


def _files(folder: Path) -> list[Path]:
    """The files below `folder`, without temporary ones that were left."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]


def _newest_first(parent: Path) -> list[Path]:
    """The run folders in `parent`, by the time of their last checkpoint, or of their start."""

    def written(folder: Path) -> float:
        last = checkpoint.find(str(folder), "last")
        return (last if last.is_file() else folder / "recipe.toml").stat().st_mtime

    return sorted((file.parent for file in parent.glob("*/recipe.toml")), key=written, reverse=True)


def _in_place(recipe: Recipe, name: str, folder: Path) -> Origin:
    """`folder` goes on, from its last checkpoint or, where there is none yet, from the beginning; it is locked."""
    last = checkpoint.find(str(folder), "last")
    if not last.is_file() and not (folder / "recipe.toml").is_file():
        raise CheckpointError(f"no run or checkpoint in {folder}", "give a run folder, a .pt file or auto")
    lock = hold(folder)
    try:
        state = resumable(checkpoint.load(last), last) if last.is_file() else None
        saved = state["recipe"] if state else read_toml(str(folder / "recipe.toml"))
        done = Progress.of(state) if state else Progress()
        going_on = continuation(recipe, {**DEFAULTS, **saved}, folder, done.epoch)
        if (folder / "summary.json").exists() and (reason := done.over(going_on)):
            problem = f"{folder} is finished: {done.epoch} epochs, {done.step:,} steps"
            raise Finished(problem, f"give more {option(reason)} to go on with it")
    except BaseException:
        os.close(lock)
        raise
    where = f"from step {state['step']:,}" if state else "from the beginning, for it has no checkpoint yet"
    lines = [f"resume: {folder} {where}", *changes({**DEFAULTS, **saved}, going_on)]
    return Origin(going_on, read_environment(folder).get("recipe", name), state, folder, lock=lock, lines=lines)


def continuation(recipe: Recipe, saved: dict[str, Any], source: Path, done: int) -> Recipe:
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
            asked = {name: value for name, value in asked.items() if name not in FITTED}
        elif "epochs" in asked and "time_budget" not in asked:
            saved = {**saved, "time_budget": None}
    wanted = {**saved, **asked}
    differing = [name for name in wanted if name not in FREE and wanted[name] != saved.get(name)]
    if differing:
        listed = ", ".join(
            f"{option(name)} {_spell(saved.get(name))}, not {_spell(wanted[name])}" for name in differing
        )
        raise CheckpointError(f"{source} is another run: {listed}", "give what it has, or leave --resume out")
    if wanted["epochs"] < done:
        raise UsageError(f"--epochs {wanted['epochs']}: {source} has done {done}", "give more")
    try:
        return Recipe.checked({**wanted, "resume": None})
    except UsageError as error:
        raise CheckpointError(f"{source} does not go on: {error}") from None


def changes(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """A line for each knob that changed and what that means."""
    now = recipe.model_dump(mode="json")
    differing = [name for name, meaning in FREE.items() if meaning and now[name] != saved[name]]
    return [f"{option(name)} {_spell(saved[name])} -> {_spell(now[name])}: {FREE[name]}" for name in differing]


def _spell(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def resumable(state: dict[str, Any], source: Path) -> dict[str, Any]:
    """`state` if it holds all that a run needs. Errors: `CheckpointError`."""
    if not isinstance(state.get("step"), int) or not {"random", "meter", "clock", "optimizer"} <= state.keys():
        raise CheckpointError(f"{source} holds weights, but not the state of a run", "`fastcifar eval` can measure it")
    return state


def load(parts: Parts, state: dict[str, Any]) -> None:
    """The state into the parts of the same run. Errors: `CheckpointError`."""
    found = (len(parts.train.labels), list(parts.data.classes))
    if found != (state["samples"], state["classes"]):
        problem = f"the checkpoint is of {state['samples']:,} training images in {len(state['classes'])} classes"
        raise CheckpointError(f"{problem}, not {found[0]:,} in {len(found[1])}", "give --data as it was")
    try:
        parts.load(state)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the checkpoint does not fit this run: {reason}") from None


def roll_back(parts: Parts, run: Run, error: NonFiniteError) -> str:
    """The run back at its last checkpoint, from where on every learning rate is half of what it was; says so.

    Raises `error` where the recipe does not want that, and after ROLLBACKS times.
    """
    if parts.recipe.on_nan != "rollback" or parts.progress.rollbacks == ROLLBACKS:
        raise error
    rollbacks = parts.progress.rollbacks + 1
    state = parts.world.shown(checkpoint.load(run.checkpoint("last")) if parts.world.leads else None)
    assert state is not None
    load(parts, state)
    parts.progress.rollbacks = parts.schedule.halvings = rollbacks
    if parts.world.leads:
        run.rewind(parts.progress.epoch)
    where = f"back to step {parts.progress.step:,}, learning rate times {0.5**rollbacks:g}"
    return f"{error.problem}: {where} from there on (rollback {rollbacks} of {ROLLBACKS})"
