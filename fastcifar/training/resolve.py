"""Parse every option of a recipe and look up every name, for all commands, before any data is read or downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastcifar.data.augment import CIFAR_IMAGE_SIZE, AugmentOp, parse_augment, split_mixer
from fastcifar.data.cifar import DATASETS, Dataset
from fastcifar.data.loaders import LOADERS
from fastcifar.data.normalization import normalization_mean_std, with_own_normalization
from fastcifar.device import ExecutionPlan, choose_execution
from fastcifar.errors import UsageError, lookup
from fastcifar.models import (
    build_for_inspection,
    build_model,
    check_param_budget,
    count_macs,
    enable_fused_ops,
    has_fixed_classes,
    model_options,
)
from fastcifar.recipe import Recipe, parse_clip_grad, parse_image_sizes, section_fields
from fastcifar.training import checkpoint, fine_tuning, trackers
from fastcifar.training.distributed import get_world
from fastcifar.training.evaluate import VIEWS
from fastcifar.training.lr_schedule import ScheduleSpec, parse_schedule
from fastcifar.training.optimizers import (
    OptimizerSpec,
    OptimizerWrapper,
    build_param_groups,
    parse_optimizer,
)
from fastcifar.training.phases import Phase, check_phases, list_phases
from fastcifar.training.rng_state import preserve_state

# The options on which `check_network` and `check_optimizer` depend. Any positive learning rate and any weight decay are
# valid for an optimizer that has it, so these are left out.
NETWORK_CHECK_OPTIONS = {*section_fields("network"), "dataset", "fused_ops", "image_size", "head_lr_mult"}
NETWORK_CHECK_OPTIONS |= {"hard_example_fraction", "hard_example_size"}
NETWORK_CHECK_OPTIONS |= {"init", "freeze", "whiten_bias_epochs", "freeze_stem_epochs"}
OPTIMIZER_CHECK_OPTIONS = {"optimizer", "optimizer_arg", "bias_lr_mult", "head_lr_mult", "bias_decay"}


@dataclass(frozen=True)
class Resolved:
    """The parsed form of a recipe."""

    recipe: Recipe
    execution: ExecutionPlan
    pixel_ops: tuple[AugmentOp, ...]  # applied by the loader
    mixer: AugmentOp | None  # applied by the training step
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    phases: tuple[Phase, ...]  # of each epoch
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    clip_grad: tuple[str, float] | None
    trackers: tuple[str, ...]
    is_resumed: bool = False  # the initial weights are those of a checkpoint of the run, whatever `--init` is
    initial: fine_tuning.InitialWeights | None = field(default=None, repr=False, compare=False)  # of `--init`

    @property
    def augment_ops(self) -> tuple[AugmentOp, ...]:
        return (*self.pixel_ops, *([self.mixer] if self.mixer else []))


def resolve(
    recipe: Recipe, execution: ExecutionPlan | None = None, checked: set[str] | None = None, is_resumed: bool = False
) -> Resolved:
    """Parse the options of `recipe`; nothing is written or read, except `--init`. The random state is left as it is.

    `execution` is `choose_execution(recipe)` by default. `checked`: the options of networks and optimizers that earlier
    calls have built, to which this call adds; they are not built again. Raises `UsageError` for invalid options or a
    network with more than `max_params` parameters, and `DeviceError` for options that this machine does not support.
    """
    execution = execution or choose_execution(recipe)
    pixel_ops, mixer = split_mixer(parse_augment(recipe.augment))
    world_size = get_world().world_size
    if mixer and recipe.batch_size < 2 * world_size:
        problem = f"--augment {mixer.name} mixes the images of a batch"
        raise UsageError(problem, f"use a --batch-size of {2 * world_size} or more")
    lookup(VIEWS, recipe.tta, "test-time augmentation")
    lookup(LOADERS, execution.loader, "loader")
    mean, std = normalization_mean_std(recipe)
    optimizer = parse_optimizer(recipe)
    phases = list_phases(recipe, parse_image_sizes(recipe.image_size))
    checked, num_classes = set() if checked is None else checked, DATASETS[recipe.dataset].num_classes
    initial = None
    if (key := recipe.model_dump_json(include=NETWORK_CHECK_OPTIONS)) not in checked:
        initial = None if is_resumed else fine_tuning.read_initial_weights(recipe)
        if not has_fixed_classes(recipe.arch):  # otherwise the data set must be known
            check_network(recipe, phases, num_classes, initial)
            checked.add(key)
    if (key := recipe.model_dump_json(include=OPTIMIZER_CHECK_OPTIONS)) not in checked:
        check_optimizer(recipe, optimizer)
        checked.add(key)
    return Resolved(
        recipe=recipe,
        execution=explain_cuda_graph(execution, optimizer),
        pixel_ops=pixel_ops,
        mixer=mixer,
        mean=mean,
        std=std,
        phases=phases,
        optimizer=optimizer,
        schedule=parse_schedule(recipe),
        clip_grad=parse_clip_grad(recipe.clip_grad),
        trackers=tuple(trackers.parse_tracker_names(recipe.track)),
        is_resumed=is_resumed,
        initial=initial,
    )


def resolve_for_data(resolved: Resolved, data: Dataset) -> Resolved:
    """Return `resolved` with the normalization that `auto` is, whose values its recipe then records.

    It is that of the weights of `--init`, else that of own images. A resumed run keeps its normalization, also if an
    earlier version trained it with that of CIFAR. Raises `DataError` without training images.
    """
    data.require_training_images()
    if resolved.is_resumed:
        return resolved
    recipe = with_own_normalization(fine_tuning.with_initial_normalization(resolved.recipe, resolved.initial), data)
    mean, std = normalization_mean_std(recipe)
    return replace(resolved, recipe=recipe, mean=mean, std=std)


def check_network(
    recipe: Recipe, phases: Sequence[Phase], num_classes: int, initial: fine_tuning.InitialWeights | None
) -> None:
    """Raise `UsageError` if the network cannot be built, is too large or refuses an image size or `num_classes`.

    The options that freeze layers are checked too. Raises `CheckpointError` if the weights `initial` do not fit.
    """
    model = model_from_recipe(recipe, num_classes, for_inspection=True)
    sizes = {phase.image_size: f"--image-size {recipe.image_size}" for phase in phases}
    if recipe.hard_example_fraction < 1:
        sizes.setdefault(recipe.hard_example_size, f"--hard-example-size {recipe.hard_example_size}")
    for size in sizes.keys() - {CIFAR_IMAGE_SIZE}:
        try:
            count_macs(model, (3, size, size))
        except Exception:
            problem = f"{sizes[size]}: {recipe.arch} does not accept images of {size}x{size}"
            raise UsageError(problem, "choose another size") from None
    if initial:
        initial.check_fit(model, recipe, fine_tuning.find_head(recipe, model, num_classes))
    fine_tuning.freeze(model, recipe)
    check_phases(model, recipe, phases)
    if not build_param_groups(model, recipe):
        raise UsageError(f"architecture {recipe.arch} has no trainable parameters", "choose another network")


def check_optimizer(recipe: Recipe, optimizer: OptimizerSpec) -> None:
    """Raise `UsageError` if the optimizer cannot train a small network."""
    with preserve_state([], torch.device("cpu")):  # initializing the network draws random numbers
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))  # parameters with 1, 2 and 4 dimensions
        OptimizerWrapper(nn.Sequential(*layers).to(memory_format=torch.channels_last), recipe, optimizer)  # type: ignore[call-overload]


def model_from_recipe(recipe: Recipe, num_classes: int, for_inspection: bool = False) -> nn.Module:
    """Return the network of a recipe, or the result of `build_for_inspection`."""
    build = build_for_inspection if for_inspection else build_model
    model = build(recipe.arch, num_classes, **model_options(recipe))
    check_param_budget(recipe.arch, model, recipe.max_params)
    if recipe.fused_ops:
        enable_fused_ops(model)
    return model


def require_fitting_network(recipe: Recipe, weights: dict[str, Tensor], num_classes: int, source: object) -> None:
    """Check that `weights`, of a checkpoint called `source`, fit the network of `recipe` before it is allocated.

    Raises `CheckpointError`, or `UsageError` if the network has more than `max_params` parameters.
    """
    checkpoint.check_weights(model_from_recipe(recipe, num_classes, for_inspection=True), weights, source)


def any_machine(recipe: Recipe) -> ExecutionPlan:
    """Return an execution plan for `resolve` that any machine supports, to resolve a recipe for another machine."""
    return ExecutionPlan("cpu", "fp32", "tensor" if recipe.loader == "auto" else recipe.loader, False, False)


def explain_cuda_graph(execution: ExecutionPlan, optimizer: OptimizerSpec) -> ExecutionPlan:
    """Return `execution`, which states whether the CUDA graph contains only a part of the training step."""
    if optimizer.capturable or not execution.cuda_graph:
        return execution
    reason = f"forward and backward pass; {optimizer.name} counts its steps in Python and updates outside the graph"
    return replace(execution, reasons={**execution.reasons, "cuda_graph": reason})
