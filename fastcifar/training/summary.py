"""The results of a finished run: summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from fastcifar.device import peak_memory_bytes
from fastcifar.files import read_regular_file
from fastcifar.renamed import upgrade_options

if TYPE_CHECKING:
    from fastcifar.training.evaluate import Scores
    from fastcifar.training.metrics_file import EpochMetrics, ValidationMetrics
    from fastcifar.training.run_dir import Clock, Run
    from fastcifar.training.step import Metrics
    from fastcifar.training.trainer import Trainer

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Count = Annotated[int, Field(ge=0, le=2**63)]


class RunSummary(BaseModel):
    """The content of summary.json. Accuracies are fractions; a value that was not measured is None."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    run: str  # folder of the run
    arch: str
    params: Count
    trained_params: Count | None = None  # without those that `--freeze` selects
    init_sha256: str | None = None  # `state_dict_sha256` of the weights that `--init` selects
    macs: Count
    recipe: str  # name
    config: Annotated[dict[str, Any], AfterValidator(upgrade_options)]  # options of the recipe
    seed: Count
    epochs: Count
    steps: Count
    images_trained: Count  # in all epochs
    device: str
    loader: str
    compiled: bool
    cuda_graph: bool
    winograd: bool = False
    precision: str
    reasons: dict[str, str] = {}  # why device, precision, loader, compile, cuda_graph and winograd were chosen
    eval_weights: Literal["last", "best", "ema"] = Field(validation_alias=AliasChoices("eval_weights", "weights"))
    val_acc: Fraction | None  # of the last epoch
    best_val_acc: Fraction | None
    val_total: Count | None = None  # number of validation images
    test_acc: Fraction | None  # with the weights that `eval_weights` selects: correct / total
    test_acc_ema: Fraction | None  # of the moving average of the weights
    test_acc_tta: Fraction | None  # with test-time augmentation
    test_loss: float | None  # mean cross-entropy in nats
    correct: Count | None
    total: Count | None
    ece: float | None  # expected calibration error
    classes: dict[str, Count] = {}  # number of training images of each class, in the order of the labels
    per_class: dict[str, Fraction | None]  # empty if there is no test set
    confusion: list[list[Count]] = []  # a row for each label and a column for each predicted class
    official_data: bool
    data_digest: str | None = None  # `Dataset.digest`
    images_per_s: float  # in training, without setup, compilation and evaluation
    seconds: dict[str, Seconds]  # of "setup", "compile", "train", "eval" and "total"
    peak_memory_bytes: Count | None
    stop_reason: str
    complete: bool  # trained for all epochs, or stopped by `patience`


def read_summary(folder: Path) -> RunSummary | None:
    """Return the summary of a run folder, None if it is missing or invalid."""
    try:
        return RunSummary.model_validate_json(read_regular_file(folder / "summary.json"))
    except (OSError, ValidationError):
        return None


def summarize_epoch(trainer: Trainer, metrics: Metrics, validation: ValidationMetrics) -> EpochMetrics:
    """Return the metrics of the current epoch, of which `metrics` are those of its steps."""
    return {
        "epoch": trainer.progress.epoch,
        "step": trainer.progress.step,
        "lr": trainer.schedule.lr_at(trainer.progress.step - 1),
        "train_loss": metrics.loss,
        "train_acc": metrics.accuracy,
        **validation,
    }


def summarize_run(
    trainer: Trainer, run: Run, clock: Clock, scores: Scores | None, ema_acc: float | None, tta_acc: float | None
) -> RunSummary:
    """Return the summary of a run. `scores`, `ema_acc` and `tta_acc` are the results of `Trainer.test`."""
    from fastcifar.models import count_macs  # imports torch, which readers of summaries do not need

    recipe, execution, progress = trainer.recipe, trainer.execution, trainer.progress
    seconds = {**clock.seconds, "total": clock.total_s()}
    return RunSummary(
        run=str(run.folder),
        arch=recipe.arch,
        params=trainer.num_params,
        trained_params=sum(parameter.numel() for parameter in trainer.optimizer.parameters),
        init_sha256=trainer.init.sha256,
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
        winograd=execution.winograd,
        precision=execution.precision,
        reasons=execution.reasons,
        eval_weights=recipe.eval_weights,
        val_acc=progress.val_acc,
        best_val_acc=progress.best,
        val_total=len(trainer.val_split.labels),
        test_acc=scores and scores.accuracy,
        test_acc_ema=ema_acc,
        test_acc_tta=tta_acc,
        test_loss=scores and scores.loss,
        correct=scores and scores.correct,
        total=scores and scores.total,
        ece=scores and scores.ece,
        classes=trainer.data.count_by_class(trainer.train_split),
        per_class=dict(zip(trainer.data.classes, scores.per_class, strict=True)) if scores else {},
        confusion=scores.confusion if scores else [],
        official_data=trainer.data.is_official,
        data_digest=trainer.data.digest,
        images_per_s=progress.images / clock.seconds["train"],
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        stop_reason=progress.stop_reason,
        complete=progress.stop_reason == "patience" or progress.step == trainer.total_steps,
    )
