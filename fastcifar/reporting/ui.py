"""`fastcifar ui`: MLflow's or TensorBoard's own web page over a folder of runs, for as long as the command lasts.

A page is a row of PAGES: a server of somebody else's, in a process group of its own, of which nothing is left behind.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fastcifar.errors import UsageError, pick
from fastcifar.reporting.runs import kind
from fastcifar.training.trackers import DATABASE, MLFLOW, TENSORBOARD, store, tracking_uri

HOST = "127.0.0.1"  # of this machine alone: neither page asks who is there
START_S, STOP_S = 120, 10  # MLflow imports for seconds, and makes its tables first


@dataclass(frozen=True)
class Page:
    """A row of PAGES. `module`: what must be installed. `has`: whether it followed a run in a folder."""

    module: str
    remedy: str
    port: int
    command: Callable[[Path, int], list[str]]
    has: Callable[[Path], bool]
    environment: dict[str, str] = field(default_factory=dict)


def _mlflow(runs: Path, port: int) -> list[str]:
    places = ["--backend-store-uri", store(runs), "--workers", "1"]
    return ["-m", "mlflow", "server", "--host", HOST, "--port", str(port), *places]


def _tensorboard(runs: Path, port: int) -> list[str]:
    return ["-m", "tensorboard.main", "--host", HOST, "--port", str(port), "--logdir", str(runs)]


PAGES: dict[str, Page] = {
    "mlflow": Page(
        module="mlflow",
        remedy=MLFLOW,
        port=5000,
        command=_mlflow,
        has=lambda runs: (runs / DATABASE).is_file() or tracking_uri() is not None,
        environment={"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    ),
    "tensorboard": Page(
        module="tensorboard",
        remedy=TENSORBOARD,
        port=6006,
        command=_tensorboard,
        has=lambda runs: next(runs.rglob("events.out.tfevents.*"), None) is not None,
    ),
}


def show(runs: Path, name: str, port: int | None, announce: Callable[[dict[str, str]], None]) -> None:
    """Serves the page `name` over the folder `runs`, or over a sweep's, until it is interrupted.

    `auto`: the first page that has a run there.

    `port`: default the server's usual one. `announce`: called with the `page` and its `url` once it answers. Errors:
    `UsageError` where the page is not installed, has nothing to show, cannot have the port or ends by itself.
    """
    if not runs.is_dir():
        raise UsageError(f"there is no folder {runs}", "give the folder of your runs")
    runs = runs / "runs" if kind(runs) == "sweep" else runs
    name = _first(runs) if name == "auto" else name
    page = pick(PAGES, name, "page")
    if not page.has(runs):
        raise UsageError(f"{name} has followed no run in {runs}", f"train with --track {name}")
    if importlib.util.find_spec(page.module) is None:
        raise UsageError(f"{page.module} is not installed", page.remedy)
    port = page.port if port is None else port
    _require_free(port)
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            [sys.executable, *page.command(runs, port)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group that can be ended as a whole, and that Ctrl-C does not reach twice
            env={**os.environ, **page.environment},
        )
        try:
            _wait_until_it_answers(server, port, said)
            announce({"page": name, "url": f"http://{HOST}:{port}"})
            server.wait()
            raise UsageError(f"{page.module} has ended: {_last_line(said)}")
        except KeyboardInterrupt:  # which is how one leaves it
            return
        finally:
            _end(server)


def _first(runs: Path) -> str:
    for name, page in PAGES.items():
        if page.has(runs):
            return name
    raise UsageError(f"no tracker has followed a run in {runs}", "train with --track tensorboard or --track mlflow")


def _require_free(port: int) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} cannot be had: {error}", "give another --port") from None


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.1)
    reason = "does not answer" if server.poll() is None else "has ended"
    raise UsageError(f"{server.args[2]} {reason}: {_last_line(said)}")  # type: ignore[index]  # a list, see `show`


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
