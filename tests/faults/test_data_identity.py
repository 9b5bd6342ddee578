"""A run is resumed and validated only with the images it was trained on, wherever they are (faults 27, 29 and 48)."""

from __future__ import annotations

import io
import json
import os
import shutil
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastcifar.benchmark.speedrun import speedrun
from fastcifar.cli.tables import scores_table, summary_table
from fastcifar.data import cifar
from fastcifar.errors import CheckpointError, DataError, UsageError
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.evaluation.export import export_model
from fastcifar.evaluation.predict import predict_to_file
from fastcifar.evaluation.prediction_files import PredictionFormat
from fastcifar.recipe import Recipe
from fastcifar.reporting.compare import compare_paths
from fastcifar.reporting.report import build_report
from fastcifar.reporting.run_plots import write_run_plots
from fastcifar.reporting.runs import list_runs
from fastcifar.sweep.sweep import count_training_steps
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.summary import read_summary
from fastcifar.training.train import train
from tests.data.image_folders import write_noise
from tests.faults.runs import last

MakeRecipe = Callable[..., Recipe]
NAMES = ("cat", "dog")
CALIBRATED = PredictionFormat(with_probabilities=True, is_calibrated=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)


@pytest.fixture
def stop_early(tiny: MakeRecipe, tmp_path: Path) -> Callable[..., str]:
    """Return a function that trains one of two epochs on class folders, and returns the run folder."""

    def run(root: Path, **options: Any) -> str:
        values = {"data": str(root), "val_size": None, "batch_size": 16, "max_steps": 2, **options}
        return train(tiny(**values)).run

    return run


def write_data(root: Path) -> Path:
    return write_noise(root, NAMES, {"train": 20, "test": 4})


def write_data_with_val(root: Path) -> Path:
    return write_noise(root, NAMES, {"train": 20, "val": 5, "test": 4})


def reorder(root: Path) -> None:
    """Rename the files of a class, so that the same images are sorted differently."""
    files = sorted((root / "train" / "cat").iterdir())
    for number, file in enumerate(reversed(files)):
        file.rename(file.with_name(f"x{number:03d}.png"))


def relabel(root: Path) -> None:
    first, second = (root / "train" / name / "003.png" for name in NAMES)
    first.rename(root / "x.png")
    second.rename(first)
    (root / "x.png").rename(second)


def change_one_pixel(root: Path) -> None:
    file = root / "train" / "dog" / "007.png"
    pixels = np.array(Image.open(file))
    pixels[4, 5, 2] ^= 1
    Image.fromarray(pixels).save(file)


def change_a_validation_image(root: Path) -> None:
    write_noise(root, ("dog",), {"val": 1})
    assert (root / "val" / "dog" / "000.png").exists()


def swap_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "x")
        (root / split / "dog").rename(root / split / "cat")
        (root / split / "x").rename(root / split / "dog")


def leave(root: Path) -> None:
    """Change nothing: the data is only in another folder."""


def convert(root: Path) -> None:
    for file in root.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()


def add_other_files(root: Path) -> None:
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"x")
    shutil.rmtree(root / "test" / "cat")
    shutil.copytree(root / "train" / "cat", root / "test" / "cat")  # other test images


