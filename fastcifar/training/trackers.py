"""Experiment trackers for a run: TensorBoard event files and an MLflow database.

Opening a tracker synchronizes it with the completed rows of the run: no row is missing or duplicated, even after an
interruption. If a tracker fails, the run continues with one warning. Both libraries are imported only if a recipe uses
them.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastcifar.device import import_optional
from fastcifar.errors import UsageError, first_message_line, lookup
from fastcifar.files import load_toml, lock_folder
from fastcifar.recipe import Recipe
from fastcifar.training.metrics_file import METRICS_COLUMNS, EpochRow, read_event_lines
from fastcifar.training.summary import RunSummary

TENSORBOARD_INSTALL = "pip install 'tensorboard>=2.18,<3'"
MLFLOW_INSTALL = "pip install 'mlflow>=3,<4'"
MLFLOW_DATABASE, MLFLOW_ARTIFACTS, MLFLOW_RUN_ID_FILE = "mlflow.db", "mlflow-artifacts", "mlflow.json"
MLFLOW_EXPERIMENT = "fastcifar"
MLFLOW_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # shows metric curves in MLflow's UI
# Values of summary.json that are logged as metrics, and files of the run folder that are uploaded
SUMMARY_METRICS = {"test_acc", "test_acc_ema", "test_acc_tta", "test_loss", "ece", "best_val_acc"}
MLFLOW_UPLOADED_FILES = ("recipe.toml", "env.json", "metrics.csv", "summary.json")


class TrackerSession(NamedTuple):
    """An open run of a tracker: functions that log a row, log the summary once, and end the session with a status."""

    write: Callable[[EpochRow], None]
    finish: Callable[[RunSummary], None]
    close: Callable[[str], None]


class Tracker:
    """An epoch callback that logs to a tracker, whose errors cause one warning and do not stop training.

    Rows that an error loses are logged when the run ends or is resumed, from events.jsonl.
    """

    def __init__(self, name: str, folder: Path, epochs_done: int = 0) -> None:
        self.name, self.folder = name, folder
        self.session: TrackerSession | None = None
        self.has_failed = False
        self.reopen(epochs_done)

    def __call__(self, row: EpochRow) -> None:
        if session := self.session:
            self._run_or_warn(lambda: session.write(row))

    def reopen(self, epochs_done: int) -> None:
        """Synchronize the tracker with the rows of the first `epochs_done` epochs."""
        rows = [json.loads(line) for line in read_event_lines(self.folder / "events.jsonl", epochs_done)]

        def open_session() -> None:
            self.session = TRACKERS[self.name].open(self.folder, rows)

        self._run_or_warn(open_session)

    def finish(self, summary: RunSummary) -> None:
        """Log the summary, after the missing rows if the tracker had failed."""
        if self.session is None:
            self.reopen(summary.epochs)
        if session := self.session:
            self._run_or_warn(lambda: session.finish(summary))

    def close(self, status: str) -> None:
        """End the session with the status "FINISHED", "KILLED" (by a signal) or "FAILED"."""
        if session := self.session:
            self._run_or_warn(lambda: session.close(status))

    def _run_or_warn(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # the libraries raise many types for database, disk and server errors
            self.session = None
            if not self.has_failed:
                warnings.warn(
                    f"{self.name} failed ({_describe_error(error)}); training continues, and missing rows are "
                    "logged when the run ends or is resumed",
                    stacklevel=2,
                )
            self.has_failed = True


def open_tensorboard(folder: Path, rows: list[EpochRow]) -> TrackerSession:
    """Open event files in `folder`/tensorboard: each column is a scalar by epoch, the recipe is the hyperparameters.

    The files are rewritten from `rows`; `purge_step` makes an active reader discard the old values.
    """
    library = import_optional("torch.utils.tensorboard", TENSORBOARD_INSTALL)
    from torch.utils.tensorboard.summary import hparams

    log_dir = folder / "tensorboard"
    stale_files = list(log_dir.glob("events.out.tfevents.*"))
    writer = library.SummaryWriter(str(log_dir), purge_step=0)
    experiment, start, end = hparams(_read_options(folder), dict.fromkeys(("val_acc", "test_acc"), 0))
    for hparams_summary in (experiment, start):
        writer.file_writer.add_summary(hparams_summary)

    def write(row: EpochRow) -> None:
        for name, value in _row_metrics(row).items():
            writer.add_scalar(name, value, row["epoch"], row.get("time"))
        writer.flush()

    def finish(summary: RunSummary) -> None:
        for name, value in _summary_metrics(summary).items():
            writer.add_scalar(name, value, summary.epochs - 1)
        writer.add_text("summary", f"```\n{json.dumps(summary.model_dump(), indent=1)}\n```", summary.epochs - 1)
        writer.file_writer.add_summary(end)
        writer.flush()

    for row in rows:
        write(row)
    for file in stale_files:
        file.unlink()
    return TrackerSession(write, finish, lambda _: writer.close())


def open_mlflow(folder: Path, rows: list[EpochRow]) -> TrackerSession:
    """Open an MLflow run in the store of `resolve_tracking_uri`: each column is a metric by epoch.

    `folder` stores the ID of the MLflow run, so that a resumed run continues it. A run with epochs that are not in
    `rows` is deleted and written again, because MLflow cannot delete logged values.
    """
    client, experiment = _connect_mlflow(folder.parent)
    run_id = _find_resumable_mlflow_run(client, folder, {row["epoch"] for row in rows})
    if run_id is None:
        tags = {"fastcifar.folder": str(folder.resolve())}
        run_id = client.create_run(experiment, run_name=folder.name, tags=tags).info.run_id
        (folder / MLFLOW_RUN_ID_FILE).write_text(json.dumps({"run_id": run_id}) + "\n", encoding="utf-8")
    client.update_run(run_id, status="RUNNING")
    _log_parameters(client, run_id, _read_options(folder))
    from mlflow.entities import Metric

    def log(values: dict[str, float], epoch: int, time_s: float) -> None:
        client.log_batch(run_id, [Metric(name, value, int(time_s * 1000), epoch) for name, value in values.items()])

    def write(row: EpochRow) -> None:
        log(_row_metrics(row), row["epoch"], row.get("time", time.time()))

    def finish(summary: RunSummary) -> None:
        log(_summary_metrics(summary), summary.epochs - 1, time.time())
        for name in MLFLOW_UPLOADED_FILES:
            client.log_artifact(run_id, str(folder / name))

    logged = _logged_epochs(client, run_id)
    for row in rows:
        if row["epoch"] not in logged:
            write(row)
    return TrackerSession(write, finish, lambda status: client.set_terminated(run_id, status))


def _require_mlflow(runs_folder: Path) -> None:
    _import_mlflow()
    # before the first run there is no store to check
    if runs_folder.is_dir() and (tracking_uri_from_env() or (runs_folder / MLFLOW_DATABASE).exists()):
        try:
            _connect_mlflow(runs_folder)
        except Exception as error:
            problem = f"MLflow cannot use {resolve_tracking_uri(runs_folder)}: {_describe_error(error)}"
            raise UsageError(problem, "repair or move it, or remove mlflow from --track") from None


@dataclass(frozen=True)
class TrackerSpec:
    """An entry of TRACKERS.

    Attributes:
        open: function of a run folder with its recipe.toml and of its completed rows.
        require_usable: check of the tracker for runs in a folder; raises `UsageError` if it cannot be used.
        view_command: function of a run folder that returns the command that starts the tracker's web page.
    """

    open: Callable[[Path, list[EpochRow]], TrackerSession]
    require_usable: Callable[[Path], object]
    view_command: Callable[[Path], str]


TRACKERS: dict[str, TrackerSpec] = {
    "tensorboard": TrackerSpec(
        open_tensorboard,
        lambda runs_folder: import_optional("torch.utils.tensorboard", TENSORBOARD_INSTALL),
        lambda folder: f"tensorboard --logdir {shlex.quote(str(folder.parent))}",
    ),
    "mlflow": TrackerSpec(
        open_mlflow,
        _require_mlflow,
        lambda folder: f"mlflow ui --backend-store-uri {shlex.quote(resolve_tracking_uri(folder.parent))}",
    ),
}


def parse_tracker_names(track: str) -> list[str]:
    """Return the names in `track`, "none" or "tensorboard,mlflow". Raises `UsageError` for an unknown name."""
    names = [name.strip() for name in track.split(",")] if track != "none" else []
    for name in names:
        lookup(TRACKERS, name, "tracker")
    return list(dict.fromkeys(names))


def require_trackers(recipe: Recipe) -> None:
    """Raise `UsageError` if a tracker of `recipe` is not installed or its store cannot be used."""
    for name in parse_tracker_names(recipe.track):
        TRACKERS[name].require_usable(Path(recipe.out).parent if recipe.out else Path("runs"))


def view_commands(track: str, folder: Path) -> list[str]:
    """Return the commands that start the web pages of the trackers in `track`, for the run in `folder`."""
    return [TRACKERS[name].view_command(folder) for name in parse_tracker_names(track)]


def tracking_uri_from_env() -> str | None:
    """Return MLFLOW_TRACKING_URI, None if it is empty or not set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def resolve_tracking_uri(runs_folder: Path) -> str:
    """Return MLflow's tracking URI for runs in `runs_folder`: MLFLOW_TRACKING_URI, else a SQLite file in the folder."""
    return tracking_uri_from_env() or f"sqlite:///{(runs_folder / MLFLOW_DATABASE).resolve()}"


