"""The networks by name: `MODELS`, `build`, and what a network costs.

An architecture is a row of `MODELS`: a function that takes `num_classes` and any of the knobs by keyword, and returns a
module from images [n, 3, 32, 32] to logits [n, num_classes]. Nothing here trains, moves or loads a network.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fastcifar.errors import UsageError, lookup
from fastcifar.format import option_flag
from fastcifar.models.airbench_net import airbench_net
from fastcifar.models.coconut import bottleneck_resnet
from fastcifar.models.count import count_macs, count_parameters, layer_table
from fastcifar.models.resnet import ACTIVATIONS, enable_fused_ops, se_resnet
from fastcifar.models.small_convnet import small_convnet
from fastcifar.recipe import section_fields

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "MODEL_OPTIONS",
    "build_model",
    "check_param_budget",
    "count_macs",
    "count_parameters",
    "enable_fused_ops",
    "layer_table",
    "max_width_within_budget",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    # Any SE-ResNet from the command line: --blocks, --channels, --se and so on.
    "resnet": se_resnet,
    "se68": partial(se_resnet, blocks=(4, 4, 3), channels=(64, 128, 256), se="stem"),
    "se55": partial(se_resnet, blocks=(2, 2, 2, 2), channels=(64, 128, 232, 268), se="stem"),
    "se68_block": partial(se_resnet, blocks=(4, 4, 3), channels=(64, 128, 256), se="block"),
    "se68_none": partial(se_resnet, blocks=(4, 4, 3), channels=(64, 128, 256), se="none"),
    "coconut_leaky": partial(bottleneck_resnet, blocks=(2, 4, 6, 2), leaky_stages=(3, 4)),
    "coconut_se": partial(bottleneck_resnet, blocks=(2, 4, 6, 2), se_stages=(3,)),
    "coconut_2452": partial(bottleneck_resnet, blocks=(2, 4, 5, 2), se_stages=(3, 4), leaky_stages=(3, 4)),
    "coconut_sep": partial(bottleneck_resnet, blocks=(3, 4, 6, 3), separable_stages=(3, 4)),
    # As its README describes it, which names no activation: over the budget.
    "coconut_over": partial(bottleneck_resnet, blocks=(2, 4, 6, 2), se_stages=(3, 4)),
    # The fourth source's README names five architectures, and of them 512 last channels, LeakyReLU and one dropout
    # layer; the exact widths are unknown. These four are our readings: ResNet-10, the standard shape that ends in 512
    # channels under five million; deeper with narrower stages; three stages, whose last maps are larger; and the first
    # with LeakyReLU and a dropout of a probability that is ours too.
    "res512a": partial(se_resnet, blocks=(1, 1, 1, 1), channels=(64, 128, 256, 512)),
    "res512b": partial(se_resnet, blocks=(2, 2, 2, 1), channels=(48, 96, 192, 512)),
    "res512c": partial(se_resnet, blocks=(4, 4, 1), channels=(64, 128, 512)),
    "res512d": partial(
        se_resnet,
        blocks=(1, 1, 1, 1),
        channels=(64, 128, 256, 512),
        activation="leaky_relu",
        dropout=0.2,
        dropout_at="head",
    ),
    # For short schedules: pools early, no shortcuts.
    "speednet": small_convnet,
    # For the shortest: a stem that whitens. Each the widest of its shape, or nearly, that the budget allows.
    "speed94": airbench_net,
    "speed95": partial(airbench_net, blocks=(3, 3, 3), channels=(112, 312, 312), residual=True),
    "speed96": partial(airbench_net, blocks=(3, 4, 4), channels=(128, 256, 256), residual=True),
    # The baseline, over the budget.
    "resnet18": partial(se_resnet, blocks=(2, 2, 2, 2), channels=(64, 128, 256, 512)),
}

# The knobs of an architecture that the command line has an option for; `build` takes whatever the row's function takes.
MODEL_OPTIONS = tuple(name for name in section_fields("network") if name not in ("arch", "max_params"))

# Where `largest_width` looks: at the lower end every sensible row is at its 8 channels a stage.
MIN_WIDTH, MAX_WIDTH = 2.0**-10, 64.0


def build_model(arch: str, num_classes: int = 10, **overrides: Any) -> nn.Module:
    """The network of the row `arch`, freshly initialised on the default device, in train mode.

    `knobs` that are None are the row's own. A row whose function takes no `num_classes` is called without it.
    Raises UsageError for an unknown name, for a knob the row's function does not take, and for values it refuses.
    """
    row = lookup(MODELS, arch, "architecture")
    given = {name: value for name, value in overrides.items() if value is not None}
    takes = inspect.signature(row).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    for name in given:
        if name not in takes and not takes_any:
            options = ", ".join(option_flag(knob) for knob in MODEL_OPTIONS if knob in takes)
            raise UsageError(f"architecture {arch} takes no {option_flag(name)}", f"it takes {options or 'no options'}")
    if "num_classes" in takes or takes_any:
        given["num_classes"] = num_classes
    return row(**given)


def check_param_budget(arch: str, model: nn.Module, max_params: int) -> None:
    """Raises UsageError if `model` has more than `max_params` trainable parameters; the message calls it `arch`."""
    count = count_parameters(model)
    if count > max_params:
        raise UsageError(
            f"{arch} has {count:,} parameters, {count - max_params:,} over the budget of {max_params:,}",
            f"choose a smaller network, or allow it with --max-params {count}",
        )


def max_width_within_budget(arch: str, max_params: int, **overrides: Any) -> float:
    """The largest `width` at which `arch`, built with the other `knobs`, has at most `budget` trainable parameters.

    The channels are rounded, so a range of widths builds the same network: of the widest that fits, this is the largest
    width that needs no more decimals than it must. Nothing is allocated (meta device) and no random number is drawn.
    Raises UsageError if the row takes no width, if even the narrowest network is over the budget, or if none is.
    """

    def count(width: float) -> int:
        with torch.device("meta"):
            return count_parameters(build_model(arch, **{**overrides, "width": width}))

    fits, over = MIN_WIDTH, 1.0
    if count(fits) > max_params:
        raise UsageError(
            f"even the narrowest {arch} has {count(fits):,} parameters, over the budget of {max_params:,}",
            f"take fewer blocks, or a budget of {count(fits)} or more",
        )
    # From exactly 1, where the channels are not rounded: it may fit where the widths on both sides of it do not.
    while count(over) <= max_params:
        fits, over = over, 2 * over
        if over > MAX_WIDTH:
            raise UsageError(f"{arch} fits {max_params:,} parameters at any width", "give a smaller budget")
    # Two neighbouring settings of multiples of 8 channels are further apart than this for any network of under 10,000.
    while over - fits > 1e-9:
        middle = (fits + over) / 2
        if count(middle) <= max_params:
            fits = middle
        else:
            over = middle
    return truncate_decimals(fits, lambda width: width > 0 and count(width) == count(fits))


def truncate_decimals(number: float, is_equivalent: Callable[[float], bool]) -> float:
    """`number` cut off after as few decimals as leave it the `same`."""
    for decimals in range(16):
        cut = math.floor(number * 10**decimals) / 10**decimals
        if is_equivalent(cut):
            return cut
    return number
