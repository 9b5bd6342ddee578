"""Timed runs: each is the run that `train` would be; what does not count, what is kept, and the arithmetic."""

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

from fastcifar.benchmark import speedrun as harness
from fastcifar.benchmark.speedrun import count_flops, speedrun, state_dict_sha256
from fastcifar.benchmark.speedrun_results import SpeedrunResults, sample_statistics
from fastcifar.errors import UsageError
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe
from fastcifar.reporting.benchmark_tables import speedrun_table
from fastcifar.training import checkpoint
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train

Make = Callable[..., Recipe]


@pytest.fixture
def file(tiny: Make, tmp_path: Path) -> Callable[..., str]:
    """A recipe file of the tiny network, without the folder that it would train in."""

    def make(**changes: Any) -> str:
        path = tmp_path / "small.toml"
        path.write_text(tiny(**changes).model_copy(update={"out": None}).to_toml())
        return str(path)

    return make


@pytest.mark.parametrize(
    "values",
    [
        {"ema_decay": 0.9, "eval_weights": "ema", "dropout": 0.1},
        {"arch": "speed94", "optimizer": "muon", "lr": 0.05, "image_size": "24:1,32", "head_lr_mult": 3.0},
        {"optimizer": "lookahead:lion", "lr": 0.001, "augment": "crop:4:zero,cutmix:1.0", "batch_size": 48},
    ],
    ids=("average", "whitened", "mixed"),
)
def test_each_run_is_the_one_that_train_would_be(tiny: Make, file: Any, tmp_path: Path, values: dict) -> None:
    found = speedrun(recipe_name=file(**values), n=3, eval_split="val", seed=4, out=str(tmp_path / "timed"))
    trials = [json.loads(line) for line in (tmp_path / "timed" / "trials.jsonl").read_text().splitlines()]
    assert found["seeds"] == [trial["seed"] for trial in trials] == [4, 5, 6]
    assert len({trial["sha256"] for trial in trials}) == 3
    for trial in trials:
        summary = train(tiny(**values, seed=trial["seed"], out=str(tmp_path / f"run-{trial['seed']}")))
        saved = checkpoint.load_checkpoint(Path(summary["run"]) / "checkpoints" / "last.pt")
        weights = saved["ema"] if values.get("eval_weights") == "ema" else saved["model"]
        assert state_dict_sha256(weights) == trial["sha256"], trial["seed"]
        assert (trial["steps"], trial["refused"]) == (summary["steps"], None)
        assert saved["step"] == trial["steps"]


def test_the_folder_the_summary_and_the_table(file: Any, tmp_path: Path) -> None:
    folder = tmp_path / "timed"
    told = Console(record=True, width=200)
    found = speedrun(target="95", recipe_name=file(), n=2, out=str(folder), console=told)
    assert "evaluation: the test set, once a run" in told.export_text()
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "env.json", "trials.jsonl", "summary.json"}
    assert {"folder": str(folder), **json.loads((folder / "summary.json").read_text())} == found
    assert (found["target"], found["recipe"], found["on"], found["tta"]) == (0.95, "small", "test", "6view")
    assert found["seconds"]["trials"] == [
        prepare + training
        for prepare, training in zip(found["prepare_s"]["trials"], found["train_s"]["trials"], strict=True)
    ]
    assert found["images"] == 2 * 160 + 2 * 40, "all images train where the test set is evaluated"
    assert len(found["cold_start_s"]) == 1
    assert found["cold_start_s"][0] > found["seconds"]["trials"][0]
    assert (found["reached"], found["flops_to_target"]) == (False, None)
    assert json.loads((folder / "recipe.json").read_text())["config"]["val_size"] == 0
    assert "small on the test set: 2 runs" in speedrun_table(found).renderables[0]  # type: ignore[operator]


