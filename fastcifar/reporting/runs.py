"""`fastcifar runs`: the run folders and sweeps below a folder, what state each is in, and removing them.

What is not surely a run's or a sweep's own is never removed, and no link is followed: a folder that one of our files
lies in may be anybody's. Nothing here reads a checkpoint.
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
from fastcifar.recipe import Recipe, load_saved_recipe
from fastcifar.reporting.records import METRICS_FILE, RECIPE_FILE, SUMMARY_FILE, TRIALS_FILE, read_trial_log
from fastcifar.training.metrics_file import parse_finite_float, read_metrics_csv
from fastcifar.training.run_dir import read_environment, read_summary
from fastcifar.training.trackers import MLFLOW_ARTIFACTS, MLFLOW_DATABASE, MLFLOW_RUN_ID_FILE

# What a run, a sweep and a sweep's `runs` consist of, exported files and their cards included. More is not ours.
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
    "sweep": ("sweep.toml", TRIALS_FILE, "study.log*", ".*.tmp"),  # Optuna's journal and its lock
    "runs": (f"{MLFLOW_DATABASE}*", ".*.lock"),  # and what SQLite puts beside it; lock files (see files.py)
}

ListingEntry = dict[str, Any]


def folder_kind(folder: Path) -> str | None:
    """ "sweep", "run" or None, for what is neither, though it may hold a file of the same name."""
    if (folder / TRIALS_FILE).is_file() and ((folder / "sweep.toml").is_file() or (folder / "runs").is_dir()):
        return "sweep"
    begun = (folder / RECIPE_FILE).is_file() and ((folder / "env.json").is_file() or (folder / "checkpoints").is_dir())
    return "run" if begun else None


def find_runs_and_sweeps(folder: Path) -> Iterator[Path]:
    """The runs and sweeps in `folder`, sorted; not those inside of another, and none through a link."""
    try:
        inside = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for path in inside:
        if folder_kind(path):
            yield path
        elif path.name != MLFLOW_ARTIFACTS and not path.name.startswith("."):  # which holds copies of recipes
            yield from find_runs_and_sweeps(path)


def list_runs(folder: Path, sort_by: str = "date", reverse: bool = False) -> list[ListingEntry]:
    """An entry for each run and sweep below `folder`, the smallest `sort` first and what was not measured before it.

    Keys: name, kind, state ("running", "finished", "interrupted", "damaged"), arch, recipe, epochs, val_acc, test_acc,
    seconds, bytes, date; of sweeps also trials, by state. Errors: `UsageError`.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "give the folder of your runs")
    lookup(SORT_COLUMNS, sort_by, "column")
    entries = [
        describe_run_or_sweep(path)
        for path in ([folder] if folder_kind(folder) == "run" else find_runs_and_sweeps(folder))
    ]
    return sorted(entries, key=lambda row: (row[sort_by] is not None, row[sort_by] or 0), reverse=reverse)


def describe_run_or_sweep(folder: Path) -> ListingEntry:
    """What is known of one run or sweep."""
    of = {"run": _describe_run, "sweep": _describe_sweep}[str(folder_kind(folder))]
    return {
        **dict.fromkeys(SORT_COLUMNS),
        "name": str(folder),
        "kind": folder_kind(folder),
        **of(folder),
        "bytes": folder_size_bytes(folder),
    }


