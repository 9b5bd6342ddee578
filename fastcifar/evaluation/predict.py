"""`fastcifar predict`: labels for images that nobody labelled, by one finished run or several, as a file.

Everything that can be wrong is found before the network runs, and the file is written last, whole. The images come
from `data.inputs`, the networks from `finished`, the file from `submissions`.
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
from fastcifar.errors import CheckpointError, NonFiniteError, UsageError
from fastcifar.evaluation import prediction_files
from fastcifar.evaluation.load_run import LoadedRun, load_model
from fastcifar.format import format_percent
from fastcifar.training.evaluate import EVAL_BATCH_SIZE, VIEWS, predict_logits

IMAGES_PER_CHUNK = 4 * EVAL_BATCH_SIZE  # images between two looks at the bar
MAX_PLOTTED_IMAGES = 40  # images of a picture


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
    """Labels the images of `source` (see `predict_inputs.read`) by `run` and writes them to `out`, a row for each, in order.

    `ensemble`: further runs; the label is that of the mean of all their logits. `names`: class names instead of
    numbers. `top`: so many best classes with their probabilities; `probabilities`: those of every class. `header`: two
    names for the first columns of a CSV. `show`: a PNG of some images with their labels. `changes`: as in `rebuild`.
    Returns what was done: `images`, `images_per_s` (of `seconds.predict` alone), counts by class, and by what.
    Errors: `UsageError`, `DataError`, `CheckpointError`, `DiskError`, `DeviceError`, `NonFiniteError`; then no file.
    """
    started = time.perf_counter()
    writer = prediction_files.get_prediction_serializer(out)
    first_two = prediction_files.parse_header(header, out)
    if plot_path is not None:
        plotting.require_png(plot_path)
    members = _require_same_classes([load_model(name, eval_weights, arch, **overrides) for name in (run, *ensemble)])
    first = members[0]
    if not 0 <= top_k <= len(first.classes):
        raise UsageError(f"--top {top_k} of {len(first.classes)} classes", f"choose 0 to {len(first.classes)}")
    asked: dict[str, Any] = {
        "use_class_names": use_class_names,
        "top_k": top_k,
        "with_probabilities": with_probabilities,
    }
    columns = partial(prediction_files.prediction_columns, classes=first.classes, header=first_two, **asked)
    columns([], np.empty((0, len(first.classes))))  # names that clash are refused before the network runs
    found = predict_inputs.read_inputs(source, first.recipe.data, first.recipe.dataset)
    for member in members:
        member.compile_for(len(found.ids) * len(VIEWS[first.recipe.tta]))
    prepared = time.perf_counter()
    likely = _ensemble_probabilities([_predict_member_logits(member, found, console) for member in members])
    done = time.perf_counter()
    if plot_path is not None:
        _plot_predictions(plot_path, found, likely, first.classes)
    prediction_files.write_predictions(out, writer(columns(found.ids, likely)))
    counts = np.bincount(likely.argmax(1), minlength=len(first.classes)).tolist()
    return {
        "out": str(out),
        "show": str(plot_path) if plot_path else None,
        "images": len(found.ids),
        "source": found.source,
        "layout": found.layout,
        "members": [_describe_member(member) for member in members],
        "tta": first.recipe.tta,
        "images_per_s": len(found.ids) / (done - prepared),
        "seconds": {"prepare": prepared - started, "predict": done - prepared},
        "counts": dict(zip(first.classes, counts, strict=True)),
        "confidence": likely.max(1).mean().item(),
    }


def _require_same_classes(members: list[LoadedRun]) -> list[LoadedRun]:
    """Errors: `CheckpointError` if they do not know the same classes."""
    for member in members:
        if member.classes != members[0].classes:
            problem = f"{member.checkpoint_path} knows other classes than {members[0].checkpoint_path}"
            raise CheckpointError(problem, "ask them apart")
    return members


def _ensemble_probabilities(logits: list[Tensor]) -> np.ndarray:
    """Class probabilities [n, classes] by the mean of the logits of each member. Errors: `NonFiniteError`."""
    mean = torch.stack(logits).double().mean(0)
    if not torch.isfinite(mean).all():
        raise NonFiniteError("the network gives logits that are not finite", "use --precision fp32, or other weights")
    return mean.softmax(1).numpy()


def _predict_member_logits(member: LoadedRun, input_images: InputImages, console: Console | None) -> Tensor:
    """float32 logits [n, classes] of one member, on the host; a bar on a terminal."""
    starts = range(0, len(input_images.ids), IMAGES_PER_CHUNK)
    hidden = console is None or not console.is_terminal
    parts = []
    for start in track(starts, "predict", console=console, disable=hidden, transient=True):
        images = input_images.images[start : start + IMAGES_PER_CHUNK]
        positions = np.arange(start, start + len(images))
        part = predict_logits(member.model, member.forward, Split(images, positions), member.device, member.recipe.tta)
        parts.append(part)
    return torch.cat(parts)


def _describe_member(member: LoadedRun) -> dict[str, Any]:
    choice = member.execution
    return {
        "checkpoint": str(member.checkpoint_path),
        "eval_weights": member.weights,
        "arch": member.recipe.arch,
        "device": choice.device,
        "precision": choice.precision,
        "compiled": choice.compile,
        "cuda_graph": choice.cuda_graph,
    }


def _plot_predictions(path: Path, input_images: InputImages, probabilities: np.ndarray, classes: list[str]) -> None:
    """Images evenly spaced through the input with their labels and confidences; what is known to be wrong in red."""
    count, labels, confidences = len(input_images.ids), probabilities.argmax(1), probabilities.max(1)
    places = np.unique(np.linspace(0, count - 1, min(count, MAX_PLOTTED_IMAGES)).round().astype(np.int64))
    truth = labels if input_images.labels is None else input_images.labels
    wrong = [bool(labels[place] != truth[place]) for place in places]
    captions = [
        f"{classes[labels[place]]} {format_percent(confidences[place], 0)}"
        + (f"\nnot {classes[truth[place]]}" if mark else "")
        for place, mark in zip(places, wrong, strict=True)
    ]
    images = np.stack([input_images.images[place] for place in places]).transpose(0, 2, 3, 1)
    plotting.plot_captioned_images(path, images, captions, wrong)
