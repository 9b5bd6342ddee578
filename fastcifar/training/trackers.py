"""Experiment trackers for a run: TensorBoard event files, an MLflow database and Weights & Biases.

Opening a tracker logs the rows of completed epochs that it lacks, so a resumed run has no missing or duplicate rows.
"""

import json
import logging
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastcifar.device import import_optional
from fastcifar.errors import UsageError, first_message_line, lookup
from fastcifar.files import load_toml, lock_folder, read_json_object, write_atomically
from fastcifar.recipe import Recipe
from fastcifar.training.metrics_file import METRICS_COLUMNS, EpochRow, read_event_lines
from fastcifar.training.summary import RunSummary

MLFLOW_DATABASE, MLFLOW_ARTIFACTS, MLFLOW_RUN_ID_FILE = "mlflow.db", "mlflow-artifacts", "mlflow.json"
MLFLOW_EXPERIMENT = "fastcifar"
MLFLOW_FOLDER_TAG = "fastcifar.folder"
MLFLOW_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # shows metric curves in MLflow's UI
WANDB_FOLDER, WANDB_RUN_ID_FILE, WANDB_PROJECT = "wandb", "wandb.json", "fastcifar"
# Environment variables that are set unless the user has set them: no output, no error reports, and time limits in
# seconds for the server's answer at the start and for uploads at the end
WANDB_ENVIRONMENT = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "60",
}
# Values of summary.json that are logged as metrics, and files of the run folder that are uploaded
SUMMARY_METRICS = {"test_acc", "test_acc_ema", "test_acc_tta", "test_loss", "ece", "best_val_acc"}
MLFLOW_UPLOADED_FILES = ("recipe.toml", "env.json", "metrics.csv", "summary.json")


class TrackerSession(NamedTuple):
    """An open run of a tracker."""

    log: Callable[[dict[str, float], int, float | None], None]  # takes metrics, their epoch and time (None: now)
    finish: Callable[[RunSummary], None]  # logs the summary
    close: Callable[[str], None]  # takes the final status
    logged_epochs: set[int]


class Tracker:
    """An epoch callback that logs to a tracker. Errors of the tracker cause one warning and do not stop training."""

    def __init__(self, name: str, folder: Path, epochs_done: int = 0) -> None:
        self.name, self.folder = name, folder
        self.session: TrackerSession | None = None
        self.has_failed = False
        self.disk_error = ""  # of the last attempt, if the disk was full
        self.reopen(epochs_done)

    def __call__(self, row: EpochRow) -> None:
        with self._errors_as_warning():
            if self.session:
                values = {name: row[name] for name in METRICS_COLUMNS if row[name] is not None}
                self.session.log(values, row["epoch"], row.get("time"))

    def reopen(self, epochs_done: int) -> None:
        """Synchronize the tracker with the rows of the first `epochs_done` epochs in events.jsonl."""
        rows = [json.loads(line) for line in read_event_lines(self.folder / "events.jsonl", epochs_done)]
        self.close("FAILED")
        self.disk_error = ""
        with self._errors_as_warning():
            self.session = TRACKERS[self.name].open(self.folder, {row["epoch"] for row in rows})
        logged_epochs = self.session.logged_epochs if self.session else set()
        for row in rows:
            if row["epoch"] not in logged_epochs:
                self(row)

    def finish(self, summary: RunSummary) -> None:
        """Log the summary, after the missing rows if the tracker had failed."""
        if self.session is None:
            self.reopen(summary.epochs)
        with self._errors_as_warning():
            if self.session:
                self.session.finish(summary)

    def close(self, status: str) -> None:
        """End the session with the status "FINISHED", "KILLED" (by a signal) or "FAILED"."""
        with self._errors_as_warning():
            if self.session:
                self.session.close(status)

    @contextmanager
    def _errors_as_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the libraries raise many types for database, disk and server errors
            self.session = None
            if "disk is full" in str(error) or "No space left on device" in str(error):  # SQLite's and the system's
                self.disk_error = f"cannot write the data of {self.name} of {self.folder}: {_describe_error(error)}"
            if not self.has_failed:
                warnings.warn(
                    f"{self.name} failed ({_describe_error(error)}); training continues, and missing rows are "
                    "logged when the run ends or is resumed",
                    stacklevel=2,
                )
            self.has_failed = True


def open_tensorboard(folder: Path, _: set[int]) -> TrackerSession:
    """Open a new event file in `folder`/tensorboard, with a scalar for each column, and remove the old event files."""
    library = import_optional("torch.utils.tensorboard")
    from torch.utils.tensorboard.summary import hparams

    log_dir = folder / "tensorboard"
    stale_files = list(log_dir.glob("events.out.tfevents.*"))
    writer = library.SummaryWriter(str(log_dir), purge_step=0)  # a running TensorBoard discards old values
    experiment, start, end = hparams(_read_options(folder), dict.fromkeys(("val_acc", "test_acc"), 0))
    for hparams_summary in (experiment, start):
        writer.file_writer.add_summary(hparams_summary)
    for file in stale_files:
        file.unlink()

    def log(values: dict[str, float], epoch: int, time_s: float | None) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch, time_s)
        writer.flush()

    def finish(summary: RunSummary) -> None:
        log(_summary_metrics(summary), summary.epochs - 1, None)
        text = json.dumps(summary.model_dump(exclude={"confusion"}), indent=1)
        writer.add_text("summary", f"```\n{text}\n```", summary.epochs - 1)
        writer.file_writer.add_summary(end)
        writer.flush()

    return TrackerSession(log, finish, lambda _: writer.close(), set())