def _describe_run(folder: Path) -> ListingEntry:
    summary, environment = read_summary(folder), read_environment(folder)
    rows = read_metrics_csv(folder / "metrics.csv", sys.maxsize)
    last = rows[-1] if rows else {}
    try:
        knobs = load_saved_recipe(folder)
        Recipe.from_saved(knobs)
        state = "interrupted"
    except UsageError:
        knobs, state = {}, "damaged"
    if (folder / SUMMARY_FILE).exists():
        state = state if state == "damaged" else "finished" if summary else "damaged"
    elif is_locked(folder):
        state = "running"
    return {
        "state": state,
        "arch": knobs.get("arch"),
        "recipe": environment.get("recipe"),
        "epochs": int(parse_finite_float(summary.get("epochs")) or len(rows)),
        "val_acc": parse_finite_float(summary.get("val_acc", last.get("val_acc"))),
        "test_acc": parse_finite_float(summary.get("test_acc")),
        "seconds": parse_finite_float(_dict_or_empty(summary, "seconds").get("total", last.get("seconds"))),
        "date": str(environment.get("started") or _modified_at(folder / RECIPE_FILE)),
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


# what entries can be sorted by -> how a table shows it
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
    """The entries as `runs ls` shows them."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("name", "state", "arch, recipe"):
        table.add_column(heading, overflow="fold", min_width=8)
    figures = {"epochs": "epochs", "val_acc": "val", "test_acc": "test", "seconds": "seconds", "bytes": "size"}
    for heading in (*figures.values(), "date"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in entries:
        shown = {name: MISSING if row[name] is None else spell(row[name]) for name, spell in SORT_COLUMNS.items()}
        cells = (shown[name] for name in (*figures, "date"))
        table.add_row(shown["name"], shown["state"], f"{shown['arch']}, {shown['recipe']}", *cells)
    return table


def select_for_removal(
    paths: Sequence[Path], only_unfinished: bool = False, keep_best: int | None = None, only_checkpoints: bool = False
) -> list[ListingEntry]:
    """What `runs rm` would remove of `paths`: all of them; or, of them and of runs in them, only some.

    `unfinished`: runs interrupted or damaged. `keep_best`: finished runs but for so many of the highest val_acc; those
    without one stay, and with either of these sweeps do. `checkpoints`: only folders that have some.
    Errors: `UsageError` for what is no run or sweep, or is running, or holds what is not ours.
    """
    filtered = only_unfinished or keep_best is not None
    folders = [
        found
        for path in paths
        for found in ([path] if folder_kind(path) or not filtered else find_runs_and_sweeps(path))
    ]
    for path in [] if filtered else folders:
        _require_removable(path)
    places = {path.resolve(): path for path in folders}  # each once, and not what goes with another
    entries = [describe_run_or_sweep(path) for place, path in places.items() if not places.keys() & set(place.parents)]
    if filtered:
        runs = [row for row in entries if row["kind"] == "run"]
        ranked = [row for row in runs if row["state"] == "finished" and row["val_acc"] is not None]
        ranked.sort(key=lambda row: -row["val_acc"])
        beaten = ranked[keep_best:] if keep_best is not None else []
        stopped = [row for row in runs if only_unfinished and row["state"] in ("interrupted", "damaged")]
        entries = [row for row in entries if row in beaten or row in stopped]
        for row in entries:
            _require_removable(Path(row["name"]))
    for row in entries:
        if row["state"] == "running":
            raise UsageError(f"{row['name']} is being trained by another process", "stop it first")
    if only_checkpoints:
        entries = [
            {**row, "bytes": sum(map(folder_size_bytes, _checkpoint_folders(Path(row["name"]))))} for row in entries
        ]
    return [row for row in entries if row["bytes"] or not only_checkpoints]


def confirm_removal(entries: Sequence[ListingEntry], only_checkpoints: bool, console: Console) -> None:
    """Asks on a terminal. Errors: `UsageError` off a terminal, or after a no."""
    console.print(runs_table(entries))
    what = "the checkpoints of these" if only_checkpoints else "these"
    if not (sys.stdin.isatty() and console.is_terminal):
        raise UsageError(f"{len(entries)} to remove, and nobody to ask", "give --yes")
    if not Confirm.ask(f"remove {what} {len(entries)}?", console=console, default=False):
        raise UsageError("nothing was removed")


def remove_runs(entries: Sequence[ListingEntry], only_checkpoints: bool = False) -> None:
    """Removes the folders of `entries`, or only their checkpoints, all of them locked first.

    Errors: `UsageError` if one is being trained, before any is removed; `DiskError`.
    """
    folders = [Path(row["name"]) for row in entries]
    inside = {folder: list(find_runs_and_sweeps(folder)) for folder in folders if folder_kind(folder) == "sweep"}
    with ExitStack() as stack:
        locks = {path: stack.enter_context(lock_folder(path)) for path in [*folders, *chain(*inside.values())]}
        for folder in folders:
            _require_removable(folder)
            # a sweep's runs first: the file that locks a run may lie in the sweep's folder, and be in use until then
            for removed in _checkpoint_folders(folder) if only_checkpoints else [*inside.get(folder, []), folder]:
                try:
                    shutil.rmtree(removed)
                except OSError as error:
                    raise DiskError(f"cannot remove {removed}: {error.strerror}") from None
                if removed in locks:
                    locks[removed].release()


def _checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints of a run, or of a sweep's runs."""
    runs = (
        [folder]
        if folder_kind(folder) == "run"
        else [run for run in find_runs_and_sweeps(folder) if folder_kind(run) == "run"]
    )
    found = [run / "checkpoints" for run in runs]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _require_removable(folder: Path) -> None:
    """Errors: `UsageError` if `folder` is not a run or a sweep that holds nothing but its own."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link", "give the folder itself")
    of = folder_kind(folder)
    if of is None:
        raise UsageError(f"{folder} is neither a run nor a sweep", "see `fastcifar runs ls`")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder} is where you are", "go elsewhere first")
    for path in _foreign_paths(folder, of):
        raise UsageError(f"{path} is not of a {of}", "move it away, or remove the folder by hand")


def _foreign_paths(folder: Path, kind: str) -> Iterator[Path]:
    """What in a run or a sweep is not its own; in a run's own folders anything is."""
    for item in os.scandir(folder):
        path = Path(item.path)
        if not item.is_dir(follow_symlinks=False):
            if not any(fnmatchcase(path.name, pattern) for pattern in EXPECTED_FILES[kind]):
                yield path
        elif kind == "runs" and path.name not in EXPECTED_FOLDERS[kind]:
            yield from _foreign_paths(path, "run")
        elif path.name not in EXPECTED_FOLDERS[kind]:
            yield path
        elif path.name == "runs":
            yield from _foreign_paths(path, "runs")


def folder_size_bytes(folder: Path) -> int:
    """Bytes of the files in `folder`, links not followed."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # of a run that replaces its files meanwhile
                continue
    return total


def _modified_at(path: Path) -> str:
    return format_timestamp(path.stat().st_mtime)


def _dict_or_empty(document: ListingEntry, key: str) -> ListingEntry:
    found = document.get(key)
    return found if isinstance(found, dict) else {}
