"""Benchmark of the data loaders in images/s, for several lists of augmentations, in turn.

    python bench/loaders.py [--data PATH --batch-size 512 --rounds 5 --seconds 1 --augment LIST --augment LIST ...]

Writes bench/results/<UTC>_<device>_loaders/{env,summary}.json and trials.jsonl, in about six minutes on two cores. A
trial measures batches for about `--seconds`, after enough batches that everything a loader has prefetched is used up.
The loaders alternate within a round, and a ratio is the median of the ratios of each round. All trials are kept, each
with the number of cores that other processes used meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import results_folder
import torch
from run import busy_seconds, ratio

from fastcifar.benchmark.bench import prepare_bench_recipe, time_units
from fastcifar.benchmark.roofline import measure_environment
from fastcifar.benchmark.workloads import Workload, loader_workload
from fastcifar.data import cifar
from fastcifar.data.augment import format_augment, parse_augment
from fastcifar.data.loaders import LOADERS
from fastcifar.data.normalization import mean_color, normalization_mean_std
from fastcifar.device import choose_execution
from fastcifar.errors import UserError
from fastcifar.recipe import Recipe
from fastcifar.training.compilation import enable_compile_cache, keep_freed_memory

LISTS = (
    "crop:4:zero,flip",
    "crop:4:zero,flip,cutout:8:mean",
    "crop:4:zero,flip,rotate:5,autoaugment:cifar10",  # augmentation A of the source projects
    "crop:4:zero,flip,rotate:10,jitter:0.2,erase:0.1:gray",  # augmentation B
    "crop:4:zero,flip,trivialaugment:wide,cutout:8:mean",
)
BASELINE = "torchvision"
WARM_UP_BATCHES = 12  # before every trial: more than a loader prefetches, 2 batches per worker or 2 chunks of DALI


def build_workloads(spec: str, split: cifar.Split, arguments: argparse.Namespace, device: str) -> dict[str, Workload]:
    """Return name -> workload of every loader that supports the augmentations `spec`; print why others do not."""
    workloads = {}
    for name, loader_class in LOADERS.items():
        try:
            loader = loader_class(
                split.images, split.labels, batch_size=arguments.batch_size, augment=parse_augment(spec), seed=0,
                device=device, fill_color=mean_color(normalization_mean_std(Recipe())[0]),
                workers=arguments.workers,
            )  # fmt: skip
        except UserError as error:
            print(f"{spec}: {name} is skipped: {error}", flush=True)
            continue
        workloads[name] = loader_workload(loader)
    return workloads


def units_for_duration(workload: Workload, seconds: float, device: torch.device) -> int:
    """Return the number of batches in about `seconds`, after two that compile kernels and start workers."""
    time_units(workload, 2, device)
    units = 4
    while (trial := time_units(workload, units, device)).seconds < seconds / 8:
        units *= 2
    return max(1, round(units * seconds / trial.seconds))


def run_trials(
    workloads: dict[str, Workload], arguments: argparse.Namespace, device: torch.device, **labels: Any
) -> list[dict]:
    """Run `--rounds` trials of each workload in turn; `labels` are added to every trial."""
    units = {name: units_for_duration(workload, arguments.seconds, device) for name, workload in workloads.items()}
    trials = []
    for number in range(arguments.rounds):
        for name, workload in workloads.items():
            time_units(workload, max(WARM_UP_BATCHES, 2 * arguments.workers + 2), device)
            busy = busy_seconds()
            trial = time_units(workload, units[name], device)
            trials.append({
                **labels, "name": name, "round": number, "images": trial.images, "seconds": trial.seconds,
                "images_per_s": trial.images_per_s, "cpu_us_per_image": trial.cpu_us_per_image,
                "others_cores": (busy_seconds() - busy - trial.cpu_s) / trial.seconds,
            })  # fmt: skip
    return trials


def summarize(trials: list[dict], **settings: Any) -> dict[str, Any]:
    """Return medians for every augmentation and loader, and speeds relative to the baseline."""
    rows = []
    for augment in dict.fromkeys(trial["augment"] for trial in trials):
        group = [trial for trial in trials if trial["augment"] == augment]
        speeds = {
            name: [trial["images_per_s"] for trial in group if trial["name"] == name]
            for name in dict.fromkeys(trial["name"] for trial in group)
        }
        baseline = BASELINE if BASELINE in speeds else None
        for name, speed in speeds.items():
            loader_trials = [trial for trial in group if trial["name"] == name]
            rows.append({
                "augment": augment, "name": name, "images_per_s": statistics.median(speed), "trials": speed,
                "cpu_us_per_image": statistics.median(trial["cpu_us_per_image"] for trial in loader_trials),
                "others_cores": max(trial["others_cores"] for trial in loader_trials),
                "times": ratio(speed, speeds[baseline]) | {"of": baseline} if baseline else None,
            })  # fmt: skip
    rounds = len({trial["round"] for trial in trials})
    return {"what": "images/s of the loaders, in turn", **settings, "n": rounds, "loaders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Images/s of every data loader for several lists of augmentations.")
    parser.add_argument("--data", help="data set, as for fastcifar train, by default that of fastcifar bench")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument(
        "--augment", action="append", help="list of augmentations; may be repeated; by default five lists"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="approximate duration of a trial, by default 1")
    parser.add_argument(
        "--workers", type=int, default=2, help="number of worker processes of the torchvision loader, by default 2"
    )
    parser.add_argument("--dry", action="store_true", help="do not write a result")
    arguments = parser.parse_args()
    recipe = prepare_bench_recipe(Recipe(data=arguments.data, device=arguments.device))
    device = torch.device(choose_execution(recipe).device)
    if device.type == "cpu":
        keep_freed_memory()
    enable_compile_cache()
    with warnings.catch_warnings(action="ignore"):
        data = cifar.load_dataset(recipe.data, recipe.dataset)
    trials: list[dict] = []
    for spec in arguments.augment or LISTS:
        workloads = build_workloads(spec, data.train, arguments, str(device))
        trials += run_trials(workloads, arguments, device, augment=format_augment(parse_augment(spec)))
        print(format_table(summarize(trials[-len(workloads) * arguments.rounds :])), flush=True)
        del workloads
    summary = summarize(
        trials,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        data="synthetic" if str(recipe.data).startswith("synthetic") else recipe.dataset,
        images=len(data.train.labels),
    )
    if not arguments.dry:
        print(results_folder.write("loaders", measure_environment(device.type), summary, trials))


def format_table(summary: dict[str, Any]) -> str:
    """Return a summary as a table for the terminal."""
    lines = []
    for row in summary["loaders"]:
        times = f"{row['times']['median']:6.1f} x {row['times']['of']}" if row["times"] else ""
        lines.append(
            f"{row['augment']:60} {row['name']:12} {row['images_per_s']:10,.0f} images/s "
            f"{row['cpu_us_per_image']:7.1f} CPU us/image {times:22} other processes {row['others_cores']:.2f} cores"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
