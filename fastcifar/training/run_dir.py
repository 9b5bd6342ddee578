"""The run folder, locked by the process that writes to it, and the progress and the timer of a run."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel
from torch import Tensor

from fastcifar.device import collect_environment
from fastcifar.errors import DiskError, UsageError, disk_errors
from fastcifar.files import FolderLock, lock_folder, read_regular_file, write_atomically
from fastcifar.format import format_timestamp
from fastcifar.recipe import Recipe
from fastcifar.training.checkpoint_reader import safetensors_metadata
from fastcifar.training.checkpoint_writer import CheckpointWriter
from fastcifar.training.environment import LaunchEnvironment, RunEnvironment, read_environment
from fastcifar.training.metrics_file import METRICS_COLUMNS, EpochRow, read_event_lines, read_metrics_csv
from fastcifar.training.summary import RunSummary
from fastcifar.training.trackers import Tracker

# Called with the row of metrics of each epoch. If it returns a string, training stops with the string as the reason.
EpochCallback = Callable[[EpochRow], object]
EpochCallbacks = Sequence[EpochCallback]


def build_csv_callback(folder: Path, epochs_done: int = 0) -> EpochCallback:
    """Truncate `folder`/metrics.csv to the first `epochs_done` epochs; return a callback that appends a row."""
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
            file.flush()  # to the disk, before the checkpoint of the epoch is written
            os.fsync(file.fileno())

    return write


def build_jsonl_callback(folder: Path, epochs_done: int = 0) -> EpochCallback:
    """Truncate `folder`/events.jsonl to the first `epochs_done` epochs; return a callback that appends a row."""
    path = folder / "events.jsonl"
    write_atomically(path, "".join(f"{line}\n" for line in read_event_lines(path, epochs_done)).encode())

    def write(row: EpochRow) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")

    return write


# file in the run folder -> function (folder, epochs_done) that truncates it and returns the callback that adds rows
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
    user_callbacks: tuple[EpochCallback, ...] = ()  # given to `train`; whatever they raise ends the run
    checkpoints: CheckpointWriter = field(default_factory=CheckpointWriter)

    @classmethod
    def create(
        cls, recipe: Recipe, name: str, trackers: Sequence[str] = (), epochs_done: int = 0, source: Path | None = None
    ) -> Run:
        """Create the run folder: `--out`, or runs/ARCH-RECIPE-sSEED-TIME by default.

        The rows of the first `epochs_done` epochs are copied from the run folder `source`.
        """
        label = re.sub(r"[^\w.+-]", "_", name)[:50]  # the name may be from env.json of a stranger's run
        default_name = f"{recipe.arch.replace(':', '.')}-{label}-s{recipe.seed}-{format_timestamp(for_file_name=True)}"
        path = Path(recipe.out) if recipe.out else Path("runs") / default_name
        with disk_errors(f"write the run folder {path}", "give a writable folder with --out"):
            folder, lock = _create_unique_folder(path)
            for file in METRICS_FILES:
                if source and os.path.isfile(source / file):
                    write_atomically(folder / file, read_regular_file(source / file))
        return cls(folder, name, lock).open(recipe, trackers, epochs_done)

    def open(self, recipe: Recipe, trackers: Sequence[str], epochs_done: int, is_resumed: bool = False) -> Run:
        """Remove results after the first `epochs_done` epochs; return this run with the callbacks of later epochs."""
        environment = collect_environment(recipe.device)
        launch = LaunchEnvironment(command=sys.argv, started=format_timestamp(), **environment.model_dump())
        document = read_environment(self.folder)
        if not document.recipe:
            document = RunEnvironment(recipe=self.recipe_name, **launch.model_dump())
        if is_resumed:
            document.resumed.append(launch)
        for name in ("checkpoints", "tensorboard"):
            if os.path.islink(self.folder / name):
                raise DiskError(f"{self.folder / name} is a symbolic link", "replace it by the folder it refers to")
        with disk_errors(f"write the run folder {self.folder}", "give a writable folder with --out"):
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            temporary = (*self.folder.glob("checkpoints/.*.tmp"), *self.folder.glob(".*.tmp"))
            for stale in (*temporary, self.folder / "summary.json"):
                stale.unlink(missing_ok=True)
            write_atomically(self.folder / "recipe.toml", recipe.to_toml().encode())
            _write_json(self.folder / "env.json", document)
            files = [build(self.folder, epochs_done) for build in METRICS_FILES.values()]
            return replace(self, callbacks=(*files, *(Tracker(name, self.folder, epochs_done) for name in trackers)))

    @property
    def trackers(self) -> list[Tracker]:
        return [callback for callback in self.callbacks if isinstance(callback, Tracker)]

    def truncate_rows(self, epochs_done: int) -> None:
        """Remove the rows after the first `epochs_done` epochs from files and trackers."""
        with disk_errors(f"write {self.folder}", "free some space"):
            for build in METRICS_FILES.values():
                build(self.folder, epochs_done)
            for tracker in self.trackers:
                tracker.reopen(epochs_done)

    def log_epoch(self, row: EpochRow) -> str:
        """Call every callback with the row of an epoch and return the first stop reason, or ""."""
        with disk_errors(f"write {self.folder}", "free some space"):
            returned = [callback(row) for callback in self.callbacks]
        returned += [callback(row) for callback in self.user_callbacks]
        return next((reason for reason in returned if isinstance(reason, str) and reason), "")

    def checkpoint_path(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.pt"

    def finish(self, summary: RunSummary, weights: dict[str, Tensor], classes: Sequence[str]) -> None:
        """Write summary.json and weights.safetensors (the evaluated weights), and log the summary in the trackers."""
        path = self.folder / "weights.safetensors"
        with disk_errors(f"write {path}", "free some space"):
            contiguous = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            metadata = safetensors_metadata(summary.config, classes, summary.data_digest)
            write_atomically(path, safetensors.torch.save(contiguous, metadata))
        path = self.folder / "summary.json"
        with disk_errors(f"write {path}", "free some space"):
            _write_json(path, summary)
        for tracker in self.trackers:
            tracker.finish(summary)
            if tracker.disk_error:
                path.unlink()  # so that the run can be resumed
                raise DiskError(tracker.disk_error, f"free disk space, and continue with --resume {self.folder}")


def _write_json(path: Path, document: BaseModel) -> None:
    text = json.dumps(document.model_dump(), indent=1) + "\n"
    # a list of integers on one line; strings contain no line breaks
    text = re.sub(r"\[\n[\d,\s]+\]", lambda match: "[" + " ".join(match[0].split()).strip("[ ]") + "]", text)
    write_atomically(path, text.encode())


def _create_unique_folder(path: Path) -> tuple[Path, FolderLock]:
    """Create and lock the folder `path`, or the first of `path`-2, `path`-3, ... that does not exist."""
    path = path if path.name not in ("", "..") else Path(os.path.abspath(path))  # such as ".", which exists
    if not path.name:
        raise UsageError(f"--out {path} is not a name for a run folder", "choose another --out")
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
    """The progress of a run, part of its checkpoints."""

    epoch: int = 0  # completed epochs
    epoch_step: int = 0  # steps in the current epoch
    step: int = 0  # steps since the start of the run
    images: int = 0  # training images of the completed epochs
    val_acc: float | None = None  # validation accuracy of the last epoch; None without a validation split
    best: float | None = None  # validation accuracy of the best epoch
    epochs_since_best: int = 0
    rollbacks: int = 0
    stop_reason: str = ""  # empty while the run trains

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any]) -> TrainingProgress:
        """Return the progress saved in a checkpoint without its stop reason, so that a resumed run continues."""
        return cls(**{field.name: state[field.name] for field in fields(cls) if field.name != "stop_reason"})

    def record_epoch(self, images: int, val_acc: float | None, is_complete: bool) -> bool:
        """Count an epoch of `images` training images and return whether it is the best so far.

        An epoch that `max_steps` cut short is the best only if there is no other. A resumed run completes that epoch,
        and its best epoch must not depend on the interruption.
        """
        self.epoch, self.images, self.val_acc = self.epoch + 1, self.images + images, val_acc
        self.epoch_step = 0 if is_complete else self.epoch_step
        is_best = val_acc is not None and (self.best is None or (is_complete and val_acc > self.best))
        if is_best:
            self.best = val_acc
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        return is_best

    def is_checkpoint_due(self, recipe: Recipe) -> bool:
        """Return whether the checkpoint "last" is saved at the end of an epoch."""
        is_interval = recipe.save_every_epochs and self.epoch % recipe.save_every_epochs == 0
        return bool(is_interval or self.find_stop_reason(recipe))

    def lacks_checkpoint(self, recipe: Recipe) -> bool:
        """Return whether an epoch has ended without a checkpoint "last"."""
        return self.epoch_step == 0 and not self.is_checkpoint_due(recipe)

    def find_stop_reason(self, recipe: Recipe) -> str:
        """Return why training stops: "max_steps", "patience", "epochs" or a callback's reason; "" if it continues."""
        reasons = {
            "max_steps": recipe.max_steps and self.step >= recipe.max_steps,
            "patience": recipe.patience and self.epochs_since_best >= recipe.patience,
            "epochs": self.epoch >= recipe.epochs,
        }
        return self.stop_reason or next((reason for reason, applies in reasons.items() if applies), "")


class Clock:
    """A timer of the phases of a run and of its total time, in seconds, including those before a resume."""

    def __init__(self) -> None:
        self.start_time = time.perf_counter()
        self.seconds: dict[str, float] = {"setup": 0.0, "compile": 0.0, "train": 0.0, "eval": 0.0}
        self._active_phase: tuple[str, float] | None = None
        self._completed_epochs_s = 0.0  # seconds of "train" until the last `end_epoch`

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the `with` block to the phase "setup", "compile", "train" or "eval"."""
        self._active_phase = (name, time.perf_counter())
        try:
            yield
        finally:
            self.seconds, self._active_phase = self.elapsed_by_phase(), None

    def elapsed_by_phase(self) -> dict[str, float]:
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
        return {**self.elapsed_by_phase(), "epoch": self.epoch_train_s(), "total": self.total_s()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add the times saved in the checkpoint from which the run is resumed."""
        self.start_time -= state["total"]
        self.seconds = {name: seconds + state[name] for name, seconds in self.seconds.items()}
        self._completed_epochs_s = self.seconds["train"] - state["epoch"]
