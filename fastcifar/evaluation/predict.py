"""Predict labels for unlabeled images with one run or an ensemble: the implementation of `fastcifar predict`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastcifar import plotting
from fastcifar.data.cifar import Split
from fastcifar.data.predict_inputs import InputImages, read_inputs
from fastcifar.errors import CheckpointError, UsageError
from fastcifar.evaluation.load_run import LoadedModel, ModelDescription, load_model
from fastcifar.evaluation.metrics import NO_TEMPERATURE, fit_temperature
from fastcifar.evaluation.prediction_files import KAGGLE_SUBMISSION, PredictionFormat, write_predictions
from fastcifar.format import format_percent
from fastcifar.training.evaluate import EVAL_BATCH_SIZE, VIEWS

IMAGES_PER_CHUNK = 4 * EVAL_BATCH_SIZE  # images per update of the progress bar
MAX_PLOTTED_IMAGES = 40


class EnsembleMember(ModelDescription):
    """A network of the ensemble and how it was run."""

    compiled: bool
    cuda_graph: bool
    temperature: float | None  # the divisor of the logits; None without calibration


class PredictResult(TypedDict):
    """The document of `fastcifar predict --json`."""

    out: str
    show: str | None  # the file of the plot
    tta: str
    members: list[EnsembleMember]
    images_per_s: float  # during the seconds of `predict`
    seconds: dict[str, float]  # keys `prepare` and `predict`
    images: int
    source: str
    layout: str
    counts: dict[str, int]  # class name -> number of images predicted as this class
    confidence: float  # mean probability of the predicted class


def predict_to_file(
    run: str,
    source: str,
    out: Path,
    *,
    eval_weights: str | None = None,
    arch: str | None = None,
    ensemble: Sequence[str] = (),
    format: PredictionFormat = KAGGLE_SUBMISSION,
    plot_path: Path | None = None,
    console: Console | None = None,
    **overrides: Any,
) -> PredictResult:
    """Predict the labels of the images in `source` and write them to `out`, one row per image in the input order.

    `ensemble` contains further runs, whose logits are averaged with those of `run`, after the division by their
    temperatures if `format` is calibrated; some images with labels are plotted to the PNG file `plot_path`. See
    `read_inputs` for `source`, `load_model` for other arguments. All arguments are validated before the networks run;
    on an error no prediction file is written.
    """
    start_time = time.perf_counter()
    members = [load_model(member, eval_weights, arch, **overrides) for member in (run, *ensemble)]
    classes, recipe = members[0].classes, members[0].recipe
    for member in members:
        if member.classes != classes:
            problem = f"{member.checkpoint_path} was trained on other classes than {members[0].checkpoint_path}"
            raise CheckpointError(problem, "predict with each of them separately")
    format.check(out, classes)
    if plot_path is not None:
        plotting.require_png(plot_path)
    inputs = read_inputs(source, recipe.resize, members[0].load_dataset)
    classes = members[0].classes  # those of the data set, if the checkpoint does not name them
    splits = [_calibration_split(member) if format.is_calibrated else None for member in members]
    for member in members:
        member.compile_for(len(inputs.ids) * len(VIEWS[recipe.tta]), console)
    temperatures = [_fit_temperature(*pair, console) for pair in zip(members, splits, strict=True)]
    predict_start_time = time.perf_counter()
    logits = [
        predict_images(member, inputs.images, console).double() / (temperature or 1)
        for member, temperature in zip(members, temperatures, strict=True)
    ]
    probabilities = torch.stack(logits).mean(0).softmax(1).numpy()
    predict_seconds = time.perf_counter() - predict_start_time
    if plot_path is not None:
        _plot_predictions(plot_path, inputs, probabilities, classes)
    write_predictions(out, format.build_columns(inputs.ids, probabilities, classes))
    counts = np.bincount(probabilities.argmax(1), minlength=len(classes)).tolist()
    return {
        "out": str(out),
        "show": str(plot_path) if plot_path else None,
        "tta": recipe.tta,
        "members": list(map(_describe_member, members, temperatures)),
        "images_per_s": len(inputs.ids) / predict_seconds,
        "seconds": {"prepare": predict_start_time - start_time, "predict": predict_seconds},
        "images": len(inputs.ids),
        "source": inputs.source,
        "layout": inputs.layout,
        "counts": dict(zip(classes, counts, strict=True)),
        "confidence": probabilities.max(1).mean().item(),
    }


def predict_images(
    member: LoadedModel, images: np.ndarray, console: Console | None, description: str = "predict"
) -> Tensor:
    """Return the float32 logits [n, classes] of one member on the CPU, with a progress bar on a terminal."""
    starts = range(0, len(images), IMAGES_PER_CHUNK)
    is_terminal = console is not None and console.is_terminal
    chunks = []
    for start in track(starts, description, console=console, disable=not is_terminal, transient=True):
        chunk = images[start : start + IMAGES_PER_CHUNK]
        unlabeled = Split(chunk, np.zeros(len(chunk), np.int64))  # the labels are ignored
        chunks.append(member.predict_logits(unlabeled, member.recipe.tta))
    return torch.cat(chunks)


def _calibration_split(member: LoadedModel) -> Split:
    """Return the validation split of a run. Raises `UsageError` if it has none, `CheckpointError` with other data."""
    data = member.load_dataset()
    split, reason = member.validation_split(data)
    if reason:
        error_type = UsageError if member.is_trained_on(data) else CheckpointError
        raise error_type(f"{member.checkpoint_path} cannot be calibrated: {reason}", "omit --calibrated")
    return split


def _fit_temperature(member: LoadedModel, split: Split | None, console: Console | None) -> float | None:
    """Fit the temperature of the logits that `member` predicts, with its test-time augmentation; None without a split.

    It is fitted for every prediction and not saved by the run, since it depends on the weights and the augmentation.
    """
    if split is None:
        return None
    logits = predict_images(member, split.images, console, "calibrate")
    if temperature := fit_temperature(logits, torch.from_numpy(split.labels)):
        return temperature
    raise UsageError(f"{member.checkpoint_path} cannot be calibrated: {NO_TEMPERATURE}", "omit --calibrated")


def _describe_member(member: LoadedModel, temperature: float | None) -> EnsembleMember:
    return {
        **member.describe(),
        "compiled": member.execution.compile,
        "cuda_graph": member.execution.cuda_graph,
        "temperature": temperature,
    }


def _plot_predictions(path: Path, inputs: InputImages, probabilities: np.ndarray, classes: list[str]) -> None:
    """Plot evenly spaced images with their predicted labels and confidences, and wrong predictions in red."""
    num_images, predicted, confidences = len(inputs.ids), probabilities.argmax(1), probabilities.max(1)
    indices = np.linspace(0, num_images - 1, min(num_images, MAX_PLOTTED_IMAGES)).round().astype(np.int64)
    labels = predicted if inputs.labels is None else inputs.labels
    is_wrong = (predicted != labels)[indices].tolist()
    captions = [f"{classes[predicted[index]]} {format_percent(confidences[index], 0)}" for index in indices]
    for number, index in enumerate(indices):
        if is_wrong[number]:
            captions[number] += f"\nnot {classes[labels[index]]}"
    plotting.plot_captioned_images(path, inputs.images[indices].transpose(0, 2, 3, 1), captions, is_wrong)
