"""Progress display of a training run: a table with a row per epoch and, on a terminal, a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from fastcifar.format import format_short_number
from fastcifar.recipe import Recipe
from fastcifar.training.metrics_file import EpochRow
from fastcifar.training.step import Metrics
from fastcifar.training.trainer import Trainer


def print_lines(console: Console | None, lines: list[str]) -> None:
    """Print `lines` without markup, highlighting or wrapping, if there is a console."""
    for line in lines:
        if console:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_scaling(console: Console | None, recipe_name: str | None, options: dict[str, Any]) -> None:
    """Print a line about the options of a recipe that `Recipe.make` scales to another number of epochs, if any."""
    if scaling := Recipe.describe_scaling(recipe_name, **options):
        print_lines(console, [scaling])


def show_preparation(console: Console | None) -> None:
    """Say on a terminal that a run starts. This is no spinner, because a download displays its own progress."""
    if console and console.is_terminal:
        print_lines(console, ["preparing the data set and the network ..."])


@contextmanager
def show_compilation(console: Console | None, compiles: bool) -> Iterator[None]:
    """Say that the `with` block compiles the network, if it does: with a spinner on a terminal, else in a line."""
    text = "compiling the network: about a minute, once per machine ..."
    if not compiles:
        yield
    elif console and console.is_terminal:
        with console.status(text):
            yield
    else:
        print_lines(console, [text])
        yield


def format_loss(loss: float) -> str:
    """Format a loss with four decimals, or with three significant digits from 1000 on."""
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.3g}"


@dataclass(frozen=True)
class EpochColumn:
    """A column of the table of epochs: the number of characters, and the text of a value in `EpochRow`."""

    key: str
    width: int
    format: Callable[[float], str]


# heading -> column; a metric that is None in the first row has no column. Together they have 80 characters.
EPOCH_COLUMNS = {
    "train_loss": EpochColumn("train_loss", 10, format_loss),
    "train_acc": EpochColumn("train_acc", 9, "{:.4f}".format),
    "val_loss": EpochColumn("val_loss", 8, format_loss),
    "val_acc": EpochColumn("val_acc", 7, "{:.4f}".format),
    "ema_acc": EpochColumn("ema_val_acc", 7, "{:.4f}".format),
    "lr": EpochColumn("lr", 9, "{:.3g}".format),
    "images/s": EpochColumn("images_per_s", 8, format_short_number),
    "seconds": EpochColumn("seconds", 7, "{:.0f}".format),
}


class TrainingDisplay:
    """Context manager that displays the progress of the training loop, if there is a console."""

    def __init__(self, console: Console | None, trainer: Trainer) -> None:
        self.console = console
        self.epochs, self.batch_size = trainer.recipe.epochs, trainer.recipe.batch_size
        self.last_update_time, self.steps_done = time.perf_counter(), trainer.progress.step
        self.columns: dict[str, EpochColumn] = {}  # empty before the first row
        self.bar = Progress(
            "epoch {task.fields[epoch]}",
            BarColumn(bar_width=None),
            "{task.percentage:>3.0f}%",
            "{task.fields[state]}",
            TimeRemainingColumn(),
            "left",
            console=console,
            expand=True,
            transient=True,
            disable=not (console and console.is_terminal),
        )
        self.task = self.bar.add_task(
            "train",
            total=trainer.planned_steps,
            completed=self.steps_done,
            epoch=f"{trainer.progress.epoch + 1}/{self.epochs}",
            state="",
        )

    def __enter__(self) -> TrainingDisplay:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.bar.disable:  # otherwise `stop` would print an empty line
            self.bar.stop()

    def show_step(self, steps_done: int, epoch: int, metrics: Metrics) -> None:
        now = time.perf_counter()
        images_per_s = (steps_done - self.steps_done) * self.batch_size / max(now - self.last_update_time, 1e-9)
        self.last_update_time, self.steps_done = now, steps_done
        state = f"loss {metrics.loss:.3f} acc {metrics.accuracy:.3f} {format_short_number(images_per_s)} images/s"
        self.bar.update(self.task, completed=steps_done, epoch=f"{epoch + 1}/{self.epochs}", state=state)

    def show_epoch(self, row: EpochRow) -> None:
        epoch = f"{row['epoch'] + 1}/{self.epochs}"
        width = max(2 * len(str(self.epochs)) + 1, len("epoch"))
        values: dict[str, Any] = {**row}
        if not self.columns:
            self.columns = {name: column for name, column in EPOCH_COLUMNS.items() if values[column.key] is not None}
            headings = [f"{name:>{column.width}}" for name, column in self.columns.items()]
            print_lines(self.console, [" ".join([f"{'epoch':>{width}}", *headings])])
        texts = [f"{column.format(values[column.key]):>{column.width}}" for column in self.columns.values()]
        print_lines(self.console, [" ".join([f"{epoch:>{width}}", *texts])])
        self.last_update_time = time.perf_counter()