def test_a_folder_goes_on_with_its_own_recipe_and_no_other(file: Any, tmp_path: Path) -> None:
    folder, name = tmp_path / "timed", file()
    first = speedrun(recipe_name=name, seed=3, out=str(folder))
    found = speedrun(append=folder, n=2)
    assert found["seeds"] == [3, 4, 5]
    assert found["acc"]["trials"][:1] == first["acc"]["trials"]
    assert json.loads((folder / "summary.json").read_text())["seeds"] == found["seeds"]
    assert speedrun(append=folder, recipe_name=name, seed=9)["seeds"] == [3, 4, 5, 9]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"seed": 4}, "has seed 4 already; begin at --seed 10"),
        ({"lr": 0.5}, "another recipe: lr 0.1, not 0.5"),
        ({"target": "95"}, "another recipe: target 94, not 95"),
        ({"eval_split": "val", "val_size": 40}, "another recipe: val_size 0, not 40, on test, not val"),
        ({"data": "synthetic:100"}, "another recipe: data synthetic:200, not synthetic:100"),
        ({"recipe_name": file(epochs=3)}, "another recipe: epochs 2, not 3"),
    )
    for asked, words in cases:
        with pytest.raises(UsageError, match=words):
            speedrun(append=folder, **asked)
    environment = json.loads((folder / "env.json").read_text())
    assert environment["chosen"].items() <= json.loads((folder / "trials.jsonl").read_text().splitlines()[0]).items()
    for change, words in (
        ({"device": "a GPU"}, "another clock: device a GPU, not "),
        ({"versions": {**environment["versions"], "torch": "2.0", "typer": "0"}}, "another clock: torch 2.0, not "),
        ({"chosen": {**environment["chosen"], "compiled": True}}, "another clock: compiled on, not off"),
    ):
        (folder / "env.json").write_text(json.dumps({**environment, **change}))
        with pytest.raises(UsageError, match=words):
            speedrun(append=folder)
    with pytest.raises(UsageError, match=f"--append {folder}"):
        speedrun(recipe_name=name, out=str(folder))
    with pytest.raises(UsageError, match="holds no trials"):
        speedrun(append=tmp_path)


