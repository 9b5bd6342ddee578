"""The benchmark of the data loaders: order of trials, ratios by round, the table of results."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastcifar.benchmark.workloads import loader_workload
from fastcifar.data import cifar
from fastcifar.data.loaders import LOADERS
from fastcifar.device import Environment

SPEEDS = {"tensor": (400.0, 100.0, 300.0), "dali": (100.0, 60.0, 50.0), "torchvision": (10.0, 20.0, 10.0)}


def script(name: str) -> ModuleType:
    """Import a script of bench/, which pyproject.toml adds to the import path."""
    return importlib.import_module(name)


def trials(augment: str = "crop:4:zero", names: tuple[str, ...] = tuple(SPEEDS)) -> list[dict]:
    return [
        {"augment": augment, "name": name, "round": number, "images_per_s": SPEEDS[name][number],
         "cpu_us_per_image": 1.0, "others_cores": 0.1}
        for number in range(3)
        for name in names
    ]  # fmt: skip


def test_ratios_are_computed_by_round_and_all_trials_are_kept() -> None:
    summary = script("loaders").summarize([*trials(), *trials("rotate:5", ("tensor",))], batch_size=512)
    assert (summary["n"], summary["batch_size"]) == (3, 512)
    tensor, dali, baseline, single = summary["loaders"]
    assert tensor["times"] == {"min": 5, "median": 30, "max": 40, "of": "torchvision"}
    assert (dali["images_per_s"], dali["trials"]) == (60.0, [100.0, 60.0, 50.0])
    assert baseline["times"]["median"] == 1
    assert (single["augment"], single["times"]) == ("rotate:5", None)


def test_the_table_has_a_row_for_each_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, loaders = script("tables"), script("loaders")
    monkeypatch.setattr(loaders.results_folder, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.loaders() == "(None recorded yet.)"
    summary = loaders.summarize(trials(), batch_size=512, workers=2)
    loaders.results_folder.write("loaders", Environment(device="a CPU"), summary, trials())
    lines = tables.loaders().splitlines()
    assert len(lines) == 2 + len(SPEEDS)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| 400, 100, 300 | 30.0 x torchvision |" in lines[2]


@pytest.mark.medium
def test_loaders_are_measured_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    loaders = script("loaders")
    split = cifar.load_dataset("synthetic:400", "cifar10").train
    arguments = argparse.Namespace(batch_size=50, workers=0, rounds=2, seconds=0.02)
    workloads = loaders.build_workloads("flip:0.5:alternating", split, arguments, "cpu")
    assert set(workloads) == set(LOADERS) - {"torchvision"}
    assert "torchvision is skipped: --loader torchvision does not support flip" in capsys.readouterr().out
    workloads = {}
    for name, loader_class in LOADERS.items():
        options: dict[str, Any] = {} if name == "torchvision" else {"compile": False}
        loader = loader_class(split.images, split.labels, batch_size=50, augment=(), seed=0, device="cpu", **options)
        workloads[name] = loader_workload(loader)
    results = loaders.run_trials(workloads, arguments, torch.device("cpu"), augment="none")
    assert [(trial["round"], trial["name"]) for trial in results] == [
        (number, name) for number in (0, 1) for name in LOADERS
    ]
    assert all(trial["images"] > 0 and trial["cpu_us_per_image"] >= 0 for trial in results)
    assert json.loads(json.dumps(results)) == results
