"""A resumed run is bit-identical to an uninterrupted one, or rejected with the options that differ."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastcifar.errors import CheckpointError, Interrupted, UsageError
from fastcifar.files import lock_folder
from fastcifar.format import option_flag
from fastcifar.recipe import Recipe, section_fields
from fastcifar.training import resume
from fastcifar.training.checkpoint import TrainingCheckpoint, read_checkpoint
from fastcifar.training.optimizers import OPTIMIZERS, OptimizerWrapper
from fastcifar.training.rng_state import collect_rng_state, restore_rng_state, seed_all
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.documentation import DOCUMENTATION
from tests.faults.runs import assert_equal_runs, contents, last, rows, summary

MakeRecipe = Callable[..., Recipe]
# With 5 steps per epoch: within the first epoch, at its end before validation, within the second epoch, at its end
STOP_STEPS = (3, 5, 8, 10)


@pytest.fixture
def train_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, int], Path]:
    """Return a function that trains until SIGTERM arrives in a given step."""
    after_step = OptimizerWrapper.after_step

    def run(recipe: Recipe, step: int) -> Path:
        def after_step_with_signal(self: OptimizerWrapper, completed_steps: int, *args: Any) -> None:
            after_step(self, completed_steps, *args)
            if completed_steps == step:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(OptimizerWrapper, "after_step", after_step_with_signal)
            with pytest.raises(Interrupted) as caught:
                train(recipe)
        assert caught.value.exit_code == 143
        assert last(str(recipe.out))["step"] == step
        return Path(str(recipe.out))

    return run


def stop_and_resume(train_until: Callable[[Recipe, int], Path], make: MakeRecipe, out: Path, **values: Any) -> Path:
    """Train in `out`, stopped at each of STOP_STEPS and resumed; return `out`."""
    for step in STOP_STEPS:
        train_until(make(**values, out=str(out), resume="auto"), step)
    train(make(**values, out=str(out), resume="auto"))
    return out


FAULT02: dict[str, Any] = {
    "ema_decay": 0.9, "label_smoothing": 0.1, "clip_grad": "norm:0.5", "patience": 2, "epochs": 9, "lr": 1e-5,
    "schedule": "plateau:1", "warmup_epochs": 1, "precision": "fp16", "augment": "crop:4:zero,flip,cutmix:1.0",
    "eval_weights": "best",
}  # fmt: skip
# The whitening layer is loaded, not initialized again; an epoch continues with its image size.
WHITENING = {
    "arch": "speed94", "image_size": "16:1,32", "optimizer": "muon", "lr": 0.05, "bias_lr_mult": 4.0,
    "head_lr_mult": 9.0, "optimizer_arg": {"weight_norm": True}, "activation": "gelu", "ema_decay": 0.9,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        *({"optimizer": name, "lr": 0.01, "dropout": 0.1} for name in ("lookahead:sgd", *OPTIMIZERS)),
        {**FAULT02, "save_every_epochs": 1},
        {**FAULT02, "save_every_epochs": 0, "save_every_steps": 3},
        WHITENING,
    ],
    ids=[*("lookahead:sgd", *OPTIMIZERS), "fault02 epochs", "fault02 steps", "whitening"],
)
def test_fault01_fault02_run_stopped_four_times_equals_an_uninterrupted_run(
    tiny: MakeRecipe, tmp_path: Path, train_until: Callable[[Recipe, int], Path], values: dict[str, Any]
) -> None:
    train(tiny(**values))
    assert_equal_runs(stop_and_resume(train_until, tiny, tmp_path / "again", **values), tmp_path / "run")
    assert not (tmp_path / "again-2").exists()
    if "patience" in values:
        assert summary(tmp_path / "run")["stop_reason"] == "patience"
    else:
        assert len(rows(tmp_path / "again")) == 2
    best = [read_checkpoint(tmp_path / name / "checkpoints" / "best.pt") for name in ("run", "again")]
    assert best[0]["step"] == best[1]["step"]


@pytest.mark.medium
def test_fault03_resuming_with_the_dali_loader(
    tiny: MakeRecipe, tmp_path: Path, train_until: Callable[[Recipe, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI cannot be imported")
    values: dict[str, Any] = {"loader": "dali", "augment": "crop:4:zero,flip,cutout:8", "dropout": 0.1}
    train(tiny(**values))
    assert_equal_runs(stop_and_resume(train_until, tiny, tmp_path / "again", **values), tmp_path / "run")
    train(tiny(**{**values, "loader": "tensor"}, out=str(tmp_path / "tensor")))
    assert rows(tmp_path / "tensor") == rows(tmp_path / "run")


@pytest.fixture
def restore_determinism_settings() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.medium
@pytest.mark.usefixtures("restore_determinism_settings")
def test_fault21_deterministic_option_gives_equal_runs(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    train(tiny(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    train(tiny(deterministic=True, out=str(tmp_path / "again")))
    assert_equal_runs(tmp_path / "again", tmp_path / "run")
    train(tiny(max_steps=1, out=str(tmp_path / "fast")))
    cudnn = torch.backends.cudnn
    assert (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark) == (False, False, True)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.medium
@pytest.mark.gpu
@pytest.mark.usefixtures("restore_determinism_settings")
@pytest.mark.parametrize("values", [{}, {"precision": "fp16", "optimizer": "adamw", "ema_decay": 0.9, "lr": 0.01}])
def test_fault01_resuming_with_a_cuda_graph(
    tiny: MakeRecipe, tmp_path: Path, train_until: Callable[[Recipe, int], Path], values: dict[str, Any]
) -> None:
    values = {"device": "cuda", "cuda_graph": True, "deterministic": True, "dropout": 0.1, "loader": "tensor", **values}
    train(tiny(**values))
    assert_equal_runs(stop_and_resume(train_until, tiny, tmp_path / "again", **values), tmp_path / "run")


def test_fault01_all_random_generators_are_seeded_and_saved() -> None:
    def draw_numbers() -> list[float]:
        return [torch.rand(()).item(), torch.randn(()).item(), np.random.standard_normal(), random.gauss(0, 1)]

    cpu = torch.device("cpu")
    seed_all(7)
    first = draw_numbers()
    file = io.BytesIO()
    torch.save(collect_rng_state(cpu), file)
    second = draw_numbers()
    file.seek(0)
    restore_rng_state(torch.load(file, weights_only=True), cpu)
    assert draw_numbers() == second != first
    seed_all(7)
    assert draw_numbers() == first
    seed_all(2**63 - 1)
    assert draw_numbers() != first


@pytest.mark.medium
def test_fault01_run_stopped_by_max_steps_continues(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny(epochs=3, eval_weights="best"))
    values = {"epochs": 3, "eval_weights": "best", "out": str(tmp_path / "cut")}
    assert train(tiny(**values, max_steps=7)).complete is False
    assert len(rows(tmp_path / "cut")) == 2
    assert train(Recipe(resume=str(tmp_path / "cut"), max_steps=12)).steps == 12
    train(Recipe(resume=str(tmp_path / "cut")))
    assert_equal_runs(tmp_path / "cut", tmp_path / "run")


@pytest.mark.medium
def test_fault01_best_checkpoint_of_an_epoch_that_max_steps_cut_short_continues(
    tiny: MakeRecipe, tmp_path: Path
) -> None:
    train(tiny(epochs=2))
    train(tiny(epochs=2, out=str(tmp_path / "cut"), max_steps=3))
    train(Recipe(resume=str(tmp_path / "cut" / "checkpoints" / "best.pt"), out=str(tmp_path / "again")))
    assert_equal_runs(tmp_path / "again", tmp_path / "run")


@pytest.mark.medium
def test_fault05_signal_after_the_last_step_of_an_epoch_loses_no_epoch(tiny: MakeRecipe, tmp_path: Path) -> None:
    values: dict[str, Any] = {"epochs": 3, "save_every_epochs": 0}
    train(tiny(**values))

    def stop(row: Any) -> None:
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(tiny(**values, out=str(tmp_path / "cut")), callbacks=[stop])
    assert last(tmp_path / "cut")["step"] == 10
    train(Recipe(resume=str(tmp_path / "cut")))
    assert_equal_runs(tmp_path / "cut", tmp_path / "run")


@pytest.mark.medium
def test_best_checkpoint_is_never_that_of_an_epoch_after_the_resumed_one(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter((0.4, 0.3, 0.5, 0.2))
    monkeypatch.setattr(
        Trainer, "validate", lambda self: {"val_loss": 1.0, "val_acc": next(accuracies), "ema_val_acc": None}
    )
    train(tiny(epochs=3))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (read_checkpoint(checkpoints / "best.pt")["step"], last(tmp_path / "run")["step"]) == (15, 15)
    source = str(checkpoints / "last.previous.pt")
    resumed = train(Recipe(resume=source, out=str(tmp_path / "fork"), max_steps=11, eval_weights="best"))
    best = read_checkpoint(tmp_path / "fork" / "checkpoints" / "best.pt")
    assert (resumed.best_val_acc, best["step"]) == (0.2, 11)


@pytest.mark.medium
def test_fault01_new_run_reuses_an_incomplete_run_folder_only(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny())
    incomplete, unrelated = tmp_path / "incomplete", tmp_path / "unrelated"
    (incomplete / "checkpoints").mkdir(parents=True)
    (incomplete / ".recipe.toml.x.tmp").write_text("arch =")
    unrelated.mkdir()
    (unrelated / "thesis.txt").write_text("text")
    for folder, used_folder in ((incomplete, incomplete), (unrelated, tmp_path / "unrelated-2")):
        assert train(tiny(out=str(folder), resume="auto")).run == str(used_folder)
        assert_equal_runs(used_folder, tmp_path / "run")
    assert not list(incomplete.rglob("*.tmp"))
    assert len(list(unrelated.iterdir())) == 1


@pytest.mark.medium
def test_fault01_fault08_damaged_run_is_resumed_from_the_previous_checkpoint_or_the_first_step(
    tiny: MakeRecipe, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    train(tiny(epochs=3))
    shutil.copytree(tmp_path / "run", damaged)
    path = damaged / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:-200])
    (damaged / "summary.json").unlink()
    with pytest.warns(UserWarning, match=r"last\.previous\.pt is used instead"):
        train(Recipe(resume=str(damaged)))
    assert_equal_runs(damaged, tmp_path / "run")
    shutil.rmtree(damaged / "checkpoints")
    (damaged / "summary.json").unlink()
    with (damaged / "metrics.csv").open("a") as file:
        file.write("2,15,0.0")  # truncated
    train(Recipe(resume=str(damaged)))
    assert_equal_runs(damaged, tmp_path / "run")


@pytest.mark.medium
@pytest.mark.parametrize("file", ["best.pt", "copy.pt"])
def test_fault01_resuming_from_a_checkpoint_file_in_a_new_folder(tiny: MakeRecipe, tmp_path: Path, file: str) -> None:
    train(tiny(epochs=3, save_every_epochs=1))
    source = tmp_path / "run" / "checkpoints" / file
    if file == "copy.pt":
        shutil.copy(tmp_path / "run" / "checkpoints" / "last.previous.pt", source)
    before = contents(tmp_path / "run")
    train(Recipe(resume=str(source), out=str(tmp_path / "fork")))
    assert_equal_runs(tmp_path / "fork", tmp_path / "run")
    assert contents(tmp_path / "run") == before


@pytest.mark.medium
@pytest.mark.parametrize(("source", "out", "run_name"), [("", "fork", "fork"), ("checkpoints/last.pt", None, "cut-2")])
def test_fault01_run_continues_in_another_folder_and_is_unchanged(
    tiny: MakeRecipe, tmp_path: Path, source: str, out: str | None, run_name: str
) -> None:
    train(tiny(epochs=3), "my_recipe")
    stopped_run = tmp_path / "cut"
    train(tiny(epochs=3, out=str(stopped_run), max_steps=7), "my_recipe")
    before = contents(stopped_run)
    resumed = train(Recipe.make(resume=str(stopped_run / source), out=out and str(tmp_path / out)))
    assert (resumed.run, resumed.recipe) == (str(tmp_path / run_name), "my_recipe")
    assert_equal_runs(tmp_path / run_name, tmp_path / "run")
    assert contents(stopped_run) == before


@pytest.mark.medium
def test_fault16_different_options_are_rejected_and_listed(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny(max_steps=3))
    different = {"channels": (8, 32), "optimizer": "adamw", "batch_size": 16, "lr": 0.2}
    for recipe in (tiny(**different, resume="auto"), Recipe.make(resume=str(tmp_path / "run"), **different)):
        with pytest.raises(CheckpointError) as caught:
            train(recipe)
        assert caught.value.exit_code == 4
        for message in ("--channels 8,16, not 8,32", "--optimizer lookahead:sgd, not adamw", "--batch-size 32, not 16"):
            assert message in str(caught.value)
    with pytest.raises(CheckpointError, match="on 160 images of 10 classes, not on 360 images"):
        train(Recipe(resume=str(tmp_path / "run"), data="synthetic:400"))
    with pytest.raises(CheckpointError, match="no training state"):
        resume.require_resumable_state(cast(TrainingCheckpoint, {"model": {}, "recipe": {}}), tmp_path)


@pytest.mark.medium
def test_fault16_more_epochs_use_the_new_schedule_from_the_current_step(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny(epochs=4, out=str(tmp_path / "four")))
    train(tiny())
    with pytest.raises(UsageError, match="run is finished: 2 epochs, 10 steps; give a larger --epochs"):
        train(Recipe(resume=str(tmp_path / "run")))
    resume_point = resume.find_resume_point(Recipe(resume=str(tmp_path / "run"), epochs=4), "custom")
    resume_point.close("FINISHED")
    assert resume_point.messages[1] == (
        "--epochs 2 -> 4: the schedule is recomputed for the new number of epochs, from the current step on"
    )
    assert train(Recipe(resume=str(tmp_path / "run"), epochs=4)).complete
    expected_rows, resumed_rows = rows(tmp_path / "four"), rows(tmp_path / "run")
    assert [row["lr"] for row in resumed_rows[2:]] == [row["lr"] for row in expected_rows[2:]]
    assert resumed_rows[1]["lr"] < expected_rows[1]["lr"]
    assert last(tmp_path / "run")["recipe"]["epochs"] == 4
    assert Recipe.make(str(tmp_path / "run" / "recipe.toml")).epochs == 4
    with pytest.raises(
        UsageError, match=r"--epochs 3: .*run has already trained for 4 epochs; give --epochs 4 or more"
    ):
        train(Recipe(resume=str(tmp_path / "run"), epochs=3))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({}, "give a larger --epochs"),
        ({"resume": "checkpoints/last.pt"}, "give a larger --epochs"),
        ({"resume": "checkpoints/last.pt", "out": "elsewhere"}, "give a larger --epochs"),
        ({"out": "elsewhere"}, "give a larger --epochs"),
        ({"max_steps": 10}, "give a larger --max-steps"),
        ({"max_steps": 4}, "give a larger --max-steps"),
        ({"epochs": 4, "max_steps": 10, "resume": "checkpoints/last.pt"}, "give a larger --max-steps"),
        ({"epochs": 4, "patience": 1, "resume": "checkpoints/last.pt"}, "give a larger --patience"),
    ],
)
def test_fault44_resuming_a_run_without_steps_left_is_refused_and_changes_nothing(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    train(tiny(lr=1e-9))  # so small that the second epoch is no better than the first
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match=f"is finished: 2 epochs, 10 steps; {remedy} to continue it"):
        train(Recipe(**{**options, "resume": str(tmp_path / "run" / options.get("resume", ""))}))
    assert contents(tmp_path / "run") == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_fault16_resumable_options_exist_and_are_documented(tiny: MakeRecipe) -> None:
    assert resume.RESUMABLE_OPTIONS.keys() <= Recipe.model_fields.keys()
    assert (
        not {"arch", "optimizer", "batch_size", "lr", "seed", "augment", "val_size"} & resume.RESUMABLE_OPTIONS.keys()
    )
    sentence = DOCUMENTATION.split("The following options may differ")[1].split("and the execution options")[0]
    documented = re.findall(r"`(--[\w-]+)`", sentence)
    assert set(documented) == {
        option_flag(name) for name in resume.RESUMABLE_OPTIONS.keys() - {"resume", *section_fields("execution")}
    }


@pytest.mark.slow
def test_resume_auto_uses_the_newest_unfinished_run_of_the_recipe(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs_folder = tmp_path / "runs"
    for name, values in {"a": {}, "b": {}, "done": {}, "other": {"lr": 0.2}, "late": {}}.items():
        train(tiny(out=f"runs/{name}", **values))
        checkpoint_path = runs_folder / name / "checkpoints" / "last.pt"
        os.utime(checkpoint_path, (1e9, 1e9 + len(list(runs_folder.iterdir()))))
        if name != "done":
            (runs_folder / name / "summary.json").unlink()
    recipe = Recipe(**{**tiny().model_dump(), "out": None, "resume": "auto"})
    lock = lock_folder(runs_folder / "late")
    for folder in ("runs/b", "runs/late"):
        resume_point = resume.find_resume_point(recipe, "custom")
        resume_point.close("FINISHED")
        assert resume_point.folder == Path(folder)
        lock.release()
    for resume_point in (
        resume.find_resume_point(recipe, "another name"),
        resume.find_resume_point(recipe.model_copy(update={"seed": 9}), "custom"),
        resume.find_resume_point(recipe.model_copy(update={"out": str(tmp_path / "none")}), "custom"),
        resume.find_resume_point(recipe.model_copy(update={"out": "runs/done"}), "custom"),
    ):
        assert resume_point.is_new
        assert resume_point.recipe.resume is None
        assert "starting a new run" in resume_point.messages[0]


@pytest.mark.medium
def test_fault23_run_that_is_being_trained_is_not_resumed(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny(max_steps=3))
    with lock_folder(tmp_path / "run"):
        for recipe in (Recipe(resume=str(tmp_path / "run")), tiny(resume="auto")):
            with pytest.raises(UsageError, match="run is being trained by another process; wait for it") as caught:
                train(recipe)
            assert caught.value.exit_code == 2
    train(tiny(resume="auto"))
    assert len(json.loads((tmp_path / "run" / "env.json").read_text())["resumed"]) == 1


@pytest.mark.medium
def test_time_budget_is_applied_once(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcifar.training import dry_run
    from fastcifar.training.dry_run import StepTiming

    monkeypatch.setattr(dry_run, "measure_step_timing", lambda trainer: StepTiming(2.0, 0.05))
    budget = {"time_budget": 0.75, "epochs": 200, "warmup_epochs": 20}
    train(tiny(**budget))
    train(tiny(**budget, max_steps=7, out=str(tmp_path / "cut")))
    train(tiny(**budget, resume="auto", out=str(tmp_path / "cut")))
    assert_equal_runs(tmp_path / "cut", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"--time-budget 0\.75, not 9"):
        train(Recipe(resume=str(tmp_path / "run"), time_budget=9.0))
    assert train(Recipe(resume=str(tmp_path / "run"), epochs=4)).epochs == 4
