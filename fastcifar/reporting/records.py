"""Run folders and sweeps as records: what was asked of a run, what came of it, and why if nothing did.

It reads, and believes nothing: a folder that is damaged or not finished is a record that says so, never a traceback.
No statistics here, and no network is built.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from fastcifar.errors import CheckpointError, UsageError
from fastcifar.format import one_line
from fastcifar.recipe import OUTPUT_OPTIONS, Recipe, load_saved_recipe
from fastcifar.renamed import upgrade_options
from fastcifar.training.metrics_file import METRICS_COLUMNS, parse_finite_float, read_metrics_csv
from fastcifar.training.run_dir import read_environment

TRIALS_FILE, RECIPE_FILE, SUMMARY_FILE, METRICS_FILE = "trials.jsonl", "recipe.toml", "summary.json", "metrics.csv"
MAX_METRIC_VALUE = 1e30  # of any metric; a mean of more might not be a number
CUSTOM_RECIPE_NAME = "custom"  # what `train` calls a recipe of options alone

Fraction = Annotated[float, Field(ge=0, le=1)]
FolderName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]  # of a folder
Seconds = Annotated[float, Field(ge=0, le=1e12)]


class RunSummary(BaseModel):
    """What a report needs of summary.json; whatever else is there is left alone."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    params: int = Field(ge=0)
    steps: int = Field(ge=0)
    eval_weights: Literal["last", "best", "ema"] = Field(validation_alias=AliasChoices("eval_weights", "weights"))
    val_acc: Fraction | None = None
    best_val_acc: Fraction | None = None
    test_acc: Fraction | None = None
    per_class: dict[str, Fraction | None] = {}
    seconds: dict[str, Seconds] = {}
    stop_reason: str
    complete: bool


class TrialLogEntry(BaseModel):
    """A line of a sweep's trials.jsonl."""

    trial: FolderName
    label: str
    knobs: dict[str, Any] = {}
    seed: int | None = None
    state: Literal["running", "done", "failed", "pruned"]
    reason: str | None = None
    run: FolderName | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run, or a trial that came to none.

    group: what it shares with the runs that differ from it by the seed alone. name: of that, for people.
    knobs: its recipe's; of a trial without a run folder, those that the sweep varies. epochs: the rows of metrics.csv,
    None where nothing was measured. state: "done" runs were tested as their recipe asks; reason: why others were not.
    """

    folder: Path
    group_key: str
    name: str
    options: dict[str, Any]
    seed: int | None
    state: Literal["done", "unfinished", "failed", "pruned", "damaged"]
    reason: str = ""
    summary: RunSummary | None = None
    metric_rows: list[dict[str, float | None]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device it ran on, in words; "" if the folder does not say."""
        return one_line(self.environment.get("device", ""))


def read_records(paths: Iterable[Path]) -> list[RunRecord]:
    """The runs in `paths`, run folders and sweeps, in order; what is named twice is there once.

    Errors: `CheckpointError` for a path that is neither, and where nothing at all could be read.
    """
    found: dict[Path, RunRecord] = {}
    for path in paths:
        for record in read_sweep_records(path) if os.path.isfile(path / TRIALS_FILE) else [_read_folder(path)]:
            place = record.folder.resolve()
            if place not in found or record.group_key.startswith("sweep"):
                found[place] = record
    records = list(found.values())
    if all(record.state == "damaged" for record in records):
        listed = "; ".join(f"{record.folder}: {record.reason}" for record in records) or "they hold no trial"
        raise CheckpointError(f"nothing to report: {listed}")
    return records


def _read_folder(path: Path) -> RunRecord:
    if not any(os.path.isfile(path / name) for name in (RECIPE_FILE, SUMMARY_FILE, METRICS_FILE)):
        problem = f"{path} is neither a run folder nor a sweep" if os.path.isdir(path) else f"there is no folder {path}"
        raise CheckpointError(problem, f"give folders that hold {RECIPE_FILE} or {TRIALS_FILE}")
    return read_run_record(path)


