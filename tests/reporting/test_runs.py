"""Listing of run folders and sweeps with their states, and their removal."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastcifar.errors import UsageError
from fastcifar.evaluation.export import EXPORT_FORMATS
from fastcifar.files import lock_folder
from fastcifar.recipe import Recipe
from fastcifar.reporting.runs import folder_size_bytes, list_runs, remove_runs, runs_table, select_for_removal
from fastcifar.training.train import train
from tests.faults.children import run_fastcifar
from tests.reporting.run_folders import write_run, write_trials

STARTED = "2026-11-0{}T10:00:00Z"


def make_run(
    folder: Path, rows: int = 2, val_acc: float = 0.5, done: bool = True, day: int = 1, **options: Any
) -> Path:
    """Write a run folder with a checkpoint; without `done` it has no summary, as if interrupted."""
    environment = {"started": STARTED.format(day)}
    write_run(folder, [val_acc] * rows, val_acc - 0.01, finished=done, epochs=3, environment=environment, **options)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.pt").write_bytes(b"x" * 1000)
    return folder


def make_sweep(folder: Path, **states: str) -> Path:
    folder.mkdir()
    (folder / "sweep.toml").write_text("")
    trials = [{"trial": name, "label": "x", "state": state} for name, state in states.items()]
    write_trials(folder, [*({**trial, "state": "running"} for trial in trials), *trials])
    for name, state in states.items():
        make_run(folder / "runs" / name, done=state == "done")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with finished runs at different depths, an interrupted and a damaged run, a sweep, and other files."""
    folder = tmp_path / "runs"
    make_run(folder / "good", val_acc=0.9, day=3)
    make_run(folder / "2026" / "fair", val_acc=0.7, day=1, arch="se55")
    make_run(folder / "stopped", rows=1, val_acc=0.3, done=False, day=2)
    (make_run(folder / "corrupt", day=4) / "summary.json").write_text('{"epochs": 2, "val_a')
    make_sweep(folder / "ablation", a="done", b="failed")
    (folder / "holiday").mkdir()
    (folder / "holiday" / "photo.jpg").write_bytes(b"photo")
    return folder


