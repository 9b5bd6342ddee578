"""Write run folders and sweeps like those of training, with contents that the test chooses."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcifar.recipe import Recipe
from fastcifar.training.metrics_file import METRICS_COLUMNS
from tests.training.summaries import summary_document

CLASSES = ("cat", "dog")


def write_run(
    folder: Path, val_accs: Sequence[float], test_acc: float | None = 0.5, *, name: str = "baseline",
    seconds: float = 60.0, finished: bool = True, device: str = "a device", steps: int = 100,
    stop_reason: str = "epochs", environment: dict[str, Any] | None = None, **options: Any,
) -> Path:  # fmt: skip
    """Write a run with one epoch for each of `val_accs`; without `finished` it has no summary, as if interrupted."""
    folder.mkdir(parents=True)
    recipe = Recipe.make(**{"epochs": len(val_accs), "val_size": 5000, **options})
    (folder / "recipe.toml").write_text(recipe.to_toml())
    document = {"recipe": name, "device": device, "versions": {"torch": "2.11.0", "fastcifar": "0.1"}}
    (folder / "env.json").write_text(json.dumps({**document, **(environment or {})}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, METRICS_COLUMNS)
        writer.writeheader()
        for epoch, val_acc in enumerate(val_accs):
            row = {"epoch": epoch, "step": epoch + 1, "lr": 0.1, "val_acc": val_acc, "val_loss": 2 - val_acc}
            row |= {"train_acc": val_acc + 0.01, "train_loss": 1.9 - val_acc, "images_per_s": 1000 + epoch}
            writer.writerow(dict.fromkeys(METRICS_COLUMNS, "") | row | {"seconds": 1})
    if finished:
        summary = summary_document(
            run=str(folder), arch=recipe.arch, steps=steps, eval_weights=recipe.eval_weights, val_acc=val_accs[-1],
            best_val_acc=max(val_accs), test_acc=test_acc, per_class=dict.fromkeys(CLASSES, test_acc),
            seconds={"train": seconds - 1, "total": seconds}, stop_reason=stop_reason,
            complete=stop_reason != "max_steps", epochs=len(val_accs),
        )  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_trials(folder: Path, trials: Sequence[dict[str, Any]], tail: str = "") -> Path:
    """Write the trials.jsonl of a sweep; `tail` is the incomplete line that a killed process leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"knobs": {}, "seed": 0, "reason": None, "run": f"runs/{trial['trial']}", **trial} for trial in trials]
    (folder / "trials.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return folder
