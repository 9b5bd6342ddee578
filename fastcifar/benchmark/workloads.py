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
from fastcifar.models import count_macs
from fastcifar.models.memory_traffic import ConvCall, count_conv_calls, feature_map_bytes_per_image
from fastcifar.training import compilation, cuda_graph
from fastcifar.training.step import DTYPES, Forward, TrainStep
from fastcifar.training.trainer import Trainer

Workload = Generator[int]  # one unit of work each time it is asked; the number of its images comes out

# Images of a batch of inference: the first for its latency, and among the others the fastest is looked for.
INFERENCE_BATCH_SIZES = {"cuda": (1, 256, 1024, 4096), "cpu": (1, 64, 256)}

STEPS_PER_REPLAY = (1, 2, 5, 10)


@dataclass(frozen=True)
class BenchmarkCase:
    """A row of results to be: the settings that name it, its work, and what an image costs there.

    flop, bytes  operations and bytes moved an image, where a model knows them
    share        of the usual length of a trial
    latency      is the time of one unit of interest, beside images a second?
    """

    settings: dict[str, Any]
    workload: Workload
    flop_per_image: int | None = None
    bytes_per_image: int | None = None
    trial_s_factor: float = 1.0
    reports_latency: bool = False


def loader_cases(trainer: Trainer, _: TrainStep | None) -> Iterator[BenchmarkCase]:
    """The loader's batches with nothing done to them."""
    yield BenchmarkCase(
        select_settings(trainer, "loader", "augment", "batch_size", "workers", "compiled", "data"),
        loader_workload(trainer),
    )


def step_cases(trainer: Trainer, step: TrainStep | None) -> Iterator[BenchmarkCase]:
    """The training step on one batch that lies on the device."""
    assert step is not None
    named = select_settings(trainer, "arch", "batch_size", "precision", "compiled", "cuda_graph")
    yield BenchmarkCase(named, step_workload(trainer, step), *training_cost_per_image(trainer))


def train_cases(trainer: Trainer, step: TrainStep | None) -> Iterator[BenchmarkCase]:
    """Training, end to end."""
    assert step is not None
    names = ("arch", "loader", "augment", "batch_size", "workers", "precision", "compiled", "cuda_graph", "data")
    yield BenchmarkCase(
        select_settings(trainer, *names), train_workload(trainer, step), *training_cost_per_image(trainer)
    )


def inference_cases(trainer: Trainer, _: TrainStep | None) -> Iterator[BenchmarkCase]:
    """The forward pass on batches of several sizes that lie on the device."""
    cost = 2 * count_macs(trainer.model), feature_map_bytes_per_image(trainer.model, False, bytes_per_element(trainer))
    for size in INFERENCE_BATCH_SIZES[trainer.device.type]:
        named = select_settings(trainer, "arch", "batch_size", "precision", "compiled", "cuda_graph")
        yield BenchmarkCase(
            named | {"batch_size": size}, inference_workload(trainer, size), *cost, reports_latency=size == 1
        )


def conv_cases(trainer: Trainer, _: TrainStep | None) -> Iterator[BenchmarkCase]:
    """The network's convolutions one by one, in the run's precision: forward alone, and with both its gradients."""
    named = select_settings(trainer, "arch", "batch_size", "precision")
    for conv, calls in count_conv_calls(trainer.model).items():
        if conv.output_shape[1:] == (1, 1):  # of a squeeze: a matrix product of next to nothing
            continue
        of_images = conv.input_shape == (3, 32, 32)  # which have no gradient
        for direction, passes in (("forward", 1), ("forward_backward", 2 if of_images else 3)):
            yield BenchmarkCase(
                named | {"conv": str(conv), "calls": calls, "direction": direction},
                conv_workload(trainer, conv, passes),
                flop_per_image=2 * passes * conv.macs,
                bytes_per_image=passes
                * bytes_per_element(trainer)
                * (math.prod(conv.input_shape) + math.prod(conv.output_shape)),
                trial_s_factor=0.1,
            )


def replay_cases(trainer: Trainer, _: TrainStep | None) -> Iterator[BenchmarkCase]:
    """Several training steps a replay: what is left to gain by launching less often."""
    for count in STEPS_PER_REPLAY:
        named = select_settings(trainer, "arch", "batch_size", "precision", "compiled", "cuda_graph")
        yield BenchmarkCase(
            named | {"steps_per_replay": count},
            replay_workload(trainer, count),
            *training_cost_per_image(trainer),
            trial_s_factor=0.5,
        )


BENCHMARKS: dict[str, Callable[[Trainer, TrainStep | None], Iterator[BenchmarkCase]]] = {
    "loader": loader_cases,
    "step": step_cases,
    "train": train_cases,
    "infer": inference_cases,
    "conv": conv_cases,
    "replay": replay_cases,
}
STEP_BENCHMARKS = {"step", "train"}  # those that need the training step built


