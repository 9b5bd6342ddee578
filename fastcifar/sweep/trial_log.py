"""trials.jsonl: what a sweep knows of its trials, one line whenever the state of one changes; the last line stands.

Lines are only ever added, so that a sweep that is killed loses none, and a line cut short counts as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastcifar.errors import DiskError
from fastcifar.reporting.records import TRIALS_FILE, read_trial_log
from fastcifar.sweep.sweep_spec import SweepTrial
from fastcifar.training.run_dir import read_summary

TRIAL_STATES = ("running", "done", "pruned", "failed")
FINISHED_STATES = ("done", "pruned")
REMOVED_SUFFIX = " (no longer asked for)"

TrialLogLine = dict[str, Any]


class TrialLog:
    """The ledger of the sweep in `folder`. `lines`: trial -> its last line, in the order of their first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / TRIALS_FILE
        self._accuracies: dict[str, TrialLogLine] = {}
        found, self._complete_bytes = read_trial_log(self.path)  # bytes; what is after them goes with the next line
        self.last_lines = {key: trial.model_dump() for key, trial in found.items()}

    def trial_state(self, key: str) -> str:
        """One of STATES, or "waiting"."""
        return str(self.last_lines.get(key, {}).get("state", "waiting"))

    def log_state(
        self, trial: SweepTrial, state: str, reason: str | None = None, summary: TrialLogLine | None = None
    ) -> None:
        """What became of a trial, as a line. Errors: `DiskError`."""
        line = {
            "trial": trial.key,
            "label": trial.label,
            "knobs": trial.options,
            "seed": trial.recipe.seed,
            "state": state,
            "reason": reason,
            "run": str(Path("runs") / (Path(summary["run"]).name if summary else trial.key)),
            "seconds": summary["seconds"]["total"] if summary else None,
        }
        self._append_line(line)

    def mark_removed(self, trial_keys: Iterable[str]) -> list[str]:
        """The trials that are not among the `wanted` any more: their labels say so, for they are of another row now."""
        trial_keys = set(trial_keys)
        apart = [key for key in self.last_lines if key not in trial_keys]
        for line in [self.last_lines[key] for key in apart]:
            if not line["label"].endswith(REMOVED_SUFFIX):
                self._append_line({**line, "label": f"{line['label']}{REMOVED_SUFFIX}"})
        return apart

    def restore_labels(self, trials: Iterable[SweepTrial]) -> None:
        """Gives trials that are asked for again their labels back."""
        for trial in trials:
            line = self.last_lines.get(trial.key)
            if line and line["label"] != trial.label:
                self._append_line({**line, "label": trial.label})

    def trial_rows(self, trial_keys: Iterable[str]) -> list[TrialLogLine]:
        """The last lines of the trials `wanted`, with `val_acc` and `test_acc` of those that are over."""
        return [
            {**self.last_lines[key], **self._read_accuracies(self.last_lines[key])}
            for key in trial_keys
            if key in self.last_lines
        ]

    def _read_accuracies(self, line: TrialLogLine) -> TrialLogLine:
        if line["state"] not in FINISHED_STATES:
            return {"val_acc": None, "test_acc": None}
        if line["run"] not in self._accuracies:
            summary = read_summary(self.folder / line["run"])
            self._accuracies[line["run"]] = {name: summary.get(name) for name in ("val_acc", "test_acc")}
        return self._accuracies[line["run"]]

    def _append_line(self, line: TrialLogLine) -> None:
        try:
            with self.path.open("ab") as file:
                file.truncate(self._complete_bytes)
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                self._complete_bytes = file.tell()
        except OSError as error:
            raise DiskError(f"cannot write {self.path}: {error.strerror}", "give another --out DIR") from None
        self.last_lines[line["trial"]] = line
