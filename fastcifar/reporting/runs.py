"""`fastcifar runs`: list the run folders and sweeps below a folder with their states, and remove them.

A folder that contains any file that is not part of a run or sweep is never removed, and symbolic links are not
followed. Checkpoints are not read.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from fastcifar.errors import DiskError, UsageError, lookup
from fastcifar.files import is_locked, lock_folder
from fastcifar.format import MISSING, format_count, format_decimal, format_percent, format_timestamp
from fastcifar.recipe import Recipe
from fastcifar.recipes import load_saved_recipe
from fastcifar.reporting.records import METRICS_FILE, RECIPE_FILE, SUMMARY_FILE, TRIALS_FILE, read_trial_log
from fastcifar.training.metrics_file import read_metrics
from fastcifar.training.run_dir import read_environment
from fastcifar.training.summary import read_summary
from fastcifar.training.trackers import MLFLOW_ARTIFACTS, MLFLOW_DATABASE, MLFLOW_RUN_ID_FILE

# The expected contents of a run folder, a sweep folder and the `runs` folder of a sweep, including exported models and
# their model cards. A folder with any other content is not removed.
EXPECTED_FOLDERS = {
    "run": {"checkpoints", "plots", "tensorboard"},
    "sweep": {"runs", "plots"},
    "runs": {MLFLOW_ARTIFACTS},
}
EXPORTED_PATTERNS = ("*.onnx", "*.pt2", "*.safetensors", "*.onnx.md", "*.pt2.md", "*.safetensors.md")
EXPECTED_FILES = {
    "run": (
        RECIPE_FILE,
        "env.json",
        METRICS_FILE,
        "events.jsonl",
        SUMMARY_FILE,
        MLFLOW_RUN_ID_FILE,
        "error.txt",
        ".*.tmp",
        *EXPORTED_PATTERNS,
    ),
    "sweep": ("sweep.toml", TRIALS_FILE, "study.log*", ".*.tmp"),  # the journal of Optuna and its lock file
    "runs": (f"{MLFLOW_DATABASE}*", ".*.lock"),  # includes the auxiliary files of SQLite; lock files (see files.py)
}

ListingEntry = dict[str, Any]


def folder_kind(folder: Path) -> str | None:
    """Return "sweep" or "run", or None for any other folder, even if it contains a file such as recipe.toml."""
    if (folder / TRIALS_FILE).is_file() and ((folder / "sweep.toml").is_file() or (folder / "runs").is_dir()):
        return "sweep"
    is_run = (folder / RECIPE_FILE).is_file() and ((folder / "env.json").is_file() or (folder / "checkpoints").is_dir())
    return "run" if is_run else None


def find_runs_and_sweeps(folder: Path) -> Iterator[Path]:
    """Yield the runs and sweeps below `folder`, sorted by path.

    Runs and sweeps inside another run or sweep are not included, and symbolic links are not followed.
    """
    try:
        subfolders = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for path in subfolders:
        if folder_kind(path):
            yield path
        elif path.name != MLFLOW_ARTIFACTS and not path.name.startswith("."):  # MLflow keeps copies of recipes
            yield from find_runs_and_sweeps(path)


def list_runs(folder: Path, sort_by: str = "date", reverse: bool = False) -> list[ListingEntry]:
    """Return an entry for each run and sweep below `folder`, in ascending order of `sort_by`, missing values first.

    Keys: name, kind, state ("running", "finished", "interrupted", "damaged"), arch, recipe, epochs, val_acc, test_acc,
    seconds, bytes, date; for sweeps also trials, the number of trials in each state. Raises `UsageError` if the folder
    does not exist or `sort_by` is not in `SORT_COLUMNS`.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "give the folder that contains the runs")
    lookup(SORT_COLUMNS, sort_by, "column")
    entries = [
        describe_run_or_sweep(path)
        for path in ([folder] if folder_kind(folder) == "run" else find_runs_and_sweeps(folder))
    ]
    return sorted(entries, key=lambda entry: (entry[sort_by] is not None, entry[sort_by] or 0), reverse=reverse)


def describe_run_or_sweep(folder: Path) -> ListingEntry:
    """Return the entry of a run or sweep folder, with the keys of `list_runs`."""
    kind = folder_kind(folder)
    return {
        **dict.fromkeys(SORT_COLUMNS),
        "name": str(folder),
        "kind": kind,
        **(_describe_sweep(folder) if kind == "sweep" else _describe_run(folder)),
        "bytes": folder_size_bytes(folder),
    }


