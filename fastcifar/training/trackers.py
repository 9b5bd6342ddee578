"""Experiment trackers that follow a run: TensorBoard's event files, MLflow's data base.

Opening one brings it to the rows that the run has done, whatever it held before: nothing is missing and nothing is
there twice, also after an interruption. A tracker that fails costs a run one warning. Both libraries are imported only
where a recipe asks for them.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcifar.device import import_optional
from fastcifar.errors import UsageError, first_message_line, lookup
from fastcifar.files import load_toml, lock_folder
from fastcifar.recipe import Recipe
from fastcifar.training.metrics_file import EpochRow, read_event_lines

TENSORBOARD_INSTALL = "pip install 'tensorboard>=2.18,<3'"
MLFLOW_INSTALL = "pip install 'mlflow>=3,<4'"
MLFLOW_DATABASE, MLFLOW_ARTIFACTS, MLFLOW_RUN_ID_FILE = "mlflow.db", "mlflow-artifacts", "mlflow.json"
MLFLOW_EXPERIMENT = "fastcifar"
MLFLOW_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # its page shows curves then, not agents
# what of summary.json stands beside the rows, and what of a run folder is small enough to be copied
SUMMARY_METRICS = ("test_acc", "test_acc_ema", "test_acc_tta", "test_loss", "ece", "best_val_acc")
MLFLOW_UPLOADED_FILES = ("recipe.toml", "env.json", "metrics.csv", "summary.json")


@dataclass(frozen=True)
class TrackerSession:
    """A run in a tracker. `write`: a row. `finish`: once, the summary. `close`: last, "FINISHED", "KILLED" by a signal
    or "FAILED"."""

    write: Callable[[EpochRow], None]
    finish: Callable[[dict[str, Any]], None]
    close: Callable[[str], None]


class Tracker:
    """A sink that cannot end a training: it fails with one warning, and is tried once more when the run ends.

    It is opened with the rows of events.jsonl, so that what it missed is made up for then, or by a resumed run.
    """

    def __init__(self, name: str, folder: Path, epochs_done: int = 0) -> None:
        self.name, self.folder = name, folder
        self.session: TrackerSession | None = None
        self.has_failed = False
        self.reopen(epochs_done)

    def __call__(self, row: EpochRow) -> None:
        if log := self.session:
            self._run_or_warn(lambda: log.write(row))

    def reopen(self, epochs_done: int) -> None:
        """Brings it to the rows of the first `done` epochs, and no others."""
        lines = read_event_lines(self.folder / "events.jsonl", epochs_done)
        rows = [json.loads(line) for line in lines]

        def open_log() -> None:
            self.session = TRACKERS[self.name].open(self.folder, rows)

        self._run_or_warn(open_log)

    def finish(self, summary: dict[str, Any]) -> None:
        """The summary, and before it what a tracker that failed has missed."""
        if self.session is None:
            self.reopen(summary["epochs"])
        if log := self.session:
            self._run_or_warn(lambda: log.finish(summary))

    def close(self, status: str) -> None:
        """Last of all: "FINISHED", "KILLED" by a signal, or "FAILED"."""
        if log := self.session:
            self._run_or_warn(lambda: log.close(status))

    def _run_or_warn(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a data base, a disk or a server, through somebody else's library
            self.session = None
            if not self.has_failed:
                told = "the run goes on; what is missing follows at its end, or when it is resumed"
                warnings.warn(f"{self.name} failed ({_describe_error(error)}); {told}", stacklevel=2)
            self.has_failed = True


def open_tensorboard(folder: Path, rows: list[EpochRow]) -> TrackerSession:
    """Event files in `folder`/tensorboard: a scalar a column, its step the epoch; the recipe as hyperparameters.

    They are written anew from `rows`, and the old ones removed. `purge_step`: who reads while we do so forgets them.
    """
    library = import_optional("torch.utils.tensorboard", TENSORBOARD_INSTALL)
    from torch.utils.tensorboard.summary import hparams

    place = folder / "tensorboard"
    stale = list(place.glob("events.out.tfevents.*"))
    writer = library.SummaryWriter(str(place), purge_step=0)
    experiment, start, end = hparams(_read_options(folder), dict.fromkeys(("val_acc", "test_acc"), 0))
    for part in (experiment, start):
        writer.file_writer.add_summary(part)

    def write(row: EpochRow) -> None:
        for name, value in _row_metrics(row).items():
            writer.add_scalar(name, value, row["epoch"], row.get("time"))
        writer.flush()

    def finish(summary: dict[str, Any]) -> None:
        for name, value in _summary_metrics(summary).items():
            writer.add_scalar(name, value, summary["epochs"] - 1)
        writer.add_text("summary", f"```\n{json.dumps(summary, indent=1)}\n```", summary["epochs"] - 1)
        writer.file_writer.add_summary(end)
        writer.flush()

    for row in rows:
        write(row)
    for file in stale:
        file.unlink()
    return TrackerSession(write, finish, lambda _: writer.close())


def open_mlflow(folder: Path, rows: list[EpochRow]) -> TrackerSession:
    """A run in MLflow's data base beside `folder` (see `store`): a metric a column, its step the epoch.

    Its id is kept in `folder`, and the same run goes on. Only one with other epochs than those of `rows` cannot: MLflow
    takes nothing back, so it is deleted (MLflow keeps it in its trash) and written anew.
    """
    client, experiment = _connect_mlflow(folder.parent)
    run_id = _find_resumable_mlflow_run(client, folder, {row["epoch"] for row in rows})
    if run_id is None:
        made = client.create_run(experiment, run_name=folder.name, tags={"fastcifar.folder": str(folder.resolve())})
        run_id = made.info.run_id
        (folder / MLFLOW_RUN_ID_FILE).write_text(json.dumps({"run_id": run_id}) + "\n", encoding="utf-8")
    client.update_run(run_id, status="RUNNING")
    _log_parameters(client, run_id, _read_options(folder))
    from mlflow.entities import Metric

    def log(values: dict[str, float], epoch: int, at: float) -> None:
        client.log_batch(run_id, [Metric(name, value, int(at * 1000), epoch) for name, value in values.items()])

    def write(row: EpochRow) -> None:
        log(_row_metrics(row), row["epoch"], row.get("time", time.time()))

    def finish(summary: dict[str, Any]) -> None:
        log(_summary_metrics(summary), summary["epochs"] - 1, time.time())
        for name in MLFLOW_UPLOADED_FILES:
            client.log_artifact(run_id, str(folder / name))

    logged = _logged_epochs(client, run_id)
    for row in rows:
        if row["epoch"] not in logged:
            write(row)
    return TrackerSession(write, finish, lambda status: client.set_terminated(run_id, status))


def _require_tensorboard(runs_folder: Path) -> None:
    import_optional("torch.utils.tensorboard", TENSORBOARD_INSTALL)


def _require_mlflow(runs_folder: Path) -> None:
    _import_mlflow()
    if not runs_folder.is_dir():  # as for a first run; then there is nothing yet that could be wrong
        return
    if tracking_uri_from_env() or (runs_folder / MLFLOW_DATABASE).exists():
        try:
            _connect_mlflow(runs_folder)
        except Exception as error:
            problem = f"MLflow cannot use {resolve_tracking_uri(runs_folder)}: {_describe_error(error)}"
            raise UsageError(problem, "repair it or move it away, or leave --track mlflow out") from None


@dataclass(frozen=True)
class TrackerSpec:
    """A row of TRACKERS. `open`: of a run folder with its recipe.toml, and the rows it has done. `require`: tries
    whether it would work for runs in a folder, and raises `UsageError` with the remedy if not."""

    open: Callable[[Path, list[EpochRow]], TrackerSession]
    require_usable: Callable[[Path], None]


TRACKERS: dict[str, TrackerSpec] = {
    "tensorboard": TrackerSpec(open_tensorboard, _require_tensorboard),
    "mlflow": TrackerSpec(open_mlflow, _require_mlflow),
}


def parse_tracker_names(track: str) -> list[str]:
    """The names in `track`: "none", "mlflow" or "tensorboard,mlflow". Errors: `UsageError`."""
    names = [name.strip() for name in track.split(",")] if track != "none" else []
    for name in names:
        lookup(TRACKERS, name, "tracker")
    return list(dict.fromkeys(names))


def require_trackers(recipe: Recipe) -> None:
    """Tries the trackers of `recipe`, before anything is written. Errors: `UsageError` with what to install."""
    for name in parse_tracker_names(recipe.track):
        TRACKERS[name].require_usable(Path(recipe.out).parent if recipe.out else Path("runs"))


def tracking_uri_from_env() -> str | None:
    """Where MLFLOW_TRACKING_URI says that MLflow keeps its runs; None where it is empty or not set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def resolve_tracking_uri(runs_folder: Path) -> str:
    """MLflow's tracking store for runs in the folder `runs`: MLFLOW_TRACKING_URI, or a SQLite file in the folder."""
    return tracking_uri_from_env() or f"sqlite:///{(runs_folder / MLFLOW_DATABASE).resolve()}"


