"""Record finished runs of one recipe as a result for the README.

    python bench/record.py LABEL RUN [RUN ...]

Writes bench/results/<UTC>_<device>_<LABEL>/ with recipe.json and env.json (of the first run), trials.jsonl (the
summaries of all runs) and summary.json (n, mean, standard deviation if n > 2, and the values of every run).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import results_folder

from fastcifar.benchmark.speedrun import count_flops
from fastcifar.device import Environment
from fastcifar.recipe import Recipe
from fastcifar.reporting.aggregate import MeanStd
from fastcifar.training.resolve import resolve

METRICS = ("test_acc", "test_acc_ema", "test_loss", "val_acc", "images_per_s")


def record(label: str, runs: list[Path]) -> Path:
    """Write the result folder and return it. Raises SystemExit for unfinished runs and for different recipes."""
    trials = [read_json(run / "summary.json") for run in runs]
    for run, trial in zip(runs, trials, strict=True):
        if not trial["complete"]:
            raise SystemExit(f"{run} is not complete (stopped by {trial['stop_reason']}); no result is written")
        if recipe_options(trial) != recipe_options(trials[0]):
            raise SystemExit(f"the recipe of {run} differs from that of {runs[0]}")
    return results_folder.write(
        label,
        Environment.model_validate(read_json(runs[0] / "env.json")),
        summarize(label, trials),
        map(without_paths, trials),
        recipe=recipe_options(trials[0]),
    )


def summarize(label: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of the result: mean, standard deviation and all values of every metric."""
    first = trials[0]
    summary: dict[str, Any] = {"what": label, "n": len(trials), "seeds": [trial["seed"] for trial in trials]}
    summary |= {
        key: first[key] for key in ("arch", "params", "macs", "recipe", "epochs", "device", "precision", "eval_weights")
    }
    resolved = resolve(Recipe.make(None, **recipe_options(first)))
    summary["train_flops"] = count_flops(resolved, len(first["classes"]), first["images_trained"])
    for name in METRICS:
        values = [trial[name] for trial in trials]
        if spread := MeanStd.from_values(values):
            summary[name] = {"mean": spread.mean, "std": spread.std, "trials": values}
    summary["seconds_total"] = [trial["seconds"]["total"] for trial in trials]
    return summary


def without_paths(trial: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a run without the paths of the run folder and the data set."""
    config = {key: value for key, value in trial["config"].items() if key not in ("data", "init", "out")}
    return {**{key: value for key, value in trial.items() if key != "run"}, "config": config}


def recipe_options(trial: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run, except seed and paths."""
    return {key: value for key, value in trial["config"].items() if key not in ("seed", "data", "init", "out")}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON document in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record finished runs of one recipe under bench/results.")
    parser.add_argument("label", help="short name of the result, such as quick")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    arguments = parser.parse_args()
    print(record(arguments.label, arguments.runs))
