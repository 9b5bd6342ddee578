"""Serving the web pages of trackers: start, termination of all processes, and error messages."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.reporting.ui import TRACKER_UIS, serve_tracker_ui
from fastcifar.training.train import train


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files by which a run tracked with both trackers is detected."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "tracked"
    (folder / "run" / "tensorboard").mkdir(parents=True)
    for name in ("mlflow.db", "run/tensorboard/events.out.tfevents.1"):
        (folder / name).write_text("")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> list[str]:
    """Return the ids of the processes that `pid` and its descendants started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    processes, generation = set(), {pid}
    while generation:
        generation = {child for child, parent in parents.items() if parent in generation} - processes
        processes |= generation
    return sorted(map(str, processes))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_tensorboard_is_served_until_interrupted(tiny: Callable[..., Recipe], tmp_path: Path, stop: int) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    train(tiny(epochs=1, track="tensorboard", out=str(tmp_path / "runs" / "one")))
    port = free_port()
    command = [sys.executable, "-m", "fastcifar", "ui", "--port", str(port), "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    document = process.stdout.readline()
    children = descendants(process.pid)
    try:
        assert json.loads(document) == {"page": "tensorboard", "url": f"http://127.0.0.1:{port}"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/data/runs", timeout=30) as response:
            assert json.load(response) == ["one/tensorboard"]
    finally:
        process.send_signal(stop)
        _, errors = process.communicate(timeout=30)
    expected = (0, "") if stop == signal.SIGINT else (143, "fastcifar: stopped by SIGTERM\n")
    assert (process.returncode, errors) == expected
    assert children
    deadline = time.monotonic() + 10  # killed grandchildren exist until the init process reaps them
    while any(Path("/proc", pid).exists() for pid in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.05)


def test_invalid_arguments_are_refused_in_one_line(
    tmp_path: Path, tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()

    def refused(name: str, port: int | None, folder: Path = tracked) -> str:
        with pytest.raises(UsageError) as caught:
            serve_tracker_ui(folder, name, port, print)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in refused("auto", None, tmp_path / "nowhere")
    assert "train with --track" in refused("auto", None, tmp_path / "empty")
    for name in TRACKER_UIS:
        assert f"train with --track {name}" in refused(name, None, tmp_path / "empty")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the same as not set
    assert "was tracked with mlflow" in refused("mlflow", None, tmp_path / "empty")
    assert "did you mean 'mlflow'" in refused("mlflo", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in refused("tensorboard", taken.getsockname()[1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, tracker in TRACKER_UIS.items():
        assert tracker.remedy in refused(name, None)


def test_trackers_of_a_folder_are_detected(tracked: Path) -> None:
    assert [name for name, tracker in TRACKER_UIS.items() if tracker.has_runs(tracked)] == ["mlflow", "tensorboard"]
    assert f"sqlite:///{tracked / 'mlflow.db'}" in TRACKER_UIS["mlflow"].command(tracked, 5000)
    (tracked / "mlflow.db").unlink()
    assert [name for name, tracker in TRACKER_UIS.items() if tracker.has_runs(tracked)] == ["tensorboard"]
    assert os.environ.get("MLFLOW_TRACKING_URI") is None


def test_output_of_a_failed_server_is_reported(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = TRACKER_UIS["tensorboard"]
    code = "import sys; sys.exit('the server failed')"
    monkeypatch.setitem(
        TRACKER_UIS, "tensorboard", type(broken)(**{**vars(broken), "command": lambda *_: ["-c", code]})
    )
    with pytest.raises(UsageError, match="the server failed"):
        serve_tracker_ui(tracked, "tensorboard", free_port(), print)
