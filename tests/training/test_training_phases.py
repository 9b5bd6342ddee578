"""`--whiten-bias-epochs` and `--freeze-stem-epochs`: the epochs they apply to, what does not change, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcifar.benchmark.speedrun import count_flops
from fastcifar.errors import UsageError
from fastcifar.models import MODELS
from fastcifar.recipe import Recipe
from fastcifar.training import dry_run
from fastcifar.training.dry_run import StepTiming, fit_epochs_to_time_budget
from fastcifar.training.optimizers import OPTIMIZERS
from fastcifar.training.phases import Phase
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.faults.runs import assert_equal_runs
from tests.training.optimizer_helpers import make_trainer

MakeRecipe = Callable[..., Recipe]
AIRBENCH = {"arch": "speed94", "blocks": (1, 2), "channels": (8, 8), "lr": 0.01}
PHASES = {"epochs": 4, "image_size": "16:1,32", "whiten_bias_epochs": 2, "freeze_stem_epochs": 1}


def test_phase_of_each_epoch(tiny: MakeRecipe) -> None:
    assert resolve(tiny(**AIRBENCH, **PHASES)).phases == (
        Phase(16, True, True),
        Phase(32, True, True),
        Phase(32, False, True),
        Phase(32, False, False),
    )
    assert set(resolve(tiny(**AIRBENCH, whiten_bias_epochs=0)).phases) == {Phase(32, False, True)}
    assert set(resolve(tiny(**AIRBENCH)).phases) == {Phase(32, True, True)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"whiten_bias_epochs": 1}, "--whiten-bias-epochs 1: resnet has no parameter whiten.bias"),
        ({"whiten_bias_epochs": -1}, "--whiten-bias-epochs should be greater than or equal to 0"),
        ({"freeze_stem_epochs": 2}, "--freeze-stem-epochs 2 is not less than --epochs 2; use --freeze"),
        ({"freeze_stem_epochs": 1, "arch": "without_stem"}, "without_stem needs the names .*stem_layers: it has none"),
        ({"freeze_stem_epochs": 1, "arch": "wrong_stem"}, "stem_layers: there is no layer 'conv7'"),
        (
            {"freeze_stem_epochs": 1, "freeze": "residual_layers,linear"},
            "--freeze-stem-epochs leaves no parameter to train in",
        ),
    ],
)
def test_invalid_options_are_refused(
    tiny: MakeRecipe, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithoutStem(nn.Sequential):
        def __init__(self, num_classes: int = 10) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    class WrongStem(WithoutStem):
        stem_layers = ("0", "conv7")

    monkeypatch.setitem(MODELS, "without_stem", WithoutStem)
    monkeypatch.setitem(MODELS, "wrong_stem", WrongStem)
    own = {"blocks": None, "channels": None} if "arch" in values else {}
    with pytest.raises(UsageError, match=message):
        resolve(tiny(epochs=2, **own, **values))


@pytest.mark.parametrize(("epochs", "expected"), [(11, (3, 2)), (5, (2, 0)), (22, (6, 4)), (1, (1, 0))])
def test_other_numbers_of_epochs_scale_the_options(epochs: int, expected: tuple[int, int]) -> None:
    recipe = Recipe(arch="speed94", epochs=11, whiten_bias_epochs=3, freeze_stem_epochs=2)
    scaled = recipe.scale_to_epochs(epochs)
    assert (scaled.whiten_bias_epochs, scaled.freeze_stem_epochs) == expected
    for multiple in range(1, 30):  # no epoch is lost to rounding
        sizes = recipe.model_copy(update={"epochs": 41, "image_size": "16:11,24:7,32"}).scale_to_epochs(41 * multiple)
        assert sizes.image_size == f"16:{11 * multiple},24:{7 * multiple},32"
    unset = Recipe(epochs=11).scale_to_epochs(5)
    assert (unset.whiten_bias_epochs, unset.freeze_stem_epochs) == (None, 0)


def train_epoch(trainer: Trainer, epoch: int) -> dict[str, Tensor]:
    """Train for an epoch; return the state before it."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.progress.epoch, trainer.progress.epoch_step = epoch, 0
    trainer.model.train()
    for batch in trainer.batches(epoch):
        trainer.train_step(batch)
    return before


