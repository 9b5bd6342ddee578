"""Architectures, layers and fitted widths as plain documents (lists and dicts that JSON can hold).

Networks are built on the meta device: no memory is allocated and no random numbers are drawn. MACs are forward
multiply-accumulates of one 32x32 image.
"""

from __future__ import annotations

from typing import Any

from fastcifar.models import (
    MODELS,
    build_meta_model,
    count_macs,
    count_parameters,
    layer_table,
    max_width_within_budget,
    model_options,
)
from fastcifar.recipe import Recipe


def describe_architectures() -> list[dict[str, Any]]:
    """Every entry of `MODELS` in order, as built by default: `name`, `params`, `macs`."""
    documents = []
    for name in MODELS:
        model = build_meta_model(name)
        documents.append({"name": name, "params": count_parameters(model), "macs": count_macs(model)})
    return documents


def describe_layers(recipe: Recipe) -> dict[str, Any]:
    """The recipe's network: `name`, `params`, `macs`, and `layers` in forward order, as `layer_table` returns them.

    Raises `UsageError` where `build_model` does.
    """
    model = build_meta_model(recipe.arch, **model_options(recipe))
    return {
        "name": recipe.arch,
        "params": count_parameters(model),
        "macs": count_macs(model),
        "layers": layer_table(model),
    }


def fit_width_to_budget(recipe: Recipe, budget: int) -> dict[str, Any]:
    """The recipe's network at the largest width with at most `budget` trainable parameters.

    Returns `name`, `width` (a value of --width), `params`, `macs` and `budget`.
    Raises `UsageError` where `max_width_within_budget` does.
    """
    options = model_options(recipe)
    options["width"] = max_width_within_budget(recipe.arch, budget, **options)
    model = build_meta_model(recipe.arch, **options)
    return {
        "name": recipe.arch,
        "width": options["width"],
        "params": count_parameters(model),
        "macs": count_macs(model),
        "budget": budget,
    }