def open_mlflow(folder: Path, epochs: set[int]) -> TrackerSession:
    """Open an MLflow run in the store of `resolve_tracking_uri`, with a metric for each column.

    Its ID is saved in `folder`, to resume it. MLflow cannot delete logged values, so a run that contains an epoch that
    is not in `epochs` is deleted and written again.
    """
    client, experiment = _connect_mlflow(folder.parent)
    from mlflow.entities import Metric, Param, RunTag

    run_id = _find_resumable_mlflow_run(client, folder, epochs)
    if run_id is None:
        tags = {MLFLOW_FOLDER_TAG: str(folder.resolve())}
        run_id = client.create_run(experiment, run_name=folder.name, tags=tags).info.run_id
        write_atomically(folder / MLFLOW_RUN_ID_FILE, (json.dumps({"run_id": run_id}) + "\n").encode())
    client.update_run(run_id, status="RUNNING")
    options = {name: str(value) for name, value in _read_options(folder).items()}
    logged_options = client.get_run(run_id).data.params  # fixed: changes of a resumed run become tags
    params = [Param(name, value) for name, value in options.items() if not logged_options]
    changed = {name: value for name, value in options.items() if logged_options.get(name, value) != value}
    client.log_batch(run_id, params=params, tags=[RunTag(f"resumed.{name}", changed[name]) for name in changed])

    def log(values: dict[str, float], epoch: int, time_s: float | None) -> None:
        time_ms = int((time_s or time.time()) * 1000)
        client.log_batch(run_id, [Metric(name, value, time_ms, epoch) for name, value in values.items()])

    def finish(summary: RunSummary) -> None:
        log(_summary_metrics(summary), summary.epochs - 1, None)
        for name in MLFLOW_UPLOADED_FILES:
            client.log_artifact(run_id, str(folder / name))

    return TrackerSession(
        log, finish, lambda status: client.set_terminated(run_id, status), _logged_epochs(client, run_id)
    )


def _require_mlflow(runs_folder: Path) -> None:
    _import_mlflow()
    # before the first run there is no store to check
    if runs_folder.is_dir() and (os.environ.get("MLFLOW_TRACKING_URI") or (runs_folder / MLFLOW_DATABASE).exists()):
        try:
            _connect_mlflow(runs_folder)
        except Exception as error:
            problem = f"MLflow cannot use {resolve_tracking_uri(runs_folder)}: {_describe_error(error)}"
            raise UsageError(problem, "repair or move it, or remove mlflow from --track") from None


def open_wandb(folder: Path, epochs: set[int]) -> TrackerSession:
    """Open a run of Weights & Biases in `folder`/wandb; the number of an epoch is its step.

    Its ID is saved in `folder`, to resume it. A run is offline without an API key or an answer of the server. An
    offline run is written again with all epochs when it is resumed, so only one folder has to be uploaded. The server
    cannot delete rows, so a run there that contains an epoch that is not in `epochs` is replaced by one with a new ID.
    """
    stale_folders = list((folder / WANDB_FOLDER).glob("offline-run-*"))
    run = _start_wandb_run(folder, read_json_object(folder / WANDB_RUN_ID_FILE).get("run_id"))
    if run.starting_step > len(epochs):
        run.finish(exit_code=1)
        run = _start_wandb_run(folder, None)
    content = json.dumps({"run_id": run.id, "url": run.url})
    write_atomically(folder / WANDB_RUN_ID_FILE, f"{content}\n".encode())
    for stale_folder in stale_folders:
        shutil.rmtree(stale_folder, ignore_errors=True)

    def log(values: dict[str, float], epoch: int, time_s: float | None) -> None:
        run.log({**values, "_timestamp": time_s or time.time()}, step=epoch, commit=True)

    def close(status: str) -> None:
        run.finish(exit_code=0 if status == "FINISHED" else 1)

    return TrackerSession(
        log,
        lambda summary: run.summary.update(summary.model_dump(exclude={"config", "confusion"}, exclude_none=True)),
        close,
        set(range(run.starting_step)),
    )


def _view_wandb(folder: Path) -> str:
    """Return the address of the run in `folder`, or the command that uploads it; "" if it was disabled."""
    offline_folders = sorted((folder / WANDB_FOLDER).glob("offline-run-*"))
    upload = f"wandb sync {shlex.quote(str(offline_folders[-1]))}" if offline_folders else ""
    return read_json_object(folder / WANDB_RUN_ID_FILE).get("url") or upload


class TrackerSpec(NamedTuple):
    """An entry of TRACKERS."""

    open: Callable[[Path, set[int]], TrackerSession]  # takes a run folder and its completed epochs
    require_usable: Callable[[Path], object]  # takes the parent of the run folder; raises `UsageError`
    view_command: Callable[[Path], str]  # takes a run folder; returns how to see the run: see `view_commands`


