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
from fastcifar.reporting.records import TRIALS, read_trials
from fastcifar.sweep.sweep_spec import Trial
from fastcifar.training.run_dir import read_summary

STATES = ("running", "done", "pruned", "failed")
OVER = ("done", "pruned")
LEFT = " (no longer asked for)"

Line = dict[str, Any]


class Ledger:
    """The ledger of the sweep in `folder`. `lines`: trial -> its last line, in the order of their first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / TRIALS
        self._scores: dict[str, Line] = {}
        found, self._whole = read_trials(self.path)  # bytes; what is after them goes with the next line
        self.lines = {key: trial.model_dump() for key, trial in found.items()}

    def state(self, key: str) -> str:
        """One of STATES, or "waiting"."""
        return str(self.lines.get(key, {}).get("state", "waiting"))

    def note(self, trial: Trial, state: str, reason: str | None = None, summary: Line | None = None) -> None:
        """What became of a trial, as a line. Errors: `DiskError`."""
        line = {
            "trial": trial.key,
            "label": trial.label,
            "knobs": trial.knobs,
            "seed": trial.recipe.seed,
            "state": state,
            "reason": reason,
            "run": str(Path("runs") / (Path(summary["run"]).name if summary else trial.key)),
            "seconds": summary["seconds"]["total"] if summary else None,
        }
        self._add(line)

    def keep_apart(self, wanted: Iterable[str]) -> list[str]:
        """The trials that are not among the `wanted` any more: their labels say so, for they are of another row now."""
        wanted = set(wanted)
        apart = [key for key in self.lines if key not in wanted]
        for line in [self.lines[key] for key in apart]:
            if not line["label"].endswith(LEFT):
                self._add({**line, "label": f"{line['label']}{LEFT}"})
        return apart

    def take_back(self, trials: Iterable[Trial]) -> None:
        """Gives trials that are asked for again their labels back."""
        for trial in trials:
            line = self.lines.get(trial.key)
            if line and line["label"] != trial.label:
                self._add({**line, "label": trial.label})

    def rows(self, wanted: Iterable[str]) -> list[Line]:
        """The last lines of the trials `wanted`, with `val_acc` and `test_acc` of those that are over."""
        return [{**self.lines[key], **self._scored(self.lines[key])} for key in wanted if key in self.lines]

    def _scored(self, line: Line) -> Line:
        if line["state"] not in OVER:
            return {"val_acc": None, "test_acc": None}
        if line["run"] not in self._scores:
            summary = read_summary(self.folder / line["run"])
            self._scores[line["run"]] = {name: summary.get(name) for name in ("val_acc", "test_acc")}
        return self._scores[line["run"]]

    def _add(self, line: Line) -> None:
        try:
            with self.path.open("ab") as file:
                file.truncate(self._whole)
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                self._whole = file.tell()
        except OSError as error:
            raise DiskError(f"cannot write {self.path}: {error.strerror}", "give another --out DIR") from None
        self.lines[line["trial"]] = line
