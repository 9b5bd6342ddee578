"""`fastcifar ui`: serve the web page of MLflow or TensorBoard for a folder of runs until the command is interrupted.

The servers are the entries of `TRACKER_UIS`. A server runs in its own process group, which is terminated as a whole.
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

HOST = "127.0.0.1"  # local connections only, because neither server authenticates users
START_TIMEOUT_S, STOP_TIMEOUT_S = 120, 10  # starting MLflow takes seconds: imports, creation of its database


@dataclass(frozen=True)
class TrackerUI:
    """How to serve the web page of a tracker.

    module        the Python module that must be installed; `remedy` is the command that installs it
    command       (folder of runs, port) -> arguments of the Python interpreter that start the server
    has_runs      whether the tracker has tracked a run in a folder
    environment   additional environment variables of the server
    """

    module: str
    remedy: str
    default_port: int
    command: Callable[[Path, int], list[str]]
    has_runs: Callable[[Path], bool]
    environment: dict[str, str] = field(default_factory=dict)


def _mlflow_command(runs: Path, port: int) -> list[str]:
    storage = ["--backend-store-uri", resolve_tracking_uri(runs), "--workers", "1"]
    return ["-m", "mlflow", "server", "--host", HOST, "--port", str(port), *storage]


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
    """Serve the web page of the tracker `name` for the folder `runs`, which may be a sweep, until interrupted.

    The name `auto` stands for the first tracker that has tracked a run in the folder. The default `port` is the usual
    one of the server. `on_ready` is called with the `page` and its `url` as soon as the server accepts connections.
    Raises `UsageError` if the tracker is not installed or has tracked no run, if the port is not available, or if the
    server terminates.
    """
    if not runs.is_dir():
        raise UsageError(f"there is no folder {runs}", "give the folder that contains the runs")
    runs = runs / "runs" if folder_kind(runs) == "sweep" else runs
    name = _first_with_runs(runs) if name == "auto" else name
    tracker = lookup(TRACKER_UIS, name, "tracker")
    if not tracker.has_runs(runs):
        raise UsageError(f"no run in {runs} was tracked with {name}", f"train with --track {name}")
    if importlib.util.find_spec(tracker.module) is None:
        raise UsageError(f"{tracker.module} is not installed", tracker.remedy)
    port = tracker.default_port if port is None else port
    _require_port_free(port)
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            [sys.executable, *tracker.command(runs, port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group, which does not receive the Ctrl-C of the terminal
            env={**os.environ, **tracker.environment},
        )
        try:
            _wait_until_ready(server, tracker.module, port, output)
            on_ready({"page": name, "url": f"http://{HOST}:{port}"})
            server.wait()
            raise UsageError(f"{tracker.module} has terminated: {_last_output_line(output)}")
        except KeyboardInterrupt:  # the regular end of the command
            return
        finally:
            _stop_server(server)


def _first_with_runs(runs: Path) -> str:
    for name, tracker in TRACKER_UIS.items():
        if tracker.has_runs(runs):
            return name
    raise UsageError(f"no run in {runs} was tracked", "train with --track tensorboard or --track mlflow")


def _require_port_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} is not available: {error}", "give another --port") from None


def _wait_until_ready(server: subprocess.Popen[bytes], name: str, port: int, output: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.1)
    problem = "does not respond" if server.poll() is None else "has terminated"
    raise UsageError(f"{name} {problem}: {_last_output_line(output)}")


def _last_output_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "without any output"


def _stop_server(server: subprocess.Popen[bytes]) -> None:
    """Terminate the server and, on systems with process groups, the processes that it started."""
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
