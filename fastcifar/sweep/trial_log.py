"""The trial log of a sweep (trials.jsonl), with one line per change of the state of a trial; the last line is current.

Lines are only appended, so that killing a sweep loses none; an incomplete last line is ignored.
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
from fastcifar.training.summary import RunSummary, read_summary

TRIAL_STATES = ("running", "done", "pruned", "failed")
FINISHED_STATES = ("done", "pruned")
REMOVED_SUFFIX = " (no longer asked for)"

TrialLogLine = dict[str, Any]


class TrialLog:
    """The trial log of the sweep in `folder`; `last_lines` maps each trial to its last line, in order of creation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / TRIALS_FILE
        self._accuracies: dict[str, TrialLogLine] = {}
        # an incomplete last line, after `_complete_bytes`, is truncated before the next line is written
        records, self._complete_bytes = read_trial_log(self.path)
        self.last_lines = {key: record.model_dump(exclude={"schema_version"}) for key, record in records.items()}

    def trial_state(self, key: str) -> str:
        """Return the state of a trial: one of `TRIAL_STATES`, or "waiting"."""
        return str(self.last_lines.get(key, {}).get("state", "waiting"))

    def log_state(
        self, trial: SweepTrial, state: str, reason: str | None = None, summary: RunSummary | None = None
    ) -> None:
        """Append a line with the new state of a trial. Raises `DiskError` if it cannot be written."""
        run_name = Path(summary.run).name if summary else trial.key
        line = {
            "trial": trial.key,
            "label": trial.label,
            "knobs": trial.options,
            "seed": trial.recipe.seed,
            "state": state,
            "reason": reason,
            "run": str(Path("runs") / run_name),
            "seconds": summary.seconds["total"] if summary else None,
        }
        self._append_line(line)

    def mark_removed(self, trial_keys: Iterable[str]) -> list[str]:
        """Mark the labels of trials that are not in `trial_keys`, and return these trials.

        A different label keeps them apart from current trials in reports.
        """
        current = set(trial_keys)
        removed = [key for key in self.last_lines if key not in current]
        for line in [self.last_lines[key] for key in removed]:
            if not line["label"].endswith(REMOVED_SUFFIX):
                self._append_line({**line, "label": f"{line['label']}{REMOVED_SUFFIX}"})
        return removed

    def restore_labels(self, trials: Iterable[SweepTrial]) -> None:
        """Restore the labels of trials that are part of the sweep again."""
        for trial in trials:
            line = self.last_lines.get(trial.key)
            if line and line["label"] != trial.label:
                self._append_line({**line, "label": trial.label})

    def trial_rows(self, trial_keys: Iterable[str]) -> list[TrialLogLine]:
        """Return the last lines of the given trials, with `val_acc` and `test_acc` of finished ones."""
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
            self._accuracies[line["run"]] = {
                "val_acc": summary and summary.val_acc,
                "test_acc": summary and summary.test_acc,
            }
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
            raise DiskError(f"cannot write {self.path}: {error.strerror}", "choose another --out DIR") from None
        self.last_lines[line["trial"]] = line
