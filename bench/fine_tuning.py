"""Benchmark of fine-tuning: training from random weights beside starts from the weights of a run on other classes.

    python bench/fine_tuning.py [--seeds 3 --data PATH]

A small network is trained on seven classes of CIFAR-10 (`SOURCE`), and then on 100 images of each of the other three
(`TARGET`), from the starts in `STARTS`, once for each seed. The learning rates were chosen on a part of these images
(LOG.md). Writes bench/results/<UTC>_<device>_fine-tuning/ with the test accuracy and the summary of every run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results_folder
from record import summarize, without_paths

from fastcifar import Recipe, train
from fastcifar.data.cifar import Dataset, Split, load_dataset
from fastcifar.device import collect_environment
from fastcifar.format import format_percent

TARGET_CLASSES = ("cat", "horse", "truck")
NETWORK = {"arch": "speednet", "width": 0.25, "val_size": 0}
SOURCE = {**NETWORK, "epochs": 5}
SOURCE_IMAGES = (2000, 1000)  # images of each class for training and testing
TARGET = {**NETWORK, "epochs": 20, "batch_size": 50}
TARGET_IMAGES = (100, 500)
FIRST_SEED = 10

# name -> options besides `TARGET`; `init` stands for the run on the other classes
STARTS: dict[str, dict[str, Any]] = {
    "random weights": {"lr": 0.005},
    "random weights, lr 0.02": {"lr": 0.02},
    "init": {"lr": 0.02, "init": "source"},
    "init, stem and first stage frozen": {"lr": 0.1, "init": "source", "freeze": "stem,stages.0"},
    "init, head only": {"lr": 0.2, "init": "source", "freeze": "stem,stages"},
}


def select(data: Dataset, classes: Sequence[str], sizes: tuple[int, int]) -> dict[str, Any]:
    """Return the first images of `classes`, `sizes` of each for training and testing, as `train` takes them."""
    splits = {}
    for (name, split), size in zip((("train", data.train), ("test", data.test)), sizes, strict=True):
        indices = [np.flatnonzero(split.labels == data.classes.index(label))[:size] for label in classes]
        labels = np.repeat(np.arange(len(classes)), [len(part) for part in indices])
        splits[name] = Split(split.images[np.concatenate(indices)], labels)
    return {**splits, "classes": list(classes)}


def measure(data: Dataset, seeds: Sequence[int], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train the source network, and from every start with every seed; return a summary of all, and one of each run."""
    others = [name for name in data.classes if name not in TARGET_CLASSES]
    recipe = Recipe.make("quick", **SOURCE, out=str(folder / "source"))
    source = train(recipe, data=select(data, others, SOURCE_IMAGES), progress=False)
    target, runs, starts = select(data, TARGET_CLASSES, TARGET_IMAGES), [], {}
    for number, (name, options) in enumerate(STARTS.items()):
        given = {**TARGET, **options, **({"init": str(source.folder)} if "init" in options else {})}
        trials = []
        for seed in seeds:
            recipe = Recipe.make("quick", **given, seed=seed, out=str(folder / f"{number}-{seed}"))
            trials.append(train(recipe, data=target, progress=False).summary.model_dump())
        chosen = {"lr": options["lr"], "freeze": options.get("freeze", "none")}
        starts[name] = {**summarize(name, trials), **chosen, "trained_params": trials[0]["trained_params"]}
        runs += trials
        print(f"{name}: {', '.join(map(format_percent, starts[name]['test_acc']['trials']))}", flush=True)
    return {"what": "fine-tuning", "source_test_acc": source.summary.test_acc, "starts": starts}, runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Training from random weights beside fine-tuning, on few images.")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs from each start")
    parser.add_argument("--data", help="data set, as for fastcifar train")
    arguments = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    with tempfile.TemporaryDirectory() as folder:
        summary, runs = measure(load_dataset(arguments.data), seeds, Path(folder))
    print(results_folder.write("fine-tuning", collect_environment("auto"), summary, map(without_paths, runs)))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
