"""Load the network of a run for inference from its checkpoint alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from torch import Tensor, nn

from fastcifar.data import cifar
from fastcifar.data.cifar import DATASETS, Dataset, Split
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.device import ExecutionPlan, choose_execution, supports_tf32
from fastcifar.errors import CheckpointError, DataError, NonFiniteError, UsageError, lookup
from fastcifar.models import use_winograd
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, compilation, evaluate
from fastcifar.training.build import split_validation, to_channels_last
from fastcifar.training.fallback import run_stage, run_with_fallback
from fastcifar.training.progress import show_compilation
from fastcifar.training.resolve import model_from_recipe, require_fitting_network
from fastcifar.training.step import Forward, build_forward

EVAL_WEIGHTS: dict[str, None] = dict.fromkeys(("last", "best", "ema"))
# Options that describe the training machine, the run folder or the training protocol do not apply to inference.
RESET_ON_LOAD = (
    "compile", "compile_mode", "cuda_graph", "freeze", "fused_ops", "init", "loader", "out", "tta",
    "winograd",
)  # fmt: skip


class ModelDescription(TypedDict):
    """A network and how it was run."""

    arch: str
    checkpoint: str
    eval_weights: str
    device: str
    precision: str


@dataclass(frozen=True)
class FineTuning:
    """What a run records of `--init` and `--freeze`, which do not apply to inference."""

    init: str  # path of the initial weights, or "none"
    init_sha256: str | None
    freeze: str  # names of the layers that were not trained, or "none"


@dataclass
class LoadedModel:
    """A trained network with its weights, on its device."""

    recipe: Recipe
    execution: ExecutionPlan
    device: torch.device
    classes: list[str]
    model: nn.Module
    forward: Forward  # uint8 images [b,3,32,32] -> float32 logits [b,classes]
    checkpoint_path: Path
    weights: str  # "last", "best", "ema" or "published"
    fine_tuning: FineTuning
    data_digest: str | None = None  # of the data that the run was trained on; None if the checkpoint lacks it

    def __post_init__(self) -> None:
        self._plan, self._eager_forward = self.execution, self.forward  # before `compile_for` replaces them
        self._compiled: dict[tuple[bool, ...], tuple[ExecutionPlan, Forward]] = {}  # results of `_optimize_forward`

    def describe(self) -> ModelDescription:
        """Return the part of the documents of `eval` and `predict` about the network."""
        return {
            "arch": self.recipe.arch,
            "checkpoint": str(self.checkpoint_path),
            "eval_weights": self.weights,
            "device": self.execution.device,
            "precision": self.execution.precision,
        }

    def load_dataset(self) -> Dataset:
        """Load the data set of the recipe. Raises `DataError` if its classes, in their order, are not the network's."""
        data = cifar.load_recipe_dataset(self.recipe)
        spec = DATASETS[self.recipe.dataset]
        if self.weights == "published" and not spec.class_names and self.classes == spec.default_class_names:
            self.classes = list(data.classes)[: len(self.classes)]  # the checkpoint does not name them
        if list(data.classes) != self.classes:
            expected = f"those that {self.checkpoint_path} was trained on ({_list_names(self.classes)})"
            problem = f"the classes of {data.source} ({_list_names(data.classes)}) are not {expected}"
            raise DataError(problem, "give --data for the data set the run was trained on")
        return data

    def is_trained_on(self, data: Dataset) -> bool:
        """Return whether `data` has the images and labels of the run in their order, as far as the run records them."""
        return self.data_digest in (None, data.digest)

    def validation_split(self, data: Dataset) -> tuple[Split, str]:
        """Return the validation split of the run and "", or an empty split and the reason why there is none."""
        recipe, train, reason = self.recipe, data.train, ""
        if self.weights == "published":
            reason = "the checkpoint does not record a validation split"
        elif recipe.val_size == 0:
            reason = "the run had no validation split"
        elif not len(train.labels) or not self.is_trained_on(data):
            reason = f"the run was trained on other images or labels than those of {data.source}, or in another order"
        elif recipe.val_size is not None and data.val is not None:
            reason = f"{data.source} has its own validation split, which the run did not use"
        elif recipe.val_size is not None and recipe.val_size >= len(train.labels):
            sizes = f"{recipe.val_size:,} images, but this data set has only {len(train.labels):,} training images"
            reason = f"the run's validation split has {sizes}"
        if reason:
            return Split(train.images[:0], train.labels[:0]), reason
        return split_validation(data, recipe.val_size, recipe.val_seed)[1], ""

    def compile_for(self, num_images: int, console: Console | None = None) -> None:
        """Compile `forward` and capture it in a CUDA graph if requested, or if that saves time for `num_images`."""
        recipe, plan = self.recipe, self._plan
        compile = plan.compile and (recipe.compile is not None or num_images >= evaluate.MIN_IMAGES_TO_COMPILE)
        cuda_graph = plan.cuda_graph and (recipe.cuda_graph is not None or num_images >= evaluate.EVAL_BATCH_SIZE)
        winograd = plan.winograd and (recipe.winograd is not None or num_images >= evaluate.EVAL_BATCH_SIZE)
        wanted = (compile, cuda_graph, winograd)
        if wanted not in self._compiled:
            plan = replace(plan, compile=compile, cuda_graph=cuda_graph, winograd=winograd)
            with show_compilation(console, compile):
                self._compiled[wanted] = run_with_fallback(self._optimize_forward, plan, recipe)
        self.execution, self.forward = self._compiled[wanted]
        use_winograd(self.model, self.execution.winograd)

    def _optimize_forward(self, plan: ExecutionPlan, compile_mode: str) -> tuple[ExecutionPlan, Forward]:
        run_stage("winograd", lambda: use_winograd(self.model, plan.winograd), self.device)
        forward = evaluate.optimize_forward(
            self.model, self._eager_forward, self.device, plan.compile, plan.cuda_graph, compile_mode
        )
        return plan, forward

    def predict_logits(self, split: Split, tta: str = "none") -> Tensor:
        """Return the float32 logits [n, classes] of a split on the CPU, averaged over the views of `tta`."""
        logits = evaluate.predict_logits(self.model, self.forward, split, self.device, tta)
        if not torch.isfinite(logits).all():
            remedy = "use --precision fp32, or other weights"
            raise NonFiniteError("the logits of the network contain NaN or infinity", remedy)
        return logits

    def evaluate(self, split: Split, tta: str = "none") -> evaluate.Scores:
        """Return the scores on a split."""
        return evaluate.compute_scores(self.predict_logits(split, tta), torch.from_numpy(split.labels))


