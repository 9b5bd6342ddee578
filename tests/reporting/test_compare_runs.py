"""Comparison of two runs, with synthetic run folders that have known differences and with trained runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcifar.errors import DataError, UsageError
from fastcifar.recipe import Recipe
from fastcifar.reporting.compare import compare_paths
from fastcifar.training.train import train
from tests.faults.children import run_fastcifar
from tests.reporting.run_folders import write_run


def make_run(folder: Path, val_acc: list[float], test_acc: float | None = None, **options: Any) -> Path:
    """Write a run folder; without `test_acc` it has no summary, as if interrupted."""
    versions = {"torch": "2.15" if test_acc else "2.14", "numpy": "2.0"}
    environment = {"started": folder.name, "command": [folder.name], "versions": versions}
    finished = test_acc is not None
    return write_run(folder, val_acc, test_acc, finished=finished, environment=environment, **{"epochs": 9, **options})


def test_differences_of_options_environment_and_curves(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [0.3, 0.6, 0.5], lr=0.1, optimizer_arg={"nesterov": True})
    b = make_run(tmp_path / "b", [0.3, 0.4], 0.4, lr=0.2, seed=3, out="b", save_every_epochs=5, track="mlflow")
    comparison, _ = compare_paths(a, b)
    assert (comparison["kind"], comparison["a"], comparison["b"]) == ("run", str(a), str(b))
    assert comparison["recipe"] == {"lr": [0.1, 0.2], "optimizer_arg": [{"nesterov": True}, {}], "seed": [0, 3]}
    assert comparison["environment"] == {"versions.torch": ["2.14", "2.15"]}
    assert (comparison["epochs"], comparison["equal_epochs"]) == ([3, 2], 2)
    assert comparison["curves"]["val_acc"] == {"final": [0.5, 0.4], "best": [0.6, 0.4], "at_equal_epochs": [0.6, 0.4]}
    assert set(map(tuple, comparison["curves"]["ema_val_acc"].values())) == {(None, None)}
    columns = ["train_loss", "train_acc", "val_loss", "val_acc"]
    assert comparison["first_difference"] == {"epoch": 1, "columns": columns}
    assert comparison["accuracy"]["measured"] == "val_acc"  # a was not tested
    assert comparison["accuracy"]["n"] == [5000, 5000]


@pytest.mark.parametrize(("other", "within"), [(0.9, True), (0.9080, True), (0.9085, False), (0.89, False)])
def test_accuracy_difference_is_compared_with_binomial_noise(tmp_path: Path, other: float, within: bool) -> None:
    """For 0.90 of 10,000 images each, the standard error of the difference is 0.00424 and its 95 % interval ±0.0083."""
    pair = [make_run(tmp_path / name, [0.9], acc) for name, acc in (("a", 0.9), ("b", other))]
    accuracy = compare_paths(*pair)[0]["accuracy"]
    assert (accuracy["measured"], accuracy["n"]) == ("test_acc", [10_000, 10_000])
    assert accuracy["difference"] == pytest.approx(other - 0.9)
    assert accuracy["standard_error"] == pytest.approx(0.00424, abs=1.5e-4)
    assert accuracy["within_noise"] is within


def test_missing_measurements_are_not_compared(tmp_path: Path) -> None:
    comparison, _ = compare_paths(*(make_run(tmp_path / name, [], val_size=0) for name in "ab"))
    assert (comparison["accuracy"], comparison["first_difference"], comparison["epochs"]) == (None, None, [0, 0])


def test_damaged_runs_and_different_kinds_are_refused(tmp_path: Path) -> None:
    a, b = (make_run(tmp_path / name, [0.1]) for name in "ab")
    (b / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"b: summary\.json: Invalid JSON"):
        compare_paths(a, b)
    (tmp_path / "labels.csv").write_text("ID,Labels\n1,2\n")
    with pytest.raises(UsageError, match=r"is a run and .* is a submission"):
        compare_paths(a, tmp_path / "labels.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is not a run or benchmark or submission"):
        compare_paths(a, tmp_path / "empty")
    (b / "recipe.toml").write_text("lr = -1\n")
    with pytest.raises(UsageError, match="--lr"):
        compare_paths(a, b)


@pytest.mark.slow
def test_compare_command_on_trained_runs(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        train(tiny(out=str(tmp_path / name), seed=seed))

    comparison = json.loads(run_fastcifar("compare", "a", "b", "--json", cwd=tmp_path).stdout)
    assert comparison["recipe"] == {"seed": [0, 1]}
    assert comparison["environment"] == {}
    assert comparison["first_difference"]["epoch"] == 0
    assert comparison["accuracy"]["n"] == [40, 40]
    table = run_fastcifar("compare", "a", "again", cwd=tmp_path).stdout
    assert "the same recipe and environment" in table
    assert "do not differ in the 2 common epochs" in table
    assert "+0.00 points" in table
    assert "within the noise of 40" in table
