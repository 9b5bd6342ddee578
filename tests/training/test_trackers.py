"""Trackers: their readers return every metric of metrics.csv once, also for interrupted runs."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastcifar.errors import Interrupted, UsageError
from fastcifar.recipe import Recipe
from fastcifar.training import trackers
from fastcifar.training.metrics_file import METRICS_COLUMNS
from fastcifar.training.optimizers import OptimizerWrapper
from fastcifar.training.run_dir import Run
from fastcifar.training.train import train
from tests.training.summaries import epoch_row

MakeRecipe = Callable[..., Recipe]
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture
def train_interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, int], None]:
    """Return a function that trains until SIGINT arrives in a given step."""

    def run(recipe: Recipe, step: int) -> None:
        after_step = OptimizerWrapper.after_step

        def after_step_with_signal(self: OptimizerWrapper, completed_steps: int, *args: Any) -> None:
            after_step(self, completed_steps, *args)
            if completed_steps == step:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(OptimizerWrapper, "after_step", after_step_with_signal)
            with pytest.raises(Interrupted):
                train(recipe)

    return run


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the rows of events.jsonl, in full precision, and of metrics.csv, with six digits."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    with (folder / "metrics.csv").open(newline="") as file:
        return events, list(csv.DictReader(file))


def assert_same_rows(folder: Path, points: Points, convert: Callable[[Any], Any]) -> None:
    """Assert that a tracker's `points`, (epoch, value) by column, equal the rows of the run.

    `convert` converts a value to the tracker's precision.
    """
    events, csv_rows = read_rows(folder)
    assert len(events) == len(csv_rows) > 0
    for name in METRICS_COLUMNS:
        expected = [(event["epoch"], convert(event[name])) for event in events if event[name] is not None]
        assert points.get(name, []) == expected, name
        csv_values = [float(row[name]) for row in csv_rows if row[name]]
        assert [value for _, value in points.get(name, [])] == pytest.approx(csv_values, rel=1e-5), name


def read_tensorboard(folder: Path) -> Points:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    scalars = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    return {name: points for name, points in scalars.items() if name in METRICS_COLUMNS}


def count_scalars(folder: Path) -> Counter[tuple[str, int]]:
    """Count how often each scalar and step occurs in the event files, without the deduplication of a reader."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    events = [
        event for file in (folder / "tensorboard").iterdir() for event in loader.EventFileLoader(str(file)).Load()
    ]
    return Counter(
        (value.tag, event.step) for event in events for value in event.summary.value if value.tag in METRICS_COLUMNS
    )


