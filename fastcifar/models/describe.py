"""Architectures, layers and fitted widths for `fastcifar models`, computed on the meta device."""

import math
from typing import TypedDict

from torch import nn

from fastcifar.errors import UsageError
from fastcifar.models import DESCRIPTIONS, architecture_names, build_for_inspection, model_options
from fastcifar.models.count import LayerRow, count_macs, count_parameters, layer_table
from fastcifar.recipe import Recipe

# The range of the search for a width: at its lower end every stage has the minimum of 8 channels.
MIN_WIDTH, MAX_WIDTH = 2.0**-10, 64.0


class NetworkSize(TypedDict):
    """The number of trainable parameters of an architecture and its multiply-accumulates."""

    name: str
    params: int
    macs: int


class Architecture(NetworkSize):
    """An architecture, and whether it has at most the parameters that `--max-params` allows by default."""

    description: str
    within_budget: bool


class NetworkLayers(NetworkSize):
    """A network and its layers in forward order."""

    layers: list[LayerRow]


class FittedWidth(NetworkSize):
    """A network with the largest `width` at which it has at most `budget` trainable parameters."""

    width: float
    budget: int


def describe_architectures() -> list[Architecture]:
    """Return the size of every architecture with its default options, and its description."""
    budget = Recipe.model_fields["max_params"].default
    sizes = [_network_size(name, build_for_inspection(name)) for name in architecture_names()]
    return [
        {**size, "description": DESCRIPTIONS.get(size["name"], "-"), "within_budget": size["params"] <= budget}
        for size in sizes
    ]


def describe_layers(recipe: Recipe) -> NetworkLayers:
    """Return the size and the layers of the recipe's network."""
    model = build_for_inspection(recipe.arch, **model_options(recipe))
    return {**_network_size(recipe.arch, model), "layers": layer_table(model)}


def fit_width_to_budget(recipe: Recipe, budget: float) -> FittedWidth:
    """Return the recipe's network at the largest width with at most `budget` trainable parameters.

    Channels are rounded, so a range of widths gives the same network; the result is the width with the fewest decimals.
    """
    if not math.isfinite(budget):
        raise UsageError(f"--budget {budget} is not a number of parameters", "give one, such as 5e6")
    arch, options, budget = recipe.arch, model_options(recipe), math.floor(budget)

    def count(width: float) -> int:
        return count_parameters(build_for_inspection(arch, **{**options, "width": width}))

    low, high = MIN_WIDTH, 1.0  # `low` is within the budget, and after the first loop `high` is over it
    if count(low) > budget:
        problem = f"even the narrowest {arch} has {count(low):,} parameters, over the budget of {budget:,}"
        raise UsageError(problem, f"use fewer blocks, or a budget of at least {count(low)}")
    # Width 1 is tested itself: its channels are not rounded, so it may fit the budget although nearby widths do not.
    while count(high) <= budget:
        low, high = high, 2 * high
        if high > MAX_WIDTH:
            raise UsageError(f"{arch} has at most {budget:,} parameters at every width", "give a smaller budget")
    # Widths at which the rounded channels change differ by more than 1e-9 if no stage has 10,000 channels.
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    truncated = (math.floor(low * 10**decimals) / 10**decimals for decimals in range(16))
    width = next((width for width in truncated if width > 0 and count(width) == count(low)), low)
    model = build_for_inspection(arch, **{**options, "width": width})
    return {**_network_size(arch, model), "width": width, "budget": budget}


def _network_size(name: str, model: nn.Module) -> NetworkSize:
    return {"name": name, "params": count_parameters(model), "macs": count_macs(model)}
