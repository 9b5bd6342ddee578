"""Stopped and resumed: the run that was never stopped, to the last bit; or refused, with what differs."""

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
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.errors import CheckpointError, Interrupted, UsageError
from fastcifar.files import lock_folder
from fastcifar.format import option_flag
from fastcifar.recipe import Recipe, section_fields
from fastcifar.training import resume
from fastcifar.training.checkpoint import read_checkpoint
from fastcifar.training.optimizers import OPTIMIZERS, OptimizerWrapper
from fastcifar.training.rng_state import collect_rng_state, restore_rng_state, seed_all
from fastcifar.training.train import train
from tests.faults.runs import assert_equal_runs, last, rows, summary

Make = Callable[..., Recipe]
# 5 steps an epoch: within the first epoch, at its end before the validation, within the second, at the very end
STOPS = (3, 5, 8, 10)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, int], Path]:
    """Trains until step `step`, in which SIGTERM arrives."""
    between_steps = OptimizerWrapper.after_step

    def run(recipe: Recipe, step: int) -> Path:
        def signalled(self: OptimizerWrapper, done: int, *given: Any) -> None:
            between_steps(self, done, *given)
            if done == step:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(OptimizerWrapper, "after_step", signalled)
            with pytest.raises(Interrupted) as caught:
                train(recipe)
        assert caught.value.exit_code == 143
        assert last(str(recipe.out))["step"] == step
        return Path(str(recipe.out))

    return run


def stopped_and_resumed(stopped: Callable[[Recipe, int], Path], make: Make, out: Path, **values: Any) -> Path:
    for step in STOPS:
        stopped(make(**values, out=str(out), resume="auto"), step)
    train(make(**values, out=str(out), resume="auto"))
    return out


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", *OPTIMIZERS])
def test_fault01_stopped_four_times_is_never_stopped(
    tiny: Make, tmp_path: Path, stopped: Callable[[Recipe, int], Path], optimizer: str
) -> None:
    values: dict[str, Any] = {"optimizer": optimizer, "lr": 0.01, "dropout": 0.1}
    train(tiny(**values))
    assert_equal_runs(stopped_and_resumed(stopped, tiny, tmp_path / "again", **values), tmp_path / "run")
    assert len(rows(tmp_path / "again")) == 2
    assert not (tmp_path / "again-2").exists()


