"""Phases of a training run: consecutive epochs with the same image size and the same trained parameters.

The steps of a phase are compiled and captured together. `--image-size`, `--whiten-bias-epochs` and
`--freeze-stem-epochs` determine the phases.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from fastcifar.data.augment import CIFAR_IMAGE_SIZE
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe


class Phase(NamedTuple):
    """What is the same in all steps of a phase."""

    image_size: int = CIFAR_IMAGE_SIZE  # in pixels
    trains_whiten_bias: bool = True
    trains_stem: bool = True


DEFAULT_PHASE = Phase()


def list_phases(recipe: Recipe, image_sizes: Sequence[tuple[int, int | None]]) -> tuple[Phase, ...]:
    """Return the phase of each epoch. `image_sizes`: result of `parse_image_sizes`."""
    sizes = [size for size, epochs in image_sizes for _ in range(epochs or recipe.epochs)]
    whiten_bias_epochs = recipe.epochs if recipe.whiten_bias_epochs is None else recipe.whiten_bias_epochs
    stem_epochs = recipe.epochs - recipe.freeze_stem_epochs
    return tuple(Phase(sizes[epoch], epoch < whiten_bias_epochs, epoch < stem_epochs) for epoch in range(recipe.epochs))


def untrained_parameters(model: nn.Module, phase: Phase) -> list[nn.Parameter]:
    """Return the trainable parameters of `model` that `phase` does not train.

    The stem is the layers that the attribute `stem_layers` of the network names.
    """
    names = [] if phase.trains_whiten_bias else ["whiten.bias"]
    if not phase.trains_stem:
        names += [f"{layer}." for layer in getattr(model, "stem_layers", ())]
    named = model.named_parameters() if names else ()
    return [weight for name, weight in named if weight.requires_grad and name.startswith(tuple(names))]


def check_phases(model: nn.Module, recipe: Recipe, phases: Sequence[Phase]) -> None:
    """Raise `UsageError` if the network lacks what `--whiten-bias-epochs` or `--freeze-stem-epochs` freezes.

    Also if a phase trains no parameter.
    """
    modules, layers = dict(model.named_modules()), getattr(model, "stem_layers", ())
    if recipe.whiten_bias_epochs is not None and "whiten.bias" not in dict(model.named_parameters()):
        problem = f"--whiten-bias-epochs {recipe.whiten_bias_epochs}: {recipe.arch} has no parameter whiten.bias"
        raise UsageError(problem, "leave it out, or use --arch speed94")
    if recipe.freeze_stem_epochs and not (layers and set(layers) <= modules.keys()):
        option = f"--freeze-stem-epochs {recipe.freeze_stem_epochs}"
        missing = next((f"there is no layer {name!r}" for name in layers if name not in modules), "it has none")
        problem = f"{option}: {recipe.arch} needs the names of its first layers in an attribute stem_layers: {missing}"
        raise UsageError(problem, 'set it in the class, such as stem_layers = ("conv1", "bn1")')
    num_trainable = sum(weight.requires_grad for weight in model.parameters())
    for phase in {*phases} - {DEFAULT_PHASE}:
        if len(untrained_parameters(model, phase)) == num_trainable > 0:
            option = "--whiten-bias-epochs" if phase.trains_stem else "--freeze-stem-epochs"
            problem = f"with --freeze {recipe.freeze}, {option} leaves no parameter to train in some epochs"
            raise UsageError(problem, f"leave out {option}, or freeze fewer layers")


@contextmanager
def not_trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the `with` block, `parameters` require no gradient."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