def _import_mlflow() -> Any:
    """MLflow, which shall not report to its makers, nor log each table that it makes, or an error that we tell of."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = import_optional("mlflow", MLFLOW_INSTALL)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def _connect_mlflow(runs_folder: Path) -> tuple[Any, str]:
    """A client of `store`, and the id of our experiment there; both made if need be."""
    mlflow = _import_mlflow()
    with lock_folder(runs_folder, wait=True):  # two processes that found one data base would both make its tables
        client = mlflow.MlflowClient(resolve_tracking_uri(runs_folder))
        if found := client.get_experiment_by_name(MLFLOW_EXPERIMENT):
            return client, found.experiment_id
        location = None if tracking_uri_from_env() else (runs_folder / MLFLOW_ARTIFACTS).resolve().as_uri()
        return client, client.create_experiment(
            MLFLOW_EXPERIMENT, artifact_location=location, tags=MLFLOW_EXPERIMENT_TAGS
        )


def _find_resumable_mlflow_run(client: Any, folder: Path, epochs: set[int]) -> str | None:
    """The id of the MLflow run of `folder`, if there is one that can go on after `epochs`.

    Any error of MLflow's but "no such run" is raised: a data base that is busy may have the run.
    """
    from mlflow.exceptions import MlflowException

    try:
        run_id = json.loads((folder / MLFLOW_RUN_ID_FILE).read_text(encoding="utf-8"))["run_id"]
        is_there = client.get_run(run_id).info.lifecycle_stage == "active"
    except (FileNotFoundError, json.JSONDecodeError):  # none yet, or cut short when a process was killed
        return None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if is_there and _logged_epochs(client, run_id) <= epochs:
        return run_id
    if is_there:
        client.delete_run(run_id)
    return None


def _logged_epochs(client: Any, run_id: str) -> set[int]:
    """The epochs that an MLflow run has: `epoch` is one of the metrics."""
    return {metric.step for metric in client.get_metric_history(run_id, "epoch")}


def _log_parameters(client: Any, run_id: str, options: dict[str, Any]) -> None:
    """The knobs as parameters, which MLflow lets nobody change; what a resumed run changed is a tag."""
    from mlflow.entities import Param, RunTag

    there = client.get_run(run_id).data.params
    spelt = {name: str(value) for name, value in options.items()}
    new = [Param(name, value) for name, value in spelt.items() if not there]
    changed = [RunTag(f"resumed.{name}", value) for name, value in spelt.items() if there.get(name, value) != value]
    client.log_batch(run_id, params=new, tags=changed)


def _read_options(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder as trackers take it: numbers, switches and text."""
    knobs = load_toml(folder / "recipe.toml")
    return {name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in knobs.items()}


def _row_metrics(row: EpochRow) -> dict[str, float]:
    """The columns of a row that were measured."""
    return {name: value for name, value in row.items() if name != "time" and value is not None}


def _summary_metrics(summary: dict[str, Any]) -> dict[str, float]:
    return {name: summary[name] for name in SUMMARY_METRICS if summary[name] is not None}


def _describe_error(error: Exception) -> str:
    first = first_message_line(error)
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
