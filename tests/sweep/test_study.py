"""Sweeps by Optuna: pruning, resuming after a kill, several processes, and invalid studies."""

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
from tests.sweep.sweeps import assert_equal_sweeps, read_log_lines, trial_states, write_sweep_file

optuna = pytest.importorskip("optuna", reason="Optuna is not installed")

STUDY = "[study]\nn = {n}\npruner = '{pruner}'\nlr.log = [{ends}]\nactivation.choice = ['relu', 'silu']\n"


def write_study_file(
    folder: Path, n: int = 4, pruner: str = "none", axes: str = "", epochs: int = 2, ends: str = "1e-7, 1e-5"
) -> str:
    """Write a sweep file with a study and one seed, and return its path."""
    source = Path(write_sweep_file(folder, STUDY.format(n=n, pruner=pruner, ends=ends) + axes, epochs))
    source.write_text(source.read_text().replace("seeds = 2\n", ""))
    return str(source)


def optuna_trials(folder: Path) -> list[Any]:
    """Return the trials in the journal of the only study in a sweep folder."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    return optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend)).trials


def val_accuracies(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as rows:
        return [float(row["val_acc"]) for row in csv.DictReader(rows)]


@pytest.mark.slow
def test_trials_are_pruned_by_the_pruner_only(tmp_path: Path) -> None:
    for pruner, expected in (("median:2", "pruned"), ("none", "done")):
        (folder := tmp_path / expected).mkdir()
        source = write_study_file(tmp_path, 4, pruner, epochs=3)
        study = OptunaStudy(*read_sweep_spec(source), folder)
        for activation in ("relu", "silu"):  # two trials with accuracies that no other trial reaches
            best_trial = optuna.trial.create_trial(
                params={"lr": 1e-6, "activation": activation},
                distributions={
                    "lr": optuna.distributions.FloatDistribution(1e-7, 1e-5, log=True),
                    "activation": optuna.distributions.CategoricalDistribution(["relu", "silu"]),
                },
                value=0.99,
                intermediate_values={0: 0.99, 1: 0.99, 2: 0.99},
            )
            study.optuna_study.add_trial(best_trial)
        document = run_sweep(source, folder)
        assert document.counts[expected] == len(document.trials) == 2
        for row, trial in zip(document.trials, optuna_trials(folder)[2:], strict=True):
            reported = val_accuracies(folder / row.folder)
            assert list(trial.intermediate_values) == list(range(1 if expected == "pruned" else 3))
            assert list(trial.intermediate_values.values()) == pytest.approx(reported)
            assert trial.state == getattr(optuna.trial.TrialState, {"pruned": "PRUNED", "done": "COMPLETE"}[expected])
            assert row.knobs == {"lr": float(f"{trial.params['lr']:.4g}"), "activation": trial.params["activation"]}
            assert row.test_acc is not None
        assert optuna_trials(folder)[3].value == pytest.approx(val_accuracies(folder / document.trials[-1].folder)[-1])


@pytest.mark.slow
def test_fault01_resumed_study_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    ends = "0.005, 0.5"  # accuracies differ in this range, so that the next point depends on them
    source, killed = write_study_file(tmp_path, 4, ends=ends), tmp_path / "killed"
    process = children.start(children.fastcifar, tmp_path / "log", 0.02, "sweep", source, "--out", str(killed))
    children.wait_for(lambda: len(trial_states(killed)) == 2 and list(killed.glob("runs/1-*/checkpoints/last.pt")))
    os.kill(process.pid, signal.SIGKILL)
    children.wait_for_exit(process)
    document = run_sweep(source, killed)
    assert document.counts["done"] == 4
    run_sweep(source, tmp_path / "uninterrupted")
    assert_equal_sweeps(killed, tmp_path / "uninterrupted")
    resumed, uninterrupted = optuna_trials(killed), optuna_trials(tmp_path / "uninterrupted")
    assert [(t.number, t.params, t.value) for t in resumed] == [(t.number, t.params, t.value) for t in uninterrupted]
    length = len(read_log_lines(killed))
    assert run_sweep(source, killed) == document
    assert (len(read_log_lines(killed)), len(optuna_trials(killed))) == (length, 4)
    assert run_sweep(write_study_file(tmp_path, 5, ends=ends), killed).counts["done"] == 5


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    document = run_sweep(
        write_study_file(tmp_path, 3, "asha:2"), tmp_path / "out", "processes", ExecutorOptions(jobs=2, cpus=1)
    )
    assert document.counts["done"] + document.counts["pruned"] == 3
    for trial in optuna_trials(tmp_path / "out"):
        (row,) = [row for row in document.trials if row.label.startswith(f"{trial.number}: ")]
        assert list(trial.intermediate_values.values()) == pytest.approx(val_accuracies(tmp_path / "out" / row.folder))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"axes": "[grid]\nepochs = [1, 2]\n"}, "a [study] samples all points itself"),
        ({"pruner": "mediam"}, "unknown pruner 'mediam'; did you mean 'median'?"),
        ({"pruner": "asha:1"}, "pruner 'asha:1'"),
        ({"pruner": "none:5"}, "pruner 'none:5': none takes no number"),
        ({"axes": "optimizer.choice = ['sgd', 'sdg']\n"}, "optimizer=sdg: unknown optimizer 'sdg'"),
        ({"axes": "dropout.uniform = [0.5, 1.5]\n"}, "--dropout should be less than 1"),
    ],
)
def test_fault15_invalid_studies_are_refused_before_anything_runs(
    tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run_sweep(write_study_file(tmp_path, **arguments), tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_points_whose_values_do_not_fit_together_are_left_out(tmp_path: Path) -> None:
    axes = "epochs.integer = [3, 6]\nfreeze_stem_epochs.integer = [1, 5]\n"  # invalid unless 1 is less than the other
    source = write_study_file(tmp_path, n=12, axes=axes)
    source_text = Path(source).read_text().replace("epochs = 2\n", "")
    Path(source).write_text(source_text)
    (tmp_path / "out").mkdir()
    study = OptunaStudy(*read_sweep_spec(source), tmp_path / "out")
    with pytest.warns(UserWarning, match=r"^trial \d+: .*freeze_stem_epochs=\d.* is not run: .*is not less than"):
        trials = list(study.remaining_trials())
    assert 0 < len(trials) < 12
    assert all(trial.recipe.freeze_stem_epochs < trial.recipe.epochs for trial in trials)
    with pytest.warns(UserWarning, match="is not run"):
        again = OptunaStudy(*read_sweep_spec(source), tmp_path / "out").existing_trials()
    assert [trial.key for trial in again] == [trial.key for trial in trials]


@pytest.mark.medium
def test_options_that_a_study_does_not_support_are_refused(tmp_path: Path) -> None:
    source, out = write_study_file(tmp_path), tmp_path / "out"
    assert plan_sweep(source, out).steps == 4 * 2 * 5
    cases: list[dict[str, Any]] = [{"seeds": "2"}, {"val_size": "0"}, {"lr": "0.1"}, {"retry_failed": True}]
    for options in cases:
        with pytest.raises(UsageError):
            run_sweep(source, out, **options)
    assert not out.exists()


def test_fault18_missing_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"optuna cannot be imported .*; pip install '\.\[sweep\]'"):
        run_sweep(write_study_file(tmp_path), tmp_path / "out")
