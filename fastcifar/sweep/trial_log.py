"""The trial log of a sweep (trials.jsonl), which has a line for each change of the state or label of a trial.

The last line of a trial is its current state. Complete lines are never changed, so killing a sweep loses none of them.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from fastcifar.errors import disk_errors
from fastcifar.reporting.records import TRIALS_FILE, TrialLogEntry, TrialState, read_trial_log
from fastcifar.sweep.executors import TrialEvent
from fastcifar.sweep.sweep_spec import SweepTrial
from fastcifar.training.summary import RunSummary, read_summary

TRIAL_STATES: tuple[TrialState, ...] = get_args(TrialState)
FINISHED_STATES = ("done", "pruned")
REMOVED_SUFFIX = " (no longer asked for)"


class TrialResult(TrialLogEntry, frozen=True):
    """The last entry of a trial, and the accuracies of its run if it is finished."""

    schema_version: Literal[1] = Field(default=1, exclude=True)
    val_acc: float | None = None
    test_acc: float | None = None


@dataclass(frozen=True)
class SweepResult:
    """The trials of a sweep."""

    sweep: str
    counts: dict[str, int]  # state -> number of trials
    trials: list[TrialResult]


@dataclass(frozen=True)
class PlannedTrial:
    """A trial that a sweep would run."""

    trial: str
    label: str
    seed: int
    knobs: dict[str, Any]
    state: str
    epochs: int
    steps: int | None  # None if the data set is not on disk or does not fit the recipe


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would run."""

    sweep: str
    n: int  # number of trials
    steps: int | None  # maximum number of remaining training steps; None if that of a trial is unknown
    trials: list[PlannedTrial]


class TrialLog:
    """The trial log of the sweep in `folder`; `entries` maps each trial to its last entry, in order of creation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / TRIALS_FILE
        # an incomplete last line, after `_complete_bytes`, is truncated before the next line is written
        self.entries, self._complete_bytes = read_trial_log(self.path)
        self._summaries: dict[Path, RunSummary | None] = {}

    def trial_state(self, key: str) -> str:
        """Return the state of a trial: one of `TRIAL_STATES`, or "waiting"."""
        return self.entries[key].state if key in self.entries else "waiting"

    def log_state(self, event: TrialEvent) -> None:
        """Append a line with the new state of a trial. Raises `DiskError` if it cannot be written."""
        trial, summary = event.trial, event.summary
        self._append(
            TrialLogEntry(
                trial=trial.key,
                label=trial.label,
                knobs=trial.options,
                seed=trial.recipe.seed,
                state=event.state,
                reason=event.reason,
                run=str(Path("runs") / (Path(summary.run).name if summary else trial.key)),
                seconds=summary.seconds["total"] if summary else None,
            )
        )

    def update_labels(self, trials: Sequence[SweepTrial]) -> int:
        """Update the labels of `trials`, and mark all other trials as removed; return the number of these."""
        labels = {trial.key: trial.label for trial in trials}
        for key, entry in list(self.entries.items()):
            label = labels.get(key) or entry.label.removesuffix(REMOVED_SUFFIX) + REMOVED_SUFFIX
            if entry.label != label:
                self._append(entry.model_copy(update={"label": label}))
        return len(self.entries.keys() - labels.keys())

    def results(self, trial_keys: Iterable[str]) -> list[TrialResult]:
        """Return the results of those of the given trials that have been started."""
        results = []
        for entry in (self.entries[key] for key in trial_keys if key in self.entries):
            if entry.state in FINISHED_STATES and entry.folder not in self._summaries:
                self._summaries[entry.folder] = read_summary(self.folder / entry.folder)
            summary = self._summaries.get(entry.folder)
            val_acc, test_acc = (summary.val_acc, summary.test_acc) if summary else (None, None)
            results.append(TrialResult(**dict(entry), val_acc=val_acc, test_acc=test_acc))
        return results

    def _append(self, entry: TrialLogEntry) -> None:
        with disk_errors(f"write {self.path}", "choose another --out DIR"), self.path.open("ab") as file:
            file.truncate(self._complete_bytes)
            file.write(entry.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._complete_bytes = file.tell()
        self.entries[entry.trial] = entry
