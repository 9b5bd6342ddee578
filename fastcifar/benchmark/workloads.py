"""Workloads to be timed by `bench.py`: generators that run the code of `train` on a trainer of `build_trainer`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcifar.data.loaders import LOADERS, Loader
from fastcifar.models import use_winograd
from fastcifar.models.count import ConvCall, count_conv_calls, count_macs, feature_map_bytes_per_image
from fastcifar.reporting.benchmark_tables import BenchSettings
from fastcifar.training import compilation, cuda_graph
from fastcifar.training.evaluate import eval_mode
from fastcifar.training.lr_schedule import constant_lr
from fastcifar.training.step import DTYPES, Forward
from fastcifar.training.trainer import Trainer

Workload = Generator[int]  # performs one unit of work per `next` and yields its number of images

# batch sizes of the inference benchmark; batch size 1 measures latency
INFERENCE_BATCH_SIZES = {"cuda": (1, 256, 1024, 4096), "cpu": (1, 64, 256)}

STEPS_PER_REPLAY = (1, 2, 5, 10)
STEP_SETTINGS = ("arch", "batch_size", "precision", "compiled", "cuda_graph", "winograd")
LOADER_SETTINGS = ("loader", "augment", "workers", "data")


@dataclass(frozen=True)
class BenchmarkCase:
    """A workload and the settings that identify its row in the results."""

    settings: BenchSettings
    workload: Workload
    flop_per_image: int | None = None  # floating-point operations
    bytes_per_image: int | None = None  # read and written
    relative_trial_s: float = 1.0  # length of a trial relative to the default


def training_case(
    trainer: Trainer,
    what: str,
    names: Sequence[str],
    workload: Workload,
    steps_per_replay: int | None = None,
    relative_trial_s: float = 1.0,
) -> BenchmarkCase:
    """Return a case that runs training steps. The backward pass counts as two forward passes."""
    settings = select_settings(trainer, what, names, steps_per_replay=steps_per_replay)
    flop = 6 * count_macs(trainer.model)
    num_bytes = feature_map_bytes_per_image(trainer.model, True, bytes_per_element(trainer))
    return BenchmarkCase(settings, workload, flop, num_bytes, relative_trial_s)


def inference_cases(trainer: Trainer) -> Iterator[BenchmarkCase]:
    """Yield a case of the forward pass for each batch size of `INFERENCE_BATCH_SIZES`."""
    cost = 2 * count_macs(trainer.model), feature_map_bytes_per_image(trainer.model, False, bytes_per_element(trainer))
    for batch_size in INFERENCE_BATCH_SIZES[trainer.device.type]:
        settings = select_settings(trainer, "infer", STEP_SETTINGS, batch_size=batch_size)
        yield BenchmarkCase(settings, inference_workload(trainer, batch_size), *cost)


def conv_cases(trainer: Trainer) -> Iterator[BenchmarkCase]:
    """Yield two cases for each distinct convolution of the model: forward pass, and forward and backward pass."""
    for conv, calls in count_conv_calls(trainer.model).items():
        if conv.output_shape[1:] == (1, 1):  # a negligible matrix product in a squeeze-and-excitation block
            continue
        elements = math.prod(conv.input_shape) + math.prod(conv.output_shape)
        is_first_layer = conv.input_shape == (3, 32, 32)  # images have no gradient
        for direction, passes in (("forward", 1), ("forward_backward", 2 if is_first_layer else 3)):
            names = ("arch", "batch_size", "precision", "winograd")
            yield BenchmarkCase(
                select_settings(trainer, "conv", names, conv=str(conv), calls=calls, direction=direction),
                conv_workload(trainer, conv, passes),
                flop_per_image=2 * passes * conv.macs,
                bytes_per_image=passes * bytes_per_element(trainer) * elements,
                relative_trial_s=0.1,
            )


# name -> function that yields the cases of a benchmark
BENCHMARKS: dict[str, Callable[[Trainer], Iterable[BenchmarkCase]]] = {
    "loader": lambda trainer: [
        BenchmarkCase(
            select_settings(trainer, "loader", (*LOADER_SETTINGS, "batch_size", "compiled")),
            loader_workload(trainer.loader),
        )
    ],
    "step": lambda trainer: [training_case(trainer, "step", STEP_SETTINGS, step_workload(trainer))],
    "train": lambda trainer: [
        training_case(trainer, "train", (*STEP_SETTINGS, *LOADER_SETTINGS), train_workload(trainer))
    ],
    "infer": inference_cases,
    "conv": conv_cases,
    "replay": lambda trainer: [  # its rows differ by the cost of launching CUDA graph replays
        training_case(trainer, "replay", STEP_SETTINGS, replay_workload(trainer, count), count, relative_trial_s=0.5)
        for count in STEPS_PER_REPLAY
    ],
}
STEP_BENCHMARKS = {"step", "train"}  # benchmarks that need a training step


def select_settings(trainer: Trainer, what: str, names: Sequence[str], **others: Any) -> BenchSettings:
    """Return the settings of the benchmark `what`: those of the trainer in `names`, and `others`."""
    recipe, execution = trainer.recipe, trainer.execution
    values = {
        "arch": recipe.arch,
        "augment": recipe.augment,
        "batch_size": recipe.batch_size,
        "loader": execution.loader,
        "workers": recipe.workers if LOADERS[execution.loader].uses_workers else None,
        "precision": execution.precision,
        "compiled": execution.compile,
        "cuda_graph": execution.cuda_graph,
        "winograd": execution.winograd or None,  # documents without it are of direct convolutions
        "data": trainer.data.source,
    }
    return BenchSettings(what=what, **{name: values[name] for name in names} | others)


def bytes_per_element(trainer: Trainer) -> int:
    """Return the size of a feature map element in bytes."""
    return DTYPES[trainer.execution.precision].itemsize


def loader_workload(loader: Loader) -> Workload:
    """Load batches, epoch after epoch."""
    for epoch in itertools.count():
        for batch in loader.batches(epoch):
            yield len(batch[1])


def step_workload(trainer: Trainer) -> Workload:
    """Run the training step of `train` on the first batch of the loader, with a learning rate of 0.

    Otherwise the model would overfit this batch, and the values that it computes with would change from trial to trial.
    """
    batch = [tensor.clone() for tensor in next(trainer.batches(0))]  # a loader may reuse its memory
    schedule, trainer.schedule = trainer.schedule, constant_lr(trainer.recipe, 0.0)
    try:
        while True:
            trainer.train_step(batch)
            yield len(batch[1])
    finally:
        trainer.schedule = schedule


def replay_workload(trainer: Trainer, steps_per_replay: int) -> Workload:
    """Run blocks of `steps_per_replay` training steps on the first batch, with a learning rate of 0."""
    block = trainer.build_step_block(steps_per_replay)
    batch = [tensor.clone() for tensor in next(trainer.batches(0))]
    trainer.optimizer.set_lr(0.0)
    for step_count in itertools.count(steps_per_replay, steps_per_replay):
        block(*batch * steps_per_replay)
        trainer.optimizer.after_step(step_count, trainer.meter.found_inf)
        yield len(batch[1]) * steps_per_replay


def train_workload(trainer: Trainer) -> Workload:
    """Run the training step on the batches of the loader, as `train` does."""
    for epoch in itertools.count():
        for batch in trainer.batches(epoch):
            trainer.train_step(batch)
            yield len(batch[1])


def inference_workload(trainer: Trainer, batch_size: int) -> Workload:
    """Compute logits of random uint8 images in evaluation mode, with the execution options of the trainer."""
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8).to(trainer.device)
    images = images.contiguous(memory_format=torch.channels_last)
    forward: Forward = trainer.forward
    with eval_mode(trainer.model):
        with torch.no_grad():
            if trainer.execution.compile:
                forward = compilation.compile_function(forward, trainer.recipe.compile_mode)
                trainer.run_stage("compile", lambda: forward(images))
            if trainer.execution.cuda_graph:
                capture = partial(cuda_graph.cuda_graphed_forward, forward, images)
                forward = trainer.run_stage("cuda_graph", capture)
        while True:
            with torch.no_grad():  # not around the yield, where it would affect the caller
                forward(images)
            yield batch_size


def conv_workload(trainer: Trainer, conv: ConvCall, passes: int) -> Workload:
    """Run one convolution on a batch of random feature maps.

    With `passes` 1 it runs the forward pass, with 2 also the gradient of the weight, with 3 also that of the input.
    """
    batch_size, dtype = trainer.recipe.batch_size, DTYPES[trainer.execution.precision]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=trainer.device).to(dtype).contiguous(memory_format=torch.channels_last)

    layer = conv.build_layer().to(trainer.device, dtype)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    use_winograd(layer, trainer.execution.winograd)
    images = random(batch_size, *conv.input_shape)
    layer.weight.requires_grad_(passes >= 2)
    images.requires_grad_(passes == 3)
    inputs = (layer.weight, images)[: passes - 1]
    gradient = random(batch_size, *conv.output_shape)
    while True:
        output = layer(images)
        if inputs:
            torch.autograd.grad(output, inputs, gradient)
        yield batch_size