TRACKERS: dict[str, TrackerSpec] = {
    "tensorboard": TrackerSpec(
        open_tensorboard,
        lambda runs_folder: import_optional("torch.utils.tensorboard"),
        lambda folder: f"tensorboard --logdir {shlex.quote(str(folder.parent))}",
    ),
    "mlflow": TrackerSpec(
        open_mlflow,
        _require_mlflow,
        lambda folder: f"mlflow ui --backend-store-uri {shlex.quote(resolve_tracking_uri(folder.parent))}",
    ),
    "wandb": TrackerSpec(open_wandb, lambda runs_folder: _import_wandb(), _view_wandb),
}


def parse_tracker_names(track: str) -> list[str]:
    """Return the names in `track`, such as "none" or "tensorboard,mlflow"."""
    names = [name.strip() for name in track.split(",")] if track != "none" else []
    for name in names:
        lookup(TRACKERS, name, "tracker")
    return list(dict.fromkeys(names))


def require_trackers(recipe: Recipe) -> None:
    """Raise `UsageError` if a tracker of `recipe` is not installed or its store cannot be used."""
    for name in parse_tracker_names(recipe.track):
        TRACKERS[name].require_usable(Path(recipe.out).parent if recipe.out else Path("runs"))


def view_commands(track: str, folder: Path) -> list[str]:
    """Return for each tracker the command that starts its web page or uploads the run in `folder`, or its address."""
    return list(filter(None, (TRACKERS[name].view_command(folder) for name in parse_tracker_names(track))))


def resolve_tracking_uri(runs_folder: Path) -> str:
    """Return MLflow's tracking URI for runs in `runs_folder`: MLFLOW_TRACKING_URI, else a SQLite file in the folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(runs_folder / MLFLOW_DATABASE).resolve()}"


def _import_mlflow() -> Any:
    """Import MLflow without telemetry and without its log messages: the caller reports errors."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = import_optional("mlflow")
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
        is_remote = bool(os.environ.get("MLFLOW_TRACKING_URI"))
        location = None if is_remote else (runs_folder / MLFLOW_ARTIFACTS).resolve().as_uri()
        return client, client.create_experiment(
            MLFLOW_EXPERIMENT, artifact_location=location, tags=MLFLOW_EXPERIMENT_TAGS
        )


def _find_resumable_mlflow_run(client: Any, folder: Path, epochs: set[int]) -> str | None:
    """Return the ID of the MLflow run of `folder`, or None. A run with an epoch not in `epochs` is deleted.

    The file with the ID, perhaps of a stranger, cannot choose the run of another folder.
    """
    from mlflow.exceptions import MlflowException

    run_id = read_json_object(folder / MLFLOW_RUN_ID_FILE).get("run_id")
    if not isinstance(run_id, str):  # the file is missing, or was truncated by a killed process
        return None
    try:
        run = client.get_run(run_id)
        is_own = run.data.tags.get(MLFLOW_FOLDER_TAG) == str(folder.resolve())
        is_active = is_own and run.info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise  # a busy database may contain the run
        return None
    if is_active and _logged_epochs(client, run_id) <= epochs:
        return run_id
    if is_active:
        client.delete_run(run_id)
    return None


def _logged_epochs(client: Any, run_id: str) -> set[int]:
    return {metric.step for metric in client.get_metric_history(run_id, "epoch")}


def _import_wandb() -> Any:
    for name, value in WANDB_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return import_optional("wandb")


def _start_wandb_run(folder: Path, run_id: str | None) -> Any:
    """Start or resume a run, in the mode of WANDB_MODE or of `wandb online|offline|disabled`, without any question."""
    library = _import_wandb()
    settings: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT") or WANDB_PROJECT,
        "id": run_id,
        "name": folder.name,
        "dir": str(folder),
        "config": _read_options(folder),
        "resume": "allow",
        "reinit": "create_new",  # a process may train several runs
    }
    mode = library.setup().settings.mode
    try:
        if mode == "online" and not library.login(prompt=False, verify=False):
            mode = "offline"
        return library.init(mode=mode, **settings)
    except library.errors.CommError as error:
        library.teardown()  # the failed run would keep the ID in use
        problem = f"the server of wandb cannot be used ({first_message_line(error)})"
        warnings.warn(f"{problem}; the run is recorded offline, to be uploaded with `wandb sync`", stacklevel=2)
        return library.init(mode="offline", **settings)


def _summary_metrics(summary: RunSummary) -> dict[str, float]:
    return summary.model_dump(include=SUMMARY_METRICS, exclude_none=True)


def _read_options(folder: Path) -> dict[str, Any]:
    """Return the options of a run as numbers, booleans and strings, which trackers accept."""
    return {
        name: value if isinstance(value, int | float | str) else json.dumps(value)
        for name, value in load_toml(folder / "recipe.toml").items()
    }


def _describe_error(error: Exception) -> str:
    return ": ".join(filter(None, (type(error).__name__, first_message_line(error))))
