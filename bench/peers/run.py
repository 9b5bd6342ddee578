"""Benchmark of the loops of loops.py in images/s on this machine, in turn, each in a separate process.

    python bench/peers/run.py [--arch se68 --batch-size 128 --augment crop-flip|crop-flip-cutout|a --data PATH]
                              [--what train|infer --precision auto --steps 8 --rounds 3 --loops NAME,NAME]
                              [--airbench CHECKOUT]

Writes bench/results/<UTC>_<device>_{peers,inference}-<arch>/{env,summary}.json and trials.jsonl. A trial times
`--steps` steps of a process after its warm-up; building, compiling and warm-up are timed separately, as `prepare_s`.
Every trial is kept with the number of cores that other processes used meanwhile. On a CPU, a loop of a peer runs twice
in a round: as its users run it, and as `NAME+allocator` with the allocator settings of fastcifar (allocator.py). On a
shared machine, `--wait` waits until other processes are idle, and `--attempts` repeats a disturbed trial; the last
attempt counts, and all are in trials.jsonl. A ratio is the median of the ratios of each round. `--airbench` adds the
scripts of a checkout of cifar10-airbench, timed by airbench.py; they need CUDA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import airbench
import allocator
import results_folder
import torch
from loops import AUGMENTATIONS, LOOPS, ON_DEVICE, ON_DEVICE_AUGMENTATIONS, Settings

from fastcifar.benchmark.bench import cpu_seconds, prepare_bench_recipe, time_units
from fastcifar.benchmark.roofline import measure_environment
from fastcifar.device import choose_execution
from fastcifar.recipe import Recipe

WARM_UP = 2  # steps: the first one compiles, the second one allocates memory
BASELINES = ("source_loop", "plain_compile")
KINDS = {"train": "training", "infer": "inference"}  # value of --what -> its name in results
NAMES = [name + variant for name in LOOPS for variant in ("", allocator.SAME_ALLOCATOR)]
SAMPLE_S, IDLE_CORES = 1.5, 0.1  # duration of a measurement of other processes, and the cores that idle ones may use


def run_trial(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a trial of the loop `name` in this process."""
    device = choose_execution(Recipe(device=arguments.device)).device
    started = time.perf_counter()
    names = ("arch", "batch_size", "augment", "data", "precision", "what")
    loop = LOOPS[name](Settings(**{name: getattr(arguments, name) for name in names}, device=device))
    for _ in range(WARM_UP):
        next(loop)
    prepare_s = time.perf_counter() - started
    wait_for_idle_machine(arguments.wait)
    busy = busy_seconds()
    trial = time_units(loop, arguments.steps, torch.device(device))
    return {
        "prepare_s": prepare_s,
        "images": trial.images,
        "seconds": trial.seconds,
        "images_per_s": trial.images_per_s,
        "cpu_us_per_image": trial.cpu_us_per_image,
        "others_cores": (busy_seconds() - busy - trial.cpu_s) / trial.seconds,
        "keeps_freed_memory": allocator.keeps_freed_memory(),
    }


def wait_for_idle_machine(max_s: float) -> None:
    """Wait until other processes are idle, for at most `max_s` seconds."""
    deadline = time.perf_counter() + max_s
    while time.perf_counter() < deadline:
        before = busy_seconds() - cpu_seconds()
        time.sleep(SAMPLE_S)
        if busy_seconds() - cpu_seconds() - before < IDLE_CORES * SAMPLE_S:
            return


