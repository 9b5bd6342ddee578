"""The pages of trackers: served by their own servers, ended without a trace, refused in one line."""

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
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that both trackers have followed a run in, as far as one can see without them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "followed"
    (folder / "run" / "tensorboard").mkdir(parents=True)
    for name in ("mlflow.db", "run/tensorboard/events.out.tfevents.1"):
        (folder / name).write_text("")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def group(leader: int) -> list[str]:
    """The command lines of the processes whose parent is `leader`, or one of its children."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, fresh = set(), {leader}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return sorted(map(str, found))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_tensorboard_shows_a_run_until_it_is_ended(tiny: Callable[..., Recipe], tmp_path: Path, stop: int) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    train(tiny(epochs=1, track="tensorboard", out=str(tmp_path / "runs" / "one")))
    port = free_port()
    command = [sys.executable, "-m", "fastcifar", "ui", "--port", str(port), "--json"]
    page = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert page.stdout is not None
    said = page.stdout.readline()
    children = group(page.pid)
    try:
        assert json.loads(said) == {"page": "tensorboard", "url": f"http://127.0.0.1:{port}"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/data/runs", timeout=30) as answer:
            assert json.load(answer) == ["one/tensorboard"]
    finally:
        page.send_signal(stop)
        _, errors = page.communicate(timeout=30)
    expected = (0, "") if stop == signal.SIGINT else (143, "fastcifar: stopped by SIGTERM\n")
    assert (page.returncode, errors) == expected
    assert children
    until = time.monotonic() + 10  # grandchildren, killed, are somebody else's to bury
    while any(Path("/proc", pid).exists() for pid in children):
        assert time.monotonic() < until, children
        time.sleep(0.05)


def test_what_cannot_be_shown_is_refused_in_one_line(
    tmp_path: Path, followed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()

    def refused(name: str, port: int | None, folder: Path = followed) -> str:
        with pytest.raises(UsageError) as caught:
            serve_tracker_ui(folder, name, port, print)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in refused("auto", None, tmp_path / "nowhere")
    assert "train with --track" in refused("auto", None, tmp_path / "empty")
    for name in TRACKER_UIS:
        assert f"train with --track {name}" in refused(name, None, tmp_path / "empty")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # as not set
    assert "mlflow has followed no run" in refused("mlflow", None, tmp_path / "empty")
    assert "did you mean 'mlflow'" in refused("mlflo", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in refused("tensorboard", taken.getsockname()[1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, page in TRACKER_UIS.items():
        assert page.remedy in refused(name, None)


def test_the_page_of_what_is_there_is_chosen(followed: Path) -> None:
    assert [name for name, page in TRACKER_UIS.items() if page.has_runs(followed)] == ["mlflow", "tensorboard"]
    assert f"sqlite:///{followed / 'mlflow.db'}" in TRACKER_UIS["mlflow"].command(followed, 5000)
    (followed / "mlflow.db").unlink()
    assert [name for name, page in TRACKER_UIS.items() if page.has_runs(followed)] == ["tensorboard"]
    assert os.environ.get("MLFLOW_TRACKING_URI") is None


def test_a_server_that_ends_by_itself_says_why(followed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = TRACKER_UIS["tensorboard"]
    code = "import sys; sys.exit('the page fell over')"
    monkeypatch.setitem(
        TRACKER_UIS, "tensorboard", type(broken)(**{**vars(broken), "command": lambda *_: ["-c", code]})
    )
    with pytest.raises(UsageError, match="the page fell over"):
        serve_tracker_ui(followed, "tensorboard", free_port(), print)
