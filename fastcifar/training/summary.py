"""The results of a finished run: summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastcifar.device import peak_memory_bytes
from fastcifar.models import count_macs, count_parameters
from fastcifar.renamed import upgrade_options

if TYPE_CHECKING:
    from fastcifar.training.run_dir import Clock, Run
    from fastcifar.training.trainer import TestResult, Trainer

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


class RunSummary(BaseModel):
    """The content of summary.json. Accuracies are fractions; a value that was not measured is None.

    Attributes:
        run: folder of the run.
        recipe: name of the recipe; its options are in `config`.
        images_trained: number of training images of all epochs.
        val_acc: validation accuracy of the last epoch; `best_val_acc` is that of the best one.
        test_acc: accuracy of the `eval_weights`: `correct` of `total` test images.
        test_acc_ema: accuracy of the moving average of the weights.
        test_acc_tta: accuracy with test-time augmentation.
        test_loss: mean cross-entropy in nats.
        ece: expected calibration error.
        official_data: whether the data files are the official ones.
        images_per_s: training images per second of training, without setup, compilation and evaluation.
        seconds: seconds of each phase ("setup", "compile", "train", "eval") and in total ("total").
        complete: whether the run ended by its recipe and not by an interruption or `max_steps`.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    run: str
    arch: str
    params: int = Field(ge=0)
    macs: int = Field(ge=0)
    recipe: str
    config: dict[str, Any]
    seed: int
    epochs: int = Field(ge=0)
    steps: int = Field(ge=0)
    images_trained: int = Field(ge=0)
    device: str
    loader: str
    compiled: bool
    cuda_graph: bool
    precision: str
    eval_weights: Literal["last", "best", "ema"] = Field(validation_alias=AliasChoices("eval_weights", "weights"))
    val_acc: Fraction | None
    best_val_acc: Fraction | None
    test_acc: Fraction | None
    test_acc_ema: Fraction | None
    test_acc_tta: Fraction | None
    test_loss: float
    correct: int
    total: int
    ece: float
    per_class: dict[str, Fraction | None]
    official_data: bool
    images_per_s: float
    seconds: dict[str, Seconds]
    peak_memory_bytes: int | None
    stop_reason: str
    complete: bool

    @field_validator("config")
    @classmethod
    def _upgrade_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        return upgrade_options(config)


def read_summary(folder: Path) -> RunSummary | None:
    """Return the summary of a run folder, None if it is missing or invalid."""
    try:
        return RunSummary.model_validate_json((folder / "summary.json").read_bytes())
    except (OSError, ValidationError):
        return None


def summarize_run(trainer: Trainer, run: Run, clock: Clock, test_result: TestResult) -> RunSummary:
    """Return the summary of a run."""
    recipe, execution, progress = trainer.recipe, trainer.execution, trainer.progress
    scores = test_result.scores
    seconds = {**clock.seconds, "total": clock.total_s()}
    return RunSummary(
        run=str(run.folder),
        arch=recipe.arch,
        params=count_parameters(trainer.model),
        macs=count_macs(trainer.model),
        recipe=run.recipe_name,
        config=recipe.model_dump(mode="json"),
        seed=recipe.seed,
        epochs=progress.epoch,
        steps=progress.step,
        images_trained=progress.images,
        device=execution.device,
        loader=execution.loader,
        compiled=execution.compile,
        cuda_graph=execution.cuda_graph,
        precision=execution.precision,
        eval_weights=recipe.eval_weights,
        val_acc=progress.val_acc,
        best_val_acc=progress.best,
        test_acc=scores.accuracy,
        test_acc_ema=test_result.ema_acc,
        test_acc_tta=test_result.tta_acc,
        test_loss=scores.loss,
        correct=scores.correct,
        total=scores.total,
        ece=scores.ece,
        per_class=dict(zip(trainer.data.classes, scores.per_class, strict=True)),
        official_data=trainer.data.is_official,
        images_per_s=progress.images / clock.seconds["train"],
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        stop_reason=progress.stop_reason,
        complete=progress.stop_reason == "patience" or progress.step == trainer.total_steps,
    )
