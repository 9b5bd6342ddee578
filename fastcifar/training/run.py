"""A run folder (recipe, environment, metrics, events, summary), the sinks, the clock and the signals of one run.

A folder is made once and never written by another run: `-2` is added to a name that is taken. Nothing here computes
a metric.
"""

from __future__ import annotations

import csv
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor

from fastcifar.device import environment
from fastcifar.errors import DiskError, Interrupted
from fastcifar.recipe import Recipe
from fastcifar.training.checkpoint import write_atomically

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_acc",
    "val_loss",
    "val_acc",
    "ema_val_acc",
    "images_per_s",
    "seconds",
)

Row = dict[str, Any]


def csv_sink(folder: Path) -> Callable[[Row], None]:
    """metrics.csv: one header ever, one row an epoch, flushed."""
    path = folder / "metrics.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(COLUMNS)

    def write(row: Row) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({name: _cell(row.get(name)) for name in COLUMNS})

    return write


def events_sink(folder: Path) -> Callable[[Row], None]:
    """events.jsonl: the same rows, one JSON object a line, with the wall clock."""
    path = folder / "events.jsonl"

    def write(row: Row) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")

    return write


# name -> what opens the sink in a run folder; it returns a function of one row
SINKS: dict[str, Callable[[Path], Callable[[Row], None]]] = {"csv": csv_sink, "events": events_sink}


@dataclass(frozen=True)
class Run:
    """A run folder that is this process's own."""

    folder: Path
    sinks: tuple[Callable[[Row], None], ...]

    @classmethod
    def create(cls, recipe: Recipe, name: str) -> Run:
        """Makes the folder (`--out`, else runs/`name`-...), with recipe.toml and env.json in it.

        Errors: `DiskError` when the folder cannot be made or written: before training, not after.
        """
        named = f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        wanted = Path(recipe.out) if recipe.out else Path("runs") / named
        try:
            folder = _claim(wanted)
            (folder / "checkpoints").mkdir()
            (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
            environment_now = {"command": sys.argv, "started": time.strftime("%FT%TZ", time.gmtime()), **environment()}
            (folder / "env.json").write_text(json.dumps(environment_now, indent=1) + "\n", encoding="utf-8")
            return cls(folder, tuple(open_sink(folder) for open_sink in SINKS.values()))
        except OSError as error:
            raise DiskError(f"cannot write the run folder {wanted}: {error.strerror}", "give --out DIR") from None

    def log(self, row: Row) -> None:
        """One epoch's row to every sink. Errors: `DiskError`."""
        try:
            for write in self.sinks:
                write(row)
        except OSError as error:
            raise DiskError(f"cannot write to {self.folder}: {error.strerror}", "free some space") from None

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.pt"

    def finish(self, summary: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """summary.json, and the weights that met the test set as weights.safetensors. Errors: `DiskError`."""
        try:
            contiguous = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            save_file(contiguous, self.folder / "weights.safetensors", {"arch": str(summary["arch"])})
            write_atomically(self.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
        except OSError as error:
            raise DiskError(f"cannot write to {self.folder}: {error.strerror}", "free some space") from None


@dataclass
class Progress:
    """Where a run stands: epochs, steps and images done, the last and the best val_acc with the epochs since."""

    epoch: int = 0
    step: int = 0
    images: int = 0
    val_acc: float | None = None
    best: float | None = None
    epochs_since_best: int = 0
    stop_reason: str = ""


class Clock:
    """Seconds of a run by phase ("setup", "compile", "train", "eval"), and in all since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {"setup": 0.0, "compile": 0.0, "train": 0.0, "eval": 0.0}
        self.last = dict(self.seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.last[name] = time.perf_counter() - started
            self.seconds[name] += self.last[name]

    def total(self) -> float:
        return time.perf_counter() - self.started


class Stop:
    """SIGINT and SIGTERM as a flag that the loop reads between steps; a second SIGINT stops at once."""

    CODES: ClassVar = {"SIGINT": 130, "SIGTERM": 143}

    def __init__(self) -> None:
        self.signal = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in self.CODES:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def interruption(self, run: Run, step: int) -> Interrupted:
        """The error that ends the process with the signal's exit code, once the checkpoint is written."""
        return Interrupted(self.signal, self.CODES[self.signal], step, str(run.checkpoint("last")))


def _claim(wanted: Path) -> Path:
    """`wanted`, or with -2, -3, ... the first that no other run has; `mkdir` decides between two processes."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
