"""The run folder, and the progress and the timer of a run.

A run folder holds the recipe, environment, metrics, events, checkpoints and summary. The process that writes to it
holds a lock on it. If a folder of the same name exists, `-2`, `-3`, ... is appended.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from fastcifar.device import Environment, collect_environment
from fastcifar.errors import DiskError, UsageError
from fastcifar.files import FolderLock, lock_folder, write_atomically
from fastcifar.format import format_timestamp
from fastcifar.recipe import Recipe
from fastcifar.training.metrics_file import METRICS_COLUMNS, EpochRow, read_event_lines, read_metrics_csv
from fastcifar.training.summary import RunSummary
from fastcifar.training.trackers import Tracker

# Called with the row of metrics of each epoch. If it returns a text, training stops with it as the stop reason.
EpochCallback = Callable[[EpochRow], str | None]
EpochCallbacks = Sequence[EpochCallback]


class LaunchEnvironment(Environment):
    """The environment of a process that trained a run, its command line and its start time."""

    command: list[str] = Field(default_factory=list)
    started: str = ""


class RunEnvironment(LaunchEnvironment):
    """The content of env.json: the name of the recipe and the processes that started and that resumed the run."""

    recipe: str = ""
    resumed: list[LaunchEnvironment] = Field(default_factory=list)


def read_environment(folder: Path) -> RunEnvironment:
    """Return env.json of a run folder; an empty environment if the file is missing or invalid."""
    try:
        return RunEnvironment.model_validate_json((folder / "env.json").read_bytes())
    except (OSError, ValidationError):
        return RunEnvironment()


def build_csv_callback(folder: Path, epochs_done: int = 0) -> EpochCallback:
    """Return a callback that appends a row to metrics.csv in `folder`, keeping the rows of the first `epochs_done`.

    A row is flushed to the disk, so that it is there before the checkpoint of its epoch.
    """
    path = folder / "metrics.csv"
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, METRICS_COLUMNS)
    writer.writeheader()
    writer.writerows(read_metrics_csv(path, epochs_done))
    write_atomically(path, table.getvalue().encode())

    def write(row: EpochRow) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, METRICS_COLUMNS).writerow(
                {name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in row.items()}
            )
            file.flush()
            os.fsync(file.fileno())

    return write


def build_jsonl_callback(folder: Path, epochs_done: int = 0) -> EpochCallback:
    """Return a callback that appends a row to events.jsonl in `folder`, keeping the rows of the first `epochs_done`."""
    path = folder / "events.jsonl"
    write_atomically(path, "".join(f"{line}\n" for line in read_event_lines(path, epochs_done)).encode())

    def write(row: EpochRow) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")

    return write


# File in the run folder -> function (folder, epochs_done) that keeps its rows of the first epochs and returns the
# callback that adds rows. The callbacks of trackers come after these, because trackers read the earlier rows from them.
METRICS_FILES: dict[str, Callable[[Path, int], EpochCallback]] = {
    "metrics.csv": build_csv_callback,
    "events.jsonl": build_jsonl_callback,
}


@dataclass(frozen=True)
class Run:
    """A run folder, locked by this process until `lock` is released, and the callbacks of its epochs.

    Methods that write raise `DiskError`. `recipe_name`: the name of the recipe, for tables.
    """

    folder: Path
    recipe_name: str
    lock: FolderLock | None = None
    callbacks: tuple[EpochCallback, ...] = ()

    @classmethod
    def create(cls, recipe: Recipe, recipe_name: str, trackers: Sequence[str] = ()) -> Run:
        """Create the run folder: `--out`, or runs/ARCH-RECIPE-sSEED-TIME by default."""
        default_name = f"{recipe.arch}-{recipe_name}-s{recipe.seed}-{format_timestamp(for_file_name=True)}"
        path = Path(recipe.out) if recipe.out else Path("runs") / default_name
        with _disk_errors(f"the run folder {path}", "give a writable folder with --out"):
            folder, lock = _create_unique_folder(path)
            environment = RunEnvironment(recipe=recipe_name, **_launch_environment(recipe).model_dump())
            return cls(folder, recipe_name, lock)._open(recipe, environment, 0, trackers)

    def reopen(self, recipe: Recipe, epochs_done: int, trackers: Sequence[str] = ()) -> Run:
        """Return this stopped run with the callbacks to continue after its first `epochs_done` epochs.

        Later rows, the summary and temporary files are removed.
        """
        launch = _launch_environment(recipe)
        environment = read_environment(self.folder)
        if not environment.recipe:
            environment = RunEnvironment(recipe=self.recipe_name, **launch.model_dump())
        environment = environment.model_copy(update={"resumed": [*environment.resumed, launch]})
        with _disk_errors(f"the run folder {self.folder}", "give a writable folder with --out"):
            temporary = (*self.folder.glob("checkpoints/.*.tmp"), *self.folder.glob(".*.tmp"))
            for stale in (*temporary, self.folder / "summary.json"):
                stale.unlink(missing_ok=True)
            return self._open(recipe, environment, epochs_done, trackers)

    def _open(self, recipe: Recipe, environment: RunEnvironment, epochs_done: int, trackers: Sequence[str]) -> Run:
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        write_atomically(self.folder / "recipe.toml", recipe.to_toml().encode())
        _write_json(self.folder / "env.json", environment)
        files = [build(self.folder, epochs_done) for build in METRICS_FILES.values()]
        return replace(self, callbacks=(*files, *(Tracker(name, self.folder, epochs_done) for name in trackers)))

    @property
    def trackers(self) -> list[Tracker]:
        return [callback for callback in self.callbacks if isinstance(callback, Tracker)]

    def truncate_rows(self, epochs_done: int) -> None:
        """Remove the rows after the first `epochs_done` epochs from files and trackers."""
        with _disk_errors(self.folder):
            for build in METRICS_FILES.values():
                build(self.folder, epochs_done)
            for tracker in self.trackers:
                tracker.reopen(epochs_done)

    def copy_rows_from(self, source: Path, epochs_done: int) -> None:
        """Copy the rows of the first `epochs_done` epochs from the run folder `source`."""
        with _disk_errors(self.folder):
            for name in METRICS_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, self.folder / name)
        self.truncate_rows(epochs_done)

    def require_disk_space(self, num_bytes: int) -> None:
        """Raise `DiskError` if the file system of the run folder has less than `num_bytes` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            problem = f"a checkpoint needs {num_bytes:,} bytes, and {free:,} are free in {self.folder}"
            raise DiskError(problem, "free some space, or give --out on another disk")

    def log_epoch(self, row: EpochRow) -> str:
        """Call every callback with the row of an epoch and return the first stop reason, or ""."""
        with _disk_errors(self.folder):
            return next(filter(None, [callback(row) for callback in self.callbacks]), "")

    def checkpoint_path(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.pt"

    def finish(self, summary: RunSummary, weights: dict[str, Tensor]) -> None:
        """Write summary.json and weights.safetensors, and pass the summary to the trackers.

        `weights`: the state dict that was evaluated on the test set.
        """
        with _disk_errors(self.folder):
            contiguous = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            save_file(contiguous, self.folder / "weights.safetensors", {"arch": summary.arch})
            _write_json(self.folder / "summary.json", summary)
        for tracker in self.trackers:
            tracker.finish(summary)


@contextmanager
def _disk_errors(target: object, remedy: str = "free some space") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write {target}: {error.strerror}", remedy) from None


def _write_json(path: Path, document: BaseModel) -> None:
    write_atomically(path, (json.dumps(document.model_dump(), indent=1) + "\n").encode())


def _launch_environment(recipe: Recipe) -> LaunchEnvironment:
    environment = collect_environment(recipe.device)
    return LaunchEnvironment(command=sys.argv, started=format_timestamp(), **environment.model_dump())


def _create_unique_folder(path: Path) -> tuple[Path, FolderLock]:
    """Create and lock the folder `path`, or the first of `path`-2, `path`-3, ... that does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir()  # atomic, so two processes never get the same folder
            return folder, lock_folder(folder)
        except (FileExistsError, UsageError):  # it exists, or a process that resumes a run has locked it first
            number += 1


@dataclass
class TrainingProgress:
    """The progress of a run.

    Attributes:
        epoch: completed epochs.
        epoch_step: steps in the current epoch.
        step: steps since the start of the run.
        images: training images of the completed epochs.
        val_acc: validation accuracy of the last epoch, a fraction; None without a validation split.
        best: validation accuracy of the best epoch.
        rollbacks: number of rollbacks after a loss or gradient that was not finite.
        stop_reason: why the run stopped; empty while it trains.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    images: int = 0
    val_acc: float | None = None
    best: float | None = None
    epochs_since_best: int = 0
    rollbacks: int = 0
    stop_reason: str = ""

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any]) -> TrainingProgress:
        """Return the progress saved in a checkpoint, without its stop reason, so that a resumed run trains on."""
        return cls(**{field.name: state[field.name] for field in fields(cls) if field.name != "stop_reason"})

    def record_epoch(self, images: int, val_acc: float | None, is_complete: bool) -> bool:
        """Count an epoch of `images` training images and return whether its validation accuracy is the best so far.

        An epoch that `max_steps` cut short is the best only if there is no other, because a resumed run completes that
        epoch and must not depend on the interruption.
        """
        self.epoch, self.images, self.val_acc = self.epoch + 1, self.images + images, val_acc
        self.epoch_step = 0 if is_complete else self.epoch_step
        is_best = val_acc is not None and (self.best is None or (is_complete and val_acc > self.best))
        if is_best:
            self.best = val_acc
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        return is_best

    def find_stop_reason(self, recipe: Recipe) -> str:
        """Return why training stops: "max_steps", "patience", "epochs" or a callback's reason; "" if it continues."""
        reasons = {
            "max_steps": recipe.max_steps and self.step >= recipe.max_steps,
            "patience": recipe.patience and self.epochs_since_best >= recipe.patience,
            "epochs": self.epoch >= recipe.epochs,
        }
        return self.stop_reason or next((reason for reason, applies in reasons.items() if applies), "")