def test_a_seed_that_another_process_added_meanwhile_is_not_counted_twice(
    file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "timed"
    speedrun(recipe_name=file(), out=str(folder))
    assembled = harness.build_trainer

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(harness, "build_trainer", assembled)
        speedrun(append=folder)
        return assembled(*given)

    monkeypatch.setattr(harness, "build_trainer", meanwhile)
    with pytest.raises(UsageError, match="has seed 1 already; begin at --seed 2"):
        speedrun(append=folder)
    assert speedrun(append=folder)["seeds"] == [0, 1, 2], "its lock was given up"


def test_killed_between_two_trials_it_keeps_the_first_and_goes_on(
    file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name, following = tmp_path / "timed", file(), harness.reset_trainer_for_recipe
    monkeypatch.setattr(harness, "reset_trainer_for_recipe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        speedrun(recipe_name=name, n=2, eval_split="val", out=str(folder))
    monkeypatch.setattr(harness, "reset_trainer_for_recipe", following)
    with (folder / "trials.jsonl").open("a") as lines:
        lines.write('{"seed": 1, "acc')  # as a file system may leave it
    assert json.loads((folder / "summary.json").read_text())["seeds"] == [0]
    found = speedrun(append=folder)
    assert found["seeds"] == [0, 1]
    assert speedrun(recipe_name=name, n=2, eval_split="val", out=str(tmp_path / "whole"))["acc"] == found["acc"]


@pytest.mark.parametrize("spoilt", ["evaluation", "training"])
def test_a_run_that_does_not_count_is_kept_as_a_miss(
    file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    evaluate, fit, calls = harness.evaluate, harness.train_without_evaluation, []

    def cheating(model: nn.Module, *given: Any) -> Any:
        calls.append(model)
        if spoilt == "evaluation" and len(calls) == 3:  # the second run's first evaluation
            next(model.parameters()).data[0] += 1e-3
        return evaluate(model, *given)

    def failing(parts: Any, step: Any) -> None:
        fit(parts, step)
        if spoilt == "training" and parts.recipe.seed == 1:
            parts.meter.found_inf.fill_(1)
            parts.meter.add(torch.tensor(math.nan), torch.tensor(0), 1)

    monkeypatch.setattr(harness, "evaluate", cheating)
    monkeypatch.setattr(harness, "train_without_evaluation", failing)
    found = speedrun(recipe_name=file(), n=3, eval_split="val", out=str(tmp_path / "timed"))
    trials = [json.loads(line) for line in (tmp_path / "timed" / "trials.jsonl").read_text().splitlines()]
    why = {"evaluation": "the evaluation changed the weights", "training": "the loss or a gradient was not finite"}
    assert [trial["refused"] for trial in trials] == [None, why[spoilt], None]
    assert (found["n"], found["refused"]) == (3, 1)
    assert found["acc"]["trials"] == [trials[0]["acc"], trials[2]["acc"]]


def test_the_summarys_arithmetic(tmp_path: Path) -> None:
    config = Recipe().model_dump(mode="json")
    document = {"target": "94", "recipe": "small", "on": "test", "config": config}
    accuracies = [0.9402, 0.94, 0.9399, 0.9471]
    tally = SpeedrunResults(tmp_path, document, {"flops": 10**15})
    for seed, accuracy in enumerate(accuracies):
        times = {"seconds": 3.0 + seed, "train_s": 2.0 + seed, "prepare_s": 1.0, "build_s": 9.0, "cold_start_s": None}
        tally.add_trial({"seed": seed, "acc": accuracy - 0.005, "acc_tta": accuracy, **times, "refused": None})
    found = tally.summary()
    assert found["acc_tta"]["mean"] == statistics.fmean(accuracies)
    assert found["acc_tta"]["std"] == statistics.stdev(accuracies)
    assert found["acc_tta"]["stderr"] == pytest.approx(statistics.stdev(accuracies) / 2)
    assert (found["acc_tta"]["share"], found["acc"]["share"]) == (0.75, 0.25)
    assert found["seconds"] == sample_statistics([3.0, 4.0, 5.0, 6.0])
    assert (found["reached"], found["flops_to_target"]) == (True, 10**15)
    tally.add_trial({**tally.trials[-1], "seed": 4, "refused": "it was not finite"})
    found = tally.summary()
    assert (found["n"], found["refused"], found["acc_tta"]["share"]) == (5, 1, 0.6)
    assert (found["reached"], found["flops_to_target"]) == (False, None), "a run that does not count is a miss"
    assert found["acc_tta"]["mean"] == statistics.fmean(accuracies)
    assert sample_statistics([1.0]) == {"mean": 1.0, "std": None, "stderr": None, "trials": [1.0]}
    assert sample_statistics([1.0, None]) is sample_statistics([]) is None


def test_operations_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution on images that need no gradient, and a linear layer: 2 and 3 passes, 2 operations each."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(4, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(images).mean((2, 3)))

    monkeypatch.setitem(MODELS, "small", Small)

    def of_image(size: int) -> int:
        return 2 * (2 * size**2 * 4 * 3 * 9 + 3 * 4 * 10)

    assert count_flops(Recipe(arch="small", epochs=5), 10, num_images=500) == 500 * of_image(32)
    mixed = Recipe(arch="small", epochs=5, image_size="16:1,24:2,32")
    assert count_flops(mixed, 10, num_images=500) == 100 * of_image(16) + 200 * of_image(24) + 200 * of_image(32)


def test_the_average_is_what_is_evaluated(tiny: Make) -> None:
    parts = build_trainer(resolve(tiny(ema_decay=0.9, eval_weights="ema", epochs=1)))
    harness.train_without_evaluation(parts, parts.build_train_step())
    assert parts.ema is not None
    assert all(torch.equal(parts.model.state_dict()[name], value) for name, value in parts.ema.average.items())


@pytest.mark.parametrize(
    ("values", "asked", "words"),
    [
        ({}, {"target": "93"}, "unknown target '93'"),
        ({}, {"eval_split": "train"}, "unknown split 'train'"),
        ({"patience": 3}, {"eval_split": "val"}, "--patience: a timed run goes from the start"),
        ({"max_steps": 3}, {}, "--max-steps: a timed run"),
        ({"eval_weights": "best"}, {"eval_split": "val"}, "looks at no validation split"),
        ({"schedule": "plateau:3"}, {"eval_split": "val"}, "looks at no validation split"),
        ({"val_size": 0}, {"eval_split": "val"}, "give --val-size"),
    ],
)
def test_fault15_what_cannot_be_timed(file: Any, tmp_path: Path, values: dict, asked: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        speedrun(recipe_name=file(**values), out=str(tmp_path / "timed"), **asked)
    assert not (tmp_path / "timed").exists()
