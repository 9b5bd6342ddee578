"""Descriptions of architectures: documents that JSON can hold, computed without memory or random numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from fastcifar.cli.tables import architectures_table, layers_table, width_table
from fastcifar.errors import UsageError
from fastcifar.models import DESCRIPTIONS, MODELS, count_parameters
from fastcifar.models.describe import describe_architectures, describe_layers, fit_width_to_budget
from fastcifar.recipe import Recipe
from tests.models.networks import on_meta

SE68 = {"name": "se68", "params": 4_697_742, "macs": 798_690_304}


@pytest.mark.medium
def test_all_architectures_are_described_in_order() -> None:
    architectures = describe_architectures()
    assert [row["name"] for row in architectures] == list(MODELS)
    assert list(DESCRIPTIONS) == list(MODELS)
    assert {**SE68, "description": DESCRIPTIONS["se68"], "within_budget": True} in architectures
    assert [row["name"] for row in architectures if not row["within_budget"]] == ["coconut_over", "resnet18"]
    assert json.loads(json.dumps(architectures)) == architectures
    assert len(architectures) == len(MODELS)
    assert architectures_table(architectures)


def test_layers_are_those_of_the_recipe() -> None:
    default = describe_layers(Recipe())
    assert {name: default[name] for name in SE68} == SE68
    network = describe_layers(Recipe(width=0.5, se="none"))
    assert json.loads(json.dumps(network)) == network
    assert network["layers"][0]["output"] == [32, 32, 32]
    assert sum(row["params"] for row in network["layers"]) == network["params"]
    assert sum(row["macs"] for row in network["layers"]) == network["macs"]
    table = layers_table(network)
    assert len(table.rows) == len(network["layers"])
    assert table.title == f"se68: {network['params']:,} parameters, {network['macs'] / 1e6:,.2f} M MACs"


@pytest.mark.medium
def test_fitted_width_replaces_that_of_the_recipe_and_keeps_the_other_options() -> None:
    result = fit_width_to_budget(Recipe(width=3.0, blocks=(2, 2, 2)), 1_000_000)
    assert (result["name"], result["budget"]) == ("se68", 1_000_000)
    built = describe_layers(Recipe(width=result["width"], blocks=(2, 2, 2)))
    assert (result["params"], result["macs"]) == (built["params"], built["macs"])
    assert 900_000 < result["params"] <= 1_000_000
    assert len(width_table(result).rows) == 3
    assert result["width"] > fit_width_to_budget(Recipe(), 1_000_000)["width"]
    # The width is exactly 1 where only the published channels fit.
    assert fit_width_to_budget(Recipe(arch="se55"), 4_994_878)["width"] == 1.0
    assert fit_width_to_budget(Recipe(arch="se55"), 4_994_877)["width"] < 1.0


@pytest.mark.medium
@pytest.mark.parametrize("budget", [1_000_000, 5_000_000])
@pytest.mark.parametrize(
    ("arch", "channels"),
    [("se68", (64, 128, 256)), ("se55", (64, 128, 232, 268)), ("coconut_over", (32, 64, 128, 256))],
)
def test_largest_width_fits_and_the_next_setting_does_not(arch: str, channels: tuple[int, ...], budget: int) -> None:
    random = torch.get_rng_state()
    width = fit_width_to_budget(Recipe(arch=arch), budget)["width"]
    assert torch.equal(torch.get_rng_state(), random)
    assert count_parameters(on_meta(arch, width=width)) <= budget
    # The rounded channels change where c * width / 8 passes a half: the next such width builds the next network.
    following = min(8 * (k + 0.5) / c for c in channels for k in range(200) if 8 * (k + 0.5) / c > width)
    assert count_parameters(on_meta(arch, width=following * (1 + 1e-12))) > budget


def test_invalid_options_and_budgets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="speednet has no option --kernel"):
        describe_layers(Recipe(arch="speednet", kernel=3))
    with pytest.raises(UsageError, match="even the narrowest se68 has"):
        fit_width_to_budget(Recipe(), 1000)
    with pytest.raises(UsageError, match="--budget inf is not a number of parameters"):
        fit_width_to_budget(Recipe(), math.inf)
    monkeypatch.setitem(MODELS, "mine", lambda: nn.Linear(2, 2))
    with pytest.raises(UsageError, match="mine has no option --width"):
        fit_width_to_budget(Recipe(arch="mine"), 5_000_000)