def _describe_run(folder: Path) -> ListingEntry:
    summary, environment = read_summary(folder), read_environment(folder)
    rows = read_metrics(folder / "metrics.csv")
    last = rows[-1] if rows else {}
    try:
        options = load_saved_recipe(folder)
        Recipe.from_saved(options)
        state = "interrupted"
    except UsageError:
        options, state = {}, "damaged"
    if (folder / SUMMARY_FILE).exists():
        state = state if state == "damaged" else "finished" if summary else "damaged"
    elif is_locked(folder):
        state = "running"
    return {
        "state": state,
        "arch": options.get("arch"),
        "recipe": environment.recipe or None,
        "epochs": summary.epochs if summary else len(rows),
        "val_acc": summary.val_acc if summary else last.get("val_acc"),
        "test_acc": summary.test_acc if summary else None,
        "seconds": summary.seconds.get("total") if summary else last.get("seconds"),
        "date": environment.started or _modified_at(folder / RECIPE_FILE),
    }


def _describe_sweep(folder: Path) -> ListingEntry:
    runs = [describe_run_or_sweep(path) for path in find_runs_and_sweeps(folder)]
    counts = Counter(trial.state for trial in read_trial_log(folder / TRIALS_FILE)[0].values())
    if is_locked(folder) or any(run["state"] == "running" for run in runs):
        state = "running"
    elif not counts:
        state = "damaged"
    else:
        state = "interrupted" if "running" in counts else "finished"
    return {
        "state": state,
        "arch": ", ".join(sorted({run["arch"] for run in runs if run["arch"]})) or None,
        "recipe": f"sweep, {', '.join(f'{count} {name}' for name, count in counts.items())}",
        "epochs": sum(run["epochs"] for run in runs),
        "val_acc": max((run["val_acc"] for run in runs if run["val_acc"] is not None), default=None),
        "seconds": sum(run["seconds"] or 0 for run in runs),
        "date": min((run["date"] for run in runs), default=_modified_at(folder / TRIALS_FILE)),
        "trials": dict(counts),
    }


# columns that entries can be sorted by -> how a table formats their values
SORT_COLUMNS: dict[str, Callable[[Any], str]] = {
    "name": str,
    "kind": str,
    "state": str,
    "arch": str,
    "recipe": str,
    "epochs": format_count,
    "val_acc": format_percent,
    "test_acc": format_percent,
    "seconds": lambda seconds: format_decimal(seconds, 0),
    "bytes": lambda num_bytes: f"{format_decimal(num_bytes / 1e6, 1)} MB",
    "date": lambda started: started[:10],
}


