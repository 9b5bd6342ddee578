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

from fastcifar.errors import UsageError, lookup
from fastcifar.reporting.runs import folder_kind
from fastcifar.training.trackers import (
    MLFLOW_DATABASE,
    MLFLOW_INSTALL,
    TENSORBOARD_INSTALL,
    resolve_tracking_uri,
    tracking_uri_from_env,
)

HOST = "127.0.0.1"  # of this machine alone: neither page asks who is there
START_TIMEOUT_S, STOP_TIMEOUT_S = 120, 10  # MLflow imports for seconds, and makes its tables first


@dataclass(frozen=True)
class TrackerUI:
    """A row of PAGES. `module`: what must be installed. `has`: whether it followed a run in a folder."""

    module: str
    remedy: str
    default_port: int
    command: Callable[[Path, int], list[str]]
    has_runs: Callable[[Path], bool]
    environment: dict[str, str] = field(default_factory=dict)


def _mlflow_command(runs: Path, port: int) -> list[str]:
    places = ["--backend-store-uri", resolve_tracking_uri(runs), "--workers", "1"]
    return ["-m", "mlflow", "server", "--host", HOST, "--port", str(port), *places]


def _tensorboard_command(runs: Path, port: int) -> list[str]:
    return ["-m", "tensorboard.main", "--host", HOST, "--port", str(port), "--logdir", str(runs)]


TRACKER_UIS: dict[str, TrackerUI] = {
    "mlflow": TrackerUI(
        module="mlflow",
        remedy=MLFLOW_INSTALL,
        default_port=5000,
        command=_mlflow_command,
        has_runs=lambda runs: (runs / MLFLOW_DATABASE).is_file() or tracking_uri_from_env() is not None,
        environment={"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    ),
    "tensorboard": TrackerUI(
        module="tensorboard",
        remedy=TENSORBOARD_INSTALL,
        default_port=6006,
        command=_tensorboard_command,
        has_runs=lambda runs: next(runs.rglob("events.out.tfevents.*"), None) is not None,
    ),
}


def serve_tracker_ui(runs: Path, name: str, port: int | None, on_ready: Callable[[dict[str, str]], None]) -> None:
    """Serves the page `name` over the folder `runs`, or over a sweep's, until it is interrupted.

    `auto`: the first page that has a run there.

    `port`: default the server's usual one. `announce`: called with the `page` and its `url` once it answers. Errors:
    `UsageError` where the page is not installed, has nothing to show, cannot have the port or ends by itself.
    """
    if not runs.is_dir():
        raise UsageError(f"there is no folder {runs}", "give the folder of your runs")
    runs = runs / "runs" if folder_kind(runs) == "sweep" else runs
    name = _first_with_runs(runs) if name == "auto" else name
    page = lookup(TRACKER_UIS, name, "page")
    if not page.has_runs(runs):
        raise UsageError(f"{name} has followed no run in {runs}", f"train with --track {name}")
    if importlib.util.find_spec(page.module) is None:
        raise UsageError(f"{page.module} is not installed", page.remedy)
    port = page.default_port if port is None else port
    _require_port_free(port)
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
            _wait_until_ready(server, port, said)
            on_ready({"page": name, "url": f"http://{HOST}:{port}"})
            server.wait()
            raise UsageError(f"{page.module} has ended: {_last_output_line(said)}")
        except KeyboardInterrupt:  # which is how one leaves it
            return
        finally:
            _stop_server(server)


def _first_with_runs(runs: Path) -> str:
    for name, page in TRACKER_UIS.items():
        if page.has_runs(runs):
            return name
    raise UsageError(f"no tracker has followed a run in {runs}", "train with --track tensorboard or --track mlflow")


def _require_port_free(port: int) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} cannot be had: {error}", "give another --port") from None


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, output: IO[bytes]) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and server.poll() is None:
        with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.1)
    reason = "does not answer" if server.poll() is None else "has ended"
    raise UsageError(f"{server.args[2]} {reason}: {_last_output_line(output)}")  # type: ignore[index]  # a list, see `show`


def _last_output_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def _stop_server(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and, where the system has process groups, whatever it started."""
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(server.pid, signal.SIGTERM)
        else:
            server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(server.pid, signal.SIGKILL)
        elif server.poll() is None:
            server.kill()
    server.wait()
