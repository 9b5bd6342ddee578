"""What a person sees of a sweep: a live table of its trials on a terminal, one line a trial elsewhere; tables of both.

It only shows what the ledger and the runs' metrics say.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fastcifar.format import format_count, format_decimal, format_percent
from fastcifar.sweep.executors import TrialEvent
from fastcifar.sweep.trial_log import TrialLog
from fastcifar.training.metrics_file import parse_finite_float, read_metrics_csv
from fastcifar.training.progress import print_lines

MAX_LIVE_ROWS = 30  # trials in the live table: those that run, then the newest


class SweepDisplay:
    """A context around a sweep of `total` trials. `console` None shows nothing."""

    def __init__(self, console: Console | None, trial_log: TrialLog, total: int) -> None:
        self.console, self.trial_log, self.total = console, trial_log, total
        self.trial_keys: list[str] = []
        self.live: Live | None = None
        if console and console.is_terminal:
            self.live = Live(console=console, get_renderable=self._live_table, refresh_per_second=1, transient=True)

    def __enter__(self) -> SweepDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def on_event(self, event: TrialEvent, trial_keys: list[str]) -> None:
        """Called with every event; `wanted`: the sweep's trials so far."""
        self.trial_keys = list(trial_keys)
        if self.live or event.state == "running":
            return
        (row,) = self.trial_log.trial_rows([event.trial.key])
        over = sum(self.trial_log.trial_state(key) not in ("running", "waiting") for key in trial_keys)
        figures = [f"{name} {format_percent(row[key])}" for name, key in (("val", "val_acc"), ("test", "test_acc"))]
        seconds = [f"{format_decimal(row['seconds'], 0)} s"] if row["seconds"] else []
        what = f"{event.state}: {event.reason}" if event.reason else event.state
        said = ", ".join([what, *figures, *seconds])
        print_lines(self.console, [f"{over} of {self.total}  {row['label']}, seed {row['seed']}: {said}"])

    def _live_table(self) -> Group:
        """Called by a thread of its own, once a second."""
        rows = self.trial_log.trial_rows(list(self.trial_keys))
        running = [row for row in rows if row["state"] == "running"]
        others = [row for row in rows if row["state"] != "running"]
        shown = [*running, *others[::-1]][:MAX_LIVE_ROWS]
        epochs = {row["trial"]: _format_progress(self.trial_log.folder / row["run"]) for row in running}
        return Group(trials_table(shown, epochs), f"{len(others)} of {self.total} over, {len(running)} running")


def sweep_table(result: dict[str, Any]) -> Group:
    """The trials of a sweep, and how many came to what. `found`: as `sweep` returns it."""
    counts = ", ".join(f"{count} {state}" for state, count in result["counts"].items() if count)
    return Group(trials_table(result["trials"]), f"{result['sweep']}: {counts or 'nothing to run'}")


def plan_table(result: dict[str, Any]) -> Group:
    """The trials that a sweep would run. `found`: as `plan` returns it."""
    table = Table("trial", "state", box=None)
    for name in ("seed", "epochs", "steps"):
        table.add_column(name, justify="right")
    for row in result["trials"]:
        figures = (str(row["seed"]), str(row["epochs"]), format_count(row["steps"]))
        table.add_row(escape(row["label"]), row["state"], *figures)
    steps = "" if result["steps"] is None else f", {result['steps']:,} steps to go at most"
    return Group(table, f"{result['sweep']}: {result['n']} trials{steps}; nothing was written")


def trials_table(rows: list[dict[str, Any]], progress: dict[str, str] | None = None) -> Table:
    """One row a trial. `epochs`: how far those are that run."""
    table = Table("trial", box=None)
    for name in ("seed", "state", "validation", "test", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        label = escape(f"{row['label']}  ({row['reason']})" if row["reason"] else row["label"])
        state = (progress or {}).get(row["trial"]) or row["state"]
        accuracies = (format_percent(row[name]) for name in ("val_acc", "test_acc"))
        table.add_row(label, str(row["seed"]), state, *accuracies, format_decimal(row["seconds"], 0))
    return table


def _format_progress(run: Path) -> str:
    """How far a running trial is, from its metrics: `3 epochs, 61.20 %`; "" where they are on another machine."""
    try:
        rows = read_metrics_csv(run / "metrics.csv", sys.maxsize)
    except OSError:
        return ""
    if not rows:
        return ""
    accuracy = parse_finite_float(rows[-1]["val_acc"] or rows[-1]["train_acc"])
    return f"{len(rows)} epochs" + (f", {format_percent(accuracy)}" if accuracy is not None else "")
