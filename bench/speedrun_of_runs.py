"""Add finished training runs to the result folder of a speedrun.

    python bench/speedrun_of_runs.py --target 94 --out FOLDER [--untimed REASON] RUN...

A run of `fastcifar train` or `fastcifar sweep` can be interrupted and resumed, a speedrun cannot; on a CPU, both train
the same weights. All runs must have the same recipe but for the seed, no validation split, and the same environment.
FOLDER is created, or must contain trials of other seeds. The time of a run includes that of reading the data set;
`--untimed` records why it is no result, such as other programs on the machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from fastcifar.benchmark.speedrun import PER_RUN_OPTIONS, count_flops, plan_speedrun
from fastcifar.benchmark.speedrun_results import (
    RunCosts,
    SpeedrunEnvironment,
    SpeedrunRecipe,
    SpeedrunResults,
    SpeedrunTrial,
    speedrun_table,
)
from fastcifar.evaluation.load_run import load_model
from fastcifar.training.checkpoint import state_dict_sha256
from fastcifar.training.environment import read_environment
from fastcifar.training.summary import RunSummary, read_summary

CHOSEN = ("device", "precision", "loader", "winograd", "compiled")  # entries of a summary that affect the time


def read_run(run: Path, target: str) -> tuple[RunSummary, SpeedrunRecipe, SpeedrunEnvironment]:
    """Return the summary of a finished run, its recipe as that of a speedrun, and its environment."""
    summary = read_summary(run)
    if summary is None or not summary.complete or summary.config.get("val_size") != 0 or summary.test_acc is None:
        raise SystemExit(f"{run} is not a finished run on all training images with a test accuracy")
    options = {name: value for name, value in summary.config.items() if name not in (*PER_RUN_OPTIONS, "data")}
    settings, resolved = plan_speedrun(None, target, summary.recipe, "test", options)
    flops = count_flops(resolved, len(summary.classes), summary.images_trained)
    about = RunCosts(params=summary.params, macs=summary.macs, images=summary.images_trained, flops=flops)
    recorded = read_environment(run).model_dump(exclude={"command", "recipe", "resumed"})
    environment = SpeedrunEnvironment(**recorded, chosen={name: getattr(summary, name) for name in CHOSEN})
    return summary, SpeedrunRecipe(**dict(settings), about=about), environment


def as_trial(run: Path, summary: RunSummary, flops: int) -> SpeedrunTrial:
    """Return a run as a trial of a speedrun."""
    seconds = summary.seconds
    return SpeedrunTrial(
        seed=summary.seed,
        **{name: getattr(summary, name) for name in CHOSEN},
        flops=flops,
        build_s=seconds["compile"],
        seconds=seconds["setup"] + seconds["train"],
        train_s=seconds["train"],
        prepare_s=seconds["setup"],
        cold_start_s=None,
        acc=summary.test_acc,
        acc_tta=summary.test_acc_tta,
        loss=summary.test_loss,
        sha256=state_dict_sha256(load_model(str(run), device="cpu", precision="fp32").model.state_dict()),
        steps=summary.steps,
        refused=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Add finished training runs to the result folder of a speedrun.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--target", default="94", help="accuracy in percent")
    parser.add_argument("--out", type=Path, required=True, help="result folder")
    parser.add_argument("--untimed", metavar="REASON", help="why the times are no results")
    arguments = parser.parse_args()
    for run in arguments.runs:
        summary, recipe, environment = read_run(run, arguments.target)
        if arguments.untimed:
            environment = environment.model_copy(update={"untimed": arguments.untimed})
        folder = arguments.out if arguments.out.exists() else None
        with SpeedrunResults.open(folder, str(arguments.out), recipe, environment, [summary.seed]) as results:
            results.add_trial(as_trial(run, summary, recipe.about.flops))
    Console().print(speedrun_table(SpeedrunResults.read(arguments.out).summary()))


if __name__ == "__main__":
    main()
