"""An Optuna study as a sweep: pruned as Optuna says, killed and gone on with as if it never was, never over its n."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fastcifar.errors import UsageError
from fastcifar.sweep.executors import ExecutorOptions
from fastcifar.sweep.study import OptunaStudy
from fastcifar.sweep.sweep import plan_sweep, run_sweep
from fastcifar.sweep.sweep_spec import read_sweep_spec
from tests.faults import children
from tests.sweep.sweeps import assert_equal_sweeps, file, lines, states

optuna = pytest.importorskip("optuna", reason="Optuna is not installed")

STUDY = "[study]\nn = {n}\npruner = '{pruner}'\nlr.log = [{ends}]\nactivation.choice = ['relu', 'silu']\n"


def ask(
    folder: Path, n: int = 4, pruner: str = "none", more: str = "", epochs: int = 2, ends: str = "1e-7, 1e-5"
) -> str:
    """A file of a study with one seed."""
    source = Path(file(folder, STUDY.format(n=n, pruner=pruner, ends=ends) + more, epochs))
    source.write_text(source.read_text().replace("seeds = 2\n", ""))
    return str(source)


def known(folder: Path) -> list[Any]:
    """Optuna's own record of the only study in a sweep's folder."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    return optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend)).trials


def accuracies(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as rows:
        return [float(row["val_acc"]) for row in csv.DictReader(rows)]


def test_trials_are_pruned_where_optunas_pruner_says_so_and_none_without_one(tmp_path: Path) -> None:
    for pruner, expected in (("median:2", "pruned"), ("none", "done")):
        (folder := tmp_path / expected).mkdir()
        source = ask(tmp_path, 4, pruner, epochs=3)
        study = OptunaStudy(*read_sweep_spec(source), folder)
        study.open_study()
        for activation in ("relu", "silu"):  # two that did so well that no other will reach them
            good = optuna.trial.create_trial(
                params={"lr": 1e-6, "activation": activation},
                distributions={
                    "lr": optuna.distributions.FloatDistribution(1e-7, 1e-5, log=True),
                    "activation": optuna.distributions.CategoricalDistribution(["relu", "silu"]),
                },
                value=0.99,
                intermediate_values={0: 0.99, 1: 0.99, 2: 0.99},
            )
            study.optuna_study.add_trial(good)
        found = run_sweep(source, folder)
        assert found["counts"][expected] == len(found["trials"]) == 2
        for row, trial in zip(found["trials"], known(folder)[2:], strict=True):
            reported = accuracies(folder / row["run"])
            assert list(trial.intermediate_values) == list(range(1 if expected == "pruned" else 3))
            assert list(trial.intermediate_values.values()) == pytest.approx(reported)
            assert trial.state == getattr(optuna.trial.TrialState, {"pruned": "PRUNED", "done": "COMPLETE"}[expected])
            assert row["knobs"] == {"lr": float(f"{trial.params['lr']:.4g}"), "activation": trial.params["activation"]}
            assert row["test_acc"] is not None
        assert known(folder)[3].value == pytest.approx(accuracies(folder / found["trials"][-1]["run"])[-1])


def test_fault01_a_study_killed_goes_on_as_if_it_never_was(tmp_path: Path) -> None:
    ends = "0.005, 0.5"  # where accuracies differ, so that what is chosen next depends on them
    source, killed = ask(tmp_path, 4, ends=ends), tmp_path / "killed"
    process = children.start(children.fastcifar, tmp_path / "log", 0.02, "sweep", source, "--out", str(killed))
    children.wait_for(lambda: len(states(killed)) == 2 and list(killed.glob("runs/1-*/checkpoints/last.pt")))
    os.kill(process.pid, signal.SIGKILL)
    children.wait_for_exit(process)
    found = run_sweep(source, killed)
    assert found["counts"]["done"] == 4
    run_sweep(source, tmp_path / "whole")
    assert_equal_sweeps(killed, tmp_path / "whole")
    mine, other = known(killed), known(tmp_path / "whole")
    assert [(t.number, t.params, t.value) for t in mine] == [(t.number, t.params, t.value) for t in other]
    length = len(lines(killed))
    assert run_sweep(source, killed) == found
    assert (len(lines(killed)), len(known(killed))) == (length, 4)
    assert run_sweep(ask(tmp_path, 5, ends=ends), killed)["counts"]["done"] == 5


def test_two_processes_report_to_one_study(tmp_path: Path) -> None:
    found = run_sweep(ask(tmp_path, 3, "asha:2"), tmp_path / "out", "processes", ExecutorOptions(jobs=2, cpus=1))
    assert found["counts"]["done"] + found["counts"]["pruned"] == 3
    for trial in known(tmp_path / "out"):
        (row,) = [row for row in found["trials"] if row["label"].startswith(f"{trial.number}: ")]
        assert list(trial.intermediate_values.values()) == pytest.approx(accuracies(tmp_path / "out" / row["run"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"more": "[grid]\nepochs = [1, 2]\n"}, "a [study] chooses all points itself"),
        ({"pruner": "mediam"}, "unknown pruner 'mediam'; did you mean 'median'?"),
        ({"pruner": "asha:1"}, "pruner 'asha:1'"),
        ({"more": "optimizer.choice = ['sgd', 'sdg']\n"}, "optimizer=sdg: unknown optimizer 'sdg'"),
        ({"more": "dropout.uniform = [0.5, 1.5]\n"}, "--dropout should be less than 1"),
    ],
)
def test_fault15_what_a_study_cannot_be_is_said_before_it_runs(
    tmp_path: Path, text: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run_sweep(ask(tmp_path, **text), tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_flags_make_of_a_study(tmp_path: Path) -> None:
    source, out = ask(tmp_path), tmp_path / "out"
    assert plan_sweep(source, out)["steps"] == 4 * 2 * 5
    asked: list[dict[str, Any]] = [{"seeds": "2"}, {"val_size": "0"}, {"lr": "0.1"}, {"retry_failed": True}]
    for refused in asked:
        with pytest.raises(UsageError):
            run_sweep(source, out, **refused)
    assert not out.exists()


def test_fault18_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"optuna cannot be imported .*; pip install 'fastcifar\[sweep\]'"):
        run_sweep(ask(tmp_path), tmp_path / "out")
