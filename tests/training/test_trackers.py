"""Trackers, read back by their own readers: every metric of metrics.csv, once, also of a run that was interrupted."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
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

Make = Callable[..., Recipe]
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, int], None]:
    """Trains until SIGINT arrives in a step."""

    def run(recipe: Recipe, step: int) -> None:
        between_steps = OptimizerWrapper.after_step

        def signalled(self: OptimizerWrapper, done: int, *given: Any) -> None:
            between_steps(self, done, *given)
            if done == step:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(OptimizerWrapper, "after_step", signalled)
            with pytest.raises(Interrupted):
                train(recipe)

    return run


def written(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The rows as events.jsonl has them, in full, and as metrics.csv has them, in six digits."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    with (folder / "metrics.csv").open(newline="") as file:
        return events, list(csv.DictReader(file))


def assert_the_same_rows(folder: Path, found: Points, rounded: Callable[[Any], Any]) -> None:
    """`found`: of each column (step, value) as a tracker's reader gives them; `rounded`: as the tracker keeps them."""
    events, table = written(folder)
    assert len(events) == len(table) > 0
    for name in METRICS_COLUMNS:
        expected = [(event["epoch"], rounded(event[name])) for event in events if event[name] is not None]
        assert found.get(name, []) == expected, name
        printed = [float(row[name]) for row in table if row[name]]
        assert [value for _, value in found.get(name, [])] == pytest.approx(printed, rel=1e-5), name


def tensorboard_rows(folder: Path) -> Points:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    found = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    return {name: points for name, points in found.items() if name in METRICS_COLUMNS}


