"""Benchmark of `keep_freed_memory`: the training step with and without it, alternating, each in a separate process.

    python bench/allocator.py [--arch speednet --batch-size 256 --rounds 3]

Writes bench/results/<UTC>_<device>_allocator-<arch>/{env,summary}.json and trials.jsonl. CPU only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import results_folder

STEPS, WARM_UP = 36, 6


def median_step_seconds(arch: str, batch_size: int, keep: bool) -> float:
    """Return the median seconds of a compiled training step on synthetic images."""
    from fastcifar.recipe import Recipe
    from fastcifar.training import build, compilation
    from fastcifar.training.resolve import resolve

    if not keep:
        compilation.keep_freed_memory = lambda: False
    recipe = Recipe(arch=arch, batch_size=batch_size, data="synthetic:20000", val_size=0, device="cpu")
    trainer = build.build_trainer(resolve(recipe))
    trainer.optimize()
    seconds = []
    for epoch in range(STEPS):
        for batch in trainer.batches(epoch):
            started = time.perf_counter()
            trainer.train_step(batch)
            seconds.append(time.perf_counter() - started)
            if len(seconds) == STEPS:
                return statistics.median(seconds[WARM_UP:])
    raise AssertionError("an epoch has no batches")


def main() -> None:
    parser = argparse.ArgumentParser(description="The training step with and without keep_freed_memory.")
    parser.add_argument("--arch", default="speednet")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("keep", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(median_step_seconds(arguments.arch, arguments.batch_size, arguments.child == "keep"))
        return
    from fastcifar.device import collect_environment

    trials = []
    command = [sys.executable, __file__, "--arch", arguments.arch, "--batch-size", str(arguments.batch_size)]
    for number in range(arguments.rounds):
        for kind in ("plain", "keep"):
            run = subprocess.run([*command, "--child", kind], stdout=subprocess.PIPE, text=True, check=False)
            if run.returncode:
                raise SystemExit(f"the {kind} run failed with exit code {run.returncode}; no result is written")
            trials.append({"round": number, "kind": kind, "step_s": float(run.stdout.split()[-1])})
            print(trials[-1], flush=True)
    ratios = [plain["step_s"] / keep["step_s"] for plain, keep in zip(trials[::2], trials[1::2], strict=True)]
    summary = {
        "what": "seconds of a training step, plain over keep_freed_memory, paired",
        "arch": arguments.arch,
        "batch_size": arguments.batch_size,
        "n": arguments.rounds,
        "speedup": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }
    folder = results_folder.write(f"allocator-{arguments.arch}", collect_environment("cpu"), summary, trials)
    print(folder, json.dumps(summary["speedup"]))


if __name__ == "__main__":
    main()
