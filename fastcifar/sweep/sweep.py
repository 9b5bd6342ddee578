"""Sweeps: the trials of a file, each an ordinary run in the sweep's folder, until every one is over.

The folder says how far the sweep is: `sweep.toml` what was asked, `trials.jsonl` what came of each trial, `runs/` the
runs. What is over is not run again, what was interrupted goes on, what failed is left with its reason.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fastcifar.data import cifar
from fastcifar.data.augment import parse_augment
from fastcifar.data.batch_slicing import slice_epoch
from fastcifar.data.loaders import LOADERS
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.device import choose_execution
from fastcifar.errors import DiskError, UsageError, UserError, lookup
from fastcifar.files import load_toml, lock_folder, write_atomically
from fastcifar.recipe import Recipe
from fastcifar.renamed import renamed_options
from fastcifar.sweep.executors import ExecutorOptions, TrialEvent, build_executor
from fastcifar.sweep.study import OptunaStudy
from fastcifar.sweep.sweep_progress import SweepDisplay
from fastcifar.sweep.sweep_spec import SPEC_FILE, SweepSpec, SweepTrial, expand_trials, read_sweep_spec
from fastcifar.sweep.trial_log import FINISHED_STATES, TRIAL_STATES, TrialLog
from fastcifar.training import trackers
from fastcifar.training.evaluate import VIEWS
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.optimizers import OptimizerWrapper, build_grad_clipper
from fastcifar.training.progress import print_lines
from fastcifar.training.resolve import check_image_sizes, model_from_recipe, resolve_cuda_graph


def run_sweep(
    source: str,
    out: Path | None = None,
    executor: str = "process",
    executor_options: ExecutorOptions | None = None,
    seeds: str | None = None,
    retry_failed: bool = False,
    console: Console | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Runs what is not over of the sweep `source` (a shipped name, a file, a sweep's folder); returns `document`.

    out            the sweep's folder; default: sweeps/NAME, or the folder that `source` is
    on, how        a row of PLACES, and how much of it
    retry_failed   failed trials once more
    flags          knobs above every recipe of the sweep
    Errors: `UserError`s, before anything is written; `Interrupted` and KeyboardInterrupt leave a sweep that goes on.
    """
    asked, folder, trials, study = prepare_sweep(source, out, executor, seeds, overrides)
    if study and retry_failed:
        raise UsageError("a [study] does not try a point again", "leave --retry-failed out: it goes on to others")
    print_lines(console, describe_duplicate_recipes(trials))
    run = build_executor(executor, executor_options or ExecutorOptions())
    with _locked_folder(folder):
        ledger = TrialLog(folder)
        if study:
            study.open_study()
            trials = [trial.with_sweep_folder(folder) for trial in study.existing_trials()]
        print_lines(console, _start_sweep(folder, asked, ledger, trials, retry_failed))
        total = study.study_spec.n if study else len(trials)
        over = FINISHED_STATES if retry_failed else (*FINISHED_STATES, "failed")
        unfinished: Iterator[SweepTrial] = (trial for trial in trials if ledger.trial_state(trial.key) not in over)
        if study:
            unfinished = (trial.with_sweep_folder(folder) for trial in study.remaining_trials())
        wanted = [trial.key for trial in trials]
        with SweepDisplay(console, ledger, total) as board, closing(run(unfinished)) as events:
            for told in events:
                _log_event(ledger, folder, told)
                wanted += [] if told.trial.key in wanted else [told.trial.key]
                board.on_event(told, wanted)
                if study:
                    study.tell(told.trial, told.state, told.summary)
        return sweep_document(folder, ledger, wanted)


def prepare_sweep(
    source: str, out: Path | None, executor: str, seeds: str | None, overrides: dict[str, Any]
) -> tuple[SweepSpec, Path, list[SweepTrial], OptunaStudy | None]:
    """What is asked, the sweep's folder, and its trials, all checked; of a study none yet, for it chooses later."""
    asked, name = read_sweep_spec(source, seeds, overrides)
    folder = out or (Path(source) if Path(source).is_dir() else Path("sweeps") / name)
    _require_current_names(folder)
    if asked.study:
        study = OptunaStudy(asked, name, folder)
        check_trials(study.boundary_trials(), executor)
        return asked, folder, [], study
    trials = [trial.with_sweep_folder(folder) for trial in expand_trials(asked, name)]
    check_trials(trials, executor)
    return asked, folder, trials, None


def _require_current_names(folder: Path) -> None:
    """Raises `UsageError` for a sweep of an earlier version: its trials are named by options that were renamed since."""
    for file in folder.glob("runs/*/recipe.toml"):
        if renamed_options().keys() & load_toml(file).keys():
            problem = f"{folder} was made by an earlier version, in which options had other names"
            raise UsageError(problem, "it can be reported, not continued: give another --out")
        return


