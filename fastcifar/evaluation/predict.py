"""Predict labels for unlabeled images with one run or an ensemble: the implementation of `fastcifar predict`.

All arguments are validated before the networks run, and the prediction file is written atomically at the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastcifar import plotting
from fastcifar.data import predict_inputs
from fastcifar.data.cifar import Split
from fastcifar.data.predict_inputs import InputImages
from fastcifar.errors import CheckpointError, NonFiniteError
from fastcifar.evaluation import prediction_files
from fastcifar.evaluation.load_run import LoadedRun, load_model
from fastcifar.format import format_percent
from fastcifar.training.evaluate import EVAL_BATCH_SIZE, VIEWS, predict_logits

IMAGES_PER_CHUNK = 4 * EVAL_BATCH_SIZE  # images per update of the progress bar
MAX_PLOTTED_IMAGES = 40


def predict_to_file(
    run: str,
    source: str,
    out: Path,
    *,
    eval_weights: str | None = None,
    arch: str | None = None,
    ensemble: Sequence[str] = (),
    top_k: int = 0,
    with_probabilities: bool = False,
    use_class_names: bool = False,
    header: str | None = None,
    plot_path: Path | None = None,
    console: Console | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Predict the labels of the images in `source` and write them to `out`, one row per image in the input order.

    run, eval_weights, arch, overrides          as for `load_model`
    source                                      see `predict_inputs.read_inputs`
    ensemble                                    further runs, whose logits are averaged with those of `run`
    top_k, with_probabilities, use_class_names  see `prediction_files.prediction_columns`
    header                                      names of the first two columns of a CSV file, as "id,label"
    plot_path                                   PNG file for a plot of some images with their predicted labels

    Returns the settings, the number of images, the counts by class and the images per second, excluding preparation.
    Raises `UsageError`, `DataError`, `CheckpointError`, `DiskError`, `DeviceError` or `NonFiniteError`; then no
    prediction file is written.
    """
    start_time = time.perf_counter()
    serialize = prediction_files.get_prediction_serializer(out)
    column_names = prediction_files.parse_header(header, out)
    if plot_path is not None:
        plotting.require_png(plot_path)
    members = _load_members([run, *ensemble], eval_weights, arch, overrides)
    classes, recipe = members[0].classes, members[0].recipe
    build_columns = partial(
        prediction_files.prediction_columns,
        classes=classes,
        header=column_names,
        use_class_names=use_class_names,
        top_k=top_k,
        with_probabilities=with_probabilities,
    )
    build_columns([], np.empty((0, len(classes))))  # raises for invalid options before the networks run
    inputs = predict_inputs.read_inputs(source, recipe.data, recipe.dataset)
    probabilities, predict_seconds = _predict_probabilities(members, inputs, console)
    prepare_seconds = time.perf_counter() - start_time - predict_seconds
    if plot_path is not None:
        _plot_predictions(plot_path, inputs, probabilities, classes)
    prediction_files.write_predictions(out, serialize(build_columns(inputs.ids, probabilities)))
    return {
        "out": str(out),
        "show": str(plot_path) if plot_path else None,
        "tta": recipe.tta,
        "members": [_describe_member(member) for member in members],
        "images_per_s": len(inputs.ids) / predict_seconds,
        "seconds": {"prepare": prepare_seconds, "predict": predict_seconds},
        **_summarize_predictions(inputs, probabilities, classes),
    }


def _load_members(
    runs: Sequence[str], eval_weights: str | None, arch: str | None, overrides: dict[str, Any]
) -> list[LoadedRun]:
    """Load the networks of the ensemble. Raises `CheckpointError` if their classes differ."""
    members = [load_model(run, eval_weights, arch, **overrides) for run in runs]
    for member in members:
        if member.classes != members[0].classes:
            problem = f"{member.checkpoint_path} was trained on other classes than {members[0].checkpoint_path}"
            raise CheckpointError(problem, "predict with each of them separately")
    return members


def _predict_probabilities(
    members: list[LoadedRun], inputs: InputImages, console: Console | None
) -> tuple[np.ndarray, float]:
    """Return the class probabilities [n, classes] of the mean logits of the members, and the seconds of computing them.

    The time excludes compilation. Raises `NonFiniteError` if the mean logits contain NaN or infinity.
    """
    for member in members:
        member.compile_for(len(inputs.ids) * len(VIEWS[member.recipe.tta]))
    start_time = time.perf_counter()
    logits = [_predict_logits_of_ensemble_member(member, inputs, console) for member in members]
    mean_logits = torch.stack(logits).double().mean(0)
    if not torch.isfinite(mean_logits).all():
        raise NonFiniteError(
            "the logits of the network contain NaN or infinity", "use --precision fp32, or other weights"
        )
    return mean_logits.softmax(1).numpy(), time.perf_counter() - start_time


def _predict_logits_of_ensemble_member(member: LoadedRun, inputs: InputImages, console: Console | None) -> Tensor:
    """Return the float32 logits [n, classes] of one member on the CPU, with a progress bar on a terminal."""
    starts = range(0, len(inputs.ids), IMAGES_PER_CHUNK)
    no_progress_bar = console is None or not console.is_terminal
    chunks = []
    for start in track(starts, "predict", console=console, disable=no_progress_bar, transient=True):
        images = inputs.images[start : start + IMAGES_PER_CHUNK]
        split = Split(images, np.zeros(len(images), np.int64))  # `predict_logits` ignores the labels
        chunks.append(predict_logits(member.model, member.forward, split, member.device, member.recipe.tta))
    return torch.cat(chunks)


def _describe_member(member: LoadedRun) -> dict[str, Any]:
    execution = member.execution
    return {
        "checkpoint": str(member.checkpoint_path),
        "eval_weights": member.weights,
        "arch": member.recipe.arch,
        "device": execution.device,
        "precision": execution.precision,
        "compiled": execution.compile,
        "cuda_graph": execution.cuda_graph,
    }


def _summarize_predictions(inputs: InputImages, probabilities: np.ndarray, classes: list[str]) -> dict[str, Any]:
    counts = np.bincount(probabilities.argmax(1), minlength=len(classes)).tolist()
    return {
        "images": len(inputs.ids),
        "source": inputs.source,
        "layout": inputs.layout,
        "counts": dict(zip(classes, counts, strict=True)),
        "confidence": probabilities.max(1).mean().item(),
    }


def _plot_predictions(path: Path, inputs: InputImages, probabilities: np.ndarray, classes: list[str]) -> None:
    """Plot evenly spaced images with their predicted labels and confidences, and wrong predictions in red."""
    num_images, predicted, confidences = len(inputs.ids), probabilities.argmax(1), probabilities.max(1)
    indices = np.linspace(0, num_images - 1, min(num_images, MAX_PLOTTED_IMAGES)).round().astype(np.int64)
    labels = predicted if inputs.labels is None else inputs.labels
    is_wrong = [bool(predicted[index] != labels[index]) for index in indices]
    captions = [
        f"{classes[predicted[index]]} {format_percent(confidences[index], 0)}"
        + (f"\nnot {classes[labels[index]]}" if wrong else "")
        for index, wrong in zip(indices, is_wrong, strict=True)
    ]
    plotting.plot_captioned_images(path, inputs.images[indices].transpose(0, 2, 3, 1), captions, is_wrong)
