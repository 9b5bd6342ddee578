"""What a person sees of a run: a bar on a terminal, one quiet line an epoch elsewhere.

It only shows what it is given; it reads no tensor and decides nothing.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastcifar.format import format_short_number
from fastcifar.training.step import Metrics


def print_lines(console: Console | None, lines: list[str]) -> None:
    """Lines as they are, one below the other; nothing without a console."""
    for line in lines:
        if console:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


class TrainingDisplay:
    """A context around the loop. `console` None shows nothing; `steps` is the whole run's number of steps, `done`
    those before this process."""

    def __init__(self, console: Console | None, steps: int, epochs: int, batch_size: int, steps_done: int = 0) -> None:
        self.console = console
        self.epochs, self.batch_size = epochs, batch_size
        self.last_update_time, self.steps_done = time.perf_counter(), steps_done
        self.bar: Progress | None = None
        if console and console.is_terminal:
            columns = ("epoch {task.fields[epoch]}", BarColumn(), "{task.percentage:>3.0f}%", "{task.fields[state]}")
            texts = [TextColumn(part) if isinstance(part, str) else part for part in columns]
            self.bar = Progress(*texts, TimeElapsedColumn(), "left", TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("train", total=steps, completed=steps_done, epoch=f"0/{epochs}", state="")

    def __enter__(self) -> TrainingDisplay:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def show_step(self, steps_done: int, epoch: int, metrics: Metrics) -> None:
        """Called every few steps with the step number and the epoch's sums so far."""
        if not self.bar:
            return
        speed = (
            (steps_done - self.steps_done) * self.batch_size / max(time.perf_counter() - self.last_update_time, 1e-9)
        )
        self.last_update_time, self.steps_done = time.perf_counter(), steps_done
        state = f"loss {metrics.loss:.3f}  acc {metrics.accuracy:.3f}  {format_short_number(speed)} images/s"
        self.bar.update(self.task, completed=steps_done, epoch=f"{epoch + 1}/{self.epochs}", state=state)

    def show_epoch(self, row: dict[str, Any]) -> None:
        """Called with the epoch's row of metrics.csv."""
        parts = [
            f"epoch {row['epoch'] + 1}/{self.epochs}",
            f"loss {row['train_loss']:.4f}",
            f"acc {row['train_acc']:.4f}",
            *(f"{name} {row[name]:.4f}" for name in ("val_loss", "val_acc", "ema_val_acc") if row[name] is not None),
            f"lr {row['lr']:.4g}",
            f"{format_short_number(row['images_per_s'])} images/s",
            f"{row['seconds']:.0f} s",
        ]
        print_lines(self.console, ["  ".join(parts)])
        self.last_update_time = time.perf_counter()
