"""Benchmark of the time to an accuracy: fastcifar and a peer's script, alternating, each run in a separate process.

    python bench/peers/speedruns.py SCRIPT [--target 94 --rounds 3 --seed 0 --data PATH --append FOLDER]

SCRIPT is a program in the style of cifar10-airbench: `python SCRIPT SEED` trains one run on the images in its folder,
in the format of that project, and prints its tables and optionally a line `flops N` with the number of operations of a
run. An example is a port of one of its scripts to a machine without CUDA; none is included here. On a CPU, the script
runs twice a round: as its users run it (`peer`), and with the allocator settings of fastcifar (`peer_same_allocator`,
see allocator.py). All programs train on all images and evaluate on the test set at the end. The seconds are those of
training alone as each program measures them, without compilation and evaluation (the scripts of cifar10-airbench
include the evaluation with test-time augmentation; a port must not). Writes
bench/results/<UTC>_<device>_speed<target>/{env,summary}.json and trials.jsonl after every round. `--append` adds rounds
to the result of an earlier call on the same machine with the same recipe; a round can take hours on a CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import airbench
import allocator
import results_folder
import torch
from run import busy_seconds, ratio

from fastcifar.benchmark.roofline import measure_environment, measure_matmul_flop_per_s
from fastcifar.benchmark.speedrun import TARGET_RECIPES, plan_speedrun
from fastcifar.benchmark.speedrun_results import SpeedrunEnvironment
from fastcifar.device import Environment, choose_execution, collect_environment
from fastcifar.format import format_differences
from fastcifar.recipe import Recipe

METRICS = ("seconds", "acc_tta", "acc", "flops")
PEERS = {"peer": False, "peer_same_allocator": True}  # name in the results -> whether it has fastcifar's allocator


def run_fastcifar(target: str, seed: int, data: str | None, folder: Path) -> dict[str, Any]:
    """Run `fastcifar speedrun` once and return its trial. Raises SystemExit if it fails or its trial is refused."""
    out = folder / f"ours-{seed}"
    command = [sys.executable, "-m", "fastcifar", "speedrun", "--target", target, "--seed", str(seed)]
    command += ["--out", str(out), *(("--data", data) if data else ())]
    run = subprocess.run(command, env=allocator.process_environment(same_allocator=False), check=False)
    if run.returncode:
        raise SystemExit(f"fastcifar with seed {seed} failed with exit code {run.returncode}; no result is written")
    trial = json.loads((out / "trials.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    if trial["refused"]:
        raise SystemExit(f"the run of fastcifar with seed {seed} was refused: {trial['refused']}")
    return {key: trial[key] for key in (*METRICS, "build_s", "cold_start_s")}


def run_peer(script: Path, seed: int, folder: Path, same_allocator: bool = False) -> dict[str, Any]:
    """Run the script once and return what it prints. Raises SystemExit with its last line if it prints no accuracy."""
    environment = allocator.process_environment(same_allocator) | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(seed)]
    process = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    lines = process.stdout.splitlines()
    runs = list(airbench.parse_runs(iter(lines)))
    if process.returncode or len(runs) != 1:
        last_line = lines[-1] if lines else ""
        raise SystemExit(
            f"{script.name} printed {len(runs)} runs and ended with exit code {process.returncode}: {last_line}"
        )
    flops = [float(line.split()[1]) for line in lines if line.startswith("flops ")]
    run = runs[0]
    return {
        "seconds": run["own_s"],
        "acc_tta": run["accuracy"],
        "acc": run["without_tta"],
        "flops": flops[0] if flops else None,
    }


def measure_run(who: str, number: int, seed: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call `run` and return a trial with its metrics and the number of cores that other processes used meanwhile.

    `cpu_matmul_tflop_per_s` has the rate of a float32 matrix product on the CPU before and after the run, because the
    speed of a virtual machine can change between runs.
    """
    rate_before = measure_cpu_tflop_per_s()
    busy, own, started = busy_seconds(), children_seconds(), time.perf_counter()
    metrics = run()
    wall = time.perf_counter() - started
    others = (busy_seconds() - busy - (children_seconds() - own)) / wall
    trial = {"round": number, "who": who, "seed": seed, **metrics, "wall_s": wall, "others_cores": others}
    trial["cpu_matmul_tflop_per_s"] = [rate_before, measure_cpu_tflop_per_s()]
    print(trial, flush=True)
    return trial


