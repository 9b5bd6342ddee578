"""Build the `Trainer` of a resolved recipe: data set, loader, network, optimizer, schedule."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from fastcifar.data import cifar
from fastcifar.data.cifar import Dataset, Split
from fastcifar.data.loaders import LOADERS, Loader
from fastcifar.data.normalization import mean_color
from fastcifar.data.splits import stratified_split
from fastcifar.errors import UsageError
from fastcifar.models import count_parameters, is_built_in
from fastcifar.recipe import default_val_size
from fastcifar.training import compilation
from fastcifar.training.distributed import World, get_world
from fastcifar.training.fine_tuning import LoadedInit, absolute_init_path, freeze, load_init, overlap_lines
from fastcifar.training.lr_schedule import LRSchedule
from fastcifar.training.optimizers import OptimizerWrapper, build_grad_clipper
from fastcifar.training.resolve import Resolved, check_network, model_from_recipe, resolve_for_data
from fastcifar.training.rng_state import seed_all
from fastcifar.training.step import Ema, Meter, build_forward, scale_and_shift
from fastcifar.training.trainer import Trainer

NUM_WHITENING_IMAGES = 5000  # training images from which a whitening layer is initialized


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def build_trainer(
    resolved: Resolved,
    data: Dataset | None = None,
    use_val_folder: bool = True,
    trainer_class: type[AnyTrainer] = Trainer,
) -> AnyTrainer:
    """Return the trainer of a resolved recipe. By default, `data` is the recipe's data set, downloaded if needed.

    Without `use_val_folder`, the data set's own validation split is ignored and `val_size` applies to all data sets.
    """
    recipe, execution, world = resolved.recipe, resolved.execution, get_world()
    device = torch.device(execution.device)
    compilation.use_deterministic_algorithms(recipe.deterministic)
    compilation.configure_process(execution)
    data = data or cifar.load_recipe_dataset(recipe)
    data = data if use_val_folder else replace(data, val=None)
    resolved = resolve_for_data(resolved, data)
    recipe = resolved.recipe
    model, num_params, init = _build_network(resolved, data.classes, device, world)
    optimizer = OptimizerWrapper(model, recipe, resolved.optimizer)
    forward = build_forward(model, resolved.mean, resolved.std, execution.precision, device)
    train_split, val_split = split_validation(data, recipe.val_size, recipe.val_seed)
    recorded = {
        "data": cifar.absolute_data_path(recipe.data),
        "init": absolute_init_path(recipe.init),
        "val_size": len(val_split.labels) if data.val is None else None,
    }
    recipe = recipe.model_copy(update=recorded)
    init = init._replace(lines=(*init.lines, *overlap_lines(resolved.initial, recipe, data)))
    resolved = replace(resolved, recipe=recipe, initial=None)  # frees their memory
    start_time = time.perf_counter()
    loader = build_loader(resolved, train_split, world)
    if (initialize := getattr(model, "init_whitening", None)) and not init.sha256:
        scale, shift = (tensor.to(device) for tensor in scale_and_shift(resolved.mean, resolved.std))
        initialize(torch.tensor(train_split.images[:NUM_WHITENING_IMAGES]).to(device) * scale + shift)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # wait for the uploads
    prepare_s = time.perf_counter() - start_time
    return trainer_class(
        resolved=resolved,
        device=device,
        data=data,
        train_split=train_split,
        val_split=val_split,
        loader=loader,
        model=model,
        optimizer=optimizer,
        ema=Ema(model, recipe.ema_decay) if recipe.ema_decay else None,
        meter=Meter(device, world),
        forward=forward,
        eval_forward=forward,
        schedule=LRSchedule(recipe, resolved.schedule, loader.steps_per_epoch),
        clip_gradients=build_grad_clipper(resolved.clip_grad, optimizer.parameters),
        scaler=torch.amp.GradScaler(device.type, enabled=execution.precision == "fp16"),
        build_loader=partial(build_loader, split=train_split, world=world),
        num_params=num_params,
        init=init,
        prepare_s=prepare_s,
    )


def _build_network(
    resolved: Resolved, classes: Sequence[str], device: torch.device, world: World
) -> tuple[nn.Module, int, LoadedInit]:
    """Return the network with `--init` and `--freeze`, and its number of parameters without `--freeze`."""
    recipe, num_classes = resolved.recipe, len(classes)
    if not is_built_in(recipe.arch):  # `resolve` does not know the number of classes
        check_network(recipe, resolved.phases, num_classes, resolved.initial)
    seed_all(recipe.seed)  # the same initial weights on every rank
    model = to_channels_last(model_from_recipe(recipe, num_classes), device)
    num_params = count_parameters(model)
    init = load_init(model, recipe, classes, resolved.initial)
    freeze(model, recipe)
    if not world.is_main_process:
        seed_all(recipe.seed + world.rank)  # and different random numbers on each rank afterwards
    return model, num_params, init


def to_channels_last(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` on the device, in channels_last memory format."""
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


def split_validation(data: Dataset, val_size: int | None, val_seed: int) -> tuple[Split, Split]:
    """Return the training images and the validation images: the data set's own, or `val_size` of `data.train`.

    The latter are stratified by class, and the same `val_seed` selects the same images. If `val_size` is None,
    `default_val_size` determines it. Raises `UsageError` if it is given and the data set has its own validation split.
    """
    train = data.train
    if data.val is not None:
        if val_size is not None:
            own = f"{data.source} has its own validation split of {len(data.val.labels):,} images"
            raise UsageError(f"--val-size {val_size}: {own}", "leave --val-size out")
        return train, data.val
    if val_size is None:
        val_size = default_val_size(len(train.labels))
    if val_size == 0:
        return train, Split(train.images[:0], train.labels[:0])
    indices = stratified_split(train.labels, val_size, val_seed)
    train_split, val_split = (Split(train.images[index], train.labels[index]) for index in indices)
    return train_split, val_split


def build_loader(resolved: Resolved, split: Split, world: World) -> Loader:
    """Return a loader of this rank's share of each batch of `split`."""
    recipe, execution = resolved.recipe, resolved.execution
    return LOADERS[execution.loader](
        split.images,
        split.labels,
        batch_size=recipe.batch_size,
        augment=resolved.augment_ops,
        seed=recipe.seed,
        device=torch.device(execution.device),
        fill_color=mean_color(resolved.mean),
        compile=execution.compile,
        workers=recipe.workers,
        drop_last=recipe.drop_last,
        rank=world.rank,
        world_size=world.world_size,
    )
