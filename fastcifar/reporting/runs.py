"""List the run folders and sweeps below a folder, and remove them, unless they contain files of other kinds."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from rich.console import Console
from rich.prompt import Confirm

from fastcifar.errors import UsageError, disk_errors, lookup
from fastcifar.files import is_locked, lock_folder
from fastcifar.format import MISSING, NumericTable, format_count, format_decimal, format_duration, format_timestamp
from fastcifar.reporting.records import (
    METRICS_FILE,
    RECIPE_FILE,
    SUMMARY_FILE,
    TRIALS_FILE,
    find_runs_and_sweeps,
    folder_kind,
    read_run_record,
    read_trial_log,
)
from fastcifar.training.trackers import MLFLOW_ARTIFACTS, MLFLOW_DATABASE, MLFLOW_RUN_ID_FILE, WANDB_RUN_ID_FILE

# The content of a run, of a sweep and of the `runs` folder of a sweep. A folder with any other content is not removed.
RECORD_FILES = (RECIPE_FILE, "env.json", METRICS_FILE, "events.jsonl", SUMMARY_FILE, "error.txt")
EXPORTED_FILES = ("*.onnx", "*.pt2", "*.safetensors", "*.onnx.md", "*.pt2.md", "*.safetensors.md")
EXPECTED_FILES = {
    "run": (*RECORD_FILES, MLFLOW_RUN_ID_FILE, WANDB_RUN_ID_FILE, *EXPORTED_FILES, ".*.tmp"),
    "sweep": ("sweep.toml", TRIALS_FILE, "study.log*", ".*.tmp"),  # the journal of Optuna and its lock file
    "runs": (f"{MLFLOW_DATABASE}*", ".*.lock"),  # includes the auxiliary files of SQLite; lock files (see files.py)
}
EXPECTED_FOLDERS = {
    "run": ("checkpoints", "plots", "tensorboard", "wandb"),
    "sweep": ("runs", "plots"),
    "runs": (MLFLOW_ARTIFACTS,),
}


class ListingEntry(TypedDict):
    """A run or sweep in the document of `runs ls --json`; a value that was not measured is None."""

    name: str
    kind: Literal["run", "sweep"]
    state: Literal["running", "finished", "interrupted", "damaged"]
    arch: str | None
    recipe: str | None
    epochs: int
    val_acc: float | None
    test_acc: float | None
    seconds: float | None
    bytes: int  # size of the files in the folder
    date: str  # start of the run or of the first run of the sweep
    trials: NotRequired[dict[str, int]]  # of a sweep: state -> number of trials


def list_runs(folder: Path, sort_by: str = "date", reverse: bool = False) -> list[ListingEntry]:
    """Return an entry for each run and sweep below `folder`, in ascending order of `sort_by`, missing values first."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "give the folder that contains the runs")
    lookup({name: None for name in ListingEntry.__annotations__ if name != "trials"}, sort_by, "column")
    entries = map(describe_run_or_sweep, _runs_in(folder))

    def key(entry: ListingEntry) -> tuple[bool, Any]:
        value = entry[sort_by]
        return (False, 0) if value is None else (True, value)

    return sorted(entries, key=key, reverse=reverse)


def describe_run_or_sweep(folder: Path) -> ListingEntry:
    """Return the entry of a run or sweep folder."""
    if folder_kind(folder) == "sweep":
        return _describe_sweep(folder)
    record = read_run_record(folder)
    summary = record.summary
    last_row = record.metric_rows[-1] if record.metric_rows else {"val_acc": None, "seconds": None}
    is_running = not (folder / SUMMARY_FILE).exists() and is_locked(folder)
    final_state = "damaged" if record.state == "damaged" else "finished" if summary else "interrupted"
    return {
        "name": str(folder),
        "kind": "run",
        "state": "running" if is_running else final_state,
        "arch": record.options.get("arch"),
        "recipe": record.environment.recipe or None,
        "epochs": summary.epochs if summary else len(record.metric_rows),
        "val_acc": summary.val_acc if summary else last_row["val_acc"],
        "test_acc": summary.test_acc if summary else None,
        "seconds": summary.seconds.get("total") if summary else last_row["seconds"],
        "bytes": folder_size_bytes(folder),
        "date": record.environment.started or format_timestamp((folder / RECIPE_FILE).stat().st_mtime),
    }


def _describe_sweep(folder: Path) -> ListingEntry:
    runs = list(map(describe_run_or_sweep, _runs_in(folder)))
    counts = Counter(trial.state for trial in read_trial_log(folder / TRIALS_FILE)[0].values())
    is_running = is_locked(folder) or any(run["state"] == "running" for run in runs)
    final_state = "damaged" if not counts else "interrupted" if "running" in counts else "finished"
    return {
        "name": str(folder),
        "kind": "sweep",
        "state": "running" if is_running else final_state,
        "arch": ", ".join(sorted({run["arch"] for run in runs if run["arch"]})) or None,
        "recipe": f"sweep, {', '.join(f'{count} {name}' for name, count in counts.items())}",
        "epochs": sum(run["epochs"] for run in runs),
        "val_acc": max((run["val_acc"] for run in runs if run["val_acc"] is not None), default=None),
        "test_acc": None,
        "seconds": sum(run["seconds"] or 0 for run in runs),
        "bytes": folder_size_bytes(folder),
        "date": min((run["date"] for run in runs), default=format_timestamp((folder / TRIALS_FILE).stat().st_mtime)),
        "trials": dict(counts),
    }