def measure_cpu_tflop_per_s() -> float:
    """Return the rate of a float32 matrix product with 1,024 rows and columns on the CPU."""
    return measure_matmul_flop_per_s(torch.device("cpu"), "fp32", 1024) / 1e12


def children_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summarize(trials: list[dict[str, Any]], target: str, script: str) -> dict[str, Any]:
    """Return the metrics of the programs by round, and the ratios of our seconds to those of the peer."""
    programs: dict[str, dict[str, list[Any]]] = {
        who: {key: [trial[key] for trial in trials if trial["who"] == who] for key in METRICS}
        for who in ("ours", *PEERS)
        if any(trial["who"] == who for trial in trials)
    }
    seconds = {who: metrics["seconds"] for who, metrics in programs.items()}
    return {
        "what": "training to an accuracy, ours and a peer's in turn",
        "target": float(target) / 100,
        "recipe": TARGET_RECIPES[target],
        "config": recipe_options(target),
        "peer_script": script,
        "n": len(seconds["ours"]),
        **programs,
        "mean_acc_tta": {who: statistics.fmean(metrics["acc_tta"]) for who, metrics in programs.items()},
        "mean_acc": {who: statistics.fmean(metrics["acc"]) for who, metrics in programs.items()},
        **{f"seconds_over_{peer}": ratio(seconds["ours"], seconds[peer]) for peer in PEERS if peer in seconds},
        "others_cores": max(trial["others_cores"] for trial in trials),
    }


def recipe_options(target: str) -> dict[str, Any]:
    """Return the options with which `fastcifar speedrun` trains, without those that differ between its runs."""
    return plan_speedrun(None, target, None, None, {})[0].config


def read_trials(folder: Path, target: str, script: str, environment: Environment) -> list[dict[str, Any]]:
    """Return the trials in a result folder.

    Raises SystemExit if they are of another peer, target, recipe or environment.
    """
    summary, saved = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("summary", "env"))
    before, after = (SpeedrunEnvironment(**items).timing_items() for items in (saved, environment.model_dump()))
    options = Recipe().model_dump(mode="json") | summary.get("config", {})  # defaults of options newer than the result
    before = {**options, **before, "target": summary["target"], "peer_script": summary["peer_script"]}
    after = {**recipe_options(target), **after, "target": float(target) / 100, "peer_script": script}
    if differing := [name for name in after if before.get(name) != after[name]]:
        raise SystemExit(f"{folder} is a result with {format_differences(before, after, differing)}")
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time to an accuracy of fastcifar and of a peer's script, alternating."
    )
    parser.add_argument(
        "script", type=Path, help="script in the style of cifar10-airbench, with the seed as its argument"
    )
    parser.add_argument("--target", choices=TARGET_RECIPES, default="94")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round; every further round adds one")
    parser.add_argument("--data", help="data set, as for fastcifar train")
    parser.add_argument("--append", type=Path, metavar="FOLDER", help="result folder to which the rounds are added")
    arguments = parser.parse_args()
    result_folder, summary, trials = arguments.append, {}, []
    if result_folder:
        trials = read_trials(result_folder, arguments.target, arguments.script.name, collect_environment("auto"))
    completed_rounds = len({trial["round"] for trial in trials})
    on_cpu = choose_execution(Recipe()).device == "cpu"  # fastcifar configures the allocator on a CPU only
    programs = ["peer", *(["peer_same_allocator"] if on_cpu else []), "ours"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        airbench.write_images(folder, arguments.data)
        for number in range(completed_rounds, completed_rounds + arguments.rounds):
            seed = arguments.seed + number
            first = number % len(programs)
            for who in programs[first:] + programs[:first]:  # every round begins with another program
                run = partial(run_fastcifar, arguments.target, seed, arguments.data, folder)
                if who != "ours":
                    run = partial(run_peer, arguments.script.absolute(), seed, folder, PEERS[who])
                trials.append(measure_run(who, number, seed, run))
            summary = summarize(trials, arguments.target, arguments.script.name)
            result_folder = results_folder.write(
                f"speed{arguments.target}", measure_environment("auto"), summary, trials, folder=result_folder
            )
    print(result_folder)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
