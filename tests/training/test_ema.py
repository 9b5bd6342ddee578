"""The exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch

from fastcifar.training.ema import Ema
from tests.training.optimizer_helpers import network


def test_ema_equals_its_formula_and_is_used_only_inside_the_context() -> None:
    model = network()
    ema = Ema(model, decay=0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    for update in range(1, 31):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * update)
        ema.update()
        update_weight = max(0.1, 9 / (10 + update))
        for name, value in expected.items():
            value += update_weight * (model.state_dict()[name] - value)
    original = copy.deepcopy(model.state_dict())
    with ema.averaged_weights():
        for name, value in expected.items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    for name, value in original.items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(ema.state_dict(model)["1.num_batches_tracked"], original["1.num_batches_tracked"])
