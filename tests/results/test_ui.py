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
from fastcifar.results.ui import PAGES, show
from fastcifar.training.train import train


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


def test_what_cannot_be_shown_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def refused(name: str, port: int | None, folder: Path = tmp_path) -> str:
        with pytest.raises(UsageError) as caught:
            show(folder, name, port, print)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in refused("auto", None, tmp_path / "nowhere")
    assert "train with --track" in refused("auto", None)
    assert "did you mean 'mlflow'" in refused("mlflo", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in refused("tensorboard", taken.getsockname()[1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, page in PAGES.items():
        assert page.remedy in refused(name, None)


def test_the_page_of_what_is_there_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "run" / "tensorboard" / "events.out.tfevents.1").write_text("")
    assert [name for name, page in PAGES.items() if page.has(tmp_path)] == ["tensorboard"]
    (tmp_path / "mlflow.db").write_text("")
    assert [name for name, page in PAGES.items() if page.has(tmp_path)] == ["mlflow", "tensorboard"]
    assert f"sqlite:///{tmp_path / 'mlflow.db'}" in PAGES["mlflow"].command(tmp_path, 5000)
    assert os.environ.get("MLFLOW_TRACKING_URI") is None


def test_a_server_that_ends_by_itself_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PAGES["tensorboard"]
    code = "import sys; sys.exit('the page fell over')"
    monkeypatch.setitem(PAGES, "tensorboard", type(broken)(**{**vars(broken), "command": lambda *_: ["-c", code]}))
    with pytest.raises(UsageError, match="the page fell over"):
        show(tmp_path, "tensorboard", free_port(), print)