# function -> whether the images for training and validation remain the same
CHANGES: dict[Callable[[Path], None], bool] = {
    reorder: False,
    relabel: False,
    change_one_pixel: False,
    change_a_validation_image: False,
    swap_classes: False,
    leave: True,
    convert: True,
    add_other_files: True,
}


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_fault27_resume_and_validation_need_the_same_images(
    stop_early: Callable[..., str], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    write = write_data_with_val if change is change_a_validation_image else write_data
    original, other = write(tmp_path / "original"), write(tmp_path / "other")
    change(other)
    run = stop_early(original)
    here, there = evaluate_run(run), evaluate_run(run, data=str(other))
    assert here["temperature_missing"] != there["temperature_missing"] or CHANGES[change]
    assert here["val_acc"] == json.loads((Path(run) / "summary.json").read_text())["val_acc"]
    assert there["test_acc"] is not None, "a test set only needs the same classes"
    resumed = Recipe(resume=run, data=str(other), max_steps=4)
    before = last(run)["step"]
    if CHANGES[change]:
        assert (there["val_acc"], there["temperature"]) == (here["val_acc"], here["temperature"])
        assert train(resumed).steps == before + 2
    else:
        assert (there["val_acc"], there["temperature"], there["loss_scaled"]) == (None, None, None)
        assert "other images or labels" in str(there["temperature_missing"])
        with pytest.raises(
            CheckpointError, match=r"other images or labels than those of .*other, or in another order; give"
        ):
            train(resumed)
        assert last(run)["step"] == before
        assert train(Recipe(resume=run, max_steps=4)).steps == before + 2


def test_fault27_other_classes_are_refused(stop_early: Callable[..., str], tmp_path: Path) -> None:
    run = stop_early(write_data(tmp_path / "original"))
    other = write_noise(tmp_path / "other", ("cat", "eel"), {"train": 20, "test": 4})
    with pytest.raises(CheckpointError, match=r"trained on other classes than those of .*other; give"):
        train(Recipe(resume=run, data=str(other), max_steps=4))
    with pytest.raises(DataError, match=r"the classes of .* are not those that"):
        evaluate_run(run, data=str(other))


def test_fault27_the_digest_is_in_checkpoint_and_summary(stop_early: Callable[..., str], tmp_path: Path) -> None:
    root = write_data(tmp_path / "original")
    run = Path(stop_early(root))
    digest = cifar.load_dataset(str(root)).digest
    assert last(run)["data_digest"] == digest
    assert json.loads((run / "summary.json").read_text())["data_digest"] == digest
    assert len(digest) == 64


@pytest.mark.medium
def test_fault27_a_checkpoint_without_a_digest_goes_on_with_one_warning(
    stop_early: Callable[..., str], tmp_path: Path
) -> None:
    run = stop_early(write_data(tmp_path / "original"))
    state = last(run)
    del state["data_digest"]
    old = tmp_path / "old.pt"
    torch.save(state, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate_run(str(old))["temperature_missing"] == evaluate_run(run)["temperature_missing"]
    with pytest.warns(UserWarning, match="does not identify its images") as caught:
        train(Recipe(resume=str(old), out=str(tmp_path / "resumed"), max_steps=4))
    assert len(caught) == 1


@pytest.mark.medium
def test_fault27_a_validation_split_of_its_own_is_part_of_the_run(
    stop_early: Callable[..., str], tmp_path: Path
) -> None:
    root = write_data_with_val(tmp_path / "original")
    with pytest.raises(UsageError, match="its own validation split of 10 images; leave --val-size out"):
        stop_early(root, val_size=5)
    run = stop_early(root)
    assert last(run)["samples"] == 40
    assert evaluate_run(run)["val_acc"] == json.loads((Path(run) / "summary.json").read_text())["val_acc"]
    assert train(Recipe(resume=run, epochs=3, max_steps=5)).steps == 5


# function -> options of `train --resume` and `eval`, after the data has been moved from `rel` to `moved`
LOCATIONS: dict[str, dict[str, Any]] = {"kept path": {}, "environment variable": {}, "option": {"data": "moved"}}


@pytest.mark.medium
@pytest.mark.parametrize("location", LOCATIONS)
def test_fault48_a_relative_path_is_kept_absolute(
    stop_early: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    write_data(tmp_path / "rel")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    run = stop_early(Path("rel"))
    assert tomllib.loads((Path(run) / "recipe.toml").read_text())["data"] == str(tmp_path / "rel")
    assert last(run)["recipe"]["data"] == str(tmp_path / "rel")
    expected = evaluate_run(run)
    monkeypatch.chdir(elsewhere)
    if location != "kept path":
        (tmp_path / "rel").rename(elsewhere / "moved")
    if location == "environment variable":
        monkeypatch.setenv("FASTCIFAR_DATA", "moved")
    options = LOCATIONS[location]
    scores = evaluate_run(run, **options)
    assert (scores["test_acc"], scores["val_acc"]) == (expected["test_acc"], expected["val_acc"])
    assert predict_to_file(run, "data:test", tmp_path / "a.csv", **options)["images"] == 8
    assert train(Recipe(resume=run, max_steps=4, **options)).steps == 4
    kept = tmp_path / "rel" if location == "kept path" else elsewhere / "moved"
    assert last(run)["recipe"]["data"] == str(kept)


@pytest.mark.medium
def test_fault48_the_environment_variable_overrides_paths_only(
    tiny: MakeRecipe, stop_early: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stop_early(write_data(tmp_path / "original"), out=str(tmp_path / "a"))
    synthetic = train(tiny(max_steps=2, out=str(tmp_path / "b"))).run
    monkeypatch.setenv("FASTCIFAR_DATA", str(write_data(tmp_path / "other")))
    assert evaluate_run(run)["data"] == str(tmp_path / "other")
    assert evaluate_run(run, data=str(tmp_path / "original"))["data"] == str(tmp_path / "original")
    assert evaluate_run(synthetic)["data"] == "synthetic:200"
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no such file or folder: .*nowhere"):
        evaluate_run(run)


@pytest.mark.parametrize(("data", "expected"), [
    ("synthetic", "synthetic"), ("synthetic:300", "synthetic:300"), (None, None), ("a/b", "HERE/a/b"),
    ("./a/../b", "HERE/b"), ("/x/y", "/x/y"), ("~/z", "HOME/z"),
])  # fmt: skip
def test_fault48_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str | None, expected: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    wanted = expected and expected.replace("HERE", os.getcwd()).replace("HOME", "/home/someone")
    assert cifar.absolute_data_path(data) == wanted


@pytest.mark.medium
@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.5, "eval_weights": "ema"}, {"tta": "flip", "eval_weights": "best"}]
)
def test_fault29_without_a_test_set_all_results_are_null(
    stop_early: Callable[..., str], tmp_path: Path, options: dict[str, Any]
) -> None:
    root = write_noise(tmp_path / "data", NAMES, {"train": 20, "val": 6})
    run = Path(stop_early(root, **options))
    summary = read_summary(run)
    assert summary
    measured = (summary.test_acc, summary.test_acc_ema, summary.test_acc_tta, summary.test_loss)
    assert measured == (None, None, None, None)
    assert (summary.correct, summary.total, summary.ece, summary.per_class) == (None, None, None, {})
    assert summary.val_acc is not None
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(summary_table(summary), scores_table(evaluate_run(str(run))))
    assert console.export_text().count("none, because the data set has no test set") == 2
    assert summary.confusion == []
    plots = sorted(file.stem for file in write_run_plots(summary))
    assert plots == ["accuracy", "batch", "loss", "throughput"]
    scores = evaluate_run(str(run))
    assert (scores["test_acc"], scores["confusion"], scores["per_class"], scores["total"]) == (None, [], {}, None)
    assert scores["val_acc"] is not None
    assert json.loads(json.dumps(scores, allow_nan=False))["test_acc_interval"] is None
    with pytest.raises(DataError, match="has no test set"):
        predict_to_file(str(run), "data:test", tmp_path / "a.csv")
    needs_test_set: list[dict[str, Any]] = [{"plots_dir": tmp_path / "plots"}, {"with_corruptions": True}]
    for needs_test in needs_test_set:
        with pytest.raises(DataError, match="has no test set"):
            evaluate_run(str(run), **needs_test)
    export_model(str(run), "safetensors", tmp_path / "a.safetensors")
    card = (tmp_path / "a.safetensors.md").read_text()
    assert "not evaluated on a test set, because the data set of the run has none" in card
    assert "val: 12 images" in card
    for format in ("terminal", "markdown", "csv", "latex"):
        assert "val" in str(build_report([run], format)[1]) or format == "terminal"
    assert "on the validation split" in str(scores["temperature_missing"])
    comparison: Any = compare_paths(run, run)[0]
    assert (comparison["accuracy"]["measured"], comparison["accuracy"]["n"]) == ("val_acc", [12, 12])
    assert [row["test_acc"] for row in list_runs(tmp_path)] == [None]


def test_fault29_the_number_of_test_images_is_said_in_one_line(tiny: MakeRecipe, tmp_path: Path) -> None:
    root = write_noise(tmp_path / "data", NAMES, {"train": 20, "val": 6})
    trainer = build_trainer(resolve(tiny(data=str(root), val_size=None)))
    [line] = [line for line in trainer.summary_lines() if line.startswith("data:")]
    assert line.endswith("40 training, 12 validation, no test images, so test_acc will be null")


def test_fault29_speedrun_and_bench_and_the_plan_of_a_sweep_with_a_validation_split_of_its_own(
    tiny: MakeRecipe, tmp_path: Path
) -> None:
    root = write_noise(tmp_path / "data", NAMES, {"train": 20, "val": 6})
    recipe = tiny(data=str(root), val_size=None, epochs=1, out=None)
    recipe_file = tmp_path / "small.toml"
    recipe_file.write_text(recipe.to_toml())
    with pytest.raises(DataError, match="has no test set"):
        speedrun(recipe_name=str(recipe_file), out=str(tmp_path / "a"))
    result = speedrun(recipe_name=str(recipe_file), eval_split="val", out=str(tmp_path / "b"), tta="none")
    assert result.n == 1
    trainer = build_trainer(resolve(recipe.model_copy(update={"val_size": 0})), use_val_folder=False)
    assert (len(trainer.train_split.labels), len(trainer.val_split.labels)) == (40, 0)
    assert count_training_steps(recipe, trainer.data) == trainer.loader.steps_per_epoch