def busy_seconds() -> float:
    """Return the CPU seconds that all processes have used since boot; NaN on systems without /proc/stat."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:]
    except OSError:
        return math.nan
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def summarize(trials: list[dict[str, Any]], what: str = "train", **settings: Any) -> dict[str, Any]:
    """Return the medians of every loop, and its speed relative to the BASELINES.

    Only the last attempt of a trial counts, whatever its speed: the others were disturbed by other processes.
    """
    last_attempts = {(trial["round"], trial["loop"]): trial for trial in trials}.values()
    names = [name for name in NAMES if any(trial["loop"] == name for trial in last_attempts)]
    by_name = {name: [trial for trial in last_attempts if trial["loop"] == name] for name in names}
    speeds = {name: [trial["images_per_s"] for trial in group] for name, group in by_name.items()}
    loops = {}
    for name, group in by_name.items():
        loops[name] = {
            "images_per_s": statistics.median(speeds[name]),
            "trials": speeds[name],
            "cpu_us_per_image": statistics.median(trial["cpu_us_per_image"] for trial in group),
            "prepare_s": [trial["prepare_s"] for trial in group],
            "others_cores": max(trial["others_cores"] for trial in group),
            **{f"times_{other}": ratio(speeds[name], speeds[other]) for other in speeds if is_baseline(other)},
        }
    rounds = len(next(iter(speeds.values())))
    summary = {"what": f"{KINDS[what]} images/s, end to end, loops in turn", **settings, "n": rounds}
    return {**summary, "loops" if what == "train" else "inference": loops}


def is_baseline(name: str) -> bool:
    """Return whether the speed of other loops relative to the loop `name` is recorded."""
    return name.removesuffix(allocator.SAME_ALLOCATOR) in BASELINES


def ratio(values: list[float], baseline: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum of `values` / `baseline`, paired by round."""
    ratios = [value / other for value, other in zip(values, baseline, strict=True)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for the terminal; "others" is the number of cores that other processes used."""
    loops = summary.get("loops") or summary["inference"]
    others = [name for name in loops if is_baseline(name)]
    headings = "".join(f" {f'x {name}':>{len(name) + 2}}" for name in others)
    lines = [f"{'loop':33} {'images/s':>9}{headings} {'CPU us/image':>13} {'others':>6}  trials"]
    for name, loop in loops.items():
        ratios = "".join(f" {loop[f'times_{other}']['median']:{len(other) + 2}.2f}" for other in others)
        lines.append(
            f"{name:33} {loop['images_per_s']:9,.1f}{ratios} "
            f"{loop['cpu_us_per_image']:13,.0f} {loop['others_cores']:6.2f}  "
            f"{', '.join(f'{trial:,.1f}' for trial in loop['trials'])}"
        )
    return "\n".join(lines + ([airbench.format_table(summary)] if "scripts" in summary else []))


def run_trials(names: list[str], command: list[str], rounds: int, attempts: int) -> list[dict[str, Any]]:
    """Run the trials of the loops in turn, each by `command` with --child and the name of the loop.

    Raises SystemExit if a process fails or does not have the allocator that the name of the loop says.
    """
    trials: list[dict[str, Any]] = []
    for number in range(rounds):
        for name in names:
            loop = name.removesuffix(allocator.SAME_ALLOCATOR)
            environment = allocator.process_environment(same_allocator=loop != name)
            for _ in range(attempts):
                run = subprocess.run(
                    [*command, "--child", loop], env=environment, stdout=subprocess.PIPE, text=True, check=False
                )
                if run.returncode:
                    raise SystemExit(f"{name} failed with exit code {run.returncode}; no result is written")
                trials.append({"round": number, "loop": name, **json.loads(run.stdout.splitlines()[-1])})
                print(trials[-1], flush=True)
                if loop != "ours" and trials[-1]["keeps_freed_memory"] not in (loop != name, None):
                    raise SystemExit(f"{name} did not run with the intended memory allocator; no result is written")
                if trials[-1]["others_cores"] < IDLE_CORES:
                    break
    return trials


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Training loops on the same network and images.")
    parser.add_argument("--what", choices=KINDS, default="train")
    parser.add_argument("--arch", default="se68")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--augment", choices=AUGMENTATIONS, default="crop-flip-cutout")
    parser.add_argument("--data", help="data set, as for fastcifar train, by default that of fastcifar bench")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--loops", default="", help=f"loops to run, by default all that support --augment: {','.join(LOOPS)}"
    )
    parser.add_argument("--steps", type=int, default=8, help="number of timed steps of a trial, by default 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--wait", type=float, default=0, help="maximum seconds that a trial waits for other processes to be idle"
    )
    parser.add_argument(
        "--attempts", type=int, default=1, help="maximum number of attempts of a trial that other processes disturb"
    )
    parser.add_argument("--airbench", type=Path, metavar="CHECKOUT", help="checkout of KellerJordan/cifar10-airbench")
    parser.add_argument("--child", choices=LOOPS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(run_trial(arguments.child, arguments)))
        return
    scripts: list[str] = list(airbench.SCRIPTS) if arguments.airbench else []
    if message := airbench.missing_cuda_message() if scripts else "":
        print(message, file=sys.stderr)
        scripts = []
    airbench.require_scripts(arguments.airbench, scripts)
    on_device = arguments.what == "train" and arguments.augment in ON_DEVICE_AUGMENTATIONS
    names = [name for name in LOOPS if on_device or name not in ON_DEVICE]
    names = arguments.loops.split(",") if arguments.loops else names
    execution = choose_execution(Recipe(device=arguments.device, precision=arguments.precision))
    precision = {"fp16": "fp32"}.get(execution.precision, execution.precision)  # no peer's loop scales the loss
    if execution.device == "cpu":  # fastcifar configures the allocator on a CPU only
        variants = {name: ("",) if name == "ours" else ("", allocator.SAME_ALLOCATOR) for name in names}
        names = [name + variant for name in names for variant in variants[name]]
    data = prepare_bench_recipe(Recipe(data=arguments.data)).data
    command = [sys.executable, __file__, *("--data", data) * bool(data), "--steps", str(arguments.steps)]
    command += ["--wait", str(arguments.wait), "--device", arguments.device, "--precision", precision]
    command += ["--arch", arguments.arch, "--batch-size", str(arguments.batch_size), "--augment", arguments.augment]
    command += ["--what", arguments.what]
    trials = run_trials(names, command, arguments.rounds, arguments.attempts)
    summary = summarize(
        trials,
        arguments.what,
        arch=arguments.arch,
        batch_size=arguments.batch_size,
        augment=AUGMENTATIONS[arguments.augment].spec,
        precision=precision,
        data="synthetic" if str(data).startswith("synthetic") else "cifar10",
        steps=arguments.steps,
        warm_up=WARM_UP,
    )
    label = f"{'peers' if arguments.what == 'train' else 'inference'}-{arguments.arch}"
    environment = measure_environment(arguments.device)
    folder = results_folder.write(label, environment, summary, trials)
    print(folder)
    if scripts:  # after the loops are written, because a script may end early
        script_trials = airbench.run_scripts(arguments.airbench, scripts, data)
        summary["scripts"] = airbench.summarize(script_trials)["scripts"]
        results_folder.write(label, environment, summary, trials + script_trials, folder=folder)
    print(format_table(summary))


if __name__ == "__main__":
    main()
