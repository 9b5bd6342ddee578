"""Kill training runs at random times by SIGKILL, SIGTERM or SIGINT, resume them and compare them with full runs.

    scripts/soak [--runs 200] [--seed 0] [--jobs 2]

Every run is a separate process, restarted with the same command and `--resume auto` until it completes. Every resumed
run must equal the uninterrupted run of the same options. Writes bench/results/<UTC>_<device>_soak/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.children import train, wait_for_exit
from tests.faults.runs import assert_equal_runs

SIGNALS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}
MAX_KILLS = 3
# Options in addition to those of `children.TINY`, which uses dropout
VARIANTS = {
    "lookahead": ("--epochs", "3"),
    "average": ("--epochs", "3", "--optimizer", "adamw", "--lr", "0.01", "--ema-decay", "0.9",
                "--label-smoothing", "0.1", "--save-every-steps", "2", "--save-every-epochs", "0",
                "--eval-weights", "best"),
    "ranger": ("--epochs", "3", "--optimizer", "ranger", "--lr", "0.01", "--schedule", "plateau:0",
               "--clip-grad", "norm:1"),
    "muon": ("--epochs", "4", "--optimizer", "muon", "--lr", "0.01", "--save-every-epochs", "2",
             "--warmup-epochs", "1"),
}  # fmt: skip


def kill_and_resume(folder: Path, variant: str, run_s: float, rng: random.Random) -> list[dict[str, Any]]:
    """Train in `folder`, killed up to MAX_KILLS times, each within `run_s` seconds of a start; return the kills."""
    log = folder.with_suffix(".log")
    log.touch()
    kills: list[dict[str, Any]] = []
    num_kills = rng.randint(1, MAX_KILLS)
    while True:
        text = log.read_text()
        process = train(log, *VARIANTS[variant], "--out", str(folder), "--resume", "auto", "--no-plots")
        name, after_s = rng.choice(list(SIGNALS)), rng.uniform(0, run_s)
        process.join(after_s if len(kills) < num_kills else 300)
        if process.exitcode is None:
            os.kill(process.pid, getattr(signal, name))
        code = wait_for_exit(process)
        if code == 0:
            return kills
        # before the signal handler is installed, a signal kills the process
        allowed = {SIGNALS[name], -getattr(signal, name)}
        if log.read_text() == text:  # it had not begun: multiprocessing exits with 1 after a KeyboardInterrupt
            allowed.add(1)
        assert code in allowed, f"exit {code} after {name}: {log.read_text()[-2000:]}"
        kills.append({"signal": name, "after_s": round(after_s, 3), "exit": code, "left": describe_state(folder)})


def describe_state(folder: Path) -> str:
    """Return what a killed run had written."""
    if not (folder / "recipe.toml").exists():
        return "no run folder"
    manifest = folder / "checkpoints" / "manifest.json"
    if not manifest.exists():
        return "no checkpoint"
    if (folder / "summary.json").exists():
        return "a summary"
    return f"a checkpoint, {(folder / 'metrics.csv').read_text().count(chr(10)) - 1} rows"


def main() -> None:
    """Run the test and write the counts; fail at the first run that differs."""
    parser = argparse.ArgumentParser(description="Kill training runs at random times and resume them.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="number of concurrent runs")
    arguments = parser.parse_args()
    import results_folder  # pyright: ignore[reportMissingImports]  # of bench/

    from fastcifar.device import collect_environment

    started = time.monotonic()
    trials = []
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(arguments.jobs) as pool:
        full_runs, seconds = {}, {}
        for variant, options in VARIANTS.items():
            full_runs[variant] = Path(parent) / variant
            start = time.monotonic()
            assert wait_for_exit(train(Path(parent) / "log", *options, "--out", str(full_runs[variant]))) == 0
            seconds[variant] = time.monotonic() - start

        def run_trial(number: int) -> dict[str, Any]:
            variant = list(VARIANTS)[number % len(VARIANTS)]
            folder, rng = Path(parent) / f"run-{number}", random.Random(f"{arguments.seed} {number}")
            kills = kill_and_resume(folder, variant, seconds[variant], rng)
            while not kills:  # the run completed before the first signal
                shutil.rmtree(folder)
                kills = kill_and_resume(folder, variant, seconds[variant], rng)
            assert_equal_runs(folder, full_runs[variant])
            return {"run": number, "variant": variant, "kills": kills, "equal": True}

        for trial in pool.map(run_trial, range(arguments.runs)):
            trials.append(trial)
            print(json.dumps(trial), file=sys.stderr, flush=True)
    kills = [kill for trial in trials for kill in trial["kills"]]
    summary = {
        "what": "soak",
        "seed": arguments.seed,
        "runs": len(trials),
        "equal": sum(trial["equal"] for trial in trials),
        "kills": len(kills),
        "by_signal": Counter(kill["signal"] for kill in kills),
        "by_exit_code": Counter(str(kill["exit"]) for kill in kills),
        "left": Counter(kill["left"] for kill in kills),
        "variants": {name: " ".join(options) for name, options in VARIANTS.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    print(results_folder.write("soak", collect_environment("cpu"), summary, trials))


if __name__ == "__main__":
    main()
