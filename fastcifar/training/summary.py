"""summary.json: what a finished run was and what it reached, in one flat document.

Figures that were not measured are None, never 0. Nothing is measured here but the peak of memory.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from fastcifar.models import macs, parameters
from fastcifar.training.run_dir import Clock, Run
from fastcifar.training.trainer import Parts, Tested


def summarise(parts: Parts, run: Run, clock: Clock, tested: Tested) -> dict[str, Any]:
    """The summary. Accuracies are fractions, times seconds, `val_acc` is the last epoch's and `best_val_acc` the best.

    `images_per_s`: training images over the seconds inside the loop, without setup, compilation and evaluation.
    """
    recipe, choice, progress = parts.recipe, parts.choice, parts.progress
    scores = tested.scores
    seconds = {**clock.seconds, "total": clock.total()}
    return {
        "run": str(run.folder),
        "arch": recipe.arch,
        "params": parameters(parts.model),
        "macs": macs(parts.model),
        "recipe": run.name,
        "config": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "epochs": progress.epoch,
        "steps": progress.step,
        "images_trained": progress.images,
        "device": choice.device,
        "loader": choice.loader,
        "compiled": choice.compile,
        "cuda_graph": choice.cuda_graph,
        "precision": choice.precision,
        "weights": recipe.weights,
        "val_acc": progress.val_acc,
        "best_val_acc": progress.best,
        "test_acc": scores.accuracy,
        "test_acc_ema": tested.ema_acc,
        "test_acc_tta": tested.tta_acc,
        "test_loss": scores.loss,
        "correct": scores.correct,
        "total": scores.total,
        "ece": scores.ece,
        "per_class": dict(zip(parts.data.classes, scores.per_class, strict=True)),
        "official_data": parts.data.official,
        "images_per_s": progress.images / clock.seconds["train"],
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_bytes": peak_memory(parts.device),
        "stop_reason": progress.stop_reason,
        "complete": progress.stop_reason == "patience" or progress.step == parts.steps,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