def runs_table(entries: Sequence[ListingEntry]) -> NumericTable:
    """Return the table that `runs ls` prints."""
    numbers = ("val %", "test %", "epochs", "time", "MB", "date", "arch", "recipe")
    table = NumericTable(["state"], numbers, num_required=3, path="folder")
    for entry in entries:
        failed = entry.get("trials", {}).get("failed") if entry["state"] == "finished" else None
        table.add_row(
            f"{failed} failed" if failed else entry["state"],
            *(format_decimal(accuracy, 2, 100) for accuracy in (entry["val_acc"], entry["test_acc"])),
            format_count(entry["epochs"]),
            format_duration(entry["seconds"]),
            format_decimal(entry["bytes"], 1, 1e-6),
            entry["date"][:10],
            entry["arch"] or MISSING,
            entry["recipe"] or MISSING,
            entry["name"],
        )
    return table


def select_for_removal(
    paths: Sequence[Path], only_unfinished: bool = False, keep_best: int | None = None, only_checkpoints: bool = False
) -> list[ListingEntry]:
    """Return the entries that `runs rm` removes: all of `paths` or, with a filter, some of the runs in or below them.

    The filter `only_unfinished` selects interrupted and damaged runs; `keep_best` selects finished runs with a val_acc,
    except the `keep_best` highest. Sweeps are never selected by a filter. With `only_checkpoints`, `bytes` counts only
    checkpoints, and entries without checkpoints are left out. Raises `UsageError` if a folder must not be removed.
    """
    is_filtered = only_unfinished or keep_best is not None
    if is_filtered:
        if missing := [path for path in paths if not os.path.isdir(path)]:
            raise UsageError(f"there is no folder {missing[0]}", "see `fastcifar runs ls`")
        paths = [*chain(*([path] if folder_kind(path) else find_runs_and_sweeps(path) for path in paths))]
    else:
        for path in paths:
            _require_removable(path)
    by_path = {path.resolve(): path for path in paths}
    outermost = [folder for path, folder in by_path.items() if not by_path.keys() & {*path.parents}]
    entries = [describe_run_or_sweep(folder) for folder in outermost]
    if is_filtered:
        runs = [entry for entry in entries if entry["kind"] == "run"]
        ranked = [entry for entry in runs if entry["state"] == "finished" and entry["val_acc"] is not None]
        ranked.sort(key=lambda entry: entry["val_acc"] or 0, reverse=True)
        selected = [entry for entry in runs if only_unfinished and entry["state"] in ("interrupted", "damaged")]
        selected += ranked[keep_best:] if keep_best is not None else []
        names = {entry["name"] for entry in selected}
        entries = [entry for entry in runs if entry["name"] in names]
    for entry in entries:
        _require_removable(Path(entry["name"]))
        if entry["state"] == "running":
            raise UsageError(f"{entry['name']} is being trained by another process", "stop that process first")
        if only_checkpoints:
            entry["bytes"] = sum(map(folder_size_bytes, _checkpoint_folders(Path(entry["name"]))))
    return [entry for entry in entries if entry["bytes"] or not only_checkpoints]


def confirm_removal(entries: Sequence[ListingEntry], only_checkpoints: bool, console: Console) -> None:
    """Ask for confirmation. Raises `UsageError` if there is no terminal or the user declines."""
    console.print(runs_table(entries), crop=False)
    what = "the checkpoints of these" if only_checkpoints else "these"
    if not (sys.stdin.isatty() and console.is_terminal):
        raise UsageError("removal needs confirmation, but there is no terminal", "add --yes")
    if not Confirm.ask(f"remove {what} {len(entries)} folders?", console=console, default=False):
        raise UsageError("nothing was removed")


def remove_runs(entries: Sequence[ListingEntry], only_checkpoints: bool = False) -> None:
    """Lock all folders of `entries`, and remove them or only their checkpoints."""
    folders = [Path(entry["name"]) for entry in entries]
    # a sweep folder comes after its runs, because it can contain their lock files
    paths_by_folder = {folder: list(dict.fromkeys([*_runs_in(folder), folder])) for folder in folders}
    with ExitStack() as stack:
        locks = {path: stack.enter_context(lock_folder(path)) for path in chain(*paths_by_folder.values())}
        for folder, paths in paths_by_folder.items():
            _require_removable(folder)
            for path in _checkpoint_folders(folder) if only_checkpoints else paths:
                with disk_errors(f"remove {path}"):
                    shutil.rmtree(path)
                if path in locks:
                    locks[path].release()


def _runs_in(folder: Path) -> Iterable[Path]:
    """Return a run folder itself, and for any other folder the runs and sweeps below it."""
    return [folder] if folder_kind(folder) == "run" else find_runs_and_sweeps(folder)


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, or of the runs of a sweep."""
    checkpoints = [run / "checkpoints" for run in _runs_in(folder) if folder_kind(run) == "run"]
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
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        patterns = (EXPECTED_FOLDERS if is_folder else EXPECTED_FILES)[kind]
        is_expected = any(fnmatchcase(path.name, pattern) for pattern in patterns)
        if is_expected and path.name == "runs":
            yield from _unexpected_paths(path, "runs")
        elif kind == "runs" and is_folder and not is_expected:
            yield from _unexpected_paths(path, "run")
        elif not is_expected:
            yield path


def folder_size_bytes(folder: Path) -> int:
    """Return the total size of the files below `folder` in bytes, without following symbolic links."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # a running training process replaced the file
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
