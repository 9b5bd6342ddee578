"""The summary of a finished run: the content of summary.json.

Values that were not measured are None, never 0.
"""

from __future__ import annotations

from typing import Any

from fastcifar.device import peak_memory_bytes
from fastcifar.models import count_macs, count_parameters
from fastcifar.training.run_dir import Clock, Run
from fastcifar.training.trainer import TestResult, Trainer


def summarize_run(trainer: Trainer, run: Run, clock: Clock, test_result: TestResult) -> dict[str, Any]:
    """Return the summary of a run. Accuracies are fractions in [0, 1], times are in seconds, memory is in bytes.

    `val_acc` is the validation accuracy of the last epoch and `best_val_acc` that of the best one. `images_per_s` is
    the number of training images divided by the seconds of training, without setup, compilation and evaluation.
    """
    recipe, execution, progress = trainer.recipe, trainer.execution, trainer.progress
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
        "device": execution.device,
        "loader": execution.loader,
        "compiled": execution.compile,
        "cuda_graph": execution.cuda_graph,
        "precision": execution.precision,
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
