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
from fastcifar.data.predict_inputs import Inputs
from fastcifar.errors import CheckpointError, NonFiniteError, UsageError
from fastcifar.evaluation import prediction_files
from fastcifar.evaluation.load_run import Finished, rebuild
from fastcifar.training.evaluate import BATCH_SIZE, VIEWS, predict_logits

CHUNK = 4 * BATCH_SIZE  # images between two looks at the bar
SHOWN = 40  # images of a picture


def predict(
    run: str,
    source: str,
    out: Path,
    *,
    weights: str | None = None,
    arch: str | None = None,
    ensemble: Sequence[str] = (),
    top: int = 0,
    probabilities: bool = False,
    names: bool = False,
    header: str | None = None,
    show: Path | None = None,
    console: Console | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Labels the images of `source` (see `predict_inputs.read`) by `run` and writes them to `out`, a row for each, in order.

    `ensemble`: further runs; the label is that of the mean of all their logits. `names`: class names instead of
    numbers. `top`: so many best classes with their probabilities; `probabilities`: those of every class. `header`: two
    names for the first columns of a CSV. `show`: a PNG of some images with their labels. `changes`: as in `rebuild`.
    Returns what was done: `images`, `images_per_s` (of `seconds.predict` alone), counts by class, and by what.
    Errors: `UsageError`, `DataError`, `CheckpointError`, `DiskError`, `DeviceError`, `NonFiniteError`; then no file.
    """
    started = time.perf_counter()
    writer = prediction_files.writer_for(out)
    first_two = prediction_files.first_two(header, out)
    if show is not None:
        plotting.require_png(show)
    members = _members([rebuild(name, weights, arch, **changes) for name in (run, *ensemble)])
    first = members[0]
    if not 0 <= top <= len(first.classes):
        raise UsageError(f"--top {top} of {len(first.classes)} classes", f"choose 0 to {len(first.classes)}")
    asked: dict[str, Any] = {"names": names, "top": top, "probabilities": probabilities}
    columns = partial(prediction_files.columns, classes=first.classes, first_two=first_two, **asked)
    columns([], np.empty((0, len(first.classes))))  # names that clash are refused before the network runs
    found = predict_inputs.read(source, first.recipe.data, first.recipe.dataset)
    for member in members:
        member.hurry(len(found.ids) * len(VIEWS[first.recipe.tta]))
    prepared = time.perf_counter()
    likely = _likely([_logits(member, found, console) for member in members])
    done = time.perf_counter()
    if show is not None:
        _picture(show, found, likely, first.classes)
    prediction_files.write(out, writer(columns(found.ids, likely)))
    counts = np.bincount(likely.argmax(1), minlength=len(first.classes)).tolist()
    return {
        "out": str(out),
        "show": str(show) if show else None,
        "images": len(found.ids),
        "source": found.source,
        "layout": found.layout,
        "members": [_described(member) for member in members],
        "tta": first.recipe.tta,
        "images_per_s": len(found.ids) / (done - prepared),
        "seconds": {"prepare": prepared - started, "predict": done - prepared},
        "counts": dict(zip(first.classes, counts, strict=True)),
        "confidence": likely.max(1).mean().item(),
    }


def _members(members: list[Finished]) -> list[Finished]:
    """Errors: `CheckpointError` if they do not know the same classes."""
    for member in members:
        if member.classes != members[0].classes:
            problem = f"{member.checkpoint} knows other classes than {members[0].checkpoint}"
            raise CheckpointError(problem, "ask them apart")
    return members


def _likely(logits: list[Tensor]) -> np.ndarray:
    """Class probabilities [n, classes] by the mean of the logits of each member. Errors: `NonFiniteError`."""
    mean = torch.stack(logits).double().mean(0)
    if not torch.isfinite(mean).all():
        raise NonFiniteError("the network gives logits that are not finite", "use --precision fp32, or other weights")
    return mean.softmax(1).numpy()


def _logits(member: Finished, found: Inputs, console: Console | None) -> Tensor:
    """float32 logits [n, classes] of one member, on the host; a bar on a terminal."""
    starts = range(0, len(found.ids), CHUNK)
    hidden = console is None or not console.is_terminal
    parts = []
    for start in track(starts, "predict", console=console, disable=hidden, transient=True):
        images = found.images[start : start + CHUNK]
        positions = np.arange(start, start + len(images))
        part = predict_logits(member.model, member.forward, Split(images, positions), member.device, member.recipe.tta)
        parts.append(part)
    return torch.cat(parts)


def _described(member: Finished) -> dict[str, Any]:
    choice = member.choice
    return {
        "checkpoint": str(member.checkpoint),
        "weights": member.weights,
        "arch": member.recipe.arch,
        "device": choice.device,
        "precision": choice.precision,
        "compiled": choice.compile,
        "cuda_graph": choice.cuda_graph,
    }


def _picture(path: Path, found: Inputs, likely: np.ndarray, classes: list[str]) -> None:
    """Images evenly spaced through the input with their labels and confidences; what is known to be wrong in red."""
    count, labels = len(found.ids), likely.argmax(1)
    places = np.unique(np.linspace(0, count - 1, min(count, SHOWN)).round().astype(np.int64))
    truth = labels if found.labels is None else found.labels
    wrong = [bool(labels[place] != truth[place]) for place in places]
    captions = [
        f"{classes[labels[place]]} {100 * likely[place, labels[place]]:.0f} %"
        + (f"\nnot {classes[truth[place]]}" if mark else "")
        for place, mark in zip(places, wrong, strict=True)
    ]
    images = np.stack([found.images[place] for place in places]).transpose(0, 2, 3, 1)
    plotting.captioned_images(path, images, captions, wrong)
