"""What a person sees of a sweep: a live table of its trials on a terminal, one line a trial elsewhere; tables of both.

It only shows what the ledger and the runs' metrics say.
"""

from __future__ import annotations

import csv
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fastcifar.sweep.executors import Told
from fastcifar.sweep.trial_log import Ledger
from fastcifar.training.progress import say

MOST = 30  # trials in the live table: those that run, then the newest


class Board:
    """A context around a sweep of `total` trials. `console` None shows nothing."""

    def __init__(self, console: Console | None, ledger: Ledger, total: int) -> None:
        self.console, self.ledger, self.total = console, ledger, total
        self.wanted: list[str] = []
        self.live: Live | None = None
        if console and console.is_terminal:
            self.live = Live(console=console, get_renderable=self._table, refresh_per_second=1, transient=True)

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def told(self, told: Told, wanted: list[str]) -> None:
        """Called with every event; `wanted`: the sweep's trials so far."""
        self.wanted = list(wanted)
        if self.live or told.state == "running":
            return
        (row,) = self.ledger.rows([told.trial.key])
        over = sum(self.ledger.state(key) not in ("running", "waiting") for key in wanted)
        figures = [f"{name} {_percent(row[key])}" for name, key in (("val", "val_acc"), ("test", "test_acc"))]
        seconds = [f"{row['seconds']:.0f} s"] if row["seconds"] else []
        what = f"{told.state}: {told.reason}" if told.reason else told.state
        said = ", ".join([what, *figures, *seconds])
        say(self.console, [f"{over} of {self.total}  {row['label']}, seed {row['seed']}: {said}"])

    def _table(self) -> Group:
        """Called by a thread of its own, once a second."""
        rows = self.ledger.rows(list(self.wanted))
        running = [row for row in rows if row["state"] == "running"]
        others = [row for row in rows if row["state"] != "running"]
        shown = [*running, *others[::-1]][:MOST]
        epochs = {row["trial"]: _epochs(self.ledger.folder / row["run"]) for row in running}
        return Group(trials_table(shown, epochs), f"{len(others)} of {self.total} over, {len(running)} running")


def sweep_table(found: dict[str, Any]) -> Group:
    """The trials of a sweep, and how many came to what. `found`: as `sweep` returns it."""
    counts = ", ".join(f"{count} {state}" for state, count in found["counts"].items() if count)
    return Group(trials_table(found["trials"]), f"{found['sweep']}: {counts or 'nothing to run'}")


def plan_table(found: dict[str, Any]) -> Group:
    """The trials that a sweep would run. `found`: as `plan` returns it."""
    table = Table("trial", "state", box=None)
    for name in ("seed", "epochs", "steps"):
        table.add_column(name, justify="right")
    for row in found["trials"]:
        steps = "-" if row["steps"] is None else f"{row['steps']:,}"
        table.add_row(escape(row["label"]), row["state"], str(row["seed"]), str(row["epochs"]), steps)
    steps = "" if found["steps"] is None else f", {found['steps']:,} steps to go at most"
    return Group(table, f"{found['sweep']}: {found['n']} trials{steps}; nothing was written")


def trials_table(rows: list[dict[str, Any]], epochs: dict[str, str] | None = None) -> Table:
    """One row a trial. `epochs`: how far those are that run."""
    table = Table("trial", box=None)
    for name in ("seed", "state", "validation", "test", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        label = escape(f"{row['label']}  ({row['reason']})" if row["reason"] else row["label"])
        state = (epochs or {}).get(row["trial"]) or row["state"]
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        table.add_row(label, str(row["seed"]), state, _percent(row["val_acc"]), _percent(row["test_acc"]), seconds)
    return table


def _epochs(run: Path) -> str:
    """How far a running trial is, from its metrics: `3 epochs, 61.20 %`; "" where they are on another machine."""
    try:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return ""
    if not rows:
        return ""
    accuracy = rows[-1].get("val_acc") or rows[-1].get("train_acc")
    try:
        return f"{len(rows)} epochs, {_percent(float(str(accuracy)))}"
    except ValueError:
        return f"{len(rows)} epochs"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"