class Clock:
    """A timer of the phases of a run ("setup", "compile", "train", "eval") and of its total time, all in seconds.

    The times of a resumed run include those of its checkpoint.
    """

    def __init__(self) -> None:
        self.start_time = time.perf_counter()
        self.seconds: dict[str, float] = {"setup": 0.0, "compile": 0.0, "train": 0.0, "eval": 0.0}
        self._active_phase: tuple[str, float] | None = None
        self._completed_epochs_s = 0.0  # seconds of "train" until the last `end_epoch`

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the `with` block to the phase `name`."""
        self._active_phase = (name, time.perf_counter())
        try:
            yield
        finally:
            self.seconds, self._active_phase = self.elapsed_by_phase(), None

    def elapsed_by_phase(self) -> dict[str, float]:
        """Return the seconds of each phase, including the time so far of the active one."""
        if self._active_phase is None:
            return dict(self.seconds)
        name, started = self._active_phase
        return {**self.seconds, name: self.seconds[name] + time.perf_counter() - started}

    def total_s(self) -> float:
        return time.perf_counter() - self.start_time

    def epoch_train_s(self) -> float:
        """Return the training seconds since the last `end_epoch`."""
        return self.elapsed_by_phase()["train"] - self._completed_epochs_s

    def end_epoch(self) -> None:
        self._completed_epochs_s = self.elapsed_by_phase()["train"]

    def state_dict(self) -> dict[str, float]:
        """Return the seconds of each phase, of training in the current epoch ("epoch"), and in total."""
        return {**self.elapsed_by_phase(), "epoch": self.epoch_train_s(), "total": self.total_s()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add the seconds of the processes that trained the run before this one."""
        self.start_time -= state["total"]
        self.seconds = {name: seconds + state[name] for name, seconds in self.seconds.items()}
        self._completed_epochs_s = self.seconds["train"] - state["epoch"]
