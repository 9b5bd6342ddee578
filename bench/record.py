"""Records finished runs of one recipe as a result that the README can quote.

    python bench/record.py WHAT RUN [RUN ...]

writes bench/results/<UTC>_<device>_<WHAT>/ with recipe.json and env.json (of the first run), trials.jsonl (the
summary of every run, none left out) and summary.json (n, mean, standard deviation and the trials' own figures).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import results_folder

from fastcifar.reporting.aggregate import MeanStd

FIGURES = ("test_acc", "test_acc_ema", "test_loss", "val_acc", "images_per_s")


def record(what: str, runs: list[Path]) -> Path:
    """Makes the result folder. Errors: SystemExit for unfinished runs or runs of different recipes."""
    trials = [read(run / "summary.json") for run in runs]
    for run, trial in zip(runs, trials, strict=True):
        if not trial["complete"]:
            raise SystemExit(f"{run} was cut short ({trial['stop_reason']}): not a result")
        if knobs(trial) != knobs(trials[0]):
            raise SystemExit(f"{run} has another recipe than {runs[0]}")
    return results_folder.write(
        what, read(runs[0] / "env.json"), summary(what, trials), map(plain, trials), recipe=knobs(trials[0])
    )


def summary(what: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    first = trials[0]
    out: dict[str, Any] = {"what": what, "n": len(trials), "seeds": [trial["seed"] for trial in trials]}
    out |= {
        key: first[key] for key in ("arch", "params", "macs", "recipe", "epochs", "device", "precision", "eval_weights")
    }
    out["train_flops"] = 6 * first["macs"] * first["images_trained"]
    for name in FIGURES:
        values = [trial[name] for trial in trials]
        if spread := MeanStd.from_values(values):
            out[name] = {"mean": spread.mean, "std": spread.std, "trials": values}
    out["seconds_total"] = [trial["seconds"]["total"] for trial in trials]
    return out


def plain(trial: dict[str, Any]) -> dict[str, Any]:
    """A summary without the places it was made in."""
    config = {key: value for key, value in trial["config"].items() if key not in ("data", "out")}
    return {**{key: value for key, value in trial.items() if key != "run"}, "config": config}


def knobs(trial: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in trial["config"].items() if key not in ("seed", "data", "out")}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record finished runs of one recipe under bench/results.")
    parser.add_argument("what", help="a short name, such as quick")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parser.parse_args()
    print(record(arguments.what, arguments.runs))
