"""The table of architectures, `MODELS`, and the function that builds one, `build_model`.

An entry takes `num_classes` and some of `MODEL_OPTIONS` by keyword and returns a module: [n,3,32,32] -> [n,classes].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastcifar.errors import UsageError, lookup
from fastcifar.format import option_flag
from fastcifar.models.coconut import BottleneckResNet
from fastcifar.models.convnets import AirbenchNet, SmallConvNet
from fastcifar.models.count import count_macs, count_parameters
from fastcifar.models.resnet import SEResNet, enable_fused_ops
from fastcifar.recipe import Recipe, section_fields

__all__ = ["MODELS", "build_model", "check_param_budget", "count_macs", "count_parameters", "enable_fused_ops"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    # Any SE-ResNet from the command line: --blocks, --channels, --se and so on.
    "resnet": SEResNet,
    "se68": partial(SEResNet, blocks=(4, 4, 3), channels=(64, 128, 256), se="stem"),
    "se55": partial(SEResNet, blocks=(2, 2, 2, 2), channels=(64, 128, 232, 268), se="stem"),
    "se68_block": partial(SEResNet, blocks=(4, 4, 3), channels=(64, 128, 256), se="block"),
    "se68_none": partial(SEResNet, blocks=(4, 4, 3), channels=(64, 128, 256), se="none"),
    "coconut_leaky": partial(BottleneckResNet, blocks=(2, 4, 6, 2), leaky_stages=(3, 4)),
    "coconut_se": partial(BottleneckResNet, blocks=(2, 4, 6, 2), se_stages=(3,)),
    "coconut_2452": partial(BottleneckResNet, blocks=(2, 4, 5, 2), se_stages=(3, 4), leaky_stages=(3, 4)),
    "coconut_sep": partial(BottleneckResNet, blocks=(3, 4, 6, 3), separable_stages=(3, 4)),
    # Follows the README of its source, which names no activation. It exceeds the default parameter budget.
    "coconut_over": partial(BottleneckResNet, blocks=(2, 4, 6, 2), se_stages=(3, 4)),
    # Reconstructions within five million parameters: the README of the fourth source mentions 512 channels in the last
    # stage, LeakyReLU and one dropout layer, but not the exact widths or the probability.
    "res512a": partial(SEResNet, blocks=(1, 1, 1, 1), channels=(64, 128, 256, 512)),
    "res512b": partial(SEResNet, blocks=(2, 2, 2, 1), channels=(48, 96, 192, 512)),
    "res512c": partial(SEResNet, blocks=(4, 4, 1), channels=(64, 128, 512)),
    "res512d": partial(
        SEResNet,
        blocks=(1, 1, 1, 1),
        channels=(64, 128, 256, 512),
        activation="leaky_relu",
        dropout=0.2,
        dropout_at="head",
    ),
    # For short schedules: early pooling, no shortcuts.
    "speednet": SmallConvNet,
    # For the shortest schedules: a whitening stem. speed95 and speed96 nearly use up the default parameter budget.
    "speed94": AirbenchNet,
    "speed95": partial(AirbenchNet, blocks=(3, 3, 3), channels=(112, 312, 312), residual=True),
    "speed96": partial(AirbenchNet, blocks=(3, 4, 4), channels=(128, 256, 256), residual=True),
    # The baseline. It exceeds the default parameter budget.
    "resnet18": partial(SEResNet, blocks=(2, 2, 2, 2), channels=(64, 128, 256, 512)),
}

# name -> description in `fastcifar models`
DESCRIPTIONS = {
    "resnet": "an SE-ResNet from --blocks, --channels, --se and other options",
    "se68": "the default: 4, 4, 3 blocks, one SE layer after the stem",
    "se55": "four stages of two blocks, one SE layer after the stem",
    "se68_block": "se68 with an SE layer in every block",
    "se68_none": "se68 without SE",
    "coconut_leaky": "bottleneck blocks, LeakyReLU in stages 3 and 4",
    "coconut_se": "bottleneck blocks, SE in stage 3",
    "coconut_2452": "bottleneck blocks, SE and LeakyReLU in stages 3 and 4",
    "coconut_sep": "bottleneck blocks, separable convolutions in stages 3 and 4",
    "coconut_over": "bottleneck blocks, SE in stages 3 and 4",
    "res512a": "ResNet-10 with up to 512 channels",
    "res512b": "deeper and narrower than res512a",
    "res512c": "three stages, 512 channels in the last",
    "res512d": "res512a with LeakyReLU and dropout",
    "speednet": "early pooling, no shortcuts: for minutes on a CPU",
    "speed94": "whitening stem: for 94 % in the shortest time",
    "speed95": "whitening stem, wider: for 95 %",
    "speed96": "whitening stem, deeper: for 96 %",
    "resnet18": "the usual baseline",
}

# The options of a recipe that are keyword arguments of architectures; `build_model` accepts others too.
MODEL_OPTIONS = tuple(name for name in section_fields("network") if name not in ("arch", "max_params"))


def model_options(recipe: Recipe) -> dict[str, Any]:
    """Return the values of `MODEL_OPTIONS` in a recipe, as `build_model` takes them."""
    return {name: getattr(recipe, name) for name in MODEL_OPTIONS}


def build_model(arch: str, num_classes: int = 10, **overrides: Any) -> nn.Module:
    """Return the architecture `arch`, newly initialized on the default device, in training mode.

    `overrides` that are None leave the architecture's own values; `Recipe` checks the range of every number. An entry
    of `MODELS` without a `num_classes` parameter is called without it.
    """
    builder = lookup(MODELS, arch, "architecture")
    arguments = {name: value for name, value in overrides.items() if value is not None}
    parameters = inspect.signature(builder).parameters
    accepts_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not accepts_any:
            flags = ", ".join(option_flag(option) for option in MODEL_OPTIONS if option in parameters) or "none"
            raise UsageError(f"architecture {arch} has no option {option_flag(name)}", f"its options: {flags}")
    if "num_classes" in parameters or accepts_any:
        arguments["num_classes"] = num_classes
    return builder(**arguments)


def check_param_budget(arch: str, model: nn.Module, max_params: int) -> None:
    """Raise `UsageError` if `model` has more than `max_params` trainable parameters."""
    count = count_parameters(model)
    if count > max_params:
        problem = f"{arch} has {count:,} parameters, {count - max_params:,} over the budget of {max_params:,}"
        raise UsageError(problem, f"choose a smaller network, or allow it with --max-params {count}")