@pytest.fixture
def training() -> Iterator[Callable[[Path], None]]:
    """Hold the lock of a run folder, as training does."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(lock_folder(folder)) and None


def states(folder: Path) -> dict[str, str]:
    return {Path(entry["name"]).name: entry["state"] for entry in list_runs(folder)}


def test_runs_and_sweeps_are_listed_at_any_depth_with_states(
    runs: Path, training: Callable[[Path], None], tmp_path: Path
) -> None:
    (runs / "link").symlink_to(make_run(tmp_path / "outside"))
    finished = dict.fromkeys(("good", "fair", "ablation"), "finished")
    assert states(runs) == {**finished, "stopped": "interrupted", "corrupt": "damaged"}
    training(runs / "stopped")
    assert states(runs)["stopped"] == "running"
    assert states(runs / "ablation") == {"a": "finished", "b": "interrupted"}
    assert states(runs / "good") == {"good": "finished"}
    training(runs / "good")  # listing leaves no lock


def test_entries_describe_the_folders(runs: Path) -> None:
    by_name = {Path(entry["name"]).name: entry for entry in list_runs(runs)}
    good = by_name["good"]
    assert (good["arch"], good["recipe"], good["epochs"], good["seconds"]) == ("se68", "baseline", 2, 60)
    assert (good["val_acc"], good["test_acc"], good["date"]) == (0.9, 0.89, STARTED.format(3))
    assert good["bytes"] == sum(path.stat().st_size for path in (runs / "good").rglob("*") if path.is_file())
    stopped = by_name["stopped"]
    assert (stopped["epochs"], stopped["val_acc"], stopped["test_acc"], stopped["seconds"]) == (1, 0.3, None, 1)
    sweep = by_name["ablation"]
    assert (sweep["kind"], sweep.get("trials"), sweep["val_acc"]) == ("sweep", {"done": 1, "failed": 1}, 0.5)


@pytest.mark.parametrize(("width", "columns"), [(80, ["state", "val %", "test %", "epochs"]), (300, ["recipe"])])
def test_table_shows_whole_paths(runs: Path, width: int, columns: list[str]) -> None:
    """A path that is longer than the line is not wrapped, so that it can be copied."""
    make_run(runs / f"{'long' * 30}", arch="se55")
    console = Console(width=width, file=io.StringIO())
    console.print(runs_table(list_runs(runs)), crop=False)
    heading, *lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(name in heading for name in columns)
    assert {line.split()[-1] for line in lines[:6]} == {entry["name"] for entry in list_runs(runs)}
    states = {re.split(" {2,}", line)[0] for line in lines[:6]}
    assert states == {"finished", "1 failed", "interrupted", "damaged"}
    assert (lines[6:] == []) == (width == 300)


def test_entries_are_sorted_by_any_column(runs: Path) -> None:
    def names(*arguments: Any) -> list[str]:
        return [Path(entry["name"]).name for entry in list_runs(runs, *arguments)]

    assert [name for name in names("date") if name != "ablation"] == ["fair", "stopped", "good", "corrupt"]
    assert names("val_acc")[-2:] == names("val_acc", True)[1::-1] == ["fair", "good"]
    assert set(names("test_acc")[:3]) == {"stopped", "ablation", "corrupt"}  # entries without the value come first
    for folder, column, message in ((runs, "val_ac", "did you mean 'val_acc'"), (runs / "no", "date", "is no folder")):
        with pytest.raises(UsageError, match=message):
            list_runs(folder, column)


def test_only_the_selected_folders_are_removed(runs: Path) -> None:
    expected = [f"good/se68{spec.suffix}" for spec in EXPORT_FORMATS.values()]
    expected += [*(f"{name}.md" for name in expected), "good/error.txt", "good/.recipe.toml.x.tmp", "good/mlflow.json"]
    expected += ["good/wandb.json", "good/wandb/offline-run-1-a/run-a.wandb"]
    for name in (*expected, "ablation/study.log", "ablation/study.log.lock", "ablation/runs/mlflow.db-journal"):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text("content")
    selected = ("good", "ablation", "ablation/runs/a", "2026/../good")
    remove_runs(select_for_removal([runs / name for name in selected]))
    assert not (runs / "good").exists()
    assert not (runs / "ablation").exists()
    assert states(runs).keys() == {"fair", "stopped", "corrupt"}
    assert (runs / "holiday" / "photo.jpg").read_bytes() == b"photo"


@pytest.mark.parametrize(
    "name", ["holiday", "2026", "good/checkpoints", "nowhere", "link", "", "recipe_only", "trials_only"]
)
def test_other_folders_are_not_removed(runs: Path, tmp_path: Path, name: str) -> None:
    for folder, file in (("recipe_only", "recipe.toml"), ("trials_only", "trials.jsonl")):
        (runs / folder).mkdir()
        (runs / folder / file).write_text("lr = 0.1\n")
    (runs / "link").symlink_to(make_run(tmp_path / "outside"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError):
        remove_runs(select_for_removal([runs / "good", runs / name]))
    assert sorted(tmp_path.rglob("*")) == before


UNEXPECTED = ("thesis.docx", "src/main.py", ".git/config", "other/recipe.toml", "notes", "notes.md", "a.csv", "b.toml")


@pytest.mark.parametrize(
    ("parent", "name"), [*itertools.product(("good", "ablation/runs/a"), UNEXPECTED), ("ablation/runs", "notes.md")]
)
def test_folders_with_unexpected_files_are_not_removed(runs: Path, parent: str, name: str) -> None:
    file = runs / parent / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("content")
    with pytest.raises(UsageError, match=f"{parent}/{name.partition('/')[0]} is not part of a"):
        remove_runs(select_for_removal([runs / parent.partition("/")[0]]))
    assert file.read_text() == "content"


def test_running_runs_and_their_sweeps_are_not_removed(runs: Path, training: Callable[[Path], None]) -> None:
    training(runs / "stopped")
    training(runs / "ablation" / "runs" / "b")
    entries = select_for_removal([runs / "good"])
    for path in (runs / "stopped", runs / "ablation"):
        with pytest.raises(UsageError, match="being trained"):
            select_for_removal([runs / "good", path])
    entries.append({**entries[0], "name": str(runs / "stopped")})  # training started after the selection
    with pytest.raises(UsageError, match="being trained"):
        remove_runs(entries)
    assert states(runs).keys() == {"good", "fair", "stopped", "corrupt", "ablation"}


def test_filters_select_runs_inside_folders(runs: Path, training: Callable[[Path], None]) -> None:
    make_run(runs / "best", val_acc=0.95)
    training(make_run(runs / "busy", done=False))
    half = make_sweep(runs / "half", c="done", d="running")

    def names(folder: Path = runs, **filters: Any) -> set[str]:
        return {Path(entry["name"]).name for entry in select_for_removal([folder], **filters)}

    assert states(runs)["half"] == "interrupted"
    assert names(half, only_unfinished=True) == set()  # the sweep also has a finished run
    assert names(half / "runs", only_unfinished=True) == {"d"}
    assert names(only_unfinished=True) == {"stopped", "corrupt"}
    assert names(keep_best=1) == {"good", "fair"}
    assert names(keep_best=1, only_unfinished=True) == {"good", "fair", "stopped", "corrupt"}
    (runs / "good" / "notes.md").write_text("content")  # prevents the removal of this run only
    assert names(only_unfinished=True) == {"stopped", "corrupt"}
    with pytest.raises(UsageError, match=r"notes\.md is not part of a run"):
        names(keep_best=1)
    with pytest.raises(UsageError, match=r"there is no folder .*missing"):
        names(runs / "missing", only_unfinished=True)


def test_only_checkpoints_are_removed(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (runs / "good" / "checkpoints").rename(kept)
    (runs / "good" / "checkpoints").symlink_to(kept)
    with pytest.raises(UsageError, match="checkpoints"):  # symbolic links are not expected in a run
        select_for_removal([runs / "good"], only_checkpoints=True)
    entries = select_for_removal([runs / "stopped", runs / "ablation"], only_checkpoints=True)
    assert [entry["bytes"] for entry in entries] == [1000, 2000]
    remove_runs(entries, only_checkpoints=True)
    assert not list(runs.rglob("ablation/**/last.pt"))
    assert states(runs)["stopped"] == "interrupted"
    assert (kept / "last.pt").is_file()
    assert not select_for_removal([runs / "stopped"], only_checkpoints=True)


@pytest.mark.medium
def test_runs_commands_on_a_trained_run(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    summary = train(tiny(out=str(tmp_path / "runs" / "real")), "quick")

    fastcifar = partial(run_fastcifar, "runs", cwd=tmp_path)
    (entry,) = json.loads(fastcifar("ls", "--json").stdout)
    assert (entry["name"], entry["state"], entry["recipe"]) == ("runs/real", "finished", "quick")
    assert (entry["test_acc"], entry["bytes"]) == (summary.test_acc, folder_size_bytes(tmp_path / "runs" / "real"))
    refused = fastcifar("rm", "runs/real")
    assert refused.returncode == 2
    assert refused.stderr == "fastcifar: removal needs confirmation, but there is no terminal; add --yes\n"
    assert (tmp_path / "runs" / "real").is_dir()
    removed = fastcifar("rm", "runs/real", "--yes", "--json")
    assert removed.returncode == 0, removed.stderr
    assert [entry["name"] for entry in json.loads(removed.stdout)] == ["runs/real"]
    assert not (tmp_path / "runs" / "real").exists()
