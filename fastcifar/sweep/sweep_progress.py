"""Progress of a sweep: a live table on a terminal, one line per trial elsewhere; and the tables of its results.

Everything shown is read from the trial log and from the metrics of the runs.
"""

from __future__ import annotations

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
from fastcifar.training.metrics_file import read_metrics
from fastcifar.training.progress import print_lines

MAX_LIVE_ROWS = 30  # rows of the live table: running trials first, then the most recent ones


class SweepDisplay:
    """Context manager that shows the progress of a sweep of `total` trials; a `console` of None shows nothing."""

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
        """Show an event, which is already in the trial log; `trial_keys` are the trials of the sweep so far."""
        self.trial_keys = list(trial_keys)
        if self.live or event.state == "running":
            return
        (row,) = self.trial_log.trial_rows([event.trial.key])
        ended = sum(self.trial_log.trial_state(key) not in ("running", "waiting") for key in trial_keys)
        accuracies = [f"{name} {format_percent(row[key])}" for name, key in (("val", "val_acc"), ("test", "test_acc"))]
        seconds = [f"{format_decimal(row['seconds'], 0)} s"] if row["seconds"] else []
        state = f"{event.state}: {event.reason}" if event.reason else event.state
        outcome = ", ".join([state, *accuracies, *seconds])
        print_lines(self.console, [f"{ended} of {self.total}  {row['label']}, seed {row['seed']}: {outcome}"])

    def _live_table(self) -> Group:
        """Return the current table; rich calls this once per second in another thread."""
        rows = self.trial_log.trial_rows(list(self.trial_keys))
        running = [row for row in rows if row["state"] == "running"]
        others = [row for row in rows if row["state"] != "running"]
        shown = [*running, *others[::-1]][:MAX_LIVE_ROWS]
        progress = {row["trial"]: _format_progress(self.trial_log.folder / row["run"]) for row in running}
        return Group(trials_table(shown, progress), f"{len(others)} of {self.total} ended, {len(running)} running")


def sweep_table(result: dict[str, Any]) -> Group:
    """Return a table of the trials of a sweep and their number in each state, from the result of `run_sweep`."""
    counts = ", ".join(f"{count} {state}" for state, count in result["counts"].items() if count)
    return Group(trials_table(result["trials"]), f"{result['sweep']}: {counts or 'nothing to run'}")


def plan_table(result: dict[str, Any]) -> Group:
    """Return a table of the trials that a sweep would run, from the result of `plan_sweep`."""
    table = Table("trial", "state", box=None)
    for name in ("seed", "epochs", "steps"):
        table.add_column(name, justify="right")
    for row in result["trials"]:
        numbers = (str(row["seed"]), str(row["epochs"]), format_count(row["steps"]))
        table.add_row(escape(row["label"]), row["state"], *numbers)
    steps = "" if result["steps"] is None else f", at most {result['steps']:,} steps remaining"
    return Group(table, f"{result['sweep']}: {result['n']} trials{steps}; nothing was written")


def trials_table(rows: list[dict[str, Any]], progress: dict[str, str] | None = None) -> Table:
    """Return a table with one row per trial; `progress` maps running trials to the text of their progress."""
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
    """Return the progress of a running trial, `3 epochs, 61.20 %`, or "" if its metrics are on another machine."""
    try:
        rows = read_metrics(run / "metrics.csv")
    except OSError:
        return ""
    if not rows:
        return ""
    accuracy = rows[-1]["train_acc"] if rows[-1]["val_acc"] is None else rows[-1]["val_acc"]
    return f"{len(rows)} epochs" + (f", {format_percent(accuracy)}" if accuracy is not None else "")
