"""Speedruns: each run equals `train`; invalid trials, the result folder, and the statistics."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fastcifar.benchmark import speedrun as speedrun_module
from fastcifar.benchmark.speedrun import count_flops, speedrun
from fastcifar.benchmark.speedrun_results import (
    RunCosts,
    SampleStatistics,
    SpeedrunEnvironment,
    SpeedrunRecipe,
    SpeedrunResults,
    SpeedrunTrial,
    speedrun_table,
)
from fastcifar.errors import UsageError
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.build import build_trainer
from fastcifar.training.checkpoint import state_dict_sha256
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train

MakeRecipe = Callable[..., Recipe]
MakeFile = Callable[..., str]


@pytest.fixture
def recipe_file(tiny: MakeRecipe, tmp_path: Path) -> MakeFile:
    """Function that writes a recipe file of the tiny network, without an output folder, and returns its path."""

    def write(**changes: Any) -> str:
        path = tmp_path / "small.toml"
        path.write_text(tiny(**changes).model_copy(update={"out": None}).to_toml())
        return str(path)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"ema_decay": 0.9, "eval_weights": "ema", "dropout": 0.1},
        {"arch": "speed94", "optimizer": "muon", "lr": 0.05, "image_size": "24:1,32", "head_lr_mult": 3.0},
        {"optimizer": "lookahead:lion", "lr": 0.001, "augment": "crop:4:zero,cutmix:1.0", "batch_size": 48},
    ],
    ids=("average", "whitened", "mixed"),
)
def test_each_run_equals_train(tiny: MakeRecipe, recipe_file: MakeFile, tmp_path: Path, values: dict) -> None:
    result = speedrun(recipe_name=recipe_file(**values), n=3, eval_split="val", seed=4, out=str(tmp_path / "timed"))
    trials = [json.loads(line) for line in (tmp_path / "timed" / "trials.jsonl").read_text().splitlines()]
    assert result.seeds == [trial["seed"] for trial in trials] == [4, 5, 6]
    assert len({trial["sha256"] for trial in trials}) == 3
    for trial in trials:
        summary = train(tiny(**values, seed=trial["seed"], out=str(tmp_path / f"run-{trial['seed']}")))
        state = checkpoint.load_checkpoint(Path(summary.run) / "checkpoints" / "last.pt")
        weights = state["ema"] if values.get("eval_weights") == "ema" else state["model"]
        assert weights is not None
        assert state_dict_sha256(weights) == trial["sha256"], trial["seed"]
        assert (trial["steps"], trial["refused"]) == (summary.steps, None)
        assert state["step"] == trial["steps"]


@pytest.mark.medium
def test_result_folder_summary_and_table(recipe_file: MakeFile, tmp_path: Path) -> None:
    folder = tmp_path / "timed"
    console = Console(record=True, width=200)
    summary = speedrun(target="95", recipe_name=recipe_file(), n=2, out=str(folder), console=console)
    assert "evaluation: the test set, once per run" in console.export_text()
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "env.json", "trials.jsonl", "summary.json"}
    document = json.loads((folder / "summary.json").read_text())
    assert {"folder": str(folder), **document} == summary.model_dump()
    assert (summary.target, summary.recipe, summary.on, summary.tta) == (0.95, "small", "test", "6view")
    assert summary.seconds and summary.prepare_s and summary.train_s  # noqa: PT018
    assert summary.seconds.trials == [
        prepare + training for prepare, training in zip(summary.prepare_s.trials, summary.train_s.trials, strict=True)
    ]
    assert summary.images == 2 * 160 + 2 * 40, "all images are used for training if the test set is evaluated"
    assert len(summary.cold_start_s) == 1
    assert summary.cold_start_s[0] > summary.seconds.trials[0]
    assert (summary.reached, summary.flops_to_target) == (False, None)
    assert json.loads((folder / "recipe.json").read_text())["config"]["val_size"] == 0
    assert "small on the test set, runs: 2" in speedrun_table(summary).renderables[0]  # type: ignore[operator]


@pytest.mark.medium
def test_a_recipe_scaled_to_other_epochs_is_announced(recipe_file: MakeFile, tmp_path: Path) -> None:
    console = Console(record=True, width=500)
    name = recipe_file(warmup_epochs=0.5)
    folder = speedrun(recipe_name=name, epochs=1, out=str(tmp_path / "timed"), console=console).folder
    assert "scaled from 2 epochs to 1: --warmup-epochs 0.25 instead of 0.5" in console.export_text()
    console = Console(record=True, width=500)
    speedrun(append=Path(folder), console=console)
    assert "scaled from" not in console.export_text()


@pytest.mark.slow
def test_append_requires_same_recipe_and_environment(recipe_file: MakeFile, tmp_path: Path) -> None:
    folder, name = tmp_path / "timed", recipe_file()
    first = speedrun(recipe_name=name, seed=3, out=str(folder))
    result = speedrun(append=folder, n=2)
    assert result.seeds == [3, 4, 5]
    assert result.acc and first.acc  # noqa: PT018
    assert result.acc.trials[:1] == first.acc.trials
    assert json.loads((folder / "summary.json").read_text())["seeds"] == result.seeds
    assert speedrun(append=folder, recipe_name=name, seed=9).seeds == [3, 4, 5, 9]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"seed": 4}, "already has a trial with seed 4; start at --seed 10"),
        ({"lr": 0.5}, "another recipe: lr 0.1, not 0.5"),
        ({"target": "95"}, "another recipe: target 94, not 95"),
        ({"eval_split": "val", "val_size": 40}, "another recipe: val_size 0, not 40, on test, not val"),
        ({"data": "synthetic:100"}, "another recipe: data synthetic:200, not synthetic:100"),
        ({"recipe_name": recipe_file(epochs=3)}, "another recipe: epochs 2, not 3"),
    )
    for arguments, words in cases:
        with pytest.raises(UsageError, match=words):
            speedrun(append=folder, **arguments)
    environment = json.loads((folder / "env.json").read_text())
    assert all(rate > 0 for rate in environment["matmul_tflop_per_s"].values())
    (folder / "env.json").write_text(json.dumps({**environment, "matmul_tflop_per_s": {"bf16": 9.0}}))
    speedrun(append=folder)
    assert json.loads((folder / "env.json").read_text())["matmul_tflop_per_s"] == {"bf16": 9.0}, "of the first run"
    assert environment["chosen"].items() <= json.loads((folder / "trials.jsonl").read_text().splitlines()[0]).items()
    for change, words in (
        ({"device": "a GPU"}, "another environment: device a GPU, not "),
        (
            {"versions": {**environment["versions"], "torch": "2.0", "typer": "0"}},
            "another environment: torch 2.0, not ",
        ),
        ({"chosen": {**environment["chosen"], "compiled": True}}, "another environment: compiled on, not off"),
        ({"cpu_family": 1, "cpu_model": 2}, "another environment: cpu_family 1, not .*, cpu_model 2, not "),
    ):
        (folder / "env.json").write_text(json.dumps({**environment, **change}))
        with pytest.raises(UsageError, match=words):
            speedrun(append=folder)
    with pytest.raises(UsageError, match=f"--append {folder}"):
        speedrun(recipe_name=name, out=str(folder))
    with pytest.raises(UsageError, match="is not a result folder of a speedrun"):
        speedrun(append=tmp_path)


@pytest.mark.medium
def test_seed_added_by_another_process_during_startup_is_not_repeated(
    recipe_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "timed"
    speedrun(recipe_name=recipe_file(), out=str(folder))
    build_trainer = speedrun_module.build_trainer

    def append_then_build(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(speedrun_module, "build_trainer", build_trainer)
        speedrun(append=folder)
        return build_trainer(*arguments, **options)

    monkeypatch.setattr(speedrun_module, "build_trainer", append_then_build)
    with pytest.raises(UsageError, match="already has a trial with seed 1; start at --seed 2"):
        speedrun(append=folder)
    assert speedrun(append=folder).seeds == [0, 1, 2], "the lock must have been released"


@pytest.mark.medium
def test_completed_trials_survive_a_kill_and_can_be_appended_to(
    recipe_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = tmp_path / "timed", recipe_file()
    reset_trainer = speedrun_module.reset_trainer
    monkeypatch.setattr(speedrun_module, "reset_trainer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        speedrun(recipe_name=name, n=2, eval_split="val", out=str(folder))
    monkeypatch.setattr(speedrun_module, "reset_trainer", reset_trainer)
    with (folder / "trials.jsonl").open("a") as lines:
        lines.write('{"seed": 1, "acc')  # an incomplete line
    assert json.loads((folder / "summary.json").read_text())["seeds"] == [0]
    result = speedrun(append=folder)
    assert result.seeds == [0, 1]
    assert speedrun(recipe_name=name, n=2, eval_split="val", out=str(tmp_path / "uninterrupted")).acc == result.acc


@pytest.mark.medium
@pytest.mark.parametrize("fault", ["evaluation", "training"])
def test_invalid_trial_is_kept_and_counts_as_a_miss(
    recipe_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    evaluate, train_without_evaluation = speedrun_module.evaluate, speedrun_module.train_without_evaluation
    calls = []

    def evaluate_and_change_weights(model: nn.Module, *arguments: Any) -> Any:
        calls.append(model)
        if fault == "evaluation" and len(calls) == 3:  # the first evaluation of the second run
            next(model.parameters()).data[0] += 1e-3
        return evaluate(model, *arguments)

    def train_with_nan(trainer: Any) -> None:
        train_without_evaluation(trainer)
        if fault == "training" and trainer.recipe.seed == 1:
            trainer.meter.found_inf.fill_(1)
            trainer.meter.update(torch.tensor(math.nan), torch.tensor(0), 1)

    monkeypatch.setattr(speedrun_module, "evaluate", evaluate_and_change_weights)
    monkeypatch.setattr(speedrun_module, "train_without_evaluation", train_with_nan)
    summary = speedrun(recipe_name=recipe_file(), n=3, eval_split="val", out=str(tmp_path / "timed"))
    trials = [json.loads(line) for line in (tmp_path / "timed" / "trials.jsonl").read_text().splitlines()]
    reasons = {
        "evaluation": "the evaluation changed the weights",
        "training": "the loss or a gradient became NaN or Inf",
    }
    assert [trial["refused"] for trial in trials] == [None, reasons[fault], None]
    assert summary.acc is not None
    assert (summary.n, summary.refused) == (3, 1)
    assert summary.acc.trials == [trials[0]["acc"], trials[2]["acc"]]


def test_recorded_result_can_be_continued() -> None:
    """It is of an earlier version, in which options had other names and trials fewer values."""
    (folder,) = (Path(__file__).parents[2] / "bench" / "results").glob("20261121*_speed95")
    results = SpeedrunResults.read(folder)
    recorded = json.loads((folder / "summary.json").read_text())
    recorded["eval_weights"] = recorded.pop("weights")
    summary = results.summary().model_dump()
    for document in (recorded, summary):  # two runs have no deviation any more
        for figure in filter(lambda value: isinstance(value, dict), document.values()):
            spread = [figure.pop(name, None) for name in ("std", "stderr", "ci95")]
            assert document is recorded or spread == [None] * 3
    assert recorded.items() <= summary.items()
    assert results.environment.cpu_family is results.environment.matmul_tflop_per_s is None
    newer = results.environment.model_copy(update={"cpu_family": 25, "cpu_model": 17, "threads": 2})
    results.require_compatible(results.recipe, newer, [9])


def test_summary_statistics(tmp_path: Path) -> None:
    costs = RunCosts(params=1, macs=1, images=1, flops=10**15)
    recipe = SpeedrunRecipe(
        target="94", recipe="small", on="test", config=Recipe().model_dump(mode="json"), about=costs
    )
    accuracies = [0.9402, 0.94, 0.9399, 0.9471]
    results = SpeedrunResults(tmp_path, recipe, SpeedrunEnvironment())
    for seed, accuracy in enumerate(accuracies):
        results.add_trial(
            SpeedrunTrial(
                seed=seed, acc=accuracy - 0.005, acc_tta=accuracy, seconds=3.0 + seed, train_s=2.0 + seed,
                prepare_s=1.0, build_s=9.0, cold_start_s=None, refused=None,
            )
        )  # fmt: skip
    summary = results.summary()
    assert summary.acc and summary.acc_tta  # noqa: PT018
    assert summary.acc_tta.mean == statistics.fmean(accuracies)
    assert summary.acc_tta.std == statistics.stdev(accuracies)
    assert summary.acc_tta.stderr == pytest.approx(statistics.stdev(accuracies) / 2)
    half_width = 3.182 * statistics.stdev(accuracies) / 2  # t distribution with 3 degrees of freedom
    interval = [statistics.fmean(accuracies) - half_width, statistics.fmean(accuracies) + half_width]
    assert summary.acc_tta.ci95 == pytest.approx(interval, abs=1e-6)
    assert json.loads((tmp_path / "summary.json").read_text())["acc_tta"]["ci95"] == pytest.approx(interval, abs=1e-6)
    console = Console(record=True, width=100)
    console.print(speedrun_table(summary))
    assert f"{100 * interval[0]:.2f}-{100 * interval[1]:.2f}" in console.export_text()
    assert (summary.acc_tta.share, summary.acc.share) == (0.75, 0.25)
    assert summary.seconds == SampleStatistics.from_values([3.0, 4.0, 5.0, 6.0])
    assert (summary.reached, summary.flops_to_target) == (True, 10**15)
    results.add_trial(results.trials[-1].model_copy(update={"seed": 4, "refused": "the loss became NaN"}))
    summary = results.summary()
    assert summary.acc_tta is not None
    assert (summary.n, summary.refused, summary.acc_tta.share) == (5, 1, 0.6)
    assert (summary.reached, summary.flops_to_target) == (False, None), "an invalid trial is a miss"
    assert summary.acc_tta.mean == statistics.fmean(accuracies)
    single = SampleStatistics.from_values([1.0])
    assert single is not None
    assert single.model_dump() == {"mean": 1.0, "std": None, "stderr": None, "ci95": None, "trials": [1.0]}
    two = SampleStatistics.from_values([1.0, 2.0])
    assert two is not None
    assert (two.mean, two.std, two.stderr, two.ci95) == (1.5, None, None, None)
    assert SampleStatistics.from_values([1.0, None]) is SampleStatistics.from_values([]) is None


def test_flops_equal_a_manual_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution on images (no input gradient, 2 passes) and a linear layer (3 passes), 2 operations per MAC."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(4, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(images).mean((2, 3)))

    monkeypatch.setitem(MODELS, "small", Small)

    def flops_per_image(size: int) -> int:
        return 2 * (2 * size**2 * 4 * 3 * 9 + 3 * 4 * 10)

    assert count_flops(resolve(Recipe(arch="small", epochs=5)), 10, num_images=500) == 500 * flops_per_image(32)
    progressive = Recipe(arch="small", epochs=5, image_size="16:1,24:2,32")
    expected = 100 * flops_per_image(16) + 200 * flops_per_image(24) + 200 * flops_per_image(32)
    assert count_flops(resolve(progressive), 10, num_images=500) == expected


def test_ema_weights_are_evaluated(tiny: MakeRecipe) -> None:
    trainer = build_trainer(resolve(tiny(ema_decay=0.9, eval_weights="ema", epochs=1)))
    speedrun_module.train_without_evaluation(trainer)
    assert trainer.ema is not None
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in trainer.ema.average.items())


@pytest.mark.parametrize(
    ("values", "arguments", "words"),
    [
        ({}, {"target": "93"}, "unknown target '93'"),
        ({}, {"eval_split": "train"}, "unknown split 'train'"),
        ({"patience": 3}, {"eval_split": "val"}, "--patience: a speedrun trains from scratch for all epochs"),
        (
            {"patience": 3},
            {},
            "--patience: a speedrun trains from scratch for all epochs; leave it out, or use a",
        ),
        ({"max_steps": 3}, {}, "--max-steps: a speedrun trains from scratch"),
        ({"eval_weights": "best"}, {"eval_split": "val"}, "does not evaluate on a validation split during training"),
        ({"schedule": "plateau:3"}, {"eval_split": "val"}, "does not evaluate on a validation split during training"),
        ({"val_size": 0}, {"eval_split": "val"}, "--eval-split val needs a validation split; set --val-size"),
    ],
)
def test_fault15_unsuitable_recipes_are_refused(
    recipe_file: MakeFile, tmp_path: Path, values: dict, arguments: dict, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        speedrun(recipe_name=recipe_file(**values), out=str(tmp_path / "timed"), **arguments)
    assert not (tmp_path / "timed").exists()