def select_settings(trainer: Trainer, *names: str) -> dict[str, Any]:
    """What a figure depends on, by name; `workers` only of a loader that has them."""
    recipe, choice = trainer.recipe, trainer.execution
    known = {
        **recipe.model_dump(include={"arch", "augment", "batch_size"}),
        "loader": choice.loader,
        "precision": choice.precision,
        "compiled": choice.compile,
        "cuda_graph": choice.cuda_graph,
        "data": trainer.data.source,
    }
    if "workers" in inspect.signature(LOADERS[choice.loader]).parameters:
        known["workers"] = recipe.workers
    return {name: known[name] for name in names if name in known}


def training_cost_per_image(trainer: Trainer) -> tuple[int, int]:
    """Operations and bytes of an image: backward costs twice forward, a multiply-accumulate is two operations."""
    return 6 * count_macs(trainer.model), feature_map_bytes_per_image(trainer.model, True, bytes_per_element(trainer))


def bytes_per_element(trainer: Trainer) -> int:
    """Bytes of an element of a feature map."""
    return DTYPES[trainer.execution.precision].itemsize


def loader_workload(trainer: Trainer) -> Workload:
    """The loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        for _images, labels in trainer.loader.batches(epoch):
            yield len(labels)


def step_workload(trainer: Trainer, step: TrainStep) -> Workload:
    """The step on the loader's first batch, at a learning rate of 0.

    The work is the same, and a network that learnt its one batch by heart would compute with other numbers in the last
    trial than in the first.
    """
    batch = [tensor.clone() for tensor in next(trainer.batches(0))]  # a loader may use its memory again
    trainer.optimizer.set_lr(0.0)
    for done in itertools.count(1):
        step(*batch)
        trainer.optimizer.after_step(done)
        yield len(batch[1])


def replay_workload(trainer: Trainer, steps_per_replay: int) -> Workload:
    """`count` steps a unit, on the loader's first batch, at a learning rate of 0."""
    block = trainer.build_step_block(steps_per_replay)
    batch = [tensor.clone() for tensor in next(trainer.batches(0))]
    trainer.optimizer.set_lr(0.0)
    for done in itertools.count(steps_per_replay, steps_per_replay):
        block(*batch * steps_per_replay)
        trainer.optimizer.after_step(done)
        yield len(batch[1]) * steps_per_replay


def train_workload(trainer: Trainer, step: TrainStep) -> Workload:
    """The loader's batches through the step, as the loop of `train` does it."""
    done = 0
    for epoch in itertools.count():
        for batch in trainer.batches(epoch):
            trainer.optimizer.set_lr(trainer.schedule.lr_at(done))
            step(*batch)
            done += 1
            trainer.optimizer.after_step(done)
            yield len(batch[1])


def inference_workload(trainer: Trainer, batch_size: int) -> Workload:
    """uint8 images to logits in evaluation mode, compiled and captured as the step would be."""
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8).to(trainer.device)
    images = images.contiguous(memory_format=torch.channels_last)
    forward: Forward = trainer.forward
    if trainer.execution.compile:
        forward = compilation.compile_function(forward, trainer.recipe.compile_mode)
    trainer.model.eval()
    try:
        with torch.no_grad():
            logits = forward(images)
            if trainer.execution.cuda_graph:
                forward = cuda_graphed_inference(forward, images, logits)
        while True:
            with torch.no_grad():  # not around the yield: it would reach whoever asks
                forward(images)
            yield batch_size
    finally:
        trainer.model.train()


def cuda_graphed_inference(forward: Forward, images: Tensor, logits: Tensor) -> Forward:
    """`forward` as one replay, into `logits`."""

    def write(images: Tensor) -> None:
        logits.copy_(forward(images))

    replay = cuda_graph.cuda_graphed(write, (images,), ())

    def run(images: Tensor) -> Tensor:
        replay(images)
        return logits

    return run


def conv_workload(trainer: Trainer, conv: ConvCall, passes: int) -> Workload:
    """One convolution on a batch of random feature maps: 1 pass is forward, 2 add the weight's gradient, 3 both."""
    size, dtype = trainer.recipe.batch_size, DTYPES[trainer.execution.precision]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=trainer.device).to(dtype).contiguous(memory_format=torch.channels_last)

    images, weight = random(size, *conv.input_shape), random(*conv.weight_shape)
    inputs = (weight, images)[: passes - 1]
    for tensor in inputs:
        tensor.requires_grad_()
    gradient = random(size, *conv.output_shape)
    while True:
        output = conv2d(images, weight, None, conv.stride, conv.padding, 1, conv.groups)
        if inputs:
            torch.autograd.grad(output, inputs, gradient)
        yield size
