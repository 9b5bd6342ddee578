"""A run folder (recipe, environment, metrics, events, summary), the sinks and the clock of one run.

A folder belongs to one process at a time, which holds a lock on it; `-2` is added to a name that is taken. Nothing
here computes a metric.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastcifar.device import collect_environment
from fastcifar.errors import DiskError, UsageError
from fastcifar.files import FolderLock, free_disk_bytes, lock_folder, read_json_object, write_atomically
from fastcifar.format import format_timestamp
from fastcifar.recipe import Recipe
from fastcifar.renamed import upgrade_options
from fastcifar.training.metrics_file import METRICS_COLUMNS, EpochRow, read_event_lines, read_metrics_csv
from fastcifar.training.trackers import Tracker, parse_tracker_names

# a function of each epoch's row; a reason that it returns ends the run
EpochCallback = Callable[[EpochRow], str | None]
EpochCallbacks = Sequence[EpochCallback]


def build_csv_callback(folder: Path, epochs_done: int = 0) -> EpochCallback:
    """metrics.csv: one header ever, one row an epoch, on the disk before the epoch's checkpoint is."""
    path = folder / "metrics.csv"
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, METRICS_COLUMNS)
    writer.writeheader()
    writer.writerows(read_metrics_csv(path, epochs_done))
    write_atomically(path, table.getvalue().encode())

    def write(row: EpochRow) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, METRICS_COLUMNS).writerow(
                {name: _format_cell(row.get(name)) for name in METRICS_COLUMNS}
            )
            file.flush()
            os.fsync(file.fileno())

    return write


def build_jsonl_callback(folder: Path, epochs_done: int = 0) -> EpochCallback:
    """events.jsonl: the same rows, one JSON object a line, with the wall clock."""
    path = folder / "events.jsonl"
    write_atomically(path, "".join(f"{line}\n" for line in read_event_lines(path, epochs_done)).encode())

    def write(row: EpochRow) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")

    return write


# name -> what opens the sink in a run folder, keeping the rows of the first `done` epochs; it returns a function of
# one row. The files come first, for trackers read what is in them, and are opened only where the recipe asks.
CALLBACK_FACTORIES: dict[str, Callable[[Path, int], EpochCallback]] = {
    "csv": build_csv_callback,
    "events": build_jsonl_callback,
    "tensorboard": partial(Tracker, "tensorboard"),
    "mlflow": partial(Tracker, "mlflow"),
}
FILE_CALLBACKS = ("csv", "events")


