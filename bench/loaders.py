"""Images a second of every loader, for lists of augmentations, in turn; and of two decoders of PNG files.

    python bench/loaders.py [--data PATH --batch-size 512 --rounds 5 --seconds 1 --augment LIST --augment LIST ...]

writes bench/results/<UTC>_<device>_loaders/{env,summary}.json and trials.jsonl, in about six minutes on two cores.
A trial is a stretch of batches of about `--seconds`, after enough of them that what a loader had made ahead is used
up. Loaders take turns within a round, and a ratio is the median of those within a round. No trial is left out; each is
kept with the cores that other processes used meanwhile.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import numpy as np
import results_folder
import torch
from PIL import Image
from run import busy_seconds, ratio

from fastcifar.benchmark.bench import cpu_seconds, prepare_bench_recipe, time_units
from fastcifar.data import cifar, class_folders
from fastcifar.data.augment import format_augment, parse_augment
from fastcifar.data.loaders import LOADERS
from fastcifar.data.normalization import mean_color
from fastcifar.device import choose_execution, collect_environment
from fastcifar.errors import UserError
from fastcifar.recipe import Recipe
from fastcifar.training.compilation import enable_compile_cache, keep_freed_memory

LISTS = (
    "crop:4:zero,flip",
    "crop:4:zero,flip,cutout:8:mean",
    "crop:4:zero,flip,rotate:5,autoaugment:cifar10",  # the source projects' A
    "crop:4:zero,flip,rotate:10,jitter:0.2,erase:0.1:gray",  # and B
    "crop:4:zero,flip,trivialaugment:wide,cutout:8:mean",
)
BASELINE = "torchvision"
AHEAD = 12  # batches before every trial: more than a loader keeps ready, which are 2 for each worker, 2 chunks of DALI
DECODED = 2000  # images of the decoders' trial
DECODER_BATCH = 256
Work = Iterator[int]


def endless(loader: Any) -> Work:
    """The loader's batches, epoch after epoch, with nothing done to them: the number of images of each."""
    for epoch in itertools.count():
        for _images, labels in loader.batches(epoch):
            yield len(labels)


def loaders_of(spec: str, split: cifar.Split, arguments: argparse.Namespace, device: str) -> dict[str, Work]:
    """Every loader that has the list `spec`, by name; the others are named, with their reason."""
    works = {}
    for name, kind in LOADERS.items():
        takes = inspect.signature(kind).parameters
        own = {"workers": arguments.workers} if "workers" in takes else {}
        try:
            loader = kind(
                split.images, split.labels, batch_size=arguments.batch_size, augment=parse_augment(spec), seed=0,
                device=device, fill_color=mean_color(Recipe()), **own,
            )  # fmt: skip
        except UserError as error:
            print(f"{spec}: no {name}: {error}", flush=True)
            continue
        works[name] = endless(loader)
    return works


def fitting(work: Work, seconds: float, device: torch.device) -> int:
    """How many units of `work` take about `seconds`, after the first ones, which compile and start what is needed."""
    time_units(work, 2, device)
    units = 4
    while (trial := time_units(work, units, device)).seconds < seconds / 8:
        units *= 2
    return max(1, round(units * seconds / trial.seconds))


def in_turn(works: dict[str, Work], arguments: argparse.Namespace, device: torch.device, **what: Any) -> list[dict]:
    """The trials of `works`, `--rounds` of each, in turn."""
    units = {name: fitting(work, arguments.seconds, device) for name, work in works.items()}
    trials = []
    for number in range(arguments.rounds):
        for name, work in works.items():
            time_units(work, max(AHEAD, 2 * arguments.workers + 2), device)
            busy = busy_seconds()
            trial = time_units(work, units[name], device)
            trials.append({
                **what, "name": name, "round": number, "images": trial.images, "seconds": trial.seconds,
                "images_per_s": trial.images_per_s, "cpu_us_per_image": trial.cpu_us_per_image,
                "others_cores": (busy_seconds() - busy - trial.cpu_s) / trial.seconds,
            })  # fmt: skip
    return trials


def write_folder(split: cifar.Split, folder: Path, count: int) -> list[Path]:
    """The first `count` images as PNG files in class folders."""
    files = []
    for number, (image, label) in enumerate(zip(split.images[:count], split.labels[:count], strict=True)):
        file = folder / f"class_{label:02d}" / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
        files.append(file)
    return files


def by_pillow(files: list[Path]) -> Iterator[np.ndarray]:
    """The files as the package reads class folders: uint8 [32,32,3] each."""
    return map(class_folders.decode_image, files)


