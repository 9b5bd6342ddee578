"""What a person sees of a run: a bar on a terminal, one quiet line an epoch elsewhere.

It only shows what it is given; it reads no tensor and decides nothing.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastcifar.training.step import Reading


def say(console: Console | None, lines: list[str]) -> None:
    """Lines as they are, one below the other; nothing without a console."""
    for line in lines:
        if console:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


class Display:
    """A context around the loop. `console` None shows nothing; `steps` is the whole run's number of steps, `done`
    those before this process."""

    def __init__(self, console: Console | None, steps: int, epochs: int, batch_size: int, done: int = 0) -> None:
        self.console = console
        self.epochs, self.batch_size = epochs, batch_size
        self.started, self.done = time.perf_counter(), done
        self.bar: Progress | None = None
        if console and console.is_terminal:
            columns = ("epoch {task.fields[epoch]}", BarColumn(), "{task.percentage:>3.0f}%", "{task.fields[state]}")
            texts = [TextColumn(part) if isinstance(part, str) else part for part in columns]
            self.bar = Progress(*texts, TimeElapsedColumn(), "left", TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("train", total=steps, completed=done, epoch=f"0/{epochs}", state="")

    def __enter__(self) -> Display:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, done: int, epoch: int, reading: Reading) -> None:
        """Called every few steps with the step number and the epoch's sums so far."""
        if not self.bar:
            return
        speed = (done - self.done) * self.batch_size / max(time.perf_counter() - self.started, 1e-9)
        self.started, self.done = time.perf_counter(), done
        state = f"loss {reading.loss:.3f}  acc {reading.accuracy:.3f}  {speed:,.0f} images/s"
        self.bar.update(self.task, completed=done, epoch=f"{epoch + 1}/{self.epochs}", state=state)

    def epoch(self, row: dict[str, Any]) -> None:
        """Called with the epoch's row of metrics.csv."""
        parts = [
            f"epoch {row['epoch'] + 1}/{self.epochs}",
            f"loss {row['train_loss']:.4f}",
            f"acc {row['train_acc']:.4f}",
            *(f"{name} {row[name]:.4f}" for name in ("val_loss", "val_acc", "ema_val_acc") if row[name] is not None),
            f"lr {row['lr']:.4g}",
            f"{row['images_per_s']:,.0f} images/s",
            f"{row['seconds']:.0f} s",
        ]
        say(self.console, ["  ".join(parts)])
        self.started = time.perf_counter()
