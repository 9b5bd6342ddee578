"""summary.json: what a finished run was and what it reached, in one flat document.

Figures that were not measured are None, never 0. Nothing is measured here but the peak of memory.
"""

from __future__ import annotations

from typing import Any

from fastcifar.device import peak_memory_bytes
from fastcifar.models import count_macs, count_parameters
from fastcifar.training.run_dir import Clock, Run
from fastcifar.training.trainer import TestResult, Trainer


def summarize_run(trainer: Trainer, run: Run, clock: Clock, test_result: TestResult) -> dict[str, Any]:
    """The summary. Accuracies are fractions, times seconds, `val_acc` is the last epoch's and `best_val_acc` the best.

    `images_per_s`: training images over the seconds inside the loop, without setup, compilation and evaluation.
    """
    recipe, choice, progress = trainer.recipe, trainer.execution, trainer.progress
    scores = test_result.scores
    seconds = {**clock.seconds, "total": clock.total_s()}
    return {
        "run": str(run.folder),
        "arch": recipe.arch,
        "params": count_parameters(trainer.model),
        "macs": count_macs(trainer.model),
        "recipe": run.recipe_name,
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
        "eval_weights": recipe.eval_weights,
        "val_acc": progress.val_acc,
        "best_val_acc": progress.best,
        "test_acc": scores.accuracy,
        "test_acc_ema": test_result.ema_acc,
        "test_acc_tta": test_result.tta_acc,
        "test_loss": scores.loss,
        "correct": scores.correct,
        "total": scores.total,
        "ece": scores.ece,
        "per_class": dict(zip(trainer.data.classes, scores.per_class, strict=True)),
        "official_data": trainer.data.is_official,
        "images_per_s": progress.images / clock.seconds["train"],
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "stop_reason": progress.stop_reason,
        "complete": progress.stop_reason == "patience" or progress.step == trainer.total_steps,
    }
