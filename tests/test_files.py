"""Folder locks exclude other processes with either method, and damaged files are detected."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastcifar import files
from fastcifar.errors import DiskError, UsageError

LOCK_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from fastcifar import files
if sys.argv[2] == "lock file":
    files.fcntl = None
lock = files.lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["flock", "lock file"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method by which `files` locks a folder during the test."""
    if request.param == "lock file":
        monkeypatch.setattr(files, "fcntl", None)
    return request.param


@pytest.fixture
def other_process(method: str) -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Start a process that holds the lock on a folder until its standard input is closed."""
    processes = []

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", LOCK_IN_ANOTHER_PROCESS, str(folder), method]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in processes:
        process.communicate()


def test_fault23_only_one_process_locks_a_folder(
    tmp_path: Path, other_process: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert not files.is_locked(folder)
    process = other_process(folder)
    assert files.is_locked(folder)
    with pytest.raises(UsageError, match="run is being trained by another process; wait for it"):
        files.lock_folder(folder)
    process.kill()  # which releases the lock
    process.wait()
    assert not files.is_locked(folder)
    with files.lock_folder(folder) as lock:
        assert files.is_locked(folder)
        assert not list(folder.iterdir())
        os.rmdir(folder)  # a locked folder can be removed
        folder.mkdir()
    lock.release()  # a second release does nothing
    assert not files.is_locked(folder)


def test_waiting_for_a_lock(tmp_path: Path, method: str) -> None:
    lock, order = files.lock_folder(tmp_path), []

    def wait() -> None:
        with files.lock_folder(tmp_path, wait=True):
            order.append("second")

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.2)
    order.append("first")
    lock.release()
    thread.join(60)
    assert order == ["first", "second"]


def test_locking_a_missing_folder_is_refused(tmp_path: Path, method: str) -> None:
    assert not files.is_locked(tmp_path / "none")
    with pytest.raises(DiskError, match=r"cannot read the folder .*none: No such file"):
        files.lock_folder(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_read_json_object(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    assert files.read_json_object(path) == {}
    for content in (b"[1]", b'{"a": ', b"", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        assert files.read_json_object(path) == {}
    path.write_bytes(b'{"a": [1]}')
    assert files.read_json_object(path) == {"a": [1]}


def test_fault15_unreadable_toml_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for content, words in ((None, ".*No such file"), (b"a = ", ""), (b"\xff", "")):
        if content:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=rf"recipe\.toml is not a readable TOML file: {words}"):
            files.load_toml(path)