@dataclass(frozen=True)
class Run:
    """A run folder that is this process's own until `lock` is released. `name`: the recipe's, for tables."""

    folder: Path
    recipe_name: str
    lock: FolderLock | None
    callbacks: tuple[EpochCallback, ...]

    @classmethod
    def create(cls, recipe: Recipe, recipe_name: str) -> Run:
        """Makes the folder (`--out`, else runs/ARCH-`name`-...), with recipe.toml and env.json in it.

        Errors: `DiskError` when the folder cannot be made or written: before training, not after.
        """
        named = f"{recipe.arch}-{recipe_name}-s{recipe.seed}-{format_timestamp(for_file_name=True)}"
        wanted = Path(recipe.out) if recipe.out else Path("runs") / named
        try:
            folder, lock = _create_unique_folder(wanted)
            return cls._open(folder, lock, recipe, {"recipe": recipe_name, **_launch_info(recipe)}, 0)
        except OSError as error:
            raise DiskError(f"cannot write the run folder {wanted}: {error.strerror}", "give --out DIR") from None

    @classmethod
    def for_other_rank(cls, folder: Path, recipe_name: str) -> Run:
        """Rank 0's run as the others have it: rows go nowhere, and nothing is written."""
        return cls(folder, recipe_name, None, ())

    @classmethod
    def reopen(cls, folder: Path, lock: FolderLock, recipe: Recipe, recipe_name: str, epochs_done: int) -> Run:
        """The folder of a run that stopped, held by `lock`: rows after its first `done` epochs and its summary go.

        Errors: `DiskError` when it cannot be written.
        """
        environment_then = read_environment(folder) or {"recipe": recipe_name, **_launch_info(recipe)}
        environment_then["resumed"] = [*environment_then.get("resumed", []), _launch_info(recipe)]
        try:
            for stale in (*folder.glob("checkpoints/.*.tmp"), *folder.glob(".*.tmp"), folder / "summary.json"):
                stale.unlink(missing_ok=True)
            return cls._open(folder, lock, recipe, environment_then, epochs_done)
        except OSError as error:
            raise DiskError(f"cannot write the run folder {folder}: {error.strerror}", "give --out DIR") from None

    @classmethod
    def _open(
        cls, folder: Path, lock: FolderLock, recipe: Recipe, environment_now: dict[str, Any], epochs_done: int
    ) -> Run:
        (folder / "checkpoints").mkdir(exist_ok=True)
        write_atomically(folder / "recipe.toml", recipe.to_toml().encode())
        write_atomically(folder / "env.json", (json.dumps(environment_now, indent=1) + "\n").encode())
        sinks = tuple(
            CALLBACK_FACTORIES[name](folder, epochs_done)
            for name in (*FILE_CALLBACKS, *parse_tracker_names(recipe.track))
        )
        return cls(folder, environment_now["recipe"], lock, sinks)

    @property
    def trackers(self) -> list[Tracker]:
        """Those of the sinks that follow the run elsewhere; see `Tracker`."""
        return [sink for sink in self.callbacks if isinstance(sink, Tracker)]

    def truncate_rows(self, epochs_done: int) -> None:
        """Removes the rows after the first `done` epochs. Errors: `DiskError`."""
        try:
            for name in FILE_CALLBACKS:
                CALLBACK_FACTORIES[name](self.folder, epochs_done)
            for tracker in self.trackers:
                tracker.reopen(epochs_done)
        except OSError as error:
            raise self._disk_error(error) from None

    def copy_rows_from(self, source: Path, epochs_done: int) -> None:
        """The rows of the first `done` epochs in the run folder `source`, here. Errors: `DiskError`."""
        try:
            for name in ("metrics.csv", "events.jsonl"):
                if (source / name).is_file():
                    shutil.copyfile(source / name, self.folder / name)
        except OSError as error:
            raise self._disk_error(error) from None
        self.truncate_rows(epochs_done)

    def require_disk_space(self, num_bytes: int) -> None:
        """Errors: `DiskError` if a checkpoint of `needed` bytes does not fit beside what is there."""
        free = free_disk_bytes(self.folder)
        if free is not None and free < num_bytes:
            problem = f"a checkpoint needs {num_bytes:,} bytes, and {free:,} are free in {self.folder}"
            raise DiskError(problem, "free some space, or give --out")

    def _disk_error(self, error: OSError) -> DiskError:
        return DiskError(f"cannot write to {self.folder}: {error.strerror}", "free some space")

    def with_callbacks(self, callbacks: EpochCallbacks) -> Run:
        """The same run with more sinks, after its own."""
        return replace(self, callbacks=(*self.callbacks, *callbacks))

    def log_epoch(self, row: EpochRow) -> str:
        """One epoch's row to every sink; the first reason that one gives to end the run, or "". Errors: `DiskError`."""
        try:
            return next(filter(None, [write(row) for write in self.callbacks]), "")
        except OSError as error:
            raise self._disk_error(error) from None

    def checkpoint_path(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.pt"

    def finish(self, summary: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """summary.json, and the weights that met the test set as weights.safetensors. Errors: `DiskError`."""
        try:
            contiguous = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            save_file(contiguous, self.folder / "weights.safetensors", {"arch": str(summary["arch"])})
            write_atomically(self.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
        except OSError as error:
            raise self._disk_error(error) from None
        for tracker in self.trackers:
            tracker.finish(summary)


@dataclass
class TrainingProgress:
    """Where a run stands: whole epochs, steps in all and in the running epoch, images of whole epochs, the last and
    the best val_acc with the epochs since, and how often it was rolled back."""

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
    def from_checkpoint(cls, state: dict[str, Any]) -> TrainingProgress:
        """The progress in a checkpoint; the reason why it stopped is not carried on."""
        return cls(**{field.name: state[field.name] for field in fields(cls) if field.name != "stop_reason"})

    def record_epoch(self, images: int, val_acc: float | None, is_whole: bool) -> bool:
        """Counts an epoch of so many `images`; whether its `val_acc` is the best.

        One that `max_steps` cut is best only where there is none: a run that goes on in it knows nothing of this one.
        """
        self.epoch, self.images, self.val_acc = self.epoch + 1, self.images + images, val_acc
        self.epoch_step = 0 if is_whole else self.epoch_step
        is_best = val_acc is not None and (self.best is None or (is_whole and val_acc > self.best))
        if is_best:
            self.best, self.epochs_since_best = val_acc, 0
        else:
            self.epochs_since_best += 1
        return is_best

    def find_stop_reason(self, recipe: Recipe) -> str:
        """Why a run by `recipe` is over ("max_steps", "patience", "epochs", or a sink's reason), or ""."""
        if self.stop_reason:
            return self.stop_reason
        if recipe.max_steps and self.step >= recipe.max_steps:
            return "max_steps"
        if recipe.patience and self.epochs_since_best >= recipe.patience:
            return "patience"
        return "epochs" if self.epoch >= recipe.epochs else ""


class Clock:
    """Seconds of a run by phase ("setup", "compile", "train", "eval"), and in all since it was made.

    A run that is resumed goes on from the seconds in its checkpoint.
    """

    def __init__(self) -> None:
        self.start_time = time.perf_counter()
        self.seconds: dict[str, float] = {"setup": 0.0, "compile": 0.0, "train": 0.0, "eval": 0.0}
        self._active_phase: tuple[str, float] | None = None
        self._finished_epochs_s = 0.0  # of "train"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._active_phase = (name, time.perf_counter())
        try:
            yield
        finally:
            self.seconds, self._active_phase = self.elapsed_by_phase(), None

    def elapsed_by_phase(self) -> dict[str, float]:
        """The seconds of each phase, the running one's included."""
        if self._active_phase is None:
            return dict(self.seconds)
        name, started = self._active_phase
        return {**self.seconds, name: self.seconds[name] + time.perf_counter() - started}

    def total_s(self) -> float:
        return time.perf_counter() - self.start_time

    def epoch_train_s(self) -> float:
        """Seconds of training since the last epoch ended."""
        return self.elapsed_by_phase()["train"] - self._finished_epochs_s

    def end_epoch(self) -> None:
        self._finished_epochs_s = self.elapsed_by_phase()["train"]

    def state_dict(self) -> dict[str, float]:
        return {**self.elapsed_by_phase(), "epoch": self.epoch_train_s(), "total": self.total_s()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Adds the seconds of the processes before this one."""
        self.start_time -= state["total"]
        self.seconds = {name: seconds + state[name] for name, seconds in self.seconds.items()}
        self._finished_epochs_s = self.seconds["train"] - state["epoch"]


def read_environment(folder: Path) -> dict[str, Any]:
    """env.json of a run folder; empty where there is none that can be read."""
    found = read_json_object(folder / "env.json")
    return found if isinstance(found.get("recipe"), str) else {}


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run's folder, with today's names; empty where there is none that can be read."""
    summary = read_json_object(folder / "summary.json")
    if isinstance(config := summary.get("config"), dict):
        summary["config"] = upgrade_options(config)
    if "weights" in summary:
        summary["eval_weights"] = summary.pop("weights")
    return summary


def _launch_info(recipe: Recipe) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "started": format_timestamp(),
        **collect_environment(recipe.device),
    }


def _create_unique_folder(wanted: Path) -> tuple[Path, FolderLock]:
    """`wanted`, or with -2, -3, ... the first that no other run has, locked; `mkdir` decides between two processes."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
            return folder, lock_folder(folder)
        except (FileExistsError, UsageError):  # or a process that resumes was quicker to lock it
            number += 1


def _format_cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