@pytest.mark.medium
def test_tensorboard_contains_every_metric_of_an_interrupted_run(
    tiny: MakeRecipe, tmp_path: Path, train_interrupted: Callable[[Recipe, int], None]
) -> None:
    run, values = tmp_path / "run", {"track": "tensorboard", "epochs": 3, "ema_decay": 0.9}
    train_interrupted(tiny(**values), 8)  # five steps per epoch
    assert_same_rows(run, read_tensorboard(run), np.float32)
    train(tiny(**values, resume=str(run), max_steps=13))  # logs a row of an incomplete epoch, which is removed later
    assert len(read_tensorboard(run)["val_acc"]) == 3
    train(tiny(**values, resume=str(run)))
    assert_same_rows(run, read_tensorboard(run), np.float32)
    assert set(count_scalars(run).values()) == {1}
    assert len(count_scalars(run)) == 3 * len(METRICS_COLUMNS)
    train(tiny(**{**values, "epochs": 4}, resume=str(run)))
    assert_same_rows(run, read_tensorboard(run), np.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_mlflow_contains_every_metric_of_an_interrupted_run(
    tiny: MakeRecipe, tmp_path: Path, train_interrupted: Callable[[Recipe, int], None]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    run, values = tmp_path / "run", {"track": "mlflow", "epochs": 2}
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def read_mlflow() -> tuple[str, Any, Points]:
        run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
        histories = {name: client.get_metric_history(run_id, name) for name in METRICS_COLUMNS}
        return run_id, client.get_run(run_id), {
            name: sorted((metric.step, metric.value) for metric in history) for name, history in histories.items()
        }  # fmt: skip

    train_interrupted(tiny(**values), 8)
    first_run_id, tracked, columns = read_mlflow()
    assert tracked.info.status == "KILLED"
    assert_same_rows(run, columns, float)
    train(tiny(**values, resume=str(run)))
    run_id, tracked, columns = read_mlflow()
    assert run_id == first_run_id
    assert (tracked.info.status, tracked.info.run_name) == ("FINISHED", "run")
    assert_same_rows(run, columns, float)
    summary = json.loads((run / "summary.json").read_text())
    assert tracked.data.metrics["test_acc"] == summary["test_acc"]
    assert (tracked.data.params["lr"], tracked.data.params["blocks"]) == ("0.1", "[1, 1]")
    assert {artifact.path for artifact in client.list_artifacts(run_id)} == set(trackers.MLFLOW_UPLOADED_FILES)
    train(tiny(**{**values, "epochs": 4}, resume=str(run), max_steps=18))  # the fourth epoch is incomplete
    run_id, tracked, columns = read_mlflow()
    assert run_id == first_run_id
    assert tracked.data.tags["resumed.epochs"] == "4"
    train(tiny(**{**values, "epochs": 4}, resume=str(run)))  # its row is removed, which MLflow cannot do: a new run
    run_id, tracked, columns = read_mlflow()
    assert_same_rows(run, columns, float)
    assert len(columns["val_acc"]) == 4
    assert client.get_run(first_run_id).info.lifecycle_stage == "deleted"
    experiment = client.get_experiment_by_name("fastcifar")
    assert [mlflow_run.info.run_id for mlflow_run in client.search_runs([experiment.experiment_id])] == [run_id]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "mlflow.db").write_text("not a database" * 100)
    with pytest.raises(UsageError, match="MLflow cannot use"):
        train(tiny(**values, out=str(tmp_path / "bad" / "run")))
    assert not (tmp_path / "bad" / "run").exists()


def test_busy_database_does_not_start_another_mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("mlflow.exceptions")
    locked_error = exceptions.MlflowException("database is locked")
    missing_error = exceptions.MlflowException("no such run", error_code=exceptions.RESOURCE_DOES_NOT_EXIST)
    requested_ids = []

    class Client:
        def get_run(self, run_id: str) -> None:
            requested_ids.append(run_id)
            raise error

    error = locked_error
    assert trackers._find_resumable_mlflow_run(Client(), tmp_path, set()) is None
    (tmp_path / "mlflow.json").write_text('{"run_')
    assert trackers._find_resumable_mlflow_run(Client(), tmp_path, set()) is None
    (tmp_path / "mlflow.json").write_text('{"run_id": "one"}')
    with pytest.raises(exceptions.MlflowException, match="locked"):
        trackers._find_resumable_mlflow_run(Client(), tmp_path, set())
    error = missing_error
    assert trackers._find_resumable_mlflow_run(Client(), tmp_path, set()) is None
    assert requested_ids == ["one", "one"]


@pytest.mark.parametrize("tags", [{}, {"fastcifar.folder": "/another"}])
def test_fault36_a_file_with_the_id_of_another_mlflow_run_does_not_change_that_run(
    tags: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("mlflow.exceptions")
    (tmp_path / "mlflow.json").write_text('{"run_id": "one"}')
    client = SimpleNamespace(
        get_run=lambda _: SimpleNamespace(
            data=SimpleNamespace(tags=tags), info=SimpleNamespace(lifecycle_stage="active")
        ),
        get_metric_history=lambda *_: pytest.fail("it uses the run"),
        delete_run=lambda _: pytest.fail("it deletes the run"),
    )
    assert trackers._find_resumable_mlflow_run(client, tmp_path, set()) is None


def read_wandb(folder: Path) -> tuple[list[Any], Points]:
    """Return the records of the only offline run in `folder`, and the points of its history.

    The file has LevelDB's log format: after a header of 7 bytes, blocks of 32 KiB with the parts of the records.
    """
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    pytest.importorskip("wandb").teardown()  # waits for the process that writes the file
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, position, parts, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if (remainder := 32768 - position % 32768) < 7:
            position += remainder
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        position += 7 + size
        parts += content[position - size : position]
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(internal.Record.FromString(parts))
            parts = b""
    points: Points = {}
    for record in records:
        for item in record.history.item:
            points.setdefault(item.nested_key[0], []).append((record.history.step.num, json.loads(item.value_json)))
    return records, points


@pytest.fixture
def wandb_without_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the settings and API keys of the user from Weights & Biases."""
    pytest.importorskip("wandb").teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in trackers.WANDB_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # restores the variables that the tracker sets
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))


@pytest.mark.slow
@pytest.mark.usefixtures("offline", "wandb_without_key")
def test_wandb_contains_every_metric_of_an_interrupted_run(
    tiny: MakeRecipe,
    tmp_path: Path,
    train_interrupted: Callable[[Recipe, int], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, values = tmp_path / "run", {"track": "wandb", "epochs": 3}
    train_interrupted(tiny(**values), 8)  # five steps per epoch
    first_id = json.loads((run / "wandb.json").read_text())["run_id"]
    records, points = read_wandb(run)
    assert_same_rows(run, points, float)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]
    train(tiny(**values, resume=str(run), max_steps=13))  # logs a row of an incomplete epoch, which is removed later
    assert len(read_wandb(run)[1]["val_acc"]) == 3
    train(tiny(**values, resume=str(run)))
    records, points = read_wandb(run)
    assert_same_rows(run, points, float)
    events, _ = read_rows(run)
    assert [time_s for _, time_s in points["_timestamp"][:2]] == [event["time"] for event in events[:2]]
    (start,) = [record.run for record in records if record.HasField("run")]
    assert (start.run_id, start.project, start.display_name) == (first_id, "fastcifar", "run")
    config = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert (config["lr"], config["blocks"], config["data"]) == (0.1, "[1, 1]", "synthetic:200")
    summary = json.loads((run / "summary.json").read_text())
    results = {item.key: json.loads(item.value_json) for record in records for item in record.summary.update}
    assert (results["test_acc"], results["per_class"]) == (summary["test_acc"], summary["per_class"])
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    (folder,) = run.glob("wandb/offline-run-*")
    assert trackers.view_commands("wandb", run) == [f"wandb sync {folder}"]
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.medium
@pytest.mark.usefixtures("wandb_without_key")
def test_wandb_without_an_answer_of_the_server_records_offline(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of the discard protocol: nothing answers
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    with pytest.warns(UserWarning, match=r"server of wandb cannot be used \(.*; the run is recorded offline") as caught:
        train(tiny(track="wandb"))
    assert len(caught) == 1
    assert_same_rows(tmp_path / "run", read_wandb(tmp_path / "run")[1], float)


@pytest.mark.medium
@pytest.mark.usefixtures("wandb_without_key")
def test_disabled_wandb_writes_nothing(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert train(tiny(track="wandb")).complete
    assert not (tmp_path / "run" / "wandb").exists()
    assert trackers.view_commands("wandb", tmp_path / "run") == []


class OnlineRun:
    """A stand-in for a run on the server of Weights & Biases, which contains `starting_step` rows."""

    def __init__(self, run_id: str, starting_step: int) -> None:
        self.id, self.starting_step, self.url = run_id, starting_step, f"https://wandb.example/{run_id}"
        self.exit_codes: list[int] = []

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.mark.parametrize(("rows_on_server", "expected_id", "logged_epochs"), [(2, "old", {0, 1}), (3, "new", set())])
def test_online_wandb_run_is_continued_unless_it_contains_removed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_on_server: int, expected_id: str, logged_epochs: set[int]
) -> None:
    old, new = OnlineRun("old", rows_on_server), OnlineRun("new", 0)
    monkeypatch.setattr(trackers, "_start_wandb_run", lambda _, run_id: old if run_id == "old" else new)
    (tmp_path / "wandb.json").write_text('{"run_id": "old"}')
    session = trackers.open_wandb(tmp_path, {0, 1})
    assert session.logged_epochs == logged_epochs
    assert old.exit_codes == ([1] if expected_id == "new" else [])
    assert trackers.view_commands("wandb", tmp_path) == [f"https://wandb.example/{expected_id}"]


@pytest.mark.parametrize("value", ["", None])
def test_empty_mlflow_tracking_uri_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if value is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert trackers.resolve_tracking_uri(tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert trackers.view_commands("tensorboard,mlflow", tmp_path / "run") == [
        f"tensorboard --logdir {tmp_path}",
        f"mlflow ui --backend-store-uri sqlite:///{tmp_path / 'mlflow.db'}",
    ]
    assert trackers.view_commands("none", tmp_path / "run") == []


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on network connections."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.medium
def test_failing_tracker_warns_once_and_logs_missing_rows_later(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    flush, calls = tensorboard.SummaryWriter.flush, []

    def failing_flush(self: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", failing_flush)
    with pytest.warns(UserWarning, match="training continues") as caught:
        summary = train(tiny(epochs=3, track="tensorboard"))
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        "tensorboard failed (OSError: [Errno 28] No space left on device)"
    ]
    assert summary.complete
    assert_same_rows(tmp_path / "run", read_tensorboard(tmp_path / "run"), np.float32)
    assert set(count_scalars(tmp_path / "run").values()) == {1}


def test_rows_removed_by_a_rollback_are_removed_from_the_tracker(tiny: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    run = Run.create(tiny(), "name", ["tensorboard"])
    for epoch, loss in ((0, 2.0), (1, 3.0), (2, 9.0)):
        run.log_epoch(epoch_row(epoch, loss))
    run.truncate_rows(1)
    run.log_epoch(epoch_row(1, 1.5))
    assert read_tensorboard(run.folder)["train_loss"] == [(0, 2.0), (1, 1.5)]
    assert_same_rows(run.folder, read_tensorboard(run.folder), np.float32)
    assert set(count_scalars(run.folder).values()) == {1}


@pytest.mark.medium
def test_tracker_enabled_later_logs_earlier_rows(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny(epochs=1))
    train(tiny(epochs=2, resume=str(tmp_path / "run"), track="tensorboard"))
    assert_same_rows(tmp_path / "run", read_tensorboard(tmp_path / "run"), np.float32)


@pytest.mark.parametrize(
    ("track", "missing", "message"),
    [
        ("tensorbord", None, "did you mean 'tensorboard'?"),
        ("csv,tensorboard", None, "unknown tracker 'csv'"),
        ("tensorboard", "torch.utils.tensorboard", "pip install '.[tensorboard]'"),
        ("tensorboard,mlflow", "mlflow", "pip install '.[mlflow]'"),
        ("wandb", "wandb", "pip install '.[wandb]'"),
    ],
)
def test_unavailable_trackers_are_rejected_before_anything_is_written(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: str, missing: str | None, message: str
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError) as caught:
        train(tiny(track=track))
    assert caught.value.exit_code == 2
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_only_the_main_process_has_trackers(tmp_path: Path) -> None:
    assert not Run(tmp_path, "name").trackers
    assert not list(tmp_path.iterdir())
