"""Descriptions of architectures: documents that JSON can hold, computed without memory or random numbers."""

from __future__ import annotations

import json

import pytest
import torch

from fastcifar.cli.tables import architectures_table, layers_table, width_table
from fastcifar.errors import UsageError
from fastcifar.models import MODELS
from fastcifar.models.describe import describe_architectures, describe_layers, fit_width_to_budget
from fastcifar.recipe import Recipe

SE68 = {"name": "se68", "params": 4_697_742, "macs": 798_690_304}


def test_all_architectures_are_described_in_order() -> None:
    architectures = describe_architectures()
    assert [row["name"] for row in architectures] == list(MODELS)
    assert SE68 in architectures
    assert json.loads(json.dumps(architectures)) == architectures
    assert architectures_table(architectures).row_count == len(MODELS)


def test_layers_are_those_of_the_recipe() -> None:
    default = describe_layers(Recipe())
    assert {name: default[name] for name in SE68} == SE68
    network = describe_layers(Recipe(width=0.5, se="none"))
    assert json.loads(json.dumps(network)) == network
    assert network["layers"][0]["output"] == [32, 32, 32]
    assert sum(row["params"] for row in network["layers"]) == network["params"]
    assert sum(row["macs"] for row in network["layers"]) == network["macs"]
    table = layers_table(network)
    assert table.row_count == len(network["layers"])
    assert table.title == f"se68: {network['params']:,} parameters, {network['macs'] / 1e6:,.2f} M MACs"


def test_fitted_width_replaces_that_of_the_recipe_and_keeps_the_other_options() -> None:
    state = torch.get_rng_state()
    result = fit_width_to_budget(Recipe(width=3.0, blocks=(2, 2, 2)), 1_000_000)
    assert torch.equal(torch.get_rng_state(), state)
    assert (result["name"], result["budget"]) == ("se68", 1_000_000)
    built = describe_layers(Recipe(width=result["width"], blocks=(2, 2, 2)))
    assert (result["params"], result["macs"]) == (built["params"], built["macs"])
    assert 900_000 < result["params"] <= 1_000_000
    assert width_table(result).row_count == 3


def test_invalid_options_and_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="speednet has no option --kernel"):
        describe_layers(Recipe(arch="speednet", kernel=3))
    with pytest.raises(UsageError, match="even the narrowest se68"):
        fit_width_to_budget(Recipe(), 10)
