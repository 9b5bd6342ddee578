"""The Python interface: `train`, `Trainer`, `load_run` and `batches`, with networks, images and transforms of the user.

A run records only the names of such objects (see `python_objects`), so whatever uses the run later needs them again.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastcifar.data.arrays import to_planar
from fastcifar.data.augment import AugmentOp, parse_augment, split_mixer
from fastcifar.data.cifar import DATASETS, Dataset
from fastcifar.data.loaders import LOADERS
from fastcifar.data.normalization import channel_mean_std, mean_color
from fastcifar.data.predict_inputs import read_inputs
from fastcifar.data.python_data import Data, Images, to_dataset, training_split
from fastcifar.errors import UsageError
from fastcifar.evaluation.evaluate_run import EvalResult, evaluate_run
from fastcifar.evaluation.export import ExportResult, export_model
from fastcifar.evaluation.load_run import load_model
from fastcifar.evaluation.predict import predict_images
from fastcifar.evaluation.prediction_files import KAGGLE_SUBMISSION, PredictionFormat, write_predictions
from fastcifar.format import DataConsole
from fastcifar.models import is_built_in
from fastcifar.python_objects import PYTHON_DATA, PythonObjects, object_name, use_objects
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint, resume, trainer
from fastcifar.training.build import build_trainer
from fastcifar.training.evaluate import VIEWS, Scores
from fastcifar.training.metrics_file import EpochMetrics
from fastcifar.training.resolve import resolve
from fastcifar.training.run_dir import Clock, EpochCallback
from fastcifar.training.summary import RunSummary, summarize_epoch
from fastcifar.training.train import train_network

Model = nn.Module | Callable[..., nn.Module]
ImageTransform = Callable[[Any], Image.Image | Tensor]  # of a PIL image
BatchTransform = Callable[[Tensor], Tensor]  # of uint8 [n, 3, 32, 32]
DEFAULT_AUGMENT = "crop:4:zero,flip"  # of `batches`


@dataclass(frozen=True)
class Result:
    """What `train` returns: the content of summary.json, the network in evaluation mode, and the run folder.

    `model` takes normalized images, float [n, 3, 32, 32], on the device of the run; `load_run(folder).predict` takes
    uint8 images. It has the weights that were evaluated on the test set; in distributed training, on rank 0.
    """

    summary: RunSummary
    model: nn.Module
    folder: Path


def train(
    recipe: Recipe | str,
    *,
    model: Model | None = None,
    data: Data | None = None,
    transform: ImageTransform | None = None,
    batch_transform: BatchTransform | None = None,
    callbacks: Sequence[EpochCallback] = (),
    progress: bool = True,
) -> Result:
    """Train as `recipe` specifies, evaluate once on the test set, and save the weights and results in a run folder.

    Args:
        recipe: the options, or the name of a built-in recipe or a TOML file.
        model: a network in place of `recipe.arch`, from normalized images, float [n, 3, 32, 32], to logits [n,
            classes]: a function or class that is called with `num_classes` (and with the network options that the
            recipe sets), or an `nn.Module`, which is trained in place from its present weights.
        data: images and labels in place of `recipe.data`: a path; a `Dataset`; a pair of images, uint8 [n, 32, 32, 3]
            or [n, 3, 32, 32], and labels, integers [n] from 0 on; a `torch.utils.data.Dataset` of such images, or PIL
            images, and labels; or a dict of such pairs or data sets with the keys "train", "val" and "test", and
            optionally "classes", the names. Images that are no dict are split 80/10/10 by `recipe.val_seed`.
        transform: replaces `recipe.augment`, except for a mixer: from a PIL image of 32x32 pixels to an RGB image of
            the same size or a tensor, uint8 [3, 32, 32]. The loader torchvision calls it in `recipe.workers` processes.
        batch_transform: applied after `recipe.augment` or `transform`, on the device: from images, uint8 [n, 3, 32,
            32], to images of the same shape and dtype.
        callbacks: called with the row of metrics of each epoch, a dict with the columns of metrics.csv. The run ends
            after an epoch for which one returns a string, the reason.
        progress: show the same lines and progress bar as the command.

    The random generators of torch, NumPy and Python are seeded for the transforms of each batch, so that a resumed run
    is bit-identical. Raises a `UserError`; for invalid arguments before anything is trained or written.
    """
    given = callbacks if isinstance(callbacks, list | tuple) else [None]
    if wrong := [type(callback).__name__ for callback in given if not callable(callback)]:
        problem = f"callbacks= contains a {wrong[0]}" if given is callbacks else "callbacks= is not a list"
        raise UsageError(problem, "give a list of functions that take the row of metrics of an epoch")
    recipe_name = recipe if isinstance(recipe, str) else None
    recipe, objects = _name_objects(recipe, PythonObjects(model, data, transform, batch_transform))
    console = DataConsole(quiet=os.environ.get("RANK", "0") != "0") if progress else None
    with use_objects(objects):
        summary, trained = train_network(recipe, recipe_name, console, callbacks)
    return Result(summary, trained.model.eval(), Path(summary.run))


class TestResult(NamedTuple):
    """The results on the test set; each is None if there is no test set, or if it was not computed."""

    scores: Scores | None
    ema_acc: float | None  # accuracy of the moving average of the weights
    tta_acc: float | None  # accuracy with test-time augmentation


class Trainer(trainer.Trainer):
    """One run for a loop of one's own, without a run folder; see `Trainer.from_recipe`.

    Among the attributes are `recipe`, `model`, `device`, `data`, `train_split` and `val_split` (`images`, uint8 [n, 3,
    32, 32], and `labels`, int64 [n]), `optimizer`, `ema`, `progress` (`epoch`, `step`) and `forward`, from images,
    uint8 [n, 3, 32, 32], to logits [n, classes].
    """

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe | str,
        *,
        model: Model | None = None,
        data: Data | None = None,
        transform: ImageTransform | None = None,
        batch_transform: BatchTransform | None = None,
    ) -> Self:
        """Build everything a run needs. For the arguments, see `train`.

        Call `optimize()` to compile the training step and, on CUDA, to capture it in a graph. Options about the run
        folder, resuming, trackers and the end of the run (`patience`, `max_steps`, `time_budget`) are ignored.
        """
        recipe, objects = _name_objects(recipe, PythonObjects(model, data, transform, batch_transform))
        with use_objects(objects):
            return build_trainer(resolve(recipe), trainer_class=cls)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Set the network to training mode, and return the batches of `epoch` (from 0) for `train_step`.

        A batch is a tuple of images, uint8 channels_last [b, 3, 32, 32], labels, int64 [b], and parameters of a mixer.
        """
        self.model.train()
        return super().batches(epoch, start_step)

    def end_epoch(self) -> EpochMetrics:
        """Evaluate on the validation split, advance to the next epoch, and return the metrics of this one.

        Raises `NonFiniteError` if a loss or gradient was NaN or Inf.
        """
        metrics = self.meter.compute()
        metrics.require_finite(self.progress.step)
        row = summarize_epoch(self, metrics, self.validate())
        self.progress.record_epoch(metrics.images, row["val_acc"], is_complete=True)
        self.meter.reset()
        self.schedule.after_epoch(row["val_loss"])
        return row

    def test(self, best_checkpoint: Path | None = None) -> TestResult:
        """Evaluate the `recipe.eval_weights` on the test set, and leave them in `model`; "best" needs a checkpoint."""
        if self.recipe.eval_weights == "best" and best_checkpoint is None:
            raise UsageError("the best epoch was not saved", "give its checkpoint, or another --eval-weights")
        return TestResult(*super().test(best_checkpoint or Path()))

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, which `load`, `load_run` and `fastcifar train --resume` read."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save_checkpoint(Path(path), self.state_dict(Clock()))

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint of a run with the same network, optimizer and data.

        Raises `CheckpointError` otherwise. The other options, such as `lr`, are not compared.
        """
        state = resume.require_resumable_state(checkpoint.load_checkpoint(Path(path)), Path(path))
        resume.require_same_data(self, state)
        resume.load_trainer_state(self, state)


@dataclass(frozen=True)
class Predictions:
    """The predictions of `LoadedRun.predict`, in the order of the images."""

    ids: list[int] | list[str]
    probabilities: np.ndarray  # float64 [n, classes]
    classes: list[str]  # names

    @property
    def labels(self) -> np.ndarray:
        """The most probable class of each image, int64 [n]."""
        return self.probabilities.argmax(1)

    def save(self, out: str | Path, format: PredictionFormat = KAGGLE_SUBMISSION) -> None:
        """Write a .csv or .jsonl file, by default with the columns `ID` and `Labels` of a Kaggle submission."""
        if format.is_calibrated:
            raise UsageError("these probabilities are not calibrated", "use `fastcifar predict --calibrated`")
        format.check(Path(out), self.classes)
        write_predictions(Path(out), format.build_columns(self.ids, self.probabilities, self.classes))


class LoadedRun:
    """A trained network, which `load_run` returns.

    Attributes: `recipe`, `classes` (names), `model` (float [n, 3, 32, 32], normalized, to logits [n, classes]) on its
    `device`, and `forward`, from uint8 [n, 3, 32, 32] to float32 logits [n, classes].
    """

    def __init__(self, path: str | Path, objects: PythonObjects, options: dict[str, Any]) -> None:
        self._path, self._objects, self._options = str(path), objects, options
        with use_objects(objects):
            self._loaded = load_model(self._path, **options)
            if objects.data:
                self._loaded.load_dataset()  # so that one that cannot be used is refused here
        self.recipe, self.classes = self._loaded.recipe, self._loaded.classes
        self.model, self.device, self.forward = self._loaded.model, self._loaded.device, self._loaded.forward

    def evaluate(
        self, *, plots_dir: Path | None = None, shifted_dir: Path | None = None, with_corruptions: bool = False
    ) -> EvalResult:
        """Evaluate on the test set and on the validation split of the run, like `fastcifar eval --json`.

        `plots_dir`: folder for plots; `shifted_dir`: folder of CIFAR-10.1 to evaluate on as well; `with_corruptions`:
        also evaluate on corrupted test images.
        """
        with use_objects(self._objects):
            return evaluate_run(
                self._loaded, plots_dir=plots_dir, shifted_dir=shifted_dir, with_corruptions=with_corruptions
            )

    def predict(self, images: Images | str | Path) -> Predictions:
        """Predict the classes of `images`: uint8 [n, 32, 32, 3] or [n, 3, 32, 32], or what `fastcifar predict` reads.

        The latter is the path of a pickle file from Kaggle, an .npy file, an image or a folder, or "data:test".
        """
        recipe = self.recipe
        if isinstance(images, str | Path):
            with use_objects(self._objects):
                inputs = read_inputs(str(images), recipe.resize, self._loaded.load_dataset)
            pixels, ids = inputs.images, inputs.ids
        else:
            remedy = "give uint8 [n, 32, 32, 3] or [n, 3, 32, 32]"
            pixels, _ = to_planar(np.asarray(images), "images", remedy, recipe.resize)
            ids = list(range(len(pixels)))
        self._loaded.compile_for(len(pixels) * len(VIEWS[recipe.tta]))
        probabilities = predict_images(self._loaded, np.ascontiguousarray(pixels), None).double().softmax(1).numpy()
        return Predictions(ids, probabilities, self._loaded.classes)

    def export(
        self,
        format: str = "onnx",
        out: str | Path | None = None,
        input_type: str = "uint8",
        output_type: str = "probabilities",
    ) -> ExportResult:
        """Write the network to a file and compare their outputs, like `fastcifar export`.

        `format`: onnx, pt2, aoti or safetensors; `out`: by default in the run folder; `input_type`: uint8 [n, 32, 32,
        3] or normalized, float32 [n, 3, 32, 32]; `output_type`: probabilities or logits.
        """
        # `export_model` loads the weights into a network on the CPU, which must not be the one of this object
        own_model = copy.deepcopy(self.model) if isinstance(self._objects.model, nn.Module) else self._objects.model
        options = {name: value for name, value in self._options.items() if name not in ("device", "precision")}
        with use_objects(replace(self._objects, model=own_model)):
            return export_model(self._path, format, Path(out) if out else None, input_type, output_type, **options)


def load_run(path: str | Path, *, model: Model | None = None, data: Data | None = None, **options: Any) -> LoadedRun:
    """Load the network of a run folder, or of a checkpoint file of this or another project.

    `model`, `data`: as for `train`. A network or data set that was given to `train` must be given again; the weights
    are loaded into an `nn.Module` in place. `options`: those of `fastcifar eval`, such as `eval_weights="best"`,
    `tta="flip"` or `device="cpu"`. Raises `CheckpointError` if the weights do not fit the network, and `DataError` if
    the classes of `data` are others than those of the run.
    """
    recipe, objects = _name_objects(Recipe(), PythonObjects(model, data))
    return LoadedRun(path, objects, {**options, "data": recipe.data})


def batches(
    data: Data,
    *,
    batch_size: int = 128,
    augment: str | Sequence[str] | None = None,
    transform: ImageTransform | None = None,
    batch_transform: BatchTransform | None = None,
    seed: int = 0,
    epochs: int = 1,
    device: torch.device | str = "cpu",
    compile: bool = False,
    workers: int = 2,
    resize: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return augmented batches of training images for `epochs` epochs, for a training loop without `Trainer`.

    Batches are images, uint8 channels_last [b, 3, 32, 32], and labels, int64 [b]. `data`: as for `train`, or a `Split`;
    all images of a pair, and the training images of others. `augment`: a list of augmentations, by default
    "crop:4:zero,flip"; or `transform`, of a PIL image, in `workers` processes. `batch_transform` follows either.
    `compile` pays off after a few hundred batches. `resize=32` resizes images of another size. Raises a `UserError` for
    invalid arguments.
    """
    if augment is not None and transform is not None:
        raise UsageError("batches(): both augment= and transform= are given", "give one of them")
    Recipe(batch_size=batch_size, seed=seed, workers=workers)  # raises for invalid values
    split = training_split(data, resize)
    text = DEFAULT_AUGMENT if augment is None else augment if isinstance(augment, str) else ",".join(augment)
    ops, mixer = split_mixer(parse_augment("none" if transform else text))
    if mixer:
        raise UsageError(f"batches(): {mixer.name} is applied in the training step", "remove it, or use train()")
    functions = {"transform": transform, "batch_transform": batch_transform}
    own = tuple(AugmentOp(name, None, object_name(f), function=f) for name, f in functions.items() if f)
    fills_with_mean = any(op.variant == "mean" for op in ops)  # which is computed from all images
    loader = LOADERS["torchvision" if transform else "tensor"](
        split.images,
        split.labels,
        batch_size=batch_size,
        augment=(*ops, *own),
        seed=seed,
        fill_color=mean_color(channel_mean_std(split.images)[0]) if fills_with_mean else (0, 0, 0),
        device=device,
        compile=compile,
        workers=workers,
    )
    return ((images, labels) for epoch in range(epochs) for images, labels in loader.batches(epoch))


