"""Images a second of inference on the same network and images, in turn, each in a process of its own.

    python bench/inference.py [--arch se68 --images 10000 --data PATH --rounds 3 --wait 15 --attempts 3]

`source_loop` is the source projects' evaluation as its code would be written today: a DataLoader of two workers over
PIL images, batches of 128, float32, NCHW, eager, loss and hits read every batch. `predict` is what `fastcifar predict`
runs by itself, `predict_compiled` the same with --compile. Weights are random: their values change no speed. Writes
bench/results/<UTC>_<device>_inference-<arch>/{env,summary}.json and trials.jsonl. The images are timed in one stretch
without warm-up; reading, building and compiling are `prepare_s`. --wait and --attempts are those of peers/run.py.
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
from run import busy_seconds, ratio, trials_of_loops, wait_for_quiet
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

BATCH_SIZE = 128  # of the source


class Images(Dataset):
    """Test images as torchvision's CIFAR10 gives them."""

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
    started = time.perf_counter()
    device = choose_execution(Recipe()).device
    model = build_model(arch).to(device)
    model.load_state_dict(checkpoint.load_checkpoint(folder / "network.pt")["model"])
    batches = DataLoader(Images(folder), BATCH_SIZE, shuffle=False, num_workers=WORKERS)
    model.eval()
    prepared = time.perf_counter()
    hits = total = 0
    loss = 0.0
    with torch.no_grad():
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss += F.cross_entropy(logits, labels).item()
            hits += logits.argmax(1).eq(labels).sum().item()
            total += len(labels)
    return {"images": total, "seconds": time.perf_counter() - prepared, "prepare_s": prepared - started}


def ours(arch: str, folder: Path, **knobs: Any) -> dict[str, float]:
    found = predict_to_file(str(folder / "network.pt"), str(folder / "images.npy"), folder / "labels.csv", **knobs)
    seconds = found["seconds"]
    return {"images": found["images"], "seconds": seconds["predict"], "prepare_s": seconds["prepare"]}


LOOPS: dict[str, Callable[[str, Path], dict[str, float]]] = {
    "source_loop": source_loop,
    "predict": ours,
    "predict_compiled": lambda arch, folder: ours(arch, folder, compile=True),
}


def one(name: str, arch: str, folder: Path, wait: float) -> dict[str, float]:
    """A trial in this process."""
    wait_for_quiet(wait)
    busy, mine, started = busy_seconds(), cpu_seconds(), time.perf_counter()
    trial = LOOPS[name](arch, folder)
    spent = time.perf_counter() - started
    others = (busy_seconds() - busy - (cpu_seconds() - mine)) / spent
    return {**trial, "images_per_s": trial["images"] / trial["seconds"], "others_cores": others}


def prepare(folder: Path, arch: str, count: int, data: str | None) -> None:
    """A checkpoint of random weights, and the first `count` test images, as files."""
    torch.manual_seed(0)
    recipe = Recipe(arch=arch, normalize="cifar10")
    state = {"recipe": recipe.model_dump(mode="json"), "classes": list(DATASETS["cifar10"].class_names)}
    checkpoint.save_checkpoint(folder / "network.pt", {**state, "model": build_model(arch).state_dict(), "ema": None})
    test = load_dataset(data, download=False).test
    np.save(folder / "images.npy", test.images[:count])
    np.save(folder / "labels.npy", test.labels[:count])


def summary(trials: list[dict[str, Any]], **setting: Any) -> dict[str, Any]:
    """Medians, and speed as a multiple of the source's; of the attempts at a trial the last stands."""
    standing = list({(trial["round"], trial["loop"]): trial for trial in trials}.values())
    by_name = {name: [trial for trial in standing if trial["loop"] == name] for name in LOOPS}
    speeds = {name: [trial["images_per_s"] for trial in found] for name, found in by_name.items()}
    loops = {
        name: {
            "images_per_s": statistics.median(speeds[name]),
            "trials": speeds[name],
            "prepare_s": [trial["prepare_s"] for trial in found],
            "others_cores": max(trial["others_cores"] for trial in found),
            "times_source_loop": ratio(speeds[name], speeds["source_loop"]),
        }
        for name, found in by_name.items()
    }
    return {"what": "inference images/s, in turn", **setting, "n": len(speeds["predict"]), "inference": loops}


def main() -> None:
    parser = argparse.ArgumentParser(description="Inference by the source's loop and by `fastcifar predict`.")
    parser.add_argument("--arch", default="se68")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--data", help="as `fastcifar train` takes it; default: what it would find, else synthetic")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wait", type=float, default=0, help="seconds a trial waits, at most, for a quiet machine")
    parser.add_argument("--attempts", type=int, default=1, help="at a trial, while other processes disturb it")
    parser.add_argument("--child", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(one(arguments.child, arguments.arch, arguments.folder, arguments.wait)))
        return
    data = prepare_bench_recipe(Recipe(data=arguments.data)).data
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.arch, arguments.images, data)
        command = [sys.executable, __file__, "--folder", folder, "--arch", arguments.arch]
        command += ["--wait", str(arguments.wait)]
        trials = trials_of_loops(list(LOOPS), command, arguments.rounds, arguments.attempts)
    found = summary(
        trials,
        arch=arguments.arch,
        images=arguments.images,
        batch_size=BATCH_SIZE,
        data="synthetic" if str(data).startswith("synthetic") else "cifar10",
    )
    print(results_folder.write(f"inference-{arguments.arch}", collect_environment("auto"), found, trials))
    print(json.dumps({name: loop["times_source_loop"] for name, loop in found["inference"].items()}))


if __name__ == "__main__":
    main()