def by_dali(files: list[Path], threads: int = 2) -> Iterator[np.ndarray]:
    """The same through DALI's file reader and image decoder (on the CPU: its GPU decoder knows no PNG)."""
    from nvidia import dali

    pipeline = dali.Pipeline(batch_size=min(DECODER_BATCH, len(files)), num_threads=threads, device_id=None)
    with pipeline:
        content, _ = dali.fn.readers.file(files=[str(file) for file in files], name="files", pad_last_batch=True)
        pipeline.set_outputs(dali.fn.decoders.image(content, device="cpu", output_type=dali.types.RGB))
    pipeline.build()
    left = len(files)
    while left > 0:
        (images,) = pipeline.run()
        for index in range(min(left, len(images))):
            yield np.array(images.at(index))
        left -= len(images)


DECODERS: dict[str, Callable[[list[Path]], Iterator[np.ndarray]]] = {"pillow": by_pillow, "dali": by_dali}


def decoders(split: cifar.Split, arguments: argparse.Namespace) -> list[dict]:
    """Trials of the decoders on the same PNG files, whole and in turn; they must agree."""
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_folder(split, Path(folder), DECODED)
        wanted = split.images[:DECODED].transpose(0, 2, 3, 1)
        for number in range(arguments.rounds):
            for name, decode in DECODERS.items():
                busy, cpu, wall = busy_seconds(), cpu_seconds(), time.perf_counter()
                images = np.stack(list(decode(files)))
                seconds, cpu_s = time.perf_counter() - wall, cpu_seconds() - cpu
                if not np.array_equal(images, wanted):
                    raise SystemExit(f"{name} decodes other pixels: no result")
                trials.append({
                    "augment": "decoding PNG files", "name": name, "round": number, "images": len(images),
                    "seconds": seconds, "images_per_s": len(images) / seconds,
                    "cpu_us_per_image": 1e6 * cpu_s / len(images),
                    "others_cores": (busy_seconds() - busy - cpu_s) / seconds,
                })  # fmt: skip
    return trials


def summary(trials: list[dict], **setting: Any) -> dict[str, Any]:
    """Medians of every (list, loader), and their speed as a multiple of the baseline's, or of Pillow's, by round."""
    rows = []
    for augment in dict.fromkeys(trial["augment"] for trial in trials):
        of_list = [trial for trial in trials if trial["augment"] == augment]
        speeds = {
            name: [trial["images_per_s"] for trial in of_list if trial["name"] == name]
            for name in dict.fromkeys(trial["name"] for trial in of_list)
        }
        against = next((name for name in (BASELINE, "pillow") if name in speeds), None)
        for name, found in speeds.items():
            mine = [trial for trial in of_list if trial["name"] == name]
            rows.append({
                "augment": augment, "name": name, "images_per_s": statistics.median(found), "trials": found,
                "cpu_us_per_image": statistics.median(trial["cpu_us_per_image"] for trial in mine),
                "others_cores": max(trial["others_cores"] for trial in mine),
                "times": ratio(found, speeds[against]) | {"of": against} if against else None,
            })  # fmt: skip
    rounds = len({trial["round"] for trial in trials})
    return {"what": "images/s of the loaders, in turn", **setting, "n": rounds, "loaders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Every loader, for lists of augmentations, in turn.")
    parser.add_argument("--data", help="as `fastcifar train` takes it; default: what it would find, else synthetic")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--augment", action="append", help="a list; may be repeated; default: five lists")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a trial, about")
    parser.add_argument("--workers", type=int, default=2, help="processes of the torchvision loader")
    parser.add_argument("--dry", action="store_true", help="write nothing")
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
        works = loaders_of(spec, data.train, arguments, str(device))
        trials += in_turn(works, arguments, device, augment=format_augment(parse_augment(spec)))
        print(table(summary(trials[-len(works) * arguments.rounds :])), flush=True)
        del works
    trials += decoders(data.train, arguments)
    found = summary(
        trials,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        data="synthetic" if str(recipe.data).startswith("synthetic") else recipe.dataset,
        images=len(data.train.labels),
    )
    print(table(summary(trials[-len(DECODERS) * arguments.rounds :])))
    if not arguments.dry:
        print(results_folder.write("loaders", collect_environment(device.type), found, trials))


def table(found: dict[str, Any]) -> str:
    """What a person sees of a summary."""
    lines = []
    for row in found["loaders"]:
        times = f"{row['times']['median']:6.1f} x {row['times']['of']}" if row["times"] else ""
        lines.append(
            f"{row['augment']:60} {row['name']:12} {row['images_per_s']:10,.0f} images/s "
            f"{row['cpu_us_per_image']:7.1f} CPU us/image {times:22} others {row['others_cores']:.2f} cores"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