def _name_objects(recipe: Recipe | str, given: PythonObjects) -> tuple[Recipe, PythonObjects]:
    """Return the recipe with the names of the objects `given`, and these with a function as `data`."""
    recipe = Recipe.make(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe):
        raise UsageError(f"the recipe is of type {type(recipe).__name__}", "give a Recipe or the name of one")
    for name in ("model", "transform", "batch_transform"):
        value = getattr(given, name)
        if not (value is None or callable(value)):
            expected = "an nn.Module, or a function or class that returns one" if name == "model" else "a function"
            raise UsageError(f"{name}= is of type {type(value).__name__}", f"give {expected}")
    changes: dict[str, Any] = {}
    if isinstance(given.data, str | Path):
        changes["data"], given = str(given.data), replace(given, data=None)
    elif given.data is not None:
        changes["data"] = PYTHON_DATA
        if isinstance(given.data, Dataset) and given.data.name in DATASETS:
            changes["dataset"] = given.data.name
        # called with the options of the recipe that a run has recorded, if it is resumed or loaded
        given = replace(given, data=functools.cache(functools.partial(to_dataset, given.data)))
    if recipe.resume is None:  # a resumed run has the names in its own recipe
        if given.model is not None:
            changes["arch"] = _network_name(recipe, given.model)
        if given.transform or given.batch_transform:
            changes["augment"] = _augment_text(recipe, given)
            changes["loader"] = "torchvision" if given.transform and recipe.loader == "auto" else recipe.loader
    return recipe.model_copy(update=changes), given


def _network_name(recipe: Recipe, model: Model) -> str:
    """Return the name of `model` in the recipe: `recipe.arch` if it is no built-in network, NAME or MODULE:NAME."""
    if "arch" in recipe.model_fields_set and not is_built_in(recipe.arch):
        return recipe.arch
    name = object_name(model)
    return f"{getattr(model, '__module__', 'python')}:{name}" if is_built_in(name) else name


def _augment_text(recipe: Recipe, given: PythonObjects) -> str:
    """Return the augmentations of `recipe` with the transforms that replace or follow them."""
    ops, mixer = split_mixer(parse_augment(recipe.augment))
    items = [f"transform:{object_name(given.transform)}"] if given.transform else [*map(str, ops)]
    items += [f"batch_transform:{object_name(given.batch_transform)}"] if given.batch_transform else []
    return ",".join([*items, *([str(mixer)] if mixer else [])])