def _import_mlflow() -> Any:
    """Import MLflow without telemetry and without its log messages, because errors are reported by the caller."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = import_optional("mlflow", MLFLOW_INSTALL)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def _connect_mlflow(runs_folder: Path) -> tuple[Any, str]:
    """Return a client of the store and the ID of the fastcifar experiment; both are created if necessary."""
    mlflow = _import_mlflow()
    with lock_folder(runs_folder, wait=True):  # concurrent processes would create the tables twice
        client = mlflow.MlflowClient(resolve_tracking_uri(runs_folder))
        if experiment := client.get_experiment_by_name(MLFLOW_EXPERIMENT):
            return client, experiment.experiment_id
        location = None if tracking_uri_from_env() else (runs_folder / MLFLOW_ARTIFACTS).resolve().as_uri()
        return client, client.create_experiment(
            MLFLOW_EXPERIMENT, artifact_location=location, tags=MLFLOW_EXPERIMENT_TAGS
        )


def _find_resumable_mlflow_run(client: Any, folder: Path, epochs: set[int]) -> str | None:
    """Return the ID of the MLflow run of `folder`, or None; a run with epochs other than `epochs` is deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run_id = json.loads((folder / MLFLOW_RUN_ID_FILE).read_text(encoding="utf-8"))["run_id"]
        is_active = client.get_run(run_id).info.lifecycle_stage == "active"
    except (FileNotFoundError, json.JSONDecodeError):  # missing, or truncated by a killed process
        return None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # a busy database may contain the run
            raise
        return None
    if is_active and _logged_epochs(client, run_id) <= epochs:
        return run_id
    if is_active:
        client.delete_run(run_id)
    return None


