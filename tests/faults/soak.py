"""Runs killed at random points by SIGKILL, SIGTERM or SIGINT and resumed, each the same as the run never stopped.

    scripts/soak [--runs 200] [--seed 0] [--jobs 2]

Every run is a process that is really killed; it starts again with the same command and `--resume auto` until it ends
by itself. Writes bench/results/<UTC>_<device>_soak/.
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

from tests.faults.children import ended, train
from tests.faults.runs import assert_equal_runs

SIGNALS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}
MOST_KILLS = 3
# what is trained: knobs beside those of `children.TINY`, which has dropout
VARIANTS = {
    "lookahead": ("--epochs", "3"),
    "average": ("--epochs", "3", "--optimizer", "adamw", "--lr", "0.01", "--ema-decay", "0.9", "--label-smoothing", "0.1",
                "--save-every-steps", "2", "--save-every-epochs", "0", "--eval-weights", "best"),
    "ranger": ("--epochs", "3", "--optimizer", "ranger", "--lr", "0.01", "--schedule", "plateau:0", "--clip-grad", "norm:1"),
    "muon": ("--epochs", "4", "--optimizer", "muon", "--lr", "0.01", "--save-every-epochs", "2", "--warmup-epochs", "1"),
}  # fmt: skip


def killed_and_resumed(folder: Path, variant: str, whole_s: float, draw: random.Random) -> list[dict[str, Any]]:
    """One run into `folder`, killed up to MOST_KILLS times within about `whole_s` seconds of a start: the kills."""
    log = folder.with_suffix(".log")
    kills: list[dict[str, Any]] = []
    wanted = draw.randint(1, MOST_KILLS)
    while True:
        process = train(log, *VARIANTS[variant], "--out", str(folder), "--resume", "auto")
        name, after_s = draw.choice(list(SIGNALS)), draw.uniform(0, whole_s)
        process.join(after_s if len(kills) < wanted else 300)
        if process.exitcode is None:
            os.kill(process.pid, getattr(signal, name))
        code = ended(process)
        if code == 0:
            return kills
        # before its handler stands, a signal ends the process as the system does
        allowed = {SIGNALS[name], -getattr(signal, name)}
        assert code in allowed, f"exit {code} after {name}: {log.read_text()[-2000:]}"
        kills.append({"signal": name, "after_s": round(after_s, 3), "exit": code, "left": left(folder)})


def left(folder: Path) -> str:
    """How far a killed run had come."""
    if not (folder / "recipe.toml").exists():
        return "no run folder"
    manifest = folder / "checkpoints" / "manifest.json"
    if not manifest.exists():
        return "no checkpoint"
    if (folder / "summary.json").exists():
        return "a summary"
    return f"a checkpoint, {(folder / 'metrics.csv').read_text().count(chr(10)) - 1} rows"


def main() -> None:
    """Soaks, compares and keeps the counts; fails with the first run that differs."""
    parser = argparse.ArgumentParser(description="Runs killed at random and resumed.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    import results_folder  # pyright: ignore[reportMissingImports]  # of bench/

    from fastcifar.device import collect_environment

    started = time.monotonic()
    trials = []
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(arguments.jobs) as pool:
        wholes, seconds = {}, {}
        for variant, knobs in VARIANTS.items():
            wholes[variant] = Path(parent) / variant
            start = time.monotonic()
            assert ended(train(Path(parent) / "log", *knobs, "--out", str(wholes[variant]))) == 0
            seconds[variant] = time.monotonic() - start

        def soaked(number: int) -> dict[str, Any]:
            variant = list(VARIANTS)[number % len(VARIANTS)]
            folder, draw = Path(parent) / f"run-{number}", random.Random(f"{arguments.seed} {number}")
            kills = killed_and_resumed(folder, variant, seconds[variant], draw)
            while not kills:  # it was quicker than the first signal
                shutil.rmtree(folder)
                kills = killed_and_resumed(folder, variant, seconds[variant], draw)
            assert_equal_runs(folder, wholes[variant])
            return {"run": number, "variant": variant, "kills": kills, "equal": True}

        for trial in pool.map(soaked, range(arguments.runs)):
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
        "variants": {name: " ".join(knobs) for name, knobs in VARIANTS.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    print(results_folder.write("soak", collect_environment("cpu"), summary, trials))


if __name__ == "__main__":
    main()
