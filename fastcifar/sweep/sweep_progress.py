"""Progress of a sweep: a live table on a terminal, one line per trial elsewhere; and the tables of its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fastcifar.format import NumericTable, format_count, format_decimal, format_percent, whole_line
from fastcifar.sweep.executors import TrialEvent
from fastcifar.sweep.trial_log import SweepPlan, SweepResult, TrialLog, TrialResult
from fastcifar.training.metrics_file import read_metrics
from fastcifar.training.progress import print_lines

MAX_LIVE_ROWS = 30  # rows of the live table: running trials first, then the most recent ones


class SweepDisplay:
    """The progress of a sweep of `total` trials; `live` is the live table, None unless `console` is a terminal.

    `trial_keys` are the trials so far, to which the caller adds further ones.
    """

    def __init__(self, console: Console | None, trial_log: TrialLog, trial_keys: list[str], total: int) -> None:
        self.console, self.trial_log, self.trial_keys, self.total = console, trial_log, trial_keys, total
        self.live: Live | None = None
        if console and console.is_terminal:
            self.live = Live(console=console, get_renderable=self._live_table, refresh_per_second=1, transient=True)

    def on_event(self, event: TrialEvent) -> None:
        """Show an event, which is already in the trial log."""
        if self.live or event.state == "running":
            return
        (result,) = self.trial_log.results([event.trial.key])
        ended = sum(self.trial_log.trial_state(key) not in ("running", "waiting") for key in self.trial_keys)
        state = f"{result.state}: {result.reason}" if result.reason else result.state
        seconds = f", {result.seconds:,.0f} s" if result.seconds else ""
        accuracies = f"val {format_percent(result.val_acc)}, test {format_percent(result.test_acc)}"
        text = f"{result.label}, seed {result.seed}: {state}, {accuracies}{seconds}"
        print_lines(self.console, [f"{ended} of {self.total}  {text}"])

    def _live_table(self) -> Group:
        """Return the current table; rich calls this once per second in another thread."""
        results = self.trial_log.results(list(self.trial_keys))
        running = [result for result in results if result.state == "running"]
        others = [result for result in results if result.state != "running"]
        progress = {result.trial: _format_progress(self.trial_log.folder / result.folder) for result in running}
        table = trials_table([*running, *others[::-1]][:MAX_LIVE_ROWS], progress)
        return Group(table, f"{len(others)} of {self.total} ended, {len(running)} running")


def sweep_table(result: SweepResult) -> Group:
    """Return a table of the trials of a sweep and their number in each state."""
    counts = ", ".join(f"{count} {state}" for state, count in result.counts.items() if count)
    return Group(trials_table(result.trials), whole_line(f"{result.sweep}: {counts or 'nothing to run'}"))


def plan_table(plan: SweepPlan) -> Group:
    """Return a table of the trials that a sweep would run."""
    table = NumericTable(["trial", "state"], ("seed", "epochs", "steps"), num_required=1)
    for trial in plan.trials:
        numbers = (str(trial.seed), str(trial.epochs), format_count(trial.steps))
        table.add_row(trial.label, trial.state, *numbers)
    steps = "" if plan.steps is None else f", at most {plan.steps:,} steps remaining"
    return Group(table, whole_line(f"{plan.sweep}: {plan.n} trials{steps}; nothing was written"))


def trials_table(results: Sequence[TrialResult], progress: Mapping[str, str] | None = None) -> Group:
    """Return a table with one row per trial and, below it, why trials failed or were pruned.

    `progress` maps running trials to the text of their progress.
    """
    table = NumericTable(["trial"], ("seed", "state", "val %", "test %", "seconds"), num_required=4)
    for result in results:
        state = (progress or {}).get(result.trial) or result.state
        accuracies = (format_decimal(accuracy, 2, 100) for accuracy in (result.val_acc, result.test_acc))
        table.add_row(result.label, str(result.seed), state, *accuracies, format_decimal(result.seconds, 0))
    reasons = (f"{result.label}, seed {result.seed}: {result.reason}" for result in results if result.reason)
    return Group(table, *map(Text, reasons))


def _format_progress(run: Path) -> str:
    """Return the progress of a running trial, `3 epochs, 61.20 %`, or "" if its metrics are on another machine."""
    try:
        rows = read_metrics(run / "metrics.csv")
    except OSError:
        rows = []
    if not rows:
        return ""
    accuracy = rows[-1]["train_acc"] if rows[-1]["val_acc"] is None else rows[-1]["val_acc"]
    return f"{len(rows)} epochs" + (f", {format_percent(accuracy)}" if accuracy is not None else "")
