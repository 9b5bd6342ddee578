"""Tests that the package works without the modules and functions that only POSIX systems have, as on Windows.

A child process removes those that the package uses and trains without them. It cannot remove everything that Windows
lacks, because torch and the standard library need some of it on Linux.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcifar.recipe import Recipe
from fastcifar.training.train import train
from tests.faults.runs import assert_equal_runs, last

PACKAGE = Path(__file__).parents[1] / "fastcifar"
# modules and attributes of modules that exist on POSIX systems only
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
POSIX_ATTRIBUTES = {
    "os": {"O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "fork", "forkpty", "geteuid", "getloadavg", "getpgid",
           "getuid", "killpg", "mkfifo", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "setitimer"},
    "time": {"CLOCK_BOOTTIME", "clock_gettime"},
}  # fmt: skip
# the files that may use them, because they handle their absence
GUARDED_FILES = {
    PACKAGE / name for name in ("files.py", "errors.py", "device.py", "cli/exit.py", "training/compilation.py")
}
# those that the child process removes
HIDDEN_MODULES = ("fcntl", "resource")
HIDDEN_ATTRIBUTES = {
    "os": ("O_DIRECTORY", "sysconf", "sched_getaffinity", "fork"),
    "signal": ("SIGHUP", "SIGKILL"),
    "time": ("CLOCK_BOOTTIME",),
}

HIDE_POSIX = f"""
import os, signal, sys, time

for name in {HIDDEN_MODULES}:
    sys.modules[name] = None  # makes its import raise ImportError
for module, names in {HIDDEN_ATTRIBUTES}.items():
    for name in names:
        delattr(sys.modules[module], name)

def open_files_only(path, *args, open=os.open, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)  # as on Windows
    return open(path, *args, **kwargs)

os.open = open_files_only
"""
TRAIN_AND_RESUME = """
import importlib, pkgutil
from pathlib import Path

import torch

import fastcifar
from fastcifar import device, errors, files
from fastcifar.cli.app import main
from fastcifar.errors import UsageError

torch.set_num_threads(1)
for module in pkgutil.walk_packages(fastcifar.__path__, "fastcifar."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def run_command(*args):
    sys.argv = ["fastcifar", *args]
    try:
        main()
    except SystemExit as error:
        assert error.code == 0, error.code
    sys.stdout.flush()


run = Path("run")
run_command("train", "--recipe", "recipe.toml", "--out", "run", "--max-steps", "7")
run_command("train", "--resume", "run")
with files.lock_folder(run):
    assert files.is_locked(run)
    try:
        run_command("train", "--resume", "run", "--epochs", "3")
    except AssertionError as error:
        assert error.args == (UsageError.exit_code,)
    else:
        raise AssertionError("the lock was ignored")
assert not files.is_locked(run)


assert device.usable_cpu_count() == os.cpu_count()
assert device.process_times() is None
assert str(errors.as_memory_error(MemoryError())).startswith("out of memory; ")
assert importlib.import_module("fastcifar.benchmark.bench").cpu_seconds() > 0

run_command("runs", "ls", ".", "--json")
"""


@pytest.mark.slow
def test_a_run_without_posix_equals_a_run_with_it(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    child = tmp_path / "child"
    child.mkdir()
    (child / "recipe.toml").write_text(tiny(out=None).to_toml())
    command = [sys.executable, "-c", HIDE_POSIX + TRAIN_AND_RESUME]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.run(
        command, cwd=child, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (row,) = json.loads(process.stdout.splitlines()[-1])
    assert (row["name"], row["state"], row["epochs"]) == ("run", "finished", 2)
    assert sorted(path.name for path in child.iterdir()) == ["recipe.toml", "run"]

    train(tiny(), "recipe.toml")
    assert last(child / "run")["step"] == 10
    assert_equal_runs(child / "run", tmp_path / "run")
    peak_memory_bytes = [
        json.loads((folder / "run" / "summary.json").read_text())["peak_memory_bytes"] for folder in (child, tmp_path)
    ]
    assert peak_memory_bytes[0] is None
    assert peak_memory_bytes[1] > 0


def posix_names(path: Path) -> set[str]:
    """Return the names in a source file that exist on POSIX systems only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names} & POSIX_MODULES
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names} & POSIX_ATTRIBUTES.get(str(node.module), set())
            names |= {str(node.module)} & POSIX_MODULES
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names |= {node.attr} & POSIX_ATTRIBUTES.get(node.value.id, set())
    return names


@pytest.mark.medium
def test_posix_names_are_used_only_in_guarded_files() -> None:
    assert {path for path in PACKAGE.rglob("*.py") if posix_names(path)} == GUARDED_FILES


@pytest.mark.slow
def test_sweep_trials_run_in_spawned_processes_without_fork(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    from fastcifar.sweep.executors import ExecutorOptions, multiprocess_executor
    from fastcifar.sweep.sweep_spec import SweepTrial

    methods: list[str] = []
    get_context = multiprocessing.get_context

    def recording_get_context(method: str) -> Any:
        methods.append(method)
        return get_context(method)

    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(multiprocessing, "get_context", recording_get_context)
    trial = SweepTrial(key="a", label="label", options={}, recipe_name="recipe", recipe=tiny(epochs=1))
    events = list(multiprocess_executor(ExecutorOptions(jobs=1))(iter([trial])))
    assert [event.state for event in events] == ["running", "done"], events[-1].reason
    assert methods == ["spawn"]
