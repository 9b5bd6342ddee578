"""Read run folders and sweeps as records. A damaged or unfinished folder becomes a record with the reason."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from fastcifar.errors import CheckpointError, UsageError
from fastcifar.files import read_regular_file
from fastcifar.format import one_line
from fastcifar.recipe import OUTPUT_OPTIONS, Recipe
from fastcifar.recipes import load_saved_recipe
from fastcifar.renamed import upgrade_options
from fastcifar.training.environment import RunEnvironment, read_environment
from fastcifar.training.metrics_file import read_metrics
from fastcifar.training.summary import RunSummary
from fastcifar.training.trackers import MLFLOW_ARTIFACTS

TRIALS_FILE, RECIPE_FILE, SUMMARY_FILE, METRICS_FILE = "trials.jsonl", "recipe.toml", "summary.json", "metrics.csv"
MAX_METRIC_VALUE = 1e30  # larger metrics are dropped, because their mean can overflow
CUSTOM_RECIPE_NAME = "custom"  # name that `train` records for a run without --recipe

FolderName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
TrialState = Literal["running", "done", "failed", "pruned"]


class TrialLogEntry(BaseModel, frozen=True, allow_inf_nan=False):
    """A line of trials.jsonl in a sweep folder."""

    schema_version: Literal[1] = 1
    trial: FolderName
    label: str
    knobs: dict[str, Any] = {}  # the options that the sweep varies
    seed: int | None = None
    state: TrialState
    reason: str | None = None
    run: FolderName | None = None
    seconds: float | None = None

    @property
    def folder(self) -> Path:
        """The run folder, relative to the sweep folder."""
        return Path(self.run or f"runs/{self.trial}")


@dataclass(frozen=True)
class RunRecord:
    """A run, or a trial of a sweep without a run folder."""

    folder: Path
    group_key: str  # equal for runs that differ only by the seed
    label: str = ""  # of a trial of a sweep
    options: dict[str, Any] = field(default_factory=dict)  # of a trial without a run folder, only those that vary
    seed: int | None = None
    state: Literal["done", "unfinished", "failed", "pruned", "damaged"] = "done"
    reason: str = ""  # why the run is not "done"
    summary: RunSummary | None = None
    metric_rows: list[dict[str, float | None]] = field(default_factory=list)  # one per epoch; None if not measured
    environment: RunEnvironment = field(default_factory=RunEnvironment)

    @property
    def recipe(self) -> str:
        """The name of a shipped recipe or recipe file; "" for a run without one."""
        name = one_line(self.environment.recipe)
        return "" if name == CUSTOM_RECIPE_NAME else name

    @property
    def device(self) -> str:
        """The name of the device that the run used; "" if unknown."""
        return one_line(self.environment.device)


def folder_kind(folder: Path) -> str | None:
    """Return "sweep" or "run", or None for any other folder; recipe.toml alone, for example, does not make a run."""
    is_file, is_dir = (lambda name: os.path.isfile(folder / name)), (lambda name: os.path.isdir(folder / name))
    if is_file(TRIALS_FILE) and (is_file("sweep.toml") or is_dir("runs")):
        return "sweep"
    return "run" if is_file(RECIPE_FILE) and (is_file("env.json") or is_dir("checkpoints")) else None


def find_runs_and_sweeps(folder: Path) -> Iterator[Path]:
    """Yield the runs and sweeps below `folder`, sorted by path, without those inside another run or sweep."""
    try:
        subfolders = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for path in subfolders:
        if folder_kind(path):
            yield path
        elif path.name != MLFLOW_ARTIFACTS and not path.name.startswith("."):  # MLflow keeps copies of recipes
            yield from find_runs_and_sweeps(path)


def read_records(paths: Iterable[Path]) -> list[RunRecord]:
    """Return the records of the runs and sweeps in `paths` or at any depth below them, each run once.

    Raises `CheckpointError` if a path contains no run or sweep, or if none of them is readable.
    """
    record_by_folder: dict[Path, RunRecord] = {}
    for path in paths:
        run_files = (TRIALS_FILE, RECIPE_FILE, SUMMARY_FILE, METRICS_FILE)
        is_run_or_sweep = any(os.path.isfile(path / name) for name in run_files)  # unlike `Path.is_file`, for any name
        folders = [path] if is_run_or_sweep else list(find_runs_and_sweeps(path))
        if not folders:
            problem = f"there is no run or sweep in {path}" if os.path.isdir(path) else f"there is no folder {path}"
            remedy = f"give folders that contain {RECIPE_FILE} or {TRIALS_FILE}, or a folder above such folders"
            raise CheckpointError(problem, remedy)
        for folder in folders:
            if os.path.isfile(folder / TRIALS_FILE):
                record_by_folder |= {record.folder.resolve(): record for record in _read_sweep(folder)}
            else:
                record_by_folder.setdefault(folder.resolve(), read_run_record(folder))
    records = list(record_by_folder.values())
    if all(record.state == "damaged" for record in records):
        reasons = "; ".join(f"{record.folder}: {record.reason}" for record in records)
        raise CheckpointError(f"nothing to report: {reasons}")
    for record in records:
        if record.state == "done" and not record.metric_rows:
            warnings.warn(f"{record.folder / METRICS_FILE} has no valid row; its curves are omitted", stacklevel=2)
    return records


def read_run_record(folder: Path) -> RunRecord:
    """Return the record of a run folder in any state."""
    try:
        rows = read_metrics(folder / METRICS_FILE, MAX_METRIC_VALUE)
    except OSError:
        rows = []
    summary, state, reason = None, "done", ""
    try:
        summary = RunSummary.model_validate_json(read_regular_file(folder / SUMMARY_FILE))
        if not summary.complete and summary.stop_reason != "max_steps":  # --max-steps is not an interruption
            state, reason = "unfinished", f"stopped by {one_line(summary.stop_reason)} after {summary.steps:,} steps"
    except FileNotFoundError:
        state = "unfinished"
    except OSError as error:
        state, reason = "damaged", f"{SUMMARY_FILE}: cannot be read: {error.strerror}"
    except ValidationError as error:
        first = error.errors()[0]
        reason = one_line(": ".join(filter(None, (SUMMARY_FILE, ".".join(map(str, first["loc"])), first["msg"]))))
        state = "damaged"
    environment = read_environment(folder)
    record = RunRecord(folder, str(folder), summary=summary, metric_rows=rows, environment=environment)
    try:
        options = read_recipe_options(folder)
    except UsageError as error:
        return replace(record, state="damaged", reason=one_line(error))
    if state == "unfinished" and not summary:
        reason = f"after {len(rows)} of {options['epochs']} epochs: still training or interrupted"
    shared = {option: value for option, value in options.items() if option not in ("seed", *OUTPUT_OPTIONS)}
    key = json.dumps(shared, sort_keys=True)
    options["init"] = options["init"].removeprefix(os.path.join(os.getcwd(), ""))  # narrower in tables
    return replace(record, group_key=key, options=options, seed=options["seed"], state=state, reason=reason)


def read_recipe_options(folder: Path) -> dict[str, Any]:
    """Return the options of a recipe, with defaults and unknown options. Raises `UsageError` if it is invalid."""
    if not os.path.isfile(folder / RECIPE_FILE):
        raise UsageError(f"no {RECIPE_FILE}")
    values = load_saved_recipe(folder)
    if not values.keys() & Recipe.model_fields:
        raise UsageError(f"{RECIPE_FILE} contains no option of a run")
    recipe = Recipe(**{name: value for name, value in values.items() if name in Recipe.model_fields})
    return {**json.loads(json.dumps(values, default=str)), **recipe.model_dump(mode="json")}


def read_trial_log(path: Path) -> tuple[dict[str, TrialLogEntry], int]:
    """Return the last entry of each trial in a trial log, and the length in bytes of the log's complete lines.

    An incomplete last line, left behind by a terminated process, is ignored; a complete but invalid line is skipped
    with a warning. A missing file has no trials. Raises `CheckpointError` if the file cannot be read.
    """
    try:
        content = read_regular_file(path)
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    num_bytes = content.rfind(b"\n") + 1
    trials, num_invalid = {}, 0
    for line in filter(bytes.strip, content[:num_bytes].split(b"\n")):
        try:
            trial = TrialLogEntry.model_validate_json(line)
        except ValidationError:
            num_invalid += 1
        else:
            trials[trial.trial] = trial
    if num_invalid:
        warnings.warn(f"{path}: invalid lines skipped: {num_invalid}", stacklevel=2)
    return trials, num_bytes


def _read_sweep(folder: Path) -> list[RunRecord]:
    """Return the records of the trials of a sweep; a damaged record of `folder` if there is no valid trial."""
    try:
        trials = read_trial_log(folder / TRIALS_FILE)[0]
    except CheckpointError as error:
        return [RunRecord(folder, str(folder), state="damaged", reason=one_line(error))]
    empty = RunRecord(folder, str(folder), state="damaged", reason=f"{TRIALS_FILE} contains no valid trial")
    return [_read_trial(folder, trial) for trial in trials.values()] or [empty]


def _read_trial(sweep_folder: Path, trial: TrialLogEntry) -> RunRecord:
    folder = sweep_folder / trial.folder
    if os.path.isdir(folder):
        record = read_run_record(folder)
    else:
        is_running = trial.state == "running"
        reason = "still training or interrupted" if is_running else "its run folder is missing"
        state = "unfinished" if is_running else "damaged"
        options = upgrade_options(trial.knobs)
        record = RunRecord(folder, "", options=options, seed=trial.seed, state=state, reason=reason)
    if trial.state in ("failed", "pruned"):
        record = replace(record, state=trial.state, reason=one_line(trial.reason or "no reason recorded"))
    return replace(record, group_key=f"sweep {sweep_folder.resolve()} {trial.label}", label=one_line(trial.label))