def _list_names(names: Sequence[str], count: int = 10) -> str:
    return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])


def load_model(run: str, eval_weights: str | None = None, arch: str | None = None, **overrides: Any) -> LoadedModel:
    """Load the network of `run`: a run folder, or a checkpoint file of this or another project.

    `eval_weights` is "last", "best" or "ema", by default the recipe's; `arch` is the architecture of a checkpoint that
    does not name it; `overrides` are recipe options; a value of None keeps that of the recipe.
    Raises `CheckpointError` for a checkpoint that is missing, invalid or lacks the requested weights, `DeviceError` if
    the device is not available, and `UsageError` for an invalid name or override.
    """
    path = checkpoint.resolve_checkpoint_path(run, "last")
    saved = checkpoint.load_any_checkpoint(path, arch)
    requested, eval_weights = eval_weights, eval_weights or str(saved["recipe"].get("eval_weights", "last"))
    lookup(EVAL_WEIGHTS, eval_weights, "weights")
    if eval_weights == "best":
        path = checkpoint.resolve_checkpoint_path(run, "best")
        saved = checkpoint.load_any_checkpoint(path, arch)
        if requested and path.stem != "best":
            problem = f"{path} is not best.pt, the checkpoint of the best epoch"
            raise UsageError(problem, "give the run folder or its best.pt, or omit --eval-weights best")
    if eval_weights != "ema":
        eval_weights = "best" if path.stem == "best" else "last"  # a file need not be that of the recipe's option
    if overrides.get("normalize") == "auto" and "format" in saved:
        overrides["normalize"] = None  # a run records what it was trained with
    overrides = {name: value for name, value in overrides.items() if value is not None}
    Recipe(**overrides)  # first without the checkpoint, so that the error does not name it
    try:
        data = cifar.saved_data_path(saved["recipe"].get("data"))
        kept = {name: value for name, value in saved["recipe"].items() if name not in RESET_ON_LOAD}
        recipe = Recipe(**{**kept, "data": data, **overrides})
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    lookup(evaluate.VIEWS, recipe.tta, "test-time augmentation")
    if recipe.precision == "tf32" and "precision" not in overrides and not supports_tf32(recipe.device):
        recipe = recipe.model_copy(update={"precision": "fp32"})  # so that every machine can evaluate the run
    execution = choose_execution(recipe)
    device = torch.device(execution.device)
    compilation.configure_process(execution)
    state = saved["ema"] if eval_weights == "ema" else saved["model"]
    if state is None:
        raise CheckpointError(f"{path} contains no EMA weights", "use --eval-weights last, or train with --ema-decay")
    require_fitting_network(recipe, state, len(saved["classes"]), path)
    model = model_from_recipe(recipe, len(saved["classes"]))
    checkpoint.load_weights(model, state, path)
    mean, std = normalization_mean_std(recipe)
    forward = build_forward(to_channels_last(model, device).eval(), mean, std, execution.precision, device)
    weights = eval_weights if "format" in saved else "published"
    options = saved["recipe"]
    fine_tuning = FineTuning(options.get("init", "none"), saved.get("init_sha256"), options.get("freeze", "none"))
    digest = saved.get("data_digest")
    return LoadedModel(recipe, execution, device, saved["classes"], model, forward, path, weights, fine_tuning, digest)
