"""What is timed: the loader, the step, training, inference, single convolutions; a row of WHATS each.

A work does one unit (a batch, a step) each time it is asked and says how many images that was, for ever. What runs here
is what `train` runs: the parts of `parts.assemble`. Nothing here looks at a clock.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fastcifar.data.loaders import LOADERS
from fastcifar.models import macs
from fastcifar.models.memory_traffic import Conv, bytes_per_image, convolutions
from fastcifar.training import cuda_graph
from fastcifar.training.step import DTYPES, Forward, Step
from fastcifar.training.trainer import Parts

Work = Generator[int]  # one unit of work each time it is asked; the number of its images comes out

# Images of a batch of inference: the first for its latency, and among the others the fastest is looked for.
INFERENCE = {"cuda": (1, 256, 1024, 4096), "cpu": (1, 64, 256)}

STEPS_PER_REPLAY = (1, 2, 5, 10)


@dataclass(frozen=True)
class Job:
    """A row of results to be: the settings that name it, its work, and what an image costs there.

    flop, bytes  operations and bytes moved an image, where a model knows them
    share        of the usual length of a trial
    latency      is the time of one unit of interest, beside images a second?
    """

    named: dict[str, Any]
    work: Work
    flop: int | None = None
    bytes: int | None = None
    share: float = 1.0
    latency: bool = False


def loader_jobs(parts: Parts, _: Step | None) -> Iterator[Job]:
    """The loader's batches with nothing done to them."""
    yield Job(settings(parts, "loader", "augment", "batch_size", "workers", "compiled", "data"), loader_work(parts))


def step_jobs(parts: Parts, step: Step | None) -> Iterator[Job]:
    """The training step on one batch that lies on the device."""
    assert step is not None
    named = settings(parts, "arch", "batch_size", "precision", "compiled", "cuda_graph")
    yield Job(named, step_work(parts, step), *training_cost(parts))


def train_jobs(parts: Parts, step: Step | None) -> Iterator[Job]:
    """Training, end to end."""
    assert step is not None
    names = ("arch", "loader", "augment", "batch_size", "workers", "precision", "compiled", "cuda_graph", "data")
    yield Job(settings(parts, *names), train_work(parts, step), *training_cost(parts))


def infer_jobs(parts: Parts, _: Step | None) -> Iterator[Job]:
    """The forward pass on batches of several sizes that lie on the device."""
    cost = 2 * macs(parts.model), bytes_per_image(parts.model, False, element(parts))
    for size in INFERENCE[parts.device.type]:
        named = settings(parts, "arch", "batch_size", "precision", "compiled", "cuda_graph")
        yield Job(named | {"batch_size": size}, infer_work(parts, size), *cost, latency=size == 1)


def conv_jobs(parts: Parts, _: Step | None) -> Iterator[Job]:
    """The network's convolutions one by one, in the run's precision: forward alone, and with both its gradients."""
    named = settings(parts, "arch", "batch_size", "precision")
    for conv, calls in convolutions(parts.model).items():
        if conv.output[1:] == (1, 1):  # of a squeeze: a matrix product of next to nothing
            continue
        of_images = conv.input == (3, 32, 32)  # which have no gradient
        for direction, passes in (("forward", 1), ("forward_backward", 2 if of_images else 3)):
            yield Job(
                named | {"conv": str(conv), "calls": calls, "direction": direction},
                conv_work(parts, conv, passes),
                flop=2 * passes * conv.macs,
                bytes=passes * element(parts) * (math.prod(conv.input) + math.prod(conv.output)),
                share=0.1,
            )


def replay_jobs(parts: Parts, _: Step | None) -> Iterator[Job]:
    """Several training steps a replay: what is left to gain by launching less often."""
    for count in STEPS_PER_REPLAY:
        named = settings(parts, "arch", "batch_size", "precision", "compiled", "cuda_graph")
        yield Job(named | {"steps_per_replay": count}, replay_work(parts, count), *training_cost(parts), share=0.5)


WHATS: dict[str, Callable[[Parts, Step | None], Iterator[Job]]] = {
    "loader": loader_jobs,
    "step": step_jobs,
    "train": train_jobs,
    "infer": infer_jobs,
    "conv": conv_jobs,
    "replay": replay_jobs,
}
STEPPING = {"step", "train"}  # those that need the training step built