def raw_counts(folder: Path) -> Counter[tuple[str, int]]:
    """How often a scalar and step stands in the event files, whatever a reader makes of that."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    events = [
        event for file in (folder / "tensorboard").iterdir() for event in loader.EventFileLoader(str(file)).Load()
    ]
    return Counter(
        (value.tag, event.step) for event in events for value in event.summary.value if value.tag in METRICS_COLUMNS
    )


def test_tensorboard_reads_back_every_metric_of_an_interrupted_run(
    tiny: Make, tmp_path: Path, interrupted: Callable[[Recipe, int], None]
) -> None:
    run, values = tmp_path / "run", {"track": "tensorboard", "epochs": 3, "ema_decay": 0.9}
    interrupted(tiny(**values), 8)  # of five an epoch
    assert_the_same_rows(run, tensorboard_rows(run), np.float32)
    train(tiny(**values, resume=str(run), max_steps=13))  # a row of an epoch that is cut short, and taken back then
    assert len(tensorboard_rows(run)["val_acc"]) == 3
    train(tiny(**values, resume=str(run)))
    assert_the_same_rows(run, tensorboard_rows(run), np.float32)
    assert set(raw_counts(run).values()) == {1}
    assert len(raw_counts(run)) == 3 * len(METRICS_COLUMNS)
    train(tiny(**{**values, "epochs": 4}, resume=str(run)))
    assert_the_same_rows(run, tensorboard_rows(run), np.float32)


@pytest.mark.usefixtures("offline")
def test_mlflow_reads_back_every_metric_of_an_interrupted_run(
    tiny: Make, tmp_path: Path, interrupted: Callable[[Recipe, int], None]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    run, values = tmp_path / "run", {"track": "mlflow", "epochs": 2}
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def found() -> tuple[str, Any, Points]:
        run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
        histories = {name: client.get_metric_history(run_id, name) for name in METRICS_COLUMNS}
        return run_id, client.get_run(run_id), {
            name: sorted((metric.step, metric.value) for metric in history) for name, history in histories.items()
        }  # fmt: skip

    interrupted(tiny(**values), 8)
    first, tracked, columns = found()
    assert tracked.info.status == "KILLED"
    assert_the_same_rows(run, columns, float)
    train(tiny(**values, resume=str(run)))
    run_id, tracked, columns = found()
    assert run_id == first
    assert (tracked.info.status, tracked.info.run_name) == ("FINISHED", "run")
    assert_the_same_rows(run, columns, float)
    summary = json.loads((run / "summary.json").read_text())
    assert tracked.data.metrics["test_acc"] == summary["test_acc"]
    assert (tracked.data.params["lr"], tracked.data.params["blocks"]) == ("0.1", "[1, 1]")
    assert {artifact.path for artifact in client.list_artifacts(run_id)} == set(trackers.MLFLOW_UPLOADED_FILES)
    train(tiny(**{**values, "epochs": 4}, resume=str(run), max_steps=18))  # the fourth epoch is cut short
    run_id, tracked, columns = found()
    assert run_id == first
    assert tracked.data.tags["resumed.epochs"] == "4"
    train(tiny(**{**values, "epochs": 4}, resume=str(run)))  # its row is taken back: not in MLflow, so a new run
    run_id, tracked, columns = found()
    assert_the_same_rows(run, columns, float)
    assert len(columns["val_acc"]) == 4
    assert client.get_run(first).info.lifecycle_stage == "deleted"
    experiment = client.get_experiment_by_name("fastcifar")
    assert [one.info.run_id for one in client.search_runs([experiment.experiment_id])] == [run_id]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "mlflow.db").write_text("no data base" * 100)
    with pytest.raises(UsageError, match="MLflow cannot use"):
        train(tiny(**values, out=str(tmp_path / "bad" / "run")))
    assert not (tmp_path / "bad" / "run").exists()


def test_a_data_base_that_is_busy_is_no_reason_for_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("mlflow.exceptions")
    busy = exceptions.MlflowException("database is locked")
    gone = exceptions.MlflowException("no such run", error_code=exceptions.RESOURCE_DOES_NOT_EXIST)
    asked = []

    class Client:
        def get_run(self, run_id: str) -> None:
            asked.append(run_id)
            raise error

    error = busy
    assert trackers._find_resumable_mlflow_run(Client(), tmp_path, set()) is None
    (tmp_path / "mlflow.json").write_text('{"run_')
    assert trackers._find_resumable_mlflow_run(Client(), tmp_path, set()) is None
    (tmp_path / "mlflow.json").write_text('{"run_id": "one"}')
    with pytest.raises(exceptions.MlflowException, match="locked"):
        trackers._find_resumable_mlflow_run(Client(), tmp_path, set())
    error = gone
    assert trackers._find_resumable_mlflow_run(Client(), tmp_path, set()) is None
    assert asked == ["one", "one"]


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_address_of_mlflow_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if value is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert trackers.tracking_uri_from_env() is None
    assert trackers.resolve_tracking_uri(tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may leave the machine."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_tracker_that_fails_is_one_warning_and_catches_up(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    flush, calls = tensorboard.SummaryWriter.flush, []

    def full(self: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", full)
    with pytest.warns(UserWarning, match="the run goes on") as caught:
        summary = train(tiny(epochs=3, track="tensorboard"))
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        "tensorboard failed (OSError: [Errno 28] No space left on device)"
    ]
    assert summary["complete"]
    assert_the_same_rows(tmp_path / "run", tensorboard_rows(tmp_path / "run"), np.float32)
    assert set(raw_counts(tmp_path / "run").values()) == {1}


def test_rows_that_a_rollback_takes_back_are_gone(tiny: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    run = Run.create(tiny(track="tensorboard"), "name")
    for epoch, loss in ((0, 2.0), (1, 3.0), (2, 9.0)):
        run.log_epoch(dict.fromkeys(METRICS_COLUMNS, 0.5) | {"epoch": epoch, "train_loss": loss})
    run.truncate_rows(1)
    run.log_epoch(dict.fromkeys(METRICS_COLUMNS, 0.5) | {"epoch": 1, "train_loss": 1.5})
    assert tensorboard_rows(run.folder)["train_loss"] == [(0, 2.0), (1, 1.5)]
    assert_the_same_rows(run.folder, tensorboard_rows(run.folder), np.float32)
    assert set(raw_counts(run.folder).values()) == {1}


def test_a_tracker_that_begins_late_gets_the_rows_before_too(tiny: Make, tmp_path: Path) -> None:
    train(tiny(epochs=1))
    train(tiny(epochs=2, resume=str(tmp_path / "run"), track="tensorboard"))
    assert_the_same_rows(tmp_path / "run", tensorboard_rows(tmp_path / "run"), np.float32)


@pytest.mark.parametrize(
    ("track", "missing", "words"),
    [
        ("tensorbord", None, "did you mean 'tensorboard'?"),
        ("csv,tensorboard", None, "unknown tracker 'csv'"),
        ("tensorboard", "torch.utils.tensorboard", "pip install 'tensorboard>=2.18,<3'"),
        ("tensorboard,mlflow", "mlflow", "pip install 'mlflow>=3,<4'"),
    ],
)
def test_a_tracker_that_is_not_there_refuses_the_run_before_it_is_made(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: str, missing: str | None, words: str
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError) as caught:
        train(tiny(track=track))
    assert caught.value.exit_code == 2
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_only_the_leading_rank_has_trackers(tmp_path: Path) -> None:
    assert not Run.for_other_rank(tmp_path, "name").trackers
    assert not list(tmp_path.iterdir())
