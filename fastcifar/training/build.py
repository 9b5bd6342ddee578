"""Builds the `Trainer` of a recipe: data, loader, network, optimizer, schedule.

Every name and number of the recipe is checked here, before anything is written.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import nn

from fastcifar.data import cifar
from fastcifar.data.augment import CIFAR_IMAGE_SIZE, parse_augment, split_mixer
from fastcifar.data.cifar import Split
from fastcifar.data.loaders import LOADERS
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.device import ExecutionPlan, enable_deterministic_algorithms
from fastcifar.errors import DeviceError, UsageError, lookup
from fastcifar.models import (
    MODEL_OPTIONS,
    build_model,
    check_param_budget,
    count_macs,
    enable_fused_ops,
)
from fastcifar.recipe import Recipe, parse_image_sizes
from fastcifar.training import compilation
from fastcifar.training.build_data import build_loader, normalize_images, split_validation
from fastcifar.training.distributed import get_world
from fastcifar.training.ema import Ema
from fastcifar.training.evaluate import VIEWS
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.optimizers import OPTIMIZERS, OptimizerWrapper, build_grad_clipper
from fastcifar.training.rng_state import seed_all
from fastcifar.training.step import (
    Meter,
    build_forward,
)
from fastcifar.training.trainer import Trainer

NUM_WHITENING_IMAGES = 5000  # training images that a network may start from


def build_trainer(recipe: Recipe, execution: ExecutionPlan) -> Trainer:
    """The parts of a run by `recipe` on the device of `choice`.

    Errors: those of each room, before anything is written.
    """
    if recipe.deterministic:
        enable_deterministic_algorithms()
    else:
        torch.backends.cudnn.benchmark = True  # a run has few shapes, and each is met thousands of times
    device, here = torch.device(execution.device), get_world()
    if device.type == "cpu":
        compilation.keep_freed_memory()
    if execution.compile:
        compilation.enable_compile_cache()
    ops = parse_augment(recipe.augment)
    pixel_ops, mixer = split_mixer(ops)
    if mixer and recipe.batch_size < 2 * here.world_size:
        raise UsageError(
            f"--augment {mixer.name} mixes the images of a batch",
            f"use a --batch-size of {2 * here.world_size} or more",
        )
    lookup(VIEWS, recipe.tta, "test-time augmentation")
    lookup(LOADERS, execution.loader, "loader")
    mean, std = normalization_mean_std(recipe)
    with torch.device("meta"):  # refuse a wrong network before a download, not after it
        check_image_sizes(model_from_recipe(recipe, cifar.DATASETS[recipe.dataset].num_classes), recipe)
    data = cifar.load_dataset(recipe.data, recipe.dataset)
    seed_all(recipe.seed)  # the same weights on every rank
    model = to_channels_last(model_from_recipe(recipe, len(data.classes)), device)
    if not here.is_main_process:
        seed_all(recipe.seed + here.rank)  # but draws of its own
    optimizer = OptimizerWrapper(model, recipe)
    execution = resolve_cuda_graph(execution, recipe, optimizer)
    forward = build_forward(model, mean, std, execution.precision, device)
    train, val = split_validation(data.train, recipe.val_size, recipe.val_seed)
    started = time.perf_counter()
    loader = build_loader(train, pixel_ops, recipe, execution, here)
    init_whitening(model, train, recipe)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was sent is there
    prepare_s = time.perf_counter() - started
    return Trainer(
        recipe=recipe,
        execution=execution,
        augment_ops=ops,
        device=device,
        data=data,
        train_split=train,
        val_split=val,
        loader=loader,
        model=model,
        optimizer=optimizer,
        ema=Ema(model, recipe.ema_decay) if recipe.ema_decay else None,
        meter=Meter(device, here),
        forward=forward,
        eval_forward=forward,
        schedule=LRSchedule(recipe, loader.steps_per_epoch),
        clip_gradients=build_grad_clipper(recipe.clip_grad, optimizer.parameters),
        scaler=torch.amp.GradScaler(device.type, enabled=execution.precision == "fp16"),
        prepare_s=prepare_s,
    )


def check_image_sizes(model: nn.Module, recipe: Recipe) -> None:
    """Errors: `UsageError` where the network does not take images of each size of the recipe."""
    for size in {size for size, _ in parse_image_sizes(recipe.image_size)} - {CIFAR_IMAGE_SIZE}:
        try:
            count_macs(model, (3, size, size))
        except RuntimeError:
            raise UsageError(
                f"--image-size {recipe.image_size}: {recipe.arch} takes no images of {size}x{size}",
                "leave that size out",
            ) from None


def init_whitening(model: nn.Module, train: Split, recipe: Recipe) -> None:
    """Shows the first training images to a network that starts from them (it has `init_whitening`); to no other."""
    if initialize := getattr(model, "init_whitening", None):
        few = Split(train.images[:NUM_WHITENING_IMAGES], train.labels[:NUM_WHITENING_IMAGES])
        initialize(normalize_images(few, recipe, next(model.parameters()).device))


def resolve_cuda_graph(execution: ExecutionPlan, recipe: Recipe, optimizer: OptimizerWrapper) -> ExecutionPlan:
    """`choice` without a CUDA graph where the optimizer cannot be captured.

    Errors: `DeviceError` where the graph was asked for.
    """
    if optimizer.spec.capturable or not execution.cuda_graph:
        return execution
    reason = f"{optimizer.name} counts its steps in Python and cannot be captured"
    if recipe.cuda_graph:
        raise DeviceError(f"--cuda-graph: {reason}", f"leave it out, or choose from {', '.join(OPTIMIZERS)}")
    return replace(execution, cuda_graph=False, reasons={**execution.reasons, "cuda_graph": reason})


def model_from_recipe(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's network, freshly initialised. Errors: `UsageError`, also when it is over the budget."""
    model = build_model(recipe.arch, num_classes, **{knob: getattr(recipe, knob) for knob in MODEL_OPTIONS})
    check_param_budget(recipe.arch, model, recipe.max_params)
    if recipe.fused_ops:
        enable_fused_ops(model)
    return model


def to_channels_last(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on the device, its convolutions channels_last."""
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