def settings(parts: Parts, *names: str) -> dict[str, Any]:
    """What a figure depends on, by name; `workers` only of a loader that has them."""
    recipe, choice = parts.recipe, parts.choice
    known = {
        **recipe.model_dump(include={"arch", "augment", "batch_size"}),
        "loader": choice.loader,
        "precision": choice.precision,
        "compiled": choice.compile,
        "cuda_graph": choice.cuda_graph,
        "data": parts.data.source,
    }
    if "workers" in inspect.signature(LOADERS[choice.loader]).parameters:
        known["workers"] = recipe.workers
    return {name: known[name] for name in names if name in known}


def training_cost(parts: Parts) -> tuple[int, int]:
    """Operations and bytes of an image: backward costs twice forward, a multiply-accumulate is two operations."""
    return 6 * macs(parts.model), bytes_per_image(parts.model, True, element(parts))


def element(parts: Parts) -> int:
    """Bytes of an element of a feature map."""
    return DTYPES[parts.choice.precision].itemsize


def loader_work(parts: Parts) -> Work:
    """The loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        for _images, labels in parts.loader.batches(epoch):
            yield len(labels)


def step_work(parts: Parts, step: Step) -> Work:
    """The step on the loader's first batch, at a learning rate of 0.

    The work is the same, and a network that learnt its one batch by heart would compute with other numbers in the last
    trial than in the first.
    """
    batch = [tensor.clone() for tensor in next(parts.batches(0))]  # a loader may use its memory again
    parts.optimizer.set_lr(0.0)
    for done in itertools.count(1):
        step(*batch)
        parts.optimizer.between_steps(done)
        yield len(batch[1])


def replay_work(parts: Parts, count: int) -> Work:
    """`count` steps a unit, on the loader's first batch, at a learning rate of 0."""
    block = parts.fast_block(count)
    batch = [tensor.clone() for tensor in next(parts.batches(0))]
    parts.optimizer.set_lr(0.0)
    for done in itertools.count(count, count):
        block(*batch * count)
        parts.optimizer.between_steps(done)
        yield len(batch[1]) * count


def train_work(parts: Parts, step: Step) -> Work:
    """The loader's batches through the step, as the loop of `train` does it."""
    done = 0
    for epoch in itertools.count():
        for batch in parts.batches(epoch):
            parts.optimizer.set_lr(parts.schedule.lr_at(done))
            step(*batch)
            done += 1
            parts.optimizer.between_steps(done)
            yield len(batch[1])


def infer_work(parts: Parts, batch_size: int) -> Work:
    """uint8 images to logits in evaluation mode, compiled and captured as the step would be."""
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8).to(parts.device)
    images = images.contiguous(memory_format=torch.channels_last)
    forward: Forward = parts.forward
    if parts.choice.compile:
        forward = cuda_graph.compiled(forward, parts.recipe.compile_mode)
    parts.model.eval()
    try:
        with torch.no_grad():
            logits = forward(images)
            if parts.choice.cuda_graph:
                forward = captured(forward, images, logits)
        while True:
            with torch.no_grad():  # not around the yield: it would reach whoever asks
                forward(images)
            yield batch_size
    finally:
        parts.model.train()


def captured(forward: Forward, images: Tensor, logits: Tensor) -> Forward:
    """`forward` as one replay, into `logits`."""

    def write(images: Tensor) -> None:
        logits.copy_(forward(images))

    replay = cuda_graph.graphed(write, (images,), ())

    def run(images: Tensor) -> Tensor:
        replay(images)
        return logits

    return run


def conv_work(parts: Parts, conv: Conv, passes: int) -> Work:
    """One convolution on a batch of random feature maps: 1 pass is forward, 2 add the weight's gradient, 3 both."""
    size, dtype = parts.recipe.batch_size, DTYPES[parts.choice.precision]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=parts.device).to(dtype).contiguous(memory_format=torch.channels_last)

    images, weight = random(size, *conv.input), random(*conv.weight)
    inputs = (weight, images)[: passes - 1]
    for tensor in inputs:
        tensor.requires_grad_()
    gradient = random(size, *conv.output)
    while True:
        output = conv2d(images, weight, None, conv.stride, conv.padding, 1, conv.groups)
        if inputs:
            torch.autograd.grad(output, inputs, gradient)
        yield size