@pytest.mark.medium
@pytest.mark.parametrize("optimizer", ["lookahead:sgd", "lookahead:lion", *OPTIMIZERS])
def test_weights_change_only_in_the_phases_that_train_them(tiny: MakeRecipe, optimizer: str) -> None:
    """The statistics of the BatchNorm layers of the stem always change."""
    options = {"weight_decay": 0.01, "clip_grad": "norm:1.0", "ema_decay": 0.9, "batch_size": 48}
    trainer = make_trainer(tiny(**AIRBENCH, **PHASES, **options, optimizer=optimizer))
    trainer.optimize()
    for epoch, phase in enumerate(trainer.resolved.phases):
        before = train_epoch(trainer, epoch)
        for name, value in trainer.model.state_dict().items():
            is_trained = name != "whiten.weight" and not name.endswith("bn.weight")
            if name == "whiten.bias":
                is_trained = phase.trains_whiten_bias and phase.trains_stem
            elif name.startswith("groups.0.") and "running" not in name and "num_batches" not in name:
                is_trained &= phase.trains_stem
            assert torch.equal(value, before[name]) != is_trained, (epoch, name)
    assert all(parameter.requires_grad for parameter in trainer.optimizer.parameters)


@pytest.mark.parametrize("arch", ["se68", "coconut_se", "speednet", "speed94"])
def test_built_in_networks_name_their_stem(tiny: MakeRecipe, arch: str) -> None:
    recipe = tiny(arch=arch, blocks=None, channels=None, width=0.125, freeze_stem_epochs=1, max_steps=1, batch_size=8)
    trainer = make_trainer(recipe)
    before = train_epoch(trainer, recipe.epochs - 1)
    first, *_, last = (name for name, weight in trainer.model.named_parameters() if weight.requires_grad)
    assert torch.equal(trainer.model.state_dict()[first], before[first])
    assert not torch.equal(trainer.model.state_dict()[last], before[last])


@pytest.mark.slow
def test_compiled_steps_of_each_phase_equal_eager_ones(tiny: MakeRecipe) -> None:
    phases = {"epochs": 2, "freeze_stem_epochs": 1}
    eager, compiled = (make_trainer(tiny(**AIRBENCH, **phases, compile=flag)) for flag in (False, True))
    compiled.optimize()
    for epoch in range(2):
        train_epoch(eager, epoch)
        train_epoch(compiled, epoch)
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.medium
@pytest.mark.parametrize("max_steps", [7, 11, 16])
def test_resumed_run_is_bit_identical(tiny: MakeRecipe, tmp_path: Path, max_steps: int) -> None:
    """Of 4 epochs of 5 steps, the bias is trained for 2 and the stem for 3."""
    values = {**AIRBENCH, **PHASES, "ema_decay": 0.9, "optimizer": "lookahead:muon"}
    train(tiny(**values))
    train(tiny(**values, max_steps=max_steps, out=str(tmp_path / "again")))
    train(tiny(**values, out=str(tmp_path / "again"), resume="auto"))
    assert_equal_runs(tmp_path / "again", tmp_path / "run")


def test_phases_of_a_time_budget_that_were_not_compiled_are_added(
    tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half the epochs, the only epoch of 16 pixels is left out, and the bias is trained for one epoch."""
    trainer = make_trainer(tiny(**AIRBENCH, **{**PHASES, "whiten_bias_epochs": 1}, time_budget=1.0))
    assert Phase(32, True, True) not in trainer.resolved.phases
    steps = trainer.loader.steps_per_epoch
    monkeypatch.setattr(dry_run, "measure_step_timing", lambda trainer: StepTiming(25 / steps, 0.0))
    fit_epochs_to_time_budget(trainer, 0.0)
    assert trainer.resolved.phases == (Phase(32, True, True), Phase(32, False, True))
    train_epoch(trainer, 0)


def test_flops_leave_out_gradients_that_are_not_computed(tiny: MakeRecipe) -> None:
    """Without the bias, the first convolution computes no input gradient; with a frozen stem, the second does not."""
    options = {**AIRBENCH, "blocks": (1, 1), "channels": (4, 8), "image_size": "16"}
    whiten, first, second, linear = 15 * 15 * 24 * 12, 14 * 14 * 4 * 24 * 9, 6 * 6 * 8 * 4 * 9, 8 * 10
    per_epoch = [
        2 * (1 * whiten + 3 * first + 3 * second + 3 * linear),
        2 * (1 * whiten + 2 * first + 3 * second + 3 * linear),
        2 * (1 * whiten + 1 * first + 2 * second + 3 * linear),
    ]
    recipe = tiny(**options, epochs=3, whiten_bias_epochs=1, freeze_stem_epochs=1)
    assert count_flops(resolve(recipe), 10, num_images=30) == 10 * sum(per_epoch)
