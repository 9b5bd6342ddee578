"""Sweeps: the trials of a file, each an ordinary run in the sweep's folder, until every one is over.

The folder says how far the sweep is: `sweep.toml` what was asked, `trials.jsonl` what came of each trial, `runs/` the
runs. What is over is not run again, what was interrupted goes on, what failed is left with its reason.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fastcifar.data import cifar
from fastcifar.data.augment import parse
from fastcifar.data.batch_slicing import cut
from fastcifar.data.loaders import LOADERS
from fastcifar.device import choose
from fastcifar.errors import DiskError, UsageError, UserError, pick
from fastcifar.recipe import Recipe
from fastcifar.sweep.executors import How, Told, place
from fastcifar.sweep.study import Study
from fastcifar.sweep.sweep_progress import Board
from fastcifar.sweep.sweep_spec import COPY, Asked, Trial, expand, read
from fastcifar.sweep.trial_log import OVER, STATES, Ledger
from fastcifar.training import trackers
from fastcifar.training.build_data import normalisation
from fastcifar.training.checkpoint import write_atomically
from fastcifar.training.evaluate import VIEWS
from fastcifar.training.lr_schedule import Schedule
from fastcifar.training.optimizers import Optimizer, clipper
from fastcifar.training.progress import say
from fastcifar.training.run_dir import hold
from fastcifar.training.trainer import network, require_sizes, settled


def sweep(
    source: str,
    out: Path | None = None,
    on: str = "process",
    how: How | None = None,
    seeds: str | None = None,
    retry_failed: bool = False,
    console: Console | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Runs what is not over of the sweep `source` (a shipped name, a file, a sweep's folder); returns `document`.

    out            the sweep's folder; default: sweeps/NAME, or the folder that `source` is
    on, how        a row of PLACES, and how much of it
    retry_failed   failed trials once more
    flags          knobs above every recipe of the sweep
    Errors: `UserError`s, before anything is written; `Interrupted` and KeyboardInterrupt leave a sweep that goes on.
    """
    asked, folder, trials, study = planned(source, out, on, seeds, flags)
    if study and retry_failed:
        raise UsageError("a [study] does not try a point again", "leave --retry-failed out: it goes on to others")
    say(console, alike(trials))
    run = place(on, how or How())
    with _held(folder):
        ledger = Ledger(folder)
        if study:
            study.open()
            trials = [trial.within(folder) for trial in study.begun()]
        say(console, _begin(folder, asked, ledger, trials, retry_failed))
        total = study.draws.n if study else len(trials)
        over = OVER if retry_failed else (*OVER, "failed")
        unfinished: Iterator[Trial] = (trial for trial in trials if ledger.state(trial.key) not in over)
        if study:
            unfinished = (trial.within(folder) for trial in study.trials())
        wanted = [trial.key for trial in trials]
        with Board(console, ledger, total) as board, closing(run(unfinished)) as events:
            for told in events:
                _note(ledger, folder, told)
                wanted += [] if told.trial.key in wanted else [told.trial.key]
                board.told(told, wanted)
                if study:
                    study.tell(told.trial, told.state, told.summary)
        return document(folder, ledger, wanted)


def planned(
    source: str, out: Path | None, on: str, seeds: str | None, flags: dict[str, Any]
) -> tuple[Asked, Path, list[Trial], Study | None]:
    """What is asked, the sweep's folder, and its trials, all checked; of a study none yet, for it chooses later."""
    asked, name = read(source, seeds, flags)
    folder = out or (Path(source) if Path(source).is_dir() else Path("sweeps") / name)
    if asked.study:
        study = Study(asked, name, folder)
        check(study.corners(), on)
        return asked, folder, [], study
    trials = [trial.within(folder) for trial in expand(asked, name)]
    check(trials, on)
    return asked, folder, trials, None


def plan(
    source: str, out: Path | None = None, on: str = "process", seeds: str | None = None, **flags: Any
) -> dict[str, Any]:
    """What `sweep` would run: `{"sweep", "n", "steps", "trials": [{"trial", "label", "seed", "knobs", "state", ...}]}`.

    `n`: trials. `steps`: training steps still to go, at most; None where the data set is not here, or where a trial
    would fail by it. Of a [study] the trials are the ends of its ranges. Nothing is written.
    """
    _, folder, trials, study = planned(source, out, on, seeds, flags)
    ledger = Ledger(folder)
    listed = [
        {
            "trial": trial.key,
            "label": trial.label,
            "seed": trial.recipe.seed,
            "knobs": trial.knobs,
            "state": ledger.state(trial.key),
            "epochs": trial.recipe.epochs,
            "steps": steps_of(trial.recipe),
        }
        for trial in (study.corners() if study else trials)
    ]
    steps = [row["steps"] for row in listed if row["state"] not in OVER]
    known = None if None in steps else max(steps, default=0) * study.draws.n if study else sum(steps)
    return {"sweep": str(folder), "n": study.draws.n if study else len(trials), "steps": known, "trials": listed}


