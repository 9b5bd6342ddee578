"""Fine-tuning: what `--init` loads and refuses, and that what `--freeze` selects does not change."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastcifar.data.cifar import DATASETS, load_dataset
from fastcifar.data.cifar_files import split_digest
from fastcifar.errors import CheckpointError, UsageError
from fastcifar.models import MODELS, build_model, enable_fused_ops
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.build import build_trainer
from fastcifar.training.checkpoint_reader import safetensors_metadata
from fastcifar.training.evaluate import eval_mode
from fastcifar.training.fine_tuning import find_head, freeze, read_initial_weights
from fastcifar.training.optimizers import OPTIMIZERS
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer
from tests.data.image_folders import write_noise
from tests.faults.runs import assert_equal_runs, last
from tests.models.networks import on_meta
from tests.training.optimizer_helpers import make_trainer

MakeRecipe = Callable[..., Recipe]
HEAD = {"linear.weight", "linear.bias"}


@pytest.fixture
def source(tiny: MakeRecipe, tmp_path: Path) -> Path:
    """Return the checkpoint of a run of another seed, as initialized."""
    path = tmp_path / "source" / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    checkpoint.save_checkpoint(path, make_trainer(tiny(seed=5, ema_decay=0.9)).state_dict())
    return path


def copied_state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal_names(state: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    """Return the names of the floating-point tensors that are equal; all shapes of equal names must be, too."""
    return {name for name, value in state.items() if value.is_floating_point() and torch.equal(value, expected[name])}


def write_source(path: Path, kind: str) -> Path:
    """Write the weights of the checkpoint `path` in another format."""
    state = checkpoint.read_checkpoint(path)
    wrapped = {f"module.{name}": value for name, value in state["model"].items()}
    if kind == "run folder":
        return path.parent.parent
    contiguous = {name: value.contiguous() for name, value in state["model"].items()}
    if kind == "safetensors":
        metadata = safetensors_metadata(state["recipe"], state["classes"], state.get("data_digest"))
        safetensors.torch.save_file(contiguous, file := path.parents[2].joinpath("weights.safetensors"), metadata)
    elif kind == "safetensors without metadata":
        safetensors.torch.save_file(contiguous, file := path.parents[2].joinpath("other.safetensors"))
    else:
        torch.save({"net": wrapped} if kind == "net" else wrapped, file := path.parents[2].joinpath("other.pth"))
    return file


@pytest.mark.parametrize(
    "kind", ["checkpoint", "run folder", "safetensors", "safetensors without metadata", "net", "state dict"]
)
def test_all_weights_for_the_same_classes_are_loaded_from_every_format(
    tiny: MakeRecipe, source: Path, kind: str
) -> None:
    weights = checkpoint.read_checkpoint(source)["model"]
    init = source if kind == "checkpoint" else write_source(source, kind)
    trainer = make_trainer(tiny(init=str(init)))
    assert equal_names(trainer.model.state_dict(), weights) == equal_names(weights, weights)
    assert trainer.init.sha256 == checkpoint.state_dict_sha256(dict(sorted(weights.items())))
    (line,) = trainer.init.lines
    assert line.startswith("init: 38 of 38 tensors from ")


@pytest.mark.parametrize("kind", ["checkpoint", "state dict"])
def test_other_number_of_classes_gets_a_head_of_the_seed(tiny: MakeRecipe, source: Path, kind: str) -> None:
    weights = checkpoint.read_checkpoint(source)["model"]
    init = source if kind == "checkpoint" else write_source(source, kind)
    values = {"dataset": "cifar100", "data": "synthetic:300", "val_size": 100}
    fine_tuned, random = make_trainer(tiny(init=str(init), **values)), make_trainer(tiny(**values))
    state = fine_tuned.model.state_dict()
    body = equal_names(weights, weights) - HEAD
    assert equal_names({name: state[name] for name in body}, weights) == body
    assert equal_names({name: state[name] for name in HEAD}, random.model.state_dict()) == HEAD
    assert "init: 36 of 38 tensors" in fine_tuned.init.lines[0]
    assert "new head: linear.weight, linear.bias" in fine_tuned.init.lines[1]


def test_other_classes_of_the_same_number_get_a_new_head(tiny: MakeRecipe, source: Path, tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    data = write_noise(tmp_path / "images", names, {"train": 4, "test": 1})
    values: dict[str, Any] = {"data": str(data), "val_size": 10, "batch_size": 10}
    fine_tuned = make_trainer(tiny(init=str(source), **values))
    state, random = fine_tuned.model.state_dict(), make_trainer(tiny(**values)).model.state_dict()
    assert {name for name in HEAD if torch.equal(state[name], random[name])} == HEAD
    assert torch.equal(state["conv1.weight"], checkpoint.read_checkpoint(source)["model"]["conv1.weight"])
    assert "10 other classes" in fine_tuned.init.lines[1]
    # the normalization is that of the initial weights, not that of the images
    assert fine_tuned.resolved.mean == (0.49139968, 0.48215841, 0.44653091)
    assert make_trainer(tiny(init=str(source), normalize="cifar100", **values)).resolved.mean[0] == 0.50707516


@pytest.mark.parametrize("kind", ["run folder", "safetensors"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),  # the same images
        ({"val_size": 20}, None),  # some of them
        ({"val_size": 0}, None),
        ({"dataset": "cifar100"}, None),  # other images
        ({"val_size": 60}, r"20 of the 60 validation images, so val_acc is too high; --val-size 40 "),
        ({"val_seed": 1}, r"(2\d|3\d) of the 40 validation images, "),
    ],
)
def test_validation_images_that_the_initial_weights_were_trained_on_are_counted(
    tiny: MakeRecipe, source: Path, kind: str, changes: dict[str, Any], expected: str | None
) -> None:
    _, *others = make_trainer(tiny(init=str(write_source(source, kind)), **changes)).init.lines
    lines = [line for line in others if "validation" in line]
    assert bool(lines) == bool(expected)
    assert not expected or re.search(f"the initial weights were trained on {expected}", lines[0])


def test_pretrained_weights_were_trained_on_all_images_of_cifar10(
    tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset("synthetic:200")
    recipe = tiny(arch="speed94", blocks=None, channels=None, init="pretrained:speed94", val_size=10)
    assert len(build_trainer(resolve(recipe), data).init.lines) == 1
    monkeypatch.setitem(DATASETS["cifar10"].split_digests, "train", split_digest(data.train))
    lines = build_trainer(resolve(recipe), data).init.lines
    assert lines[1:] == ("the initial weights were trained on 10 of the 10 validation images, so val_acc is too high",)


@pytest.mark.parametrize("eval_weights", ["last", "best", "ema"])
def test_weights_are_those_that_the_run_evaluated(tiny: MakeRecipe, source: Path, eval_weights: str) -> None:
    state = checkpoint.read_checkpoint(source)
    state["recipe"]["eval_weights"] = eval_weights
    state["ema"] = {name: value + 1 for name, value in state["model"].items()}
    best = {**state, "model": {name: value + 2 for name, value in state["model"].items()}}
    for name, content in (("last", state), ("best", best)):
        checkpoint.save_checkpoint(source.with_name(f"{name}.pt"), content)
    expected = {"last": state["model"], "best": best["model"], "ema": state["ema"]}[eval_weights]
    initial = read_initial_weights(tiny(init=str(source.parent.parent)))
    assert initial
    assert initial.path.name == ("best.pt" if eval_weights == "best" else "last.pt")
    assert equal_names(initial.weights, expected) == equal_names(expected, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"se": "block"},
            r"last\.pt does not fit --arch resnet: it lacks .*seblock.*and 5 more; use only --arch",
        ),
        (
            {"channels": (8, 32)},
            r"has other shapes for residual_layers\.1\..*; use only --arch resnet --blocks 1,1 --channels 8,16$",
        ),
        (
            {"arch": "speednet", "blocks": None, "channels": None, "width": 0.25},
            r"--arch speednet: it lacks .*, has unexpected .*; use only --arch resnet",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(
    tiny: MakeRecipe, source: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(tiny(init=str(source), **changes))


def test_missing_invalid_and_non_finite_files_are_refused(tiny: MakeRecipe, source: Path, tmp_path: Path) -> None:
    state = checkpoint.read_checkpoint(source)["model"]
    text, infinite = tmp_path / "text.pt", tmp_path / "infinite.pt"
    text.write_text("no checkpoint")
    torch.save({**state, "conv1.weight": state["conv1.weight"] / 0}, infinite)
    for init, message in {
        str(tmp_path / "none.pt"): "does not exist",
        str(tmp_path): "does not exist",
        str(text): "is not a checkpoint",
        str(infinite): "contains NaN or infinity",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            resolve(tiny(init=init))


@pytest.mark.parametrize("arch", ["resnet", "se68_block", "coconut_sep", "speednet", "speed95"])
def test_head_is_the_last_linear_layer(arch: str) -> None:
    options: dict[str, Any] = {"blocks": (1, 1), "channels": (8, 16)} if arch == "resnet" else {}
    model, recipe = on_meta(arch, **options), Recipe(arch=arch, max_params=10**8, **options)
    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    assert set(find_head(recipe, model, 10)) == {key for key in model.state_dict() if key.startswith(f"{name}.")}


def test_whitening_filters_are_those_of_the_initial_weights(tiny: MakeRecipe, tmp_path: Path) -> None:
    values: dict[str, Any] = {"arch": "speed94", "blocks": None, "channels": None, "width": 0.125}
    first = make_trainer(tiny(**values, data="synthetic:400"))
    checkpoint.save_checkpoint(tmp_path / "first.pt", first.state_dict())
    second = make_trainer(tiny(**values, init=str(tmp_path / "first.pt")))
    assert torch.equal(first.model.state_dict()["whiten.weight"], second.model.state_dict()["whiten.weight"])
    assert not torch.equal(
        first.model.state_dict()["whiten.weight"], make_trainer(tiny(**values)).model.state_dict()["whiten.weight"]
    )


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ("conv1,bn1,residual_layers", {"linear.weight", "linear.bias"}),
        ("[!l]*", {"linear.weight", "linear.bias"}),
        ("*.weight, conv1", {"linear.bias", "bn1.bias"}),
    ],
)
def test_patterns_select_layers_with_all_their_parts_and_parameters(patterns: str, trained: set[str]) -> None:
    recipe = Recipe(arch="resnet", blocks=(1, 1), channels=(8, 16), freeze=patterns.replace(" ", ""))
    model = build_model("resnet", blocks=(1, 1), channels=(8, 16))
    freeze(model, recipe)
    left = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained <= left
    if "*.weight" in patterns:
        assert {name.rpartition(".")[2] for name in left} == {"bias"}
        assert all(module.train().training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    else:
        assert left == trained


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("con1", r"--freeze con1 matches no layer with parameters of resnet; did you mean .*conv1"),
        ("conv1,stem", r"--freeze stem matches no layer .*; choose from conv1, bn1, residual_layers, linear and their"),
        ("activation", "matches no layer with parameters"),
        (
            "*",
            r"--freeze \* leaves no parameter of resnet to train; do not freeze its last layer, linear$",
        ),
    ],
)
def test_patterns_that_match_nothing_or_all_are_refused(tiny: MakeRecipe, patterns: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(tiny(freeze=patterns))


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", *OPTIMIZERS])
def test_frozen_weights_and_statistics_do_not_change(tiny: MakeRecipe, source: Path, optimizer: str) -> None:
    frozen = "conv1,bn1,residual_layers.0,residual_layers.1.0.bn2"
    recipe = tiny(
        optimizer=optimizer, lr=0.01, init=str(source), freeze=frozen, ema_decay=0.9, weight_decay=0.01,
        clip_grad="norm:1.0", bias_lr_mult=2.0, epochs=1,
    )  # fmt: skip
    trainer = make_trainer(recipe)
    before = copied_state(trainer)
    trainer.optimize()
    trainer.model.train()
    for batch in trainer.batches(0):
        trainer.train_step(batch)
    trainer.validate()
    trainer.model.train()
    trainer.train_step(next(iter(trainer.batches(1))))
    state, num_frozen = trainer.model.state_dict(), 0
    assert trainer.ema
    for name, value in state.items():
        is_frozen = any(name.startswith(f"{layer}.") for layer in frozen.split(","))
        num_frozen += is_frozen
        assert torch.equal(value, before[name]) == is_frozen, name
        if is_frozen and value.is_floating_point():
            assert torch.equal(trainer.ema.average[name], value), name
    assert num_frozen == 23  # a convolution each, and five tensors of each BatchNorm
    trained = {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
    assert {id(weight) for group in trainer.optimizer.inner.param_groups for weight in group["params"]} == trained


def test_frozen_batch_norm_stays_in_evaluation_mode() -> None:
    model = build_model("resnet", blocks=(1, 1), channels=(8, 16))
    freeze(model, Recipe(arch="resnet", blocks=(1, 1), channels=(8, 16), freeze="bn1,residual_layers.0.0.bn2.*"))
    with eval_mode(model.train()):
        assert not any(module.training for module in model.modules())
    for network in (model, copy.deepcopy(model).train()):
        in_eval = {name for name, module in network.named_modules() if not module.training}
        assert in_eval == {"bn1", "residual_layers.0.0.bn2"}


@pytest.mark.parametrize("patterns", ["none", "bn1", "residual_layers.0", "residual_layers.0.0.bn1,residual_layers.1"])
def test_fused_operators_use_the_running_statistics_of_frozen_layers(patterns: str) -> None:
    recipe = Recipe(arch="resnet", blocks=(1, 1), channels=(8, 16), se="block", freeze=patterns)
    outputs, states = [], []
    for fused in (False, True):
        torch.manual_seed(0)
        model = build_model("resnet", blocks=(1, 1), channels=(8, 16), se="block").train()
        if fused:
            enable_fused_ops(model)
        freeze(model, recipe)
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        outputs.append(model(images.contiguous(memory_format=torch.channels_last)))
        states.append(model.state_dict())
    torch.testing.assert_close(*outputs)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)


def test_budget_counts_frozen_parameters_and_summary_both_numbers(tiny: MakeRecipe, source: Path) -> None:
    with pytest.raises(UsageError, match="5,266 parameters"):
        resolve(tiny(freeze="residual_layers", max_params=5000))
    summary = train(tiny(freeze="residual_layers", init=str(source), epochs=1))
    assert (summary.params, summary.trained_params) == (5266, 5266 - 4864)
    assert summary.init_sha256 == make_trainer(tiny(init=str(source))).init.sha256
    assert last(summary.run)["recipe"]["init"] == summary.config["init"] == str(source)


def test_resumed_run_needs_no_initial_weights_and_is_bit_identical(
    tiny: MakeRecipe, source: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"init": str(source), "freeze": "conv1,residual_layers.0", "ema_decay": 0.9}
    train(tiny(**values))
    train(tiny(**values, max_steps=7, out=str(tmp_path / "again")))
    source.unlink()
    train(tiny(**values, out=str(tmp_path / "again"), resume="auto"))
    assert_equal_runs(tmp_path / "again", tmp_path / "run")
    for changes in ({"init": "none"}, {"init": str(tmp_path / "other.pt")}, {"freeze": "conv1"}):
        with pytest.raises(CheckpointError, match=rf"other options: --{min(changes)} "):
            train(Recipe(resume=str(tmp_path / "again"), epochs=3, **changes))
    summary = train(Recipe(resume=str(tmp_path / "again"), epochs=3))
    assert summary.init_sha256 == last(tmp_path / "run")["init_sha256"] is not None


@pytest.mark.parametrize("arch", ["resnet", "own"])
def test_initial_weights_are_read_once(
    tiny: MakeRecipe, source: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setitem(MODELS, "own", MODELS["resnet"])
    paths = []
    load = checkpoint.load_checkpoint
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path, **flags: paths.append(path) or load(path, **flags))
    trainer = make_trainer(tiny(init=str(source), arch=arch))
    assert paths == [source]
    assert trainer.init.sha256
    assert trainer.resolved.initial is None, "the weights stay in memory"