def runs_table(entries: Sequence[ListingEntry]) -> Table:
    """Return the table that `runs ls` prints."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("name", "state", "arch, recipe"):
        table.add_column(heading, overflow="fold", min_width=8)
    numeric_columns = {"epochs": "epochs", "val_acc": "val", "test_acc": "test", "seconds": "seconds", "bytes": "size"}
    for heading in (*numeric_columns.values(), "date"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        texts = {
            name: MISSING if entry[name] is None else format_value(entry[name])
            for name, format_value in SORT_COLUMNS.items()
        }
        cells = (texts[name] for name in (*numeric_columns, "date"))
        table.add_row(texts["name"], texts["state"], f"{texts['arch']}, {texts['recipe']}", *cells)
    return table


def select_for_removal(
    paths: Sequence[Path], only_unfinished: bool = False, keep_best: int | None = None, only_checkpoints: bool = False
) -> list[ListingEntry]:
    """Return the entries that `runs rm` removes: all of `paths` or, with a filter, some of the runs in or below them.

    only_unfinished   a filter that selects interrupted and damaged runs
    keep_best         a filter that selects all finished runs but this many with the highest val_acc; a run without
                      val_acc is not selected
    only_checkpoints  leaves out entries without checkpoints; `bytes` counts only the checkpoints

    A filter never selects a sweep. Raises `UsageError` if a path is not a run or sweep, a selected run is training, or
    a selected folder contains files that are not part of a run or sweep.
    """
    is_filtered = only_unfinished or keep_best is not None
    folders = [
        folder
        for path in paths
        for folder in ([path] if folder_kind(path) or not is_filtered else find_runs_and_sweeps(path))
    ]
    if not is_filtered:
        for folder in folders:
            _require_removable(folder)
    # each folder once, without folders inside another one of the list
    by_path = {folder.resolve(): folder for folder in folders}
    entries = [
        describe_run_or_sweep(folder) for path, folder in by_path.items() if not by_path.keys() & {*path.parents}
    ]
    if is_filtered:
        entries = _filter_entries(entries, only_unfinished, keep_best)
        for entry in entries:
            _require_removable(Path(entry["name"]))
    for entry in entries:
        if entry["state"] == "running":
            raise UsageError(f"{entry['name']} is being trained by another process", "stop that process first")
    if not only_checkpoints:
        return entries
    sizes = [sum(map(folder_size_bytes, _checkpoint_folders(Path(entry["name"])))) for entry in entries]
    return [{**entry, "bytes": size} for entry, size in zip(entries, sizes, strict=True) if size]


def _filter_entries(
    entries: Sequence[ListingEntry], only_unfinished: bool, keep_best: int | None
) -> list[ListingEntry]:
    """Return the runs among `entries` that the filters of `select_for_removal` select."""
    runs = [entry for entry in entries if entry["kind"] == "run"]
    selected = [entry for entry in runs if only_unfinished and entry["state"] in ("interrupted", "damaged")]
    if keep_best is not None:
        ranked = [entry for entry in runs if entry["state"] == "finished" and entry["val_acc"] is not None]
        selected += sorted(ranked, key=lambda entry: -entry["val_acc"])[keep_best:]
    return [entry for entry in entries if entry in selected]


def confirm_removal(entries: Sequence[ListingEntry], only_checkpoints: bool, console: Console) -> None:
    """Ask for confirmation on the terminal. Raises `UsageError` if there is no terminal or the user declines."""
    console.print(runs_table(entries))
    what = "the checkpoints of these" if only_checkpoints else "these"
    if not (sys.stdin.isatty() and console.is_terminal):
        raise UsageError("removal needs confirmation, but there is no terminal", "add --yes")
    if not Confirm.ask(f"remove {what} {len(entries)} folders?", console=console, default=False):
        raise UsageError("nothing was removed")


def remove_runs(entries: Sequence[ListingEntry], only_checkpoints: bool = False) -> None:
    """Remove the folders of `entries`, or only their checkpoints, after locking all of them.

    Raises `UsageError` if one is being trained, before any is removed, and `DiskError` if a folder cannot be removed.
    """
    folders = [Path(entry["name"]) for entry in entries]
    runs_of_sweep = {folder: list(find_runs_and_sweeps(folder)) for folder in folders if folder_kind(folder) == "sweep"}
    with ExitStack() as stack:
        locks = {path: stack.enter_context(lock_folder(path)) for path in [*folders, *chain(*runs_of_sweep.values())]}
        for folder in folders:
            _require_removable(folder)
            # the runs of a sweep first: their lock files can be in the sweep folder and are in use until then
            for path in _checkpoint_folders(folder) if only_checkpoints else [*runs_of_sweep.get(folder, []), folder]:
                try:
                    shutil.rmtree(path)
                except OSError as error:
                    raise DiskError(f"cannot remove {path}: {error.strerror}") from None
                if path in locks:
                    locks[path].release()


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, or of the runs of a sweep."""
    folders = [folder] if folder_kind(folder) == "run" else find_runs_and_sweeps(folder)
    checkpoints = [run / "checkpoints" for run in folders if folder_kind(run) == "run"]
    return [path for path in checkpoints if path.is_dir() and not path.is_symlink()]


def _require_removable(folder: Path) -> None:
    """Raise `UsageError` unless `folder` is a run or sweep that contains only the expected files and folders."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link", "give the folder itself")
    kind = folder_kind(folder)
    if kind is None:
        raise UsageError(f"{folder} is neither a run nor a sweep", "see `fastcifar runs ls`")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder} contains the current working directory", "change to another directory first")
    unexpected = next(_unexpected_paths(folder, kind), None)
    if unexpected:
        raise UsageError(f"{unexpected} is not part of a {kind}", "move it away, or remove the folder manually")


def _unexpected_paths(folder: Path, kind: str) -> Iterator[Path]:
    """Yield the paths in a run or sweep that are not part of it; the expected folders of a run may contain anything."""
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if not entry.is_dir(follow_symlinks=False):
            if not any(fnmatchcase(path.name, pattern) for pattern in EXPECTED_FILES[kind]):
                yield path
        elif kind == "runs" and path.name not in EXPECTED_FOLDERS[kind]:
            yield from _unexpected_paths(path, "run")
        elif path.name not in EXPECTED_FOLDERS[kind]:
            yield path
        elif path.name == "runs":
            yield from _unexpected_paths(path, "runs")


def folder_size_bytes(folder: Path) -> int:
    """Return the total size of the files below `folder` in bytes, without following symbolic links."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # a running training process replaced the file
                continue
    return total


def _modified_at(path: Path) -> str:
    return format_timestamp(path.stat().st_mtime)
