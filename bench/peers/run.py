"""Images a second of the training loops of loops.py on this machine, in turn, each in a process of its own.

    python bench/peers/run.py [--arch se68 --batch-size 128 --augment crop-flip|crop-flip-cutout|a --data PATH]
                              [--steps 8 --rounds 3 --loops NAME,NAME --airbench CHECKOUT]

writes bench/results/<UTC>_<device>_peers-<arch>/{env,summary}.json and trials.jsonl. A trial is the `--steps` steps
after the warm-up of one process; building, compiling and warming up are its `prepare_s`. Each is kept with the cores
that other processes used meanwhile; on a shared machine, `--wait` waits for a quiet one and `--attempts` repeats a
disturbed trial: the last attempt stands, all are in trials.jsonl. A ratio is the median of the ratios within a round.
With `--airbench` the scripts of a checkout of cifar10-airbench follow, timed as airbench.py does it; they need CUDA.
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
import results_folder
import torch
from loops import AUGMENTATIONS, LOOPS, ON_DEVICE, THEIRS, Setting

from fastcifar.benchmark.bench import cpu_seconds, prepare_bench_recipe, time_units
from fastcifar.device import choose_execution, collect_environment
from fastcifar.recipe import Recipe

WARM_UP = 2  # steps: the first compiles, the second finds its memory
BASELINES = ("source_loop", "plain_compile")
LOOK_S, QUIET = 1.5, 0.1  # seconds of one look at the other processes, and how many cores they may use


def one(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """A trial of the loop `name`, in this process."""
    device = choose_execution(Recipe(device=arguments.device)).device
    started = time.perf_counter()
    loop = LOOPS[name](Setting(arguments.arch, arguments.batch_size, arguments.augment, arguments.data, device))
    for _ in range(WARM_UP):
        next(loop)
    prepare_s = time.perf_counter() - started
    wait_for_quiet(arguments.wait)
    busy = busy_seconds()
    trial = time_units(loop, arguments.steps, torch.device(device))
    return {
        "prepare_s": prepare_s,
        "images": trial.images,
        "seconds": trial.seconds,
        "images_per_s": trial.images_per_s,
        "cpu_us_per_image": trial.cpu_us_per_image,
        "others_cores": (busy_seconds() - busy - trial.cpu_s) / trial.seconds,
    }


def wait_for_quiet(most_s: float) -> None:
    """Returns when other processes leave the machine alone, after `most_s` seconds at the latest."""
    deadline = time.perf_counter() + most_s
    while time.perf_counter() < deadline:
        others = busy_seconds() - cpu_seconds()
        time.sleep(LOOK_S)
        if busy_seconds() - cpu_seconds() - others < QUIET * LOOK_S:
            return


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used; nan where /proc does not show them."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = Path("/proc/stat").read_text().split()[1:]
    except OSError:
        return math.nan
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def summary(trials: list[dict[str, Any]], **setting: Any) -> dict[str, Any]:
    """The medians, and each loop's speed as a multiple of the source's and of the plainly compiled one's.

    Of the attempts at a trial the last stands, whatever its speed: the others were disturbed by other processes.
    """
    standing = {(trial["round"], trial["loop"]): trial for trial in trials}.values()
    names = [name for name in LOOPS if any(trial["loop"] == name for trial in standing)]
    by_name = {name: [trial for trial in standing if trial["loop"] == name] for name in names}
    speeds = {name: [trial["images_per_s"] for trial in found] for name, found in by_name.items()}
    loops = {}
    for name, found in by_name.items():
        loops[name] = {
            "images_per_s": statistics.median(speeds[name]),
            "trials": speeds[name],
            "cpu_us_per_image": statistics.median(trial["cpu_us_per_image"] for trial in found),
            "prepare_s": [trial["prepare_s"] for trial in found],
            "others_cores": max(trial["others_cores"] for trial in found),
            **{f"times_{other}": ratio(speeds[name], speeds[other]) for other in BASELINES if other in speeds},
        }
    rounds = len(next(iter(speeds.values())))
    return {"what": "training images/s, end to end, loops in turn", **setting, "n": rounds, "loops": loops}


def ratio(mine: list[float], others: list[float]) -> dict[str, float]:
    """`mine` over `others`, paired by round."""
    paired = [one / other for one, other in zip(mine, others, strict=True)]
    return {"min": min(paired), "median": statistics.median(paired), "max": max(paired)}


def table(found: dict[str, Any]) -> str:
    lines = [f"{'loop':24} {'images/s':>9} {'x source':>9} {'x compile':>9} {'CPU us/image':>13} {'others':>6}  trials"]
    for name, loop in found["loops"].items():
        ratios = (loop.get(f"times_{other}", {}).get("median", math.nan) for other in BASELINES)
        lines.append(
            f"{name:24} {loop['images_per_s']:9,.1f} {' '.join(f'{value:9.2f}' for value in ratios)} "
            f"{loop['cpu_us_per_image']:13,.0f} {loop['others_cores']:6.2f}  "
            f"{', '.join(f'{trial:,.1f}' for trial in loop['trials'])}"
        )
    return "\n".join(lines + ([airbench.table(found)] if "scripts" in found else []))


def trials_of_loops(names: list[str], command: list[str], rounds: int, attempts: int) -> list[dict[str, Any]]:
    """Every trial of every loop, in turn, each by `command` with the loop's name behind it."""
    trials: list[dict[str, Any]] = []
    for number in range(rounds):
        for name in names:
            for _ in range(attempts):
                run = subprocess.run([*command, "--child", name], stdout=subprocess.PIPE, text=True, check=False)
                if run.returncode:
                    raise SystemExit(f"{name} failed with exit code {run.returncode}: no result")
                trials.append({"round": number, "loop": name, **json.loads(run.stdout.splitlines()[-1])})
                print(trials[-1], flush=True)
                if trials[-1]["others_cores"] < QUIET:
                    break
    return trials


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training loops on the same network and images.")
    parser.add_argument("--arch", default="se68")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--augment", choices=AUGMENTATIONS, default="crop-flip-cutout")
    parser.add_argument("--data", help="as `fastcifar train` takes it; default: what it would find, else synthetic")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--loops", default="", help=f"some of {','.join(LOOPS)}; default: all that know --augment")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a trial")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wait", type=float, default=0, help="seconds a trial waits, at most, for a quiet machine")
    parser.add_argument("--attempts", type=int, default=1, help="at a trial, while other processes disturb it")
    parser.add_argument("--airbench", type=Path, metavar="CHECKOUT", help="of KellerJordan/cifar10-airbench")
    parser.add_argument("--child", choices=LOOPS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    arguments = arguments_of()
    if arguments.child:
        print(json.dumps(one(arguments.child, arguments)))
        return
    scripts: list[str] = list(airbench.SCRIPTS) if arguments.airbench else []
    if why := airbench.needs_cuda() if scripts else "":
        print(why, file=sys.stderr)
        scripts = []
    airbench.require(arguments.airbench, scripts)
    names = [name for name in LOOPS if arguments.augment in THEIRS or name not in ON_DEVICE]
    if arguments.loops:
        names = arguments.loops.split(",")
    data = prepare_bench_recipe(Recipe(data=arguments.data)).data
    command = [sys.executable, __file__, *("--data", data) * bool(data), "--steps", str(arguments.steps)]
    command += ["--wait", str(arguments.wait), "--device", arguments.device]
    command += ["--arch", arguments.arch, "--batch-size", str(arguments.batch_size), "--augment", arguments.augment]
    trials = trials_of_loops(names, command, arguments.rounds, arguments.attempts)
    found = summary(
        trials,
        arch=arguments.arch,
        batch_size=arguments.batch_size,
        augment=AUGMENTATIONS[arguments.augment].spelling,
        data="synthetic" if str(data).startswith("synthetic") else "cifar10",
        steps=arguments.steps,
        warm_up=WARM_UP,
    )
    what, machine = f"peers-{arguments.arch}", collect_environment(arguments.device)
    folder = results_folder.write(what, machine, found, trials)
    print(folder)
    if scripts:  # one may end early, and the loops are kept
        theirs = airbench.measured(arguments.airbench, scripts, data)
        found["scripts"] = airbench.summary(theirs)["scripts"]
        results_folder.write(what, machine, found, trials + theirs, folder=folder)
    print(table(found))


if __name__ == "__main__":
    main()