def test_fault03_through_the_dali_loader(
    tiny: Make, tmp_path: Path, stopped: Callable[[Recipe, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI does not import here")
    values: dict[str, Any] = {"loader": "dali", "augment": "crop:4:zero,flip,cutout:8", "dropout": 0.1}
    train(tiny(**values))
    assert_equal_runs(stopped_and_resumed(stopped, tiny, tmp_path / "again", **values), tmp_path / "run")
    train(tiny(**{**values, "loader": "tensor"}, out=str(tmp_path / "tensor")))
    assert rows(tmp_path / "tensor") == rows(tmp_path / "run")


@pytest.fixture
def nondeterministic_afterwards() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.usefixtures("nondeterministic_afterwards")
def test_fault21_deterministic_algorithms_alone(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    train(tiny(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    train(tiny(deterministic=True, out=str(tmp_path / "again")))
    assert_equal_runs(tmp_path / "again", tmp_path / "run")
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.gpu
@pytest.mark.usefixtures("nondeterministic_afterwards")
@pytest.mark.parametrize("values", [{}, {"precision": "fp16", "optimizer": "adamw", "ema_decay": 0.9, "lr": 0.01}])
def test_fault01_in_a_cuda_graph(
    tiny: Make, tmp_path: Path, stopped: Callable[[Recipe, int], Path], values: dict[str, Any]
) -> None:
    values = {"device": "cuda", "cuda_graph": True, "deterministic": True, "dropout": 0.1, "loader": "tensor", **values}
    train(tiny(**values))
    assert_equal_runs(stopped_and_resumed(stopped, tiny, tmp_path / "again", **values), tmp_path / "run")


def test_fault01_every_generator_of_random_numbers_is_seeded_and_kept() -> None:
    def drawn() -> list[float]:
        return [torch.rand(()).item(), torch.randn(()).item(), np.random.standard_normal(), random.gauss(0, 1)]

    cpu = torch.device("cpu")
    seed_all(7)
    first = drawn()
    file = io.BytesIO()
    torch.save(collect_rng_state(cpu), file)
    second = drawn()
    file.seek(0)
    restore_rng_state(torch.load(file, weights_only=True), cpu)
    assert drawn() == second != first
    seed_all(7)
    assert drawn() == first
    seed_all(2**63 - 1)
    assert drawn() != first


@pytest.mark.parametrize("intervals", [{"save_every_epochs": 1}, {"save_every_epochs": 0, "save_every_steps": 3}])
def test_fault02_with_average_cutmix_smoothing_clipping_early_stop_and_fp16(
    tiny: Make, tmp_path: Path, stopped: Callable[[Recipe, int], Path], intervals: dict[str, int]
) -> None:
    values: dict[str, Any] = {
        "ema_decay": 0.9,
        "label_smoothing": 0.1,
        "clip_grad": "norm:0.5",
        "patience": 2,
        "epochs": 9,
        "lr": 1e-5,
        "schedule": "plateau:1",
        "warmup_epochs": 1,
        "precision": "fp16",
        "augment": "crop:4:zero,flip,cutmix:1.0",
        "eval_weights": "best",
        **intervals,
    }
    train(tiny(**values))
    assert summary(tmp_path / "run")["stop_reason"] == "patience"
    assert_equal_runs(stopped_and_resumed(stopped, tiny, tmp_path / "again", **values), tmp_path / "run")
    best = [read_checkpoint(tmp_path / name / "checkpoints" / "best.pt") for name in ("run", "again")]
    assert best[0]["step"] == best[1]["step"]


def test_fault01_a_run_that_max_steps_cut_goes_on(tiny: Make, tmp_path: Path) -> None:
    train(tiny(epochs=3, eval_weights="best"))
    cut = {"epochs": 3, "eval_weights": "best", "out": str(tmp_path / "cut")}
    assert train(tiny(**cut, max_steps=7))["complete"] is False
    assert len(rows(tmp_path / "cut")) == 2
    assert train(Recipe(resume=str(tmp_path / "cut"), max_steps=12))["steps"] == 12
    train(Recipe(resume=str(tmp_path / "cut")))
    assert_equal_runs(tmp_path / "cut", tmp_path / "run")


def test_fault01_a_run_without_a_checkpoint_starts_in_its_own_folder(tiny: Make, tmp_path: Path) -> None:
    train(tiny())
    shutil.copytree(tmp_path / "run", tmp_path / "young")
    shutil.rmtree(tmp_path / "young" / "checkpoints")
    (tmp_path / "young" / "summary.json").unlink()
    with (tmp_path / "young" / "metrics.csv").open("a") as file:
        file.write("2,15,0.0")  # cut short
    train(Recipe(resume=str(tmp_path / "young")))
    assert_equal_runs(tmp_path / "young", tmp_path / "run")


def test_fault01_a_folder_that_was_only_just_made_is_taken_over(tiny: Make, tmp_path: Path) -> None:
    train(tiny())
    young, others = tmp_path / "young", tmp_path / "others"
    (young / "checkpoints").mkdir(parents=True)
    (young / ".recipe.toml.x.tmp").write_text("arch =")
    others.mkdir()
    (others / "thesis.txt").write_text("mine")
    for folder, taken in ((young, young), (others, tmp_path / "others-2")):
        assert train(tiny(out=str(folder), resume="auto"))["run"] == str(taken)
        assert_equal_runs(taken, tmp_path / "run")
    assert not list(young.rglob("*.tmp"))
    assert len(list(others.iterdir())) == 1


def test_fault08_a_damaged_last_resumes_from_the_previous(tiny: Make, tmp_path: Path) -> None:
    train(tiny(epochs=3))
    shutil.copytree(tmp_path / "run", tmp_path / "hurt")
    path = tmp_path / "hurt" / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / "hurt" / "summary.json").unlink()
    with pytest.warns(UserWarning, match=r"last\.previous\.pt is used instead"):
        train(Recipe(resume=str(tmp_path / "hurt")))
    assert_equal_runs(tmp_path / "hurt", tmp_path / "run")


@pytest.mark.parametrize("file", ["best.pt", "copy.pt"])
def test_fault01_from_a_checkpoint_file_in_a_new_folder(tiny: Make, tmp_path: Path, file: str) -> None:
    train(tiny(epochs=3, save_every_epochs=1))
    source = tmp_path / "run" / "checkpoints" / file
    if file == "copy.pt":
        shutil.copy(tmp_path / "run" / "checkpoints" / "last.previous.pt", source)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(Recipe(resume=str(source), out=str(tmp_path / "fork")))
    assert_equal_runs(tmp_path / "fork", tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("source", "out", "made"), [("", "fork", "fork"), ("checkpoints/last.pt", None, "cut-2")])
def test_fault01_a_run_goes_on_in_another_folder_and_stays_as_it_is(
    tiny: Make, tmp_path: Path, source: str, out: str | None, made: str
) -> None:
    train(tiny(epochs=3), "mine")
    cut = tmp_path / "cut"
    train(tiny(epochs=3, out=str(cut), max_steps=7), "mine")
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    found = train(Recipe.make(resume=str(cut / source), out=out and str(tmp_path / out)))
    assert (found["run"], found["recipe"]) == (str(tmp_path / made), "mine")
    assert_equal_runs(tmp_path / made, tmp_path / "run")
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


def test_fault16_what_is_another_run_is_refused_with_all_that_differs(tiny: Make, tmp_path: Path) -> None:
    train(tiny(max_steps=3))
    other = {"channels": (8, 32), "optimizer": "adamw", "batch_size": 16, "lr": 0.2}
    for asked in (tiny(**other, resume="auto"), Recipe.make(resume=str(tmp_path / "run"), **other)):
        with pytest.raises(CheckpointError) as caught:
            train(asked)
        assert caught.value.exit_code == 4
        for words in ("--channels 8,16, not 8,32", "--optimizer lookahead:sgd, not adamw", "--batch-size 32, not 16"):
            assert words in str(caught.value)
    with pytest.raises(CheckpointError, match="on 160 images of 10 classes, not on 360 images"):
        train(Recipe(resume=str(tmp_path / "run"), data="synthetic:400"))
    with pytest.raises(CheckpointError, match="no training state"):
        resume.require_resumable_state({"model": {}, "recipe": {}}, tmp_path)


def test_fault16_more_epochs_follow_the_new_schedule_from_the_step_on(tiny: Make, tmp_path: Path) -> None:
    train(tiny(epochs=4, out=str(tmp_path / "four")))
    train(tiny())
    with pytest.raises(UsageError, match="run is finished: 2 epochs, 10 steps; give a larger --epochs"):
        train(Recipe(resume=str(tmp_path / "run")))
    origin = resume.find_resume_point(Recipe(resume=str(tmp_path / "run"), epochs=4), "custom")
    with origin:
        assert origin.messages[1] == (
            "--epochs 2 -> 4: the schedule is recomputed for the new number of epochs, from the current step on"
        )
    assert train(Recipe(resume=str(tmp_path / "run"), epochs=4))["complete"]
    four, two = rows(tmp_path / "four"), rows(tmp_path / "run")
    assert [row["lr"] for row in two[2:]] == [row["lr"] for row in four[2:]]
    assert two[1]["lr"] < four[1]["lr"]
    assert last(tmp_path / "run")["recipe"]["epochs"] == 4
    assert Recipe.make(str(tmp_path / "run" / "recipe.toml")).epochs == 4
    with pytest.raises(
        UsageError, match=r"--epochs 3: .*run has already trained for 4 epochs; give --epochs 4 or more"
    ):
        train(Recipe(resume=str(tmp_path / "run"), epochs=3))


def test_fault16_every_free_knob_is_one(tiny: Make) -> None:
    assert resume.RESUMABLE_OPTIONS.keys() <= Recipe.model_fields.keys()
    assert (
        not {"arch", "optimizer", "batch_size", "lr", "seed", "augment", "val_size"} & resume.RESUMABLE_OPTIONS.keys()
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    text = " ".join(readme.split()).split("options may differ from those of the interrupted run: ")[1]
    named = re.findall(r"`(--[\w-]+)`", text.split("and the execution options")[0])
    assert set(named) == {
        option_flag(name) for name in resume.RESUMABLE_OPTIONS.keys() - {"resume", *section_fields("execution")}
    }


def test_auto_takes_the_newest_unfinished_run_of_the_recipe(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = tmp_path / "runs"
    for name, values in {"a": {}, "b": {}, "done": {}, "other": {"lr": 0.2}, "late": {}}.items():
        train(tiny(out=f"runs/{name}", **values))
        stamp = recipes / name / "checkpoints" / "last.pt"
        os.utime(stamp, (1e9, 1e9 + len(list(recipes.iterdir()))))
        if name != "done":
            (recipes / name / "summary.json").unlink()
    asked = Recipe.from_dict({**tiny().model_dump(), "out": None, "resume": "auto"})
    busy = lock_folder(recipes / "late")
    with resume.find_resume_point(asked, "custom") as origin:
        assert origin.folder == Path("runs/b")
    busy.release()
    with resume.find_resume_point(asked, "custom") as origin:
        assert origin.folder == Path("runs/late")
    for origin in (
        resume.find_resume_point(asked, "another name"),
        resume.find_resume_point(asked.model_copy(update={"seed": 9}), "custom"),
        resume.find_resume_point(asked.model_copy(update={"out": str(tmp_path / "none")}), "custom"),
        resume.find_resume_point(asked.model_copy(update={"out": "runs/done"}), "custom"),
    ):
        assert origin.is_new
        assert origin.recipe.resume is None
        assert "starting a new run" in origin.messages[0]


def test_fault23_a_run_that_is_being_trained_is_not_resumed(tiny: Make, tmp_path: Path) -> None:
    train(tiny(max_steps=3))
    with lock_folder(tmp_path / "run"):
        for asked in (Recipe(resume=str(tmp_path / "run")), tiny(resume="auto")):
            with pytest.raises(UsageError, match="run is being trained by another process; wait for it") as caught:
                train(asked)
            assert caught.value.exit_code == 2
    train(tiny(resume="auto"))
    assert len(json.loads((tmp_path / "run" / "env.json").read_text())["resumed"]) == 1


def test_a_time_budget_fits_once(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcifar.training import dry_run
    from fastcifar.training.dry_run import StepTiming

    monkeypatch.setattr(dry_run, "measure_step_timing", lambda parts, step: StepTiming(2.0, 0.05))
    budget = {"time_budget": 0.75, "epochs": 200, "warmup_epochs": 20}
    train(tiny(**budget))
    train(tiny(**budget, max_steps=7, out=str(tmp_path / "cut")))
    train(tiny(**budget, resume="auto", out=str(tmp_path / "cut")))
    assert_equal_runs(tmp_path / "cut", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"--time-budget 0\.75, not 9"):
        train(Recipe(resume=str(tmp_path / "run"), time_budget=9.0))
    assert train(Recipe(resume=str(tmp_path / "run"), epochs=4))["epochs"] == 4


def test_fault01_with_a_stem_from_the_images_sizes_and_rates_of_groups(
    tiny: Make, tmp_path: Path, stopped: Callable[[Recipe, int], Path]
) -> None:
    """A whitening stem is loaded, not made again; an epoch goes on in the size that it began with."""
    values: dict[str, Any] = {"arch": "speed94", "image_size": "16:1,32", "optimizer": "muon", "lr": 0.05}
    values |= {
        "bias_lr_mult": 4.0,
        "head_lr_mult": 9.0,
        "optimizer_arg": {"weight_norm": True},
        "activation": "gelu",
        "ema_decay": 0.9,
    }
    train(tiny(**values))
    assert_equal_runs(stopped_and_resumed(stopped, tiny, tmp_path / "again", **values), tmp_path / "run")
