"""Progress display of a training run: one line per epoch and, on a terminal, a progress bar."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fastcifar.format import format_short_number
from fastcifar.training.metrics_file import EpochRow, ValidationMetrics
from fastcifar.training.step import Metrics
from fastcifar.training.trainer import Trainer


def print_lines(console: Console | None, lines: list[str]) -> None:
    """Print `lines` without markup, highlighting or wrapping, if there is a console."""
    for line in lines:
        if console:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


class TrainingDisplay:
    """Context manager that displays the progress of the training loop, if there is a console."""

    def __init__(self, console: Console | None, trainer: Trainer) -> None:
        self.console = console
        self.epochs, self.batch_size = trainer.recipe.epochs, trainer.recipe.batch_size
        self.last_update_time, self.steps_done = time.perf_counter(), trainer.progress.step
        self.bar = Progress(
            "epoch {task.fields[epoch]}",
            BarColumn(),
            "{task.percentage:>3.0f}%",
            "{task.fields[state]}",
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
            console=console,
            disable=not (console and console.is_terminal),
        )
        self.task = self.bar.add_task(
            "train", total=trainer.total_steps, completed=self.steps_done, epoch=f"0/{self.epochs}", state=""
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
        state = f"loss {metrics.loss:.3f}  acc {metrics.accuracy:.3f}  {format_short_number(images_per_s)} images/s"
        self.bar.update(self.task, completed=steps_done, epoch=f"{epoch + 1}/{self.epochs}", state=state)

    def show_epoch(self, row: EpochRow) -> None:
        fields = [
            f"epoch {row['epoch'] + 1}/{self.epochs}",
            f"loss {row['train_loss']:.4f}",
            f"acc {row['train_acc']:.4f}",
            *(f"{name} {row[name]:.4f}" for name in ValidationMetrics.__annotations__ if row[name] is not None),
            f"lr {row['lr']:.4g}",
            f"{format_short_number(row['images_per_s'])} images/s",
            f"{row['seconds']:.0f} s",
        ]
        print_lines(self.console, ["  ".join(fields)])
        self.last_update_time = time.perf_counter()