def plan_sweep(
    source: str, out: Path | None = None, executor: str = "process", seeds: str | None = None, **overrides: Any
) -> dict[str, Any]:
    """What `sweep` would run: `{"sweep", "n", "steps", "trials": [{"trial", "label", "seed", "knobs", "state", ...}]}`.

    `n`: trials. `steps`: training steps still to go, at most; None where the data set is not here, or where a trial
    would fail by it. Of a [study] the trials are the ends of its ranges. Nothing is written.
    """
    _, folder, trials, study = prepare_sweep(source, out, executor, seeds, overrides)
    ledger = TrialLog(folder)
    listed = [
        {
            "trial": trial.key,
            "label": trial.label,
            "seed": trial.recipe.seed,
            "knobs": trial.options,
            "state": ledger.trial_state(trial.key),
            "epochs": trial.recipe.epochs,
            "steps": count_training_steps(trial.recipe),
        }
        for trial in (study.boundary_trials() if study else trials)
    ]
    steps = [row["steps"] for row in listed if row["state"] not in FINISHED_STATES]
    known = None if None in steps else max(steps, default=0) * study.study_spec.n if study else sum(steps)
    return {"sweep": str(folder), "n": study.study_spec.n if study else len(trials), "steps": known, "trials": listed}


def sweep_document(folder: Path, trial_log: TrialLog, trial_keys: Iterable[str]) -> dict[str, Any]:
    """`{"sweep": folder, "counts": {state: trials}, "trials": [...]}`: the ledger's lines, with accuracies."""
    rows = trial_log.trial_rows(trial_keys)
    counts = Counter(row["state"] for row in rows)
    return {"sweep": str(folder), "counts": {state: counts[state] for state in TRIAL_STATES}, "trials": rows}


def check_trials(trials: Iterable[SweepTrial], executor: str) -> None:
    """Everything in the trials' recipes that is a name in a table, looked up, and that this machine has what they ask
    for, unless they run `on` others; one trial of a label stands for all, which differ by the seed.

    Errors: `UserError` with the label.
    """
    for trial in {trial.label: trial for trial in trials}.values():
        recipe = trial.recipe
        try:
            parse_augment(recipe.augment)
            normalization_mean_std(recipe)
            lookup(VIEWS, recipe.tta, "test-time augmentation")
            lookup({"auto": None, **LOADERS}, recipe.loader, "loader")
            trackers.require_trackers(recipe)
            LRSchedule(recipe, 1)
            build_grad_clipper(recipe.clip_grad, [])
            model = model_from_recipe(recipe, cifar.DATASETS[recipe.dataset].num_classes)
            check_image_sizes(model, recipe)
            optimizer = OptimizerWrapper(model, recipe)
            if executor != "ray":
                resolve_cuda_graph(choose_execution(recipe), recipe, optimizer)
        except UserError as error:
            raise type(error)(f"{trial.label}: {error.problem}", error.remedy) from None


def describe_duplicate_recipes(trials: Sequence[SweepTrial]) -> list[str]:
    """A line for rows that have the same recipe: options may have taken away what they differed in."""
    labels: dict[str, dict[str, None]] = defaultdict(dict)
    for trial in trials:
        knobs = trial.recipe.model_dump(mode="json", exclude={"out", "resume", "seed"})
        labels[json.dumps(knobs)][trial.label] = None
    return [f"{' and '.join(same)} have the same recipe here" for same in labels.values() if len(same) > 1]


def count_training_steps(recipe: Recipe) -> int | None:
    """Training steps of a run by `recipe`; None without its data set, which is not downloaded for this, or where the
    data set cannot be cut as the recipe wants it: the run will say so."""
    try:
        images = len(cifar.load_dataset(recipe.data, recipe.dataset, download=False).train.labels)
        steps = (
            recipe.epochs * slice_epoch(images - recipe.val_size, recipe.batch_size, recipe.drop_last).steps_per_epoch
        )
    except UserError:
        return None
    return min(steps, recipe.max_steps or steps)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """The sweep's folder, made if it is not there, for this process alone. Errors: `DiskError`, `UsageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot write the sweep's folder {folder}: {error.strerror}", "give --out DIR") from None
    with lock_folder(folder):
        yield


def _start_sweep(
    folder: Path, spec: SweepSpec, trial_log: TrialLog, trials: list[SweepTrial], retry_failed: bool
) -> list[str]:
    """Writes down what is asked, and says how far the sweep is and whether it is another than before."""
    lines, copy, text = [], folder / SPEC_FILE, spec.to_toml()
    added = sum(trial.key not in trial_log.last_lines for trial in trials)
    apart = trial_log.mark_removed(trial.key for trial in trials)
    if copy.is_file() and copy.read_text("utf-8") != text:
        lines.append(f"the sweep has changed: {added} trials added, {len(apart)} no longer asked for and kept")
    try:
        write_atomically(copy, text.encode())
    except OSError as error:
        raise DiskError(f"cannot write {copy}: {error.strerror}", "give another --out DIR") from None
    trial_log.restore_labels(trials)
    counts = Counter(trial_log.trial_state(trial.key) for trial in trials)
    words = {"waiting": "to begin", "running": "to go on with", "failed": "failed"}
    words["failed"] += ", to try again" if retry_failed else " (--retry-failed tries again)"
    told = [f"{count} {words.get(state, state)}" for state, count in counts.items()]
    return [
        *lines,
        f"{folder}: {spec.study.n if spec.study else len(trials)} trials: {', '.join(told) or 'none yet'}",
    ]


def _log_event(trial_log: TrialLog, folder: Path, event: TrialEvent) -> None:
    """One event into the ledger; of a run on another machine's disk the small files are kept here.

    Errors: `DiskError`.
    """
    run = folder / "runs" / event.trial.key
    try:
        for name, content in event.files.items():
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(run / name, content)
    except OSError as error:
        raise DiskError(f"cannot write {run}: {error.strerror}", "free some space; the same command goes on") from None
    trial_log.log_state(event.trial, event.state, event.reason, event.summary)
