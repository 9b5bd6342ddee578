"""Benchmark of inference in images/s, on the same network and images, in turn, each in a separate process.

    python bench/inference.py [--arch se68 --images 10000 --data PATH --rounds 3 --wait 15 --attempts 3]

`source_loop` is the evaluation of the source projects, written as their code would be today: a DataLoader with two
workers over PIL images, batches of 128, float32, NCHW, eager, loss and accuracy read after every batch. `predict` is
`fastcifar predict` with its defaults, `predict_compiled` the same with --compile. The weights are random, which does
not influence the speed. Writes bench/results/<UTC>_<device>_inference-<arch>/{env,summary}.json and trials.jsonl. All
images are timed in one pass without warm-up; reading, building and compiling are timed separately, as `prepare_s`.
--wait and --attempts are those of peers/run.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import numpy as np
import results_folder
import torch
import torch.nn.functional as F
from loops import WORKERS
from PIL import Image
from run import busy_seconds, ratio, run_trials, wait_for_idle_machine
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastcifar.benchmark.bench import cpu_seconds, prepare_bench_recipe
from fastcifar.data.cifar import DATASETS, load_dataset
from fastcifar.data.normalization import parse_normalization
from fastcifar.device import choose_execution, collect_environment
from fastcifar.evaluation.predict import predict_to_file
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint

BATCH_SIZE = 128  # that of the source projects


class Images(Dataset):
    """Test images as torchvision.datasets.CIFAR10 returns them."""

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy").transpose(0, 2, 3, 1).copy()
        self.labels = np.load(folder / "labels.npy").tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(*parse_normalization("cifar10"))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def source_loop(arch: str, folder: Path) -> dict[str, float]:
    """Evaluate the network in `folder` with the loop of the source projects, and return images and seconds."""
    started = time.perf_counter()
    device = choose_execution(Recipe()).device
    model = build_model(arch).to(device)
    model.load_state_dict(checkpoint.load_checkpoint(folder / "network.pt")["model"])
    batches = DataLoader(Images(folder), BATCH_SIZE, shuffle=False, num_workers=WORKERS)
    model.eval()
    prepared = time.perf_counter()
    correct = total = 0
    loss = 0.0
    with torch.no_grad():
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss += F.cross_entropy(logits, labels).item()
            correct += logits.argmax(1).eq(labels).sum().item()
            total += len(labels)
    return {"images": total, "seconds": time.perf_counter() - prepared, "prepare_s": prepared - started}


def run_predict(arch: str, folder: Path, **options: Any) -> dict[str, float]:
    """Predict the images in `folder` with `fastcifar predict`, and return images and seconds."""
    result = predict_to_file(str(folder / "network.pt"), str(folder / "images.npy"), folder / "labels.csv", **options)
    seconds = result["seconds"]
    return {"images": result["images"], "seconds": seconds["predict"], "prepare_s": seconds["prepare"]}


LOOPS: dict[str, Callable[[str, Path], dict[str, float]]] = {
    "source_loop": source_loop,
    "predict": run_predict,
    "predict_compiled": lambda arch, folder: run_predict(arch, folder, compile=True),
}


def run_trial(name: str, arch: str, folder: Path, wait: float) -> dict[str, float]:
    """Run a trial of the loop `name` in this process."""
    wait_for_idle_machine(wait)
    busy, own, started = busy_seconds(), cpu_seconds(), time.perf_counter()
    trial = LOOPS[name](arch, folder)
    seconds = time.perf_counter() - started
    others = (busy_seconds() - busy - (cpu_seconds() - own)) / seconds
    return {**trial, "images_per_s": trial["images"] / trial["seconds"], "others_cores": others}


def prepare(folder: Path, arch: str, count: int, data: str | None) -> None:
    """Write a checkpoint with random weights and the first `count` test images to `folder`."""
    torch.manual_seed(0)
    recipe = Recipe(arch=arch, normalize="cifar10")
    state = {"recipe": recipe.model_dump(mode="json"), "classes": list(DATASETS["cifar10"].class_names)}
    checkpoint.save_checkpoint(folder / "network.pt", {**state, "model": build_model(arch).state_dict(), "ema": None})
    test = load_dataset(data, download=False).test
    np.save(folder / "images.npy", test.images[:count])
    np.save(folder / "labels.npy", test.labels[:count])


def summarize(trials: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Return medians, and speeds relative to `source_loop`; only the last attempt of a trial counts."""
    last_attempts = list({(trial["round"], trial["loop"]): trial for trial in trials}.values())
    by_name = {name: [trial for trial in last_attempts if trial["loop"] == name] for name in LOOPS}
    speeds = {name: [trial["images_per_s"] for trial in group] for name, group in by_name.items()}
    loops = {
        name: {
            "images_per_s": statistics.median(speeds[name]),
            "trials": speeds[name],
            "prepare_s": [trial["prepare_s"] for trial in group],
            "others_cores": max(trial["others_cores"] for trial in group),
            "times_source_loop": ratio(speeds[name], speeds["source_loop"]),
        }
        for name, group in by_name.items()
    }
    return {"what": "inference images/s, in turn", **settings, "n": len(speeds["predict"]), "inference": loops}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Inference with the loop of the source projects and with `fastcifar predict`."
    )
    parser.add_argument("--arch", default="se68")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--data", help="data set, as for fastcifar train, by default that of fastcifar bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--wait", type=float, default=0, help="maximum seconds that a trial waits for other processes to be idle"
    )
    parser.add_argument(
        "--attempts", type=int, default=1, help="maximum number of attempts of a trial that other processes disturb"
    )
    parser.add_argument("--child", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_trial(arguments.child, arguments.arch, arguments.folder, arguments.wait)))
        return
    data = prepare_bench_recipe(Recipe(data=arguments.data)).data
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.arch, arguments.images, data)
        command = [sys.executable, __file__, "--folder", folder, "--arch", arguments.arch]
        command += ["--wait", str(arguments.wait)]
        trials = run_trials(list(LOOPS), command, arguments.rounds, arguments.attempts)
    summary = summarize(
        trials,
        arch=arguments.arch,
        images=arguments.images,
        batch_size=BATCH_SIZE,
        data="synthetic" if str(data).startswith("synthetic") else "cifar10",
    )
    print(results_folder.write(f"inference-{arguments.arch}", collect_environment("auto"), summary, trials))
    print(json.dumps({name: loop["times_source_loop"] for name, loop in summary["inference"].items()}))


if __name__ == "__main__":
    main()