def document(folder: Path, ledger: Ledger, wanted: Iterable[str]) -> dict[str, Any]:
    """`{"sweep": folder, "counts": {state: trials}, "trials": [...]}`: the ledger's lines, with accuracies."""
    rows = ledger.rows(wanted)
    counts = Counter(row["state"] for row in rows)
    return {"sweep": str(folder), "counts": {state: counts[state] for state in STATES}, "trials": rows}


def check(trials: Iterable[Trial], on: str) -> None:
    """Everything in the trials' recipes that is a name in a table, looked up, and that this machine has what they ask
    for, unless they run `on` others; one trial of a label stands for all, which differ by the seed.

    Errors: `UserError` with the label.
    """
    for trial in {trial.label: trial for trial in trials}.values():
        recipe = trial.recipe
        try:
            parse(recipe.augment)
            normalisation(recipe)
            pick(VIEWS, recipe.tta, "test-time augmentation")
            pick({"auto": None, **LOADERS}, recipe.loader, "loader")
            trackers.require(recipe)
            Schedule(recipe, 1)
            clipper(recipe.clip, [])
            model = network(recipe, cifar.DATASETS[recipe.dataset].classes)
            require_sizes(model, recipe)
            optimizer = Optimizer(model, recipe)
            if on != "ray":
                settled(choose(recipe), recipe, optimizer)
        except UserError as error:
            raise type(error)(f"{trial.label}: {error.problem}", error.remedy) from None


def alike(trials: Sequence[Trial]) -> list[str]:
    """A line for rows that have the same recipe: options may have taken away what they differed in."""
    labels: dict[str, dict[str, None]] = defaultdict(dict)
    for trial in trials:
        knobs = trial.recipe.model_dump(mode="json", exclude={"out", "resume", "seed"})
        labels[json.dumps(knobs)][trial.label] = None
    return [f"{' and '.join(same)} have the same recipe here" for same in labels.values() if len(same) > 1]


def steps_of(recipe: Recipe) -> int | None:
    """Training steps of a run by `recipe`; None without its data set, which is not downloaded for this, or where the
    data set cannot be cut as the recipe wants it: the run will say so."""
    try:
        images = len(cifar.load(recipe.data, recipe.dataset, download=False).train.labels)
        steps = recipe.epochs * cut(images - recipe.val_size, recipe.batch_size, recipe.drop_last).per_epoch
    except UserError:
        return None
    return min(steps, recipe.max_steps or steps)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The sweep's folder, made if it is not there, for this process alone. Errors: `DiskError`, `UsageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot write the sweep's folder {folder}: {error.strerror}", "give --out DIR") from None
    lock = hold(folder)
    try:
        yield
    finally:
        os.close(lock)


def _begin(folder: Path, asked: Asked, ledger: Ledger, trials: list[Trial], retry_failed: bool) -> list[str]:
    """Writes down what is asked, and says how far the sweep is and whether it is another than before."""
    lines, copy, text = [], folder / COPY, asked.to_toml()
    added = sum(trial.key not in ledger.lines for trial in trials)
    apart = ledger.keep_apart(trial.key for trial in trials)
    if copy.is_file() and copy.read_text("utf-8") != text:
        lines.append(f"the sweep has changed: {added} trials added, {len(apart)} no longer asked for and kept")
    try:
        write_atomically(copy, text.encode())
    except OSError as error:
        raise DiskError(f"cannot write {copy}: {error.strerror}", "give another --out DIR") from None
    ledger.take_back(trials)
    counts = Counter(ledger.state(trial.key) for trial in trials)
    words = {"waiting": "to begin", "running": "to go on with", "failed": "failed"}
    words["failed"] += ", to try again" if retry_failed else " (--retry-failed tries again)"
    told = [f"{count} {words.get(state, state)}" for state, count in counts.items()]
    return [
        *lines,
        f"{folder}: {asked.study.n if asked.study else len(trials)} trials: {', '.join(told) or 'none yet'}",
    ]


def _note(ledger: Ledger, folder: Path, told: Told) -> None:
    """One event into the ledger; of a run on another machine's disk the small files are kept here.

    Errors: `DiskError`.
    """
    run = folder / "runs" / told.trial.key
    try:
        for name, content in told.files.items():
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(run / name, content)
    except OSError as error:
        raise DiskError(f"cannot write {run}: {error.strerror}", "free some space; the same command goes on") from None
    ledger.note(told.trial, told.state, told.reason, told.summary)
