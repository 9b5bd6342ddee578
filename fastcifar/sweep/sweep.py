"""Sweeps: run the trials of a sweep file, each as an ordinary run in the sweep folder.

The sweep folder holds the state: `sweep.toml` is the sweep file, `trials.jsonl` the state of each trial, `runs/` the
run folders. Finished trials are not repeated, interrupted ones are resumed, and failed ones are kept with the reason.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from fastcifar.data import cifar
from fastcifar.data.batch_loader import BatchSlicing
from fastcifar.data.cifar import Dataset
from fastcifar.errors import UsageError, UserError, disk_errors
from fastcifar.files import load_toml, lock_folder, read_regular_file, write_atomically
from fastcifar.recipe import Recipe, default_val_size
from fastcifar.renamed import renamed_options
from fastcifar.sweep.executors import ExecutorOptions, TrialEvent, build_executor
from fastcifar.sweep.study import OptunaStudy
from fastcifar.sweep.sweep_progress import SweepDisplay
from fastcifar.sweep.sweep_spec import SPEC_FILE, SweepSpec, SweepTrial, expand_trials, read_sweep_spec, shipped_sweeps
from fastcifar.sweep.trial_log import FINISHED_STATES, TRIAL_STATES, PlannedTrial, SweepPlan, SweepResult, TrialLog
from fastcifar.training import trackers
from fastcifar.training.progress import print_lines
from fastcifar.training.resolve import any_machine, resolve


def run_sweep(
    source: str,
    out: Path | None = None,
    executor: str = "process",
    executor_options: ExecutorOptions | None = None,
    seeds: str | None = None,
    retry_failed: bool = False,
    console: Console | None = None,
    **overrides: Any,
) -> SweepResult:
    """Run the unfinished trials of a sweep and return the results of all.

    `source` is a shipped sweep, a sweep file or a sweep folder, and `seeds` replaces those of the file. `overrides` are
    recipe options that take precedence over all recipes and [base]; None values are ignored. Raises a `UserError`
    before anything is written if the sweep is invalid. The sweep can be continued after an interruption.
    """
    spec, folder, trials, study = prepare_sweep(source, out, executor, seeds, overrides)
    if study and retry_failed:
        raise UsageError("a [study] does not rerun failed trials", "leave --retry-failed out")
    print_lines(console, [] if study else describe_duplicate_recipes(trials))
    run_trials = build_executor(executor, executor_options or ExecutorOptions())
    with disk_errors(f"create the sweep folder {folder}", "choose another --out DIR"):
        folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        trial_log = TrialLog(folder)
        trials = study.existing_trials() if study else trials
        print_lines(console, _start_sweep(folder, spec, trial_log, trials, retry_failed))
        skipped = FINISHED_STATES if retry_failed else (*FINISHED_STATES, "failed")
        unfinished = (trial for trial in trials if trial_log.trial_state(trial.key) not in skipped)
        remaining = study.remaining_trials() if study else unfinished
        trial_keys = [trial.key for trial in trials]
        display = SweepDisplay(console, trial_log, trial_keys, study.study_spec.n if study else len(trials))
        events = run_trials(trial.with_sweep_folder(folder) for trial in remaining)
        with display.live or nullcontext(), closing(events):
            for event in events:
                _log_event(trial_log, folder, event)
                if event.trial.key not in trial_keys:
                    trial_keys.append(event.trial.key)
                display.on_event(event)
                if study:
                    study.tell(event.trial, event.state, event.summary)
        results = trial_log.results(trial_keys)
    counts = Counter(result.state for result in results)
    return SweepResult(str(folder), {state: counts[state] for state in TRIAL_STATES}, results)


def prepare_sweep(
    source: str, out: Path | None, executor: str, seeds: str | None, overrides: dict[str, Any]
) -> tuple[SweepSpec, Path, list[SweepTrial], OptunaStudy | None]:
    """Return the spec, the sweep folder, the checked trials (`boundary_trials` of a study), and the study or None."""
    spec, name = read_sweep_spec(source, seeds, overrides)
    is_folder = Path(source).is_dir() and source not in shipped_sweeps()
    folder = out or (Path(source) if is_folder else Path("sweeps") / name)
    saved = next(folder.glob("runs/*/recipe.toml"), None)
    if saved and renamed_options().keys() & load_toml(saved).keys():  # the names of the trials would differ
        problem = f"{folder} was created by an earlier version, in which options had other names"
        raise UsageError(problem, "such a sweep cannot be continued, only reported: choose another --out")
    study = OptunaStudy(spec, name, folder) if spec.study else None
    trials = study.boundary_trials() if study else expand_trials(spec, name)
    trials = [trial.with_sweep_folder(folder) for trial in trials]
    check_trials(trials, executor)
    return spec, folder, trials, study


def plan_sweep(
    source: str, out: Path | None = None, executor: str = "process", seeds: str | None = None, **overrides: Any
) -> SweepPlan:
    """Return what `run_sweep` would run; for a study, the trials of `boundary_trials`. Nothing is written."""
    _, folder, trials, study = prepare_sweep(source, out, executor, seeds, overrides)
    recipes = {(trial.recipe.data, trial.recipe.dataset): trial.recipe for trial in trials}
    data = {source: load_dataset_if_present(recipe) for source, recipe in recipes.items()}
    trial_log = TrialLog(folder)
    planned = [
        PlannedTrial(
            trial=trial.key,
            label=trial.label,
            seed=trial.recipe.seed,
            knobs=trial.options,
            state=trial_log.trial_state(trial.key),
            epochs=trial.recipe.epochs,
            steps=count_training_steps(trial.recipe, data[trial.recipe.data, trial.recipe.dataset]),
        )
        for trial in trials
    ]
    n = study.study_spec.n if study else len(trials)
    steps = [trial.steps for trial in planned if trial.state not in FINISHED_STATES]
    known = [count for count in steps if count is not None]
    total = max(known, default=0) * n if study else sum(known)
    return SweepPlan(str(folder), n, total if len(known) == len(steps) else None, planned)


def check_trials(trials: Iterable[SweepTrial], executor: str) -> None:
    """Check that this machine, or any machine for Ray, supports the recipes; raise a `UserError` that names the trial.

    One trial per label is checked, because the others differ only in the seed.
    """
    checked: set[str] = set()
    for trial in {trial.label: trial for trial in trials}.values():
        recipe = trial.recipe
        try:
            trackers.require_trackers(recipe)
            resolve(recipe, any_machine(recipe) if executor == "ray" else None, checked)
        except UserError as error:
            raise type(error)(f"{trial.label}: {error.problem}", error.remedy) from None


def describe_duplicate_recipes(trials: Sequence[SweepTrial]) -> list[str]:
    """Return a line for each group of labels with identical recipes, which may result from overrides."""
    labels: dict[str, dict[str, None]] = defaultdict(dict)
    for trial in trials:
        options = trial.recipe.model_dump(mode="json", exclude={"out", "resume", "seed"})
        labels[json.dumps(options)][trial.label] = None
    return [f"{' and '.join(equal)} have identical recipes" for equal in labels.values() if len(equal) > 1]


def load_dataset_if_present(recipe: Recipe) -> Dataset | None:
    """Return the data set of a recipe, or None if it is not on disk."""
    try:
        return cifar.load_recipe_dataset(recipe, download=False)
    except UserError:
        return None


def count_training_steps(recipe: Recipe, data: Dataset | None) -> int | None:
    """Return the training steps of a run, or None if `data` is unknown or does not fit the recipe."""
    if data is None:
        return None
    images = len(data.train.labels)
    val_size = default_val_size(images) if recipe.val_size is None else recipe.val_size
    try:
        slicing = BatchSlicing(images - (val_size if data.val is None else 0), recipe.batch_size, recipe.drop_last)
    except UserError:
        return None
    steps = recipe.epochs * slicing.steps_per_epoch
    return min(steps, recipe.max_steps or steps)


def _start_sweep(
    folder: Path, spec: SweepSpec, trial_log: TrialLog, trials: list[SweepTrial], retry_failed: bool
) -> list[str]:
    """Write the sweep file and update the trial log; return lines about changes and the state of the trials."""
    lines, spec_file, text = [], folder / SPEC_FILE, spec.to_toml()
    added = sum(trial.key not in trial_log.entries for trial in trials)
    removed = trial_log.update_labels(trials)
    if os.path.isfile(spec_file) and read_regular_file(spec_file) != text.encode():
        lines.append(f"the sweep file has changed: {added} trials added, {removed} removed (their runs are kept)")
    with disk_errors(f"write {spec_file}", "choose another --out DIR"):
        write_atomically(spec_file, text.encode())
    failed = "failed, to rerun" if retry_failed else "failed (--retry-failed reruns them)"
    words = {"waiting": "to start", "running": "to resume", "failed": failed}
    counts = Counter(trial_log.trial_state(trial.key) for trial in trials)
    states = [f"{count} {words.get(state, state)}" for state, count in counts.items()]
    num_trials = spec.study.n if spec.study else len(trials)
    return [*lines, f"{folder}: {num_trials} trials: {', '.join(states) or 'none started'}"]


def _log_event(trial_log: TrialLog, folder: Path, event: TrialEvent) -> None:
    """Write an event to the trial log, and the files of a run on another machine to its run folder here."""
    run = folder / "runs" / event.trial.key
    with disk_errors(f"write {run}", "free some space and repeat the command"):
        for name, content in event.files.items():
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(run / name, content)
    trial_log.log_state(event)