def _logged_epochs(client: Any, run_id: str) -> set[int]:
    """Return the epochs that an MLflow run contains, from its metric `epoch`."""
    return {metric.step for metric in client.get_metric_history(run_id, "epoch")}


def _log_parameters(client: Any, run_id: str, options: dict[str, Any]) -> None:
    """Log the options as parameters, which MLflow does not allow to change; log options of a resumed run as tags."""
    from mlflow.entities import Param, RunTag

    logged = client.get_run(run_id).data.params
    values = {name: str(value) for name, value in options.items()}
    params = [Param(name, value) for name, value in values.items() if not logged]
    tags = [RunTag(f"resumed.{name}", value) for name, value in values.items() if logged.get(name, value) != value]
    client.log_batch(run_id, params=params, tags=tags)


def _read_options(folder: Path) -> dict[str, Any]:
    """Return the options in the recipe of a run folder as numbers, booleans and strings, which trackers accept."""
    return {
        name: value if isinstance(value, int | float | str) else json.dumps(value)
        for name, value in load_toml(folder / "recipe.toml").items()
    }


def _row_metrics(row: EpochRow) -> dict[str, float]:
    return {name: row[name] for name in METRICS_COLUMNS if row[name] is not None}


def _summary_metrics(summary: RunSummary) -> dict[str, float]:
    return summary.model_dump(include=SUMMARY_METRICS, exclude_none=True)


def _describe_error(error: Exception) -> str:
    return ": ".join(filter(None, (type(error).__name__, first_message_line(error))))