def read_run_record(folder: Path) -> RunRecord:
    """The record of a run folder, whatever state it is in."""
    environment = read_environment(folder)
    try:
        knobs = _read_recipe_options(folder)
    except UsageError as error:
        return RunRecord(
            folder, str(folder), folder.name, {}, None, "damaged", one_line(error), environment=environment
        )
    recipe = one_line(environment.get("recipe", ""))
    name = knobs["arch"] if recipe in ("", CUSTOM_RECIPE_NAME) else recipe
    alike = {knob: value for knob, value in knobs.items() if knob not in ("seed", *OUTPUT_OPTIONS)}
    record = RunRecord(
        folder,
        json.dumps(alike, sort_keys=True),
        name,
        knobs,
        knobs["seed"],
        "unfinished",
        metric_rows=_read_metric_rows(folder),
        environment=environment,
    )
    if not (folder / SUMMARY_FILE).exists():
        reason = f"after {len(record.metric_rows)} of {knobs['epochs']} epochs: in training, or stopped"
        return replace(record, reason=reason)
    try:
        summary = RunSummary.model_validate_json((folder / SUMMARY_FILE).read_bytes())
    except (ValidationError, OSError) as error:
        return replace(record, state="damaged", reason=f"{SUMMARY_FILE}: {_describe_read_error(error)}")
    if not summary.complete and summary.stop_reason != "max_steps":  # which is a knob: all of it that was asked for
        return replace(record, reason=f"stopped by {one_line(summary.stop_reason)} after {summary.steps:,} steps")
    if not record.metric_rows:
        warnings.warn(f"{folder / METRICS_FILE} has no row that can be read; its curves are left out", stacklevel=2)
    return replace(record, state="done", summary=summary)


def _read_recipe_options(folder: Path) -> dict[str, Any]:
    """The recipe's knobs, checked; one that this version does not know is kept, one that the file lacks is the default.

    Errors: `UsageError`.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise UsageError(f"no {RECIPE_FILE}")
    values = load_saved_recipe(folder)
    return {**json.loads(json.dumps(values, default=str)), **Recipe.from_saved(values).model_dump(mode="json")}


def _read_metric_rows(folder: Path) -> list[dict[str, float | None]]:
    """The whole rows of metrics.csv as numbers; what is no number that can be is None."""
    try:
        rows = read_metrics_csv(folder / METRICS_FILE, sys.maxsize)
    except OSError:
        return []
    return [{name: parse_finite_float(row[name], MAX_METRIC_VALUE) for name in METRICS_COLUMNS} for row in rows]


def read_sweep_records(folder: Path) -> list[RunRecord]:
    """The trials of a sweep. Errors: `CheckpointError`."""
    return [_trial_record(folder, trial) for trial in read_trial_log(folder / TRIALS_FILE)[0].values()]


def read_trial_log(path: Path) -> tuple[dict[str, TrialLogEntry], int]:
    """The last line of each trial in a sweep's ledger, in the order of their first, and the bytes of its whole lines.

    What comes after those was cut short by the end of a process, and counts as none; a whole line that is no trial's is
    left out, with a warning. No file is no trials. Errors: `CheckpointError`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    whole = content.rfind(b"\n") + 1
    trials, unreadable = {}, 0
    for line in filter(bytes.strip, content[:whole].split(b"\n")):
        try:
            trial = TrialLogEntry.model_validate_json(line)
        except ValidationError:
            unreadable += 1
        else:
            trials[trial.trial] = trial
    if unreadable:
        warnings.warn(f"{path}: {unreadable} of its lines cannot be read and are left out", stacklevel=2)
    return trials, whole


def _trial_record(sweep_folder: Path, trial: TrialLogEntry) -> RunRecord:
    folder = sweep_folder / (trial.run or f"runs/{trial.trial}")
    label = one_line(trial.label)
    named: dict[str, Any] = {"group_key": f"sweep {sweep_folder.resolve()} {trial.label}", "name": label}
    if os.path.isdir(folder):  # unlike pathlib it takes any name
        record = replace(read_run_record(folder), **named)
    else:
        reason = "in training, or stopped" if trial.state == "running" else "its run folder is gone"
        state = "unfinished" if trial.state == "running" else "damaged"
        record = RunRecord(
            folder, options=upgrade_options(trial.knobs), seed=trial.seed, state=state, reason=reason, **named
        )
    if trial.state in ("failed", "pruned"):
        return replace(record, state=trial.state, reason=one_line(trial.reason or "no reason was given"), summary=None)
    return record


def _describe_read_error(error: ValidationError | OSError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    first = error.errors()[0]
    return one_line(": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))))
