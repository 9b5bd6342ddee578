"""Summaries and rows of metrics of runs that were not trained."""

from __future__ import annotations

from typing import Any

from fastcifar.recipe import Recipe
from fastcifar.training.metrics_file import EpochRow


def summary_document(**values: Any) -> dict[str, Any]:
    """Return the content of a summary.json with `values`."""
    recipe = Recipe()
    document = {
        "run": "runs/x", "arch": recipe.arch, "params": 4_697_742, "macs": 10**9, "recipe": "baseline",
        "config": recipe.model_dump(mode="json"), "seed": 0, "epochs": 3, "steps": 270, "images_trained": 1000,
        "device": "cpu", "loader": "tensor", "compiled": False, "cuda_graph": False, "precision": "fp32",
        "eval_weights": "last", "val_acc": 0.5, "best_val_acc": 0.5, "test_acc": 0.4, "test_acc_ema": None,
        "test_acc_tta": None, "test_loss": 1.5, "correct": 4000, "total": 10_000, "ece": 0.1, "per_class": {"cat": 0.4},
        "official_data": False, "images_per_s": 1000.0, "seconds": {"train": 60.0, "total": 61.5},
        "peak_memory_bytes": None, "stop_reason": "epochs", "complete": True,
    }  # fmt: skip
    assert values.keys() <= document.keys()
    return {**document, **values}


def epoch_row(epoch: int = 0, train_loss: float = 0.5, val_acc: float | None = 0.5) -> EpochRow:
    """Return a row of metrics."""
    return {
        "epoch": epoch, "step": 3, "lr": 0.5, "train_loss": train_loss, "train_acc": 0.5, "val_loss": 0.5,
        "val_acc": val_acc, "ema_val_acc": 0.5, "images_per_s": 0.5, "seconds": 0.5,
    }  # fmt: skip
