"""Benchmark of the compile cache: seconds from the start of a process to the end of its first training step.

    python bench/start.py [--arch se68 --batch-size 128 --rounds 3]

A round is two starts with a common cache, which is empty before the first. The images are synthetic, so that no time is
spent on reading files.
Writes bench/results/<UTC>_<device>_start-<arch>/{env,summary}.json and trials.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import results_folder


def first_step(arch: str, batch_size: int) -> None:
    """Run everything that `train` does up to the end of its first step, except for the run folder."""
    from fastcifar.recipe import Recipe
    from fastcifar.training import build
    from fastcifar.training.resolve import resolve

    recipe = Recipe(arch=arch, batch_size=batch_size, augment="crop:4:zero,flip", data="synthetic:2000", val_size=0)
    trainer = build.build_trainer(resolve(recipe))
    trainer.optimize()
    trainer.train_step(next(trainer.batches(0)))
    assert trainer.meter.compute().images == batch_size


def seconds(command: list[str], cache: str) -> float:
    """Return the seconds until the child process reports the end of its first step."""
    started = time.perf_counter()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as child:
        assert child.stdout is not None
        if b"done" not in child.stdout.readline():
            raise RuntimeError("the child process ended before the end of its first step")
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds to the end of the first step, without and with a compile cache."
    )
    parser.add_argument("--arch", default="se68")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        first_step(arguments.arch, arguments.batch_size)
        print("done", flush=True)
        return
    from fastcifar.device import collect_environment

    command = [sys.executable, __file__, "--child", "--arch", arguments.arch, "--batch-size", str(arguments.batch_size)]
    trials = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as cache:
            trials.append({"round": number, "cold_s": seconds(command, cache), "warm_s": seconds(command, cache)})
        print(trials[-1], flush=True)
    ratios = [trial["warm_s"] / trial["cold_s"] for trial in trials]
    summary = {
        "what": "seconds from process start to the end of step 1, with a warm compile cache over a cold one, paired",
        "arch": arguments.arch,
        "batch_size": arguments.batch_size,
        "n": arguments.rounds,
        "cold_s": statistics.median(trial["cold_s"] for trial in trials),
        "warm_s": statistics.median(trial["warm_s"] for trial in trials),
        "share": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }
    folder = results_folder.write(f"start-{arguments.arch}", collect_environment("auto"), summary, trials)
    print(folder, json.dumps(summary["share"]))


if __name__ == "__main__":
    main()
