"""The package works on systems without POSIX: a child process trains after names that only POSIX has are removed.

Not everything that Windows lacks can be removed, but all such names that the package uses are.
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
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
ATTRIBUTES = {
    "os": {"O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "fork", "forkpty", "geteuid", "getloadavg", "getpgid",
           "getuid", "killpg", "mkfifo", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "setitimer"},
    "time": {"CLOCK_BOOTTIME", "clock_gettime"},
}  # fmt: skip
# files that may use these names, because they handle their absence
GUARDED_FILES = {PACKAGE / "files.py", PACKAGE / "device.py", PACKAGE / "reporting" / "ui.py"}
# the names that the package uses; torch and the standard library need some of the others on Linux
HIDDEN_MODULES = ("fcntl", "resource")
HIDDEN_ATTRIBUTES = {
    "os": ("O_DIRECTORY", "sysconf", "killpg", "sched_getaffinity", "fork", "statvfs"),
    "signal": ("SIGHUP", "SIGKILL"),
    "time": ("CLOCK_BOOTTIME",),
}

HIDE = f"""
import os, signal, sys, time

for name in {HIDDEN_MODULES}:
    sys.modules[name] = None  # importing it raises ImportError
for module, names in {HIDDEN_ATTRIBUTES}.items():
    for name in names:
        delattr(sys.modules[module], name)

def open_files_only(path, *arguments, open=os.open, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)  # as on Windows
    return open(path, *arguments, **options)

os.open = open_files_only
"""
TRAIN = """
import importlib, pkgutil, subprocess
from pathlib import Path

import torch

import fastcifar
from fastcifar import device, files
from fastcifar.cli.app import main
from fastcifar.errors import UsageError

torch.set_num_threads(1)
for module in pkgutil.walk_packages(fastcifar.__path__, "fastcifar."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def fastcifar(*arguments):
    sys.argv = ["fastcifar", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, end.code
    sys.stdout.flush()


run = Path("run")
fastcifar("train", "--recipe", "recipe.toml", "--out", "run", "--max-steps", "7")
fastcifar("train", "--resume", "run")
with files.lock_folder(run):
    assert files.is_locked(run)
    try:
        fastcifar("train", "--resume", "run", "--epochs", "3")
    except AssertionError as error:
        assert error.args == (UsageError.exit_code,)
    else:
        raise AssertionError("the lock was ignored")
assert not files.is_locked(run)

assert files.free_disk_bytes(run) is None
assert device.usable_cpu_count() == os.cpu_count()
assert device.available_memory_bytes() is device.process_times() is None
assert "out of memory" in str(device.as_memory_error(MemoryError()))
assert importlib.import_module("fastcifar.benchmark.bench").cpu_seconds() > 0
assert importlib.import_module("fastcifar.benchmark.speedrun").process_uptime_s() is None
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # not the pipes of this process
server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **quiet)
importlib.import_module("fastcifar.reporting.ui")._stop_server(server)
assert server.returncode is not None

fastcifar("runs", "ls", ".", "--json")
"""


def test_a_run_without_posix_is_identical(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    child = tmp_path / "child"
    child.mkdir()
    (child / "recipe.toml").write_text(tiny(out=None).to_toml())
    command = [sys.executable, "-c", HIDE + TRAIN]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.run(
        command, cwd=child, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (entry,) = json.loads(process.stdout.splitlines()[-1])
    assert (entry["name"], entry["state"], entry["epochs"]) == ("run", "finished", 2)
    assert sorted(path.name for path in child.iterdir()) == ["recipe.toml", "run"]

    train(tiny(), "recipe.toml")
    assert last(child / "run")["step"] == 10
    assert_equal_runs(child / "run", tmp_path / "run")
    peaks = [
        json.loads((folder / "run" / "summary.json").read_text())["peak_memory_bytes"] for folder in (child, tmp_path)
    ]
    assert peaks[0] is None
    assert peaks[1] > 0


def posix_names(path: Path) -> set[str]:
    """Return the names in a source file that only POSIX systems have."""
    names_used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names_used |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            names_used |= {alias.name for alias in node.names} & ATTRIBUTES.get(str(node.module), set())
            names_used |= {str(node.module)} & MODULES
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names_used |= {node.attr} & ATTRIBUTES.get(node.value.id, set())
    return names_used


def test_posix_names_are_used_only_in_guarded_files() -> None:
    assert {path for path in PACKAGE.rglob("*.py") if posix_names(path)} == GUARDED_FILES


def test_trials_run_in_separate_processes_without_fork(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    from fastcifar.sweep.executors import ExecutorOptions, multiprocess_executor
    from fastcifar.sweep.sweep_spec import SweepTrial

    methods: list[str] = []
    get_context = multiprocessing.get_context

    def record(method: str) -> Any:
        methods.append(method)
        return get_context(method)

    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(multiprocessing, "get_context", record)
    trial = SweepTrial(key="a", label="label", options={}, recipe_name="recipe", recipe=tiny(epochs=1))
    events = list(multiprocess_executor(ExecutorOptions(jobs=1))(iter([trial])))
    assert [event.state for event in events] == ["running", "process"], events[-1].reason
    assert methods == ["spawn"]
