"""Time to an accuracy beside a peer's script: a run of ours and a run of theirs, in turn, each in a process of its own.

    python bench/peers/speedruns.py SCRIPT [--target 94 --rounds 3 --seed 0 --data PATH]

SCRIPT trains in cifar10-airbench's way and prints its tables: `python SCRIPT SEED` for one run, on the images in its
folder as that project keeps them, with a line `flops N` for the operations of a run where it knows them. The port of a
script to a machine without CUDA is such a one; none is kept here. Both train on all images and meet the test set at
their end. Seconds are training alone, by each one's own clock: compiled before, evaluated after
(cifar10-airbench's own scripts time the evaluation with views too; a port must leave it out). Writes
bench/results/<UTC>_<device>_speed<target>/{env,summary}.json and trials.jsonl, anew after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import airbench
import results_folder
from run import busy_seconds, ratio

from fastcifar.benchmark.speedrun import TARGET_RECIPES
from fastcifar.device import collect_environment

FIGURES = ("seconds", "acc_tta", "acc", "flops")


def our_run(target: str, seed: int, data: str | None, place: Path) -> dict[str, Any]:
    """The trial that `fastcifar speedrun` keeps of one run. Errors: SystemExit if it ends otherwise or is refused."""
    out = place / f"ours-{seed}"
    command = [sys.executable, "-m", "fastcifar", "speedrun", "--target", target, "--seed", str(seed)]
    command += ["--out", str(out), *(("--data", data) if data else ())]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f"our run of seed {seed} ended with exit code {done.returncode}: no result")
    trial = json.loads((out / "trials.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    if trial["refused"]:
        raise SystemExit(f"our run of seed {seed} does not count: {trial['refused']}")
    return {key: trial[key] for key in (*FIGURES, "build_s", "cold_start_s")}


def their_run(script: Path, seed: int, place: Path) -> dict[str, Any]:
    """What the script prints of one run. Errors: SystemExit with its last line if it prints no accuracy."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(seed)]
    done = subprocess.run(command, cwd=place, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    lines = done.stdout.splitlines()
    found = list(airbench.finished_runs(iter(lines)))
    if done.returncode or len(found) != 1:
        raise SystemExit(f"{script.name} gave {len(found)} runs and code {done.returncode}: {(lines or [''])[-1]}")
    flops = [float(line.split()[1]) for line in lines if line.startswith("flops ")]
    run = found[0]
    return {
        "seconds": run["own_s"],
        "acc_tta": run["accuracy"],
        "acc": run["without_tta"],
        "flops": flops[0] if flops else None,
    }


def watched(who: str, number: int, seed: int, run: Any) -> dict[str, Any]:
    """A trial, with the cores that other processes used meanwhile."""
    busy, own, started = busy_seconds(), children_seconds(), time.perf_counter()
    figures = run()
    wall = time.perf_counter() - started
    others = (busy_seconds() - busy - (children_seconds() - own)) / wall
    trial = {"round": number, "who": who, "seed": seed, **figures, "wall_s": wall, "others_cores": others}
    print(trial, flush=True)
    return trial


def children_seconds() -> float:
    """CPU seconds of the processes that this one waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(trials: list[dict[str, Any]], target: str, script: str) -> dict[str, Any]:
    """Both sides' figures by round, and ours over theirs."""
    sides = {
        who: {key: [trial[key] for trial in trials if trial["who"] == who] for key in FIGURES}
        for who in ("ours", "peer")
    }
    return {
        "what": "training to an accuracy, ours and a peer's in turn",
        "target": float(target) / 100,
        "recipe": TARGET_RECIPES[target],
        "peer_script": script,
        "n": len(sides["ours"]["seconds"]),
        **sides,
        "mean_acc_tta": {who: statistics.fmean(side["acc_tta"]) for who, side in sides.items()},
        "mean_acc": {who: statistics.fmean(side["acc"]) for who, side in sides.items()},
        "seconds_over_peer": ratio(sides["ours"]["seconds"], sides["peer"]["seconds"]),
        "others_cores": max(trial["others_cores"] for trial in trials),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A speedrun of ours and a peer's run, in turn.")
    parser.add_argument("script", type=Path, help="as cifar10-airbench's, with the seed as its argument")
    parser.add_argument("--target", choices=TARGET_RECIPES, default="94")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next one's is one more")
    parser.add_argument("--data", help="as `fastcifar train` takes it")
    arguments = parser.parse_args()
    trials: list[dict[str, Any]] = []
    folder = None
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        airbench.write_images(place, arguments.data)
        for number in range(arguments.rounds):
            seed = arguments.seed + number
            runs = {
                "ours": lambda seed=seed: our_run(arguments.target, seed, arguments.data, place),
                "peer": lambda seed=seed: their_run(arguments.script.absolute(), seed, place),
            }
            for who in sorted(runs, reverse=number % 2 == 0):  # who begins, alternates
                trials.append(watched(who, number, seed, runs[who]))
            found = summary(trials, arguments.target, arguments.script.name)
            folder = results_folder.write(
                f"speed{arguments.target}", collect_environment("auto"), found, trials, folder=folder
            )
    print(folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
