"""Compiled and captured steps against eager steps; warm-up leaves the state unchanged."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import platform
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fastcifar.data.mixers import MIXERS
from fastcifar.device import choose_execution
from fastcifar.models.convnets import global_max_pool
from fastcifar.recipe import Recipe
from fastcifar.training import compilation, cuda_graph, evaluate
from fastcifar.training.compilation import compile_function
from fastcifar.training.cuda_graph import cuda_graphed
from fastcifar.training.optimizers import OPTIMIZERS, find_optimizer
from fastcifar.training.resolve import resolve
from fastcifar.training.trainer import Trainer
from tests.training.optimizer_helpers import make_trainer


def full_batches(trainer: Trainer, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Return the first `count` full batches, over as many epochs as needed."""
    batches: list[tuple[torch.Tensor, ...]] = []
    epoch = 0
    while len(batches) < count:
        batches += [batch for batch in trainer.loader.batches(epoch) if len(batch[1]) == trainer.recipe.batch_size]
        epoch += 1
    return batches[:count]


def copy_state(source: Trainer, target: Trainer) -> None:
    with torch.no_grad():
        for target_tensor, source_tensor in zip(target.state_tensors(), source.state_tensors(), strict=True):
            target_tensor.copy_(source_tensor)


def assert_equal_state(trainer: Trainer, reference: Trainer) -> None:
    for tensor, expected in zip(trainer.state_tensors(), reference.state_tensors(), strict=True):
        assert torch.equal(tensor, expected)


def use_optimized_step(trainer: Trainer, **execution: bool) -> None:
    trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, **execution))
    trainer.step = trainer.build_train_step()


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_compiled_steps_from_the_same_state_equal_eager_steps(tiny: Callable[..., Recipe], activation: str) -> None:
    """Weights agree within 1e-5 relative: each tensor for a smooth activation, all tensors together for ReLU.

    A rounding error of an activation near 0 may change the sign and with it the gradient of ReLU.
    """
    recipe = tiny(se="block", activation=activation, ema_decay=0.9, label_smoothing=0.1)
    eager, compiled = make_trainer(recipe), make_trainer(recipe)
    compiled.step = compiled.build_step(compile_function(compiled.build_loss_function()))
    for images, labels in full_batches(eager, 10):
        copy_state(eager, compiled)
        losses = []
        for trainer in (eager, compiled):
            trainer.meter.reset()
            trainer.step(images, labels)
            losses.append(trainer.meter.compute().loss)
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        pairs = list(zip(compiled.model.parameters(), eager.model.parameters(), strict=True))
        difference = torch.cat([(weight - expected).flatten() for weight, expected in pairs]).norm()
        assert difference <= 1e-5 * torch.cat([expected.flatten() for _, expected in pairs]).norm()
        if activation == "silu":
            for weight, expected in pairs:
                # the absolute tolerance is for biases near their initial value 0
                assert (weight - expected).norm() <= 1e-5 * expected.norm() + 1e-7


@pytest.mark.medium
@pytest.mark.parametrize("option", ["compile", "cuda_graph"])
@pytest.mark.parametrize(
    "values",
    [
        *({"optimizer": name} for name in ("lion", "lookahead:lion", "ranger", "muon", "rmsprop", "sgd")),
        {"ema_decay": 0.9},
        {"dropout": 0.3},
        {"precision": "fp16", "optimizer": "sgd"},
    ],
    ids=str,
)
def test_warm_up_preserves_the_training_and_random_state(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, option: str, values: dict
) -> None:
    """Compilation and capture, which are slow, are replaced by identity functions; the warm-up is real."""
    monkeypatch.setattr(compilation, "compile_function", lambda function, mode: function)
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: work)
    trainer = make_trainer(tiny(**values))
    inner = trainer.optimizer.inner
    weights = copy.deepcopy(trainer.optimizer.parameters)
    group_options = str([{key: group[key] for key in group if key != "params"} for group in inner.param_groups])
    state = [tensor.detach().clone() for tensor in trainer.state_tensors()]
    addresses = [tensor.data_ptr() for tensor in trainer.state_tensors()]
    random_state, scaler_state = torch.get_rng_state(), trainer.scaler.state_dict()
    use_optimized_step(trainer, **{option: True})
    assert str([{key: group[key] for key in group if key != "params"} for group in inner.param_groups]) == group_options
    assert all(torch.equal(before, after) for before, after in zip(state, trainer.state_tensors(), strict=True))
    assert [tensor.data_ptr() for tensor in trainer.state_tensors()] == addresses
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.scaler.state_dict() == scaler_state
    trainer.step(*full_batches(trainer, 1)[0])
    assert trainer.meter.compute().all_finite
    if "precision" not in values:  # the first step in fp16 may overflow
        pairs = zip(trainer.optimizer.parameters, weights, strict=True)
        assert not any(torch.equal(weight, before) for weight, before in pairs)


class FakeGraph:
    """A replacement of torch.cuda.CUDAGraph with a memory pool, which is new or that of another graph."""

    def __init__(self) -> None:
        self.pools: list[object] = []

    def pool(self) -> object:
        assert self.pools, "torch raises an error for a graph that was not captured, or that was reset"
        return self.pools[0]

    def replay(self) -> None:
        assert self.pools

    def reset(self) -> None:
        self.pools.clear()

    @staticmethod
    @contextlib.contextmanager
    def capture(graph: FakeGraph, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        yield
        graph.pools.append(pool or object())


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch's graphs, so that functions are called where they would be captured."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeGraph.capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(cuda_graph, "_captured_graphs", weakref.WeakSet())
    monkeypatch.setattr(cuda_graph, "_failed_captures", failed := {})
    monkeypatch.setattr(cuda_graph, "_clean_up_failed_capture", lambda graph, pool, _: failed.update({pool: graph}))


@pytest.mark.medium
@pytest.mark.usefixtures("fake_graphs")
def test_capture_disables_garbage_collection_and_graphs_can_be_reset() -> None:
    gc_enabled = []
    replay = cuda_graph.capture_cuda_graph(lambda: gc_enabled.append(gc.isenabled()))
    assert gc_enabled == [False]
    assert gc.isenabled()
    replay()
    cuda_graph.reset_cuda_graphs()
    with pytest.raises(AssertionError):
        replay()


@pytest.mark.slow
@pytest.mark.usefixtures("fake_graphs")
def test_all_graphs_share_a_memory_pool_that_lives_as_long_as_one_of_them() -> None:
    def capture() -> FakeGraph:
        return cast(Any, cuda_graph.capture_cuda_graph(lambda: None)).__self__

    def fail() -> None:
        raise RuntimeError("not permitted in a capture")

    first, second = capture(), capture()
    assert first.pool() is second.pool()
    del first
    third = capture()
    assert third.pool() is second.pool()
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graph.capture_cuda_graph(fail)
    fourth, fifth = capture(), capture()
    assert fourth.pool() is fifth.pool() is not third.pool(), "torch may refuse a pool in which a capture failed"
    old_pool = fourth.pool()
    cuda_graph.reset_cuda_graphs()
    assert capture().pool() is not old_pool


@pytest.mark.parametrize("requested", [None, True])
def test_fault17_optimizers_that_cannot_be_captured_update_outside_the_graph(
    tiny: Callable[..., Recipe], requested: bool | None
) -> None:
    recipe = Recipe(**{**tiny(optimizer="lookahead:lion").model_dump(), "cuda_graph": requested})
    execution = replace(choose_execution(tiny()), cuda_graph=True)
    chosen = resolve(recipe, execution).execution
    assert chosen.cuda_graph
    assert any(
        "lion counts its steps in Python and updates outside the graph" in line for line in chosen.format_lines()
    )
    assert resolve(tiny(optimizer="rmsprop"), execution).execution == execution


@pytest.mark.medium
@pytest.mark.parametrize(
    "values",
    [
        *({"optimizer": name} for name in ("lookahead:sgd", "lookahead:lion", *OPTIMIZERS)),
        *({"augment": f"flip,{name}"} for name in MIXERS),
        {"image_size": "24:1,32"},
        {"image_size": "24:1,32", "optimizer": "lion", "clip_grad": "norm:1"},
        {"freeze_stem_epochs": 1, "epochs": 2, "optimizer": "lookahead:adamw", "clip_grad": "norm:1"},
        {"freeze_stem_epochs": 1, "epochs": 2, "optimizer": "lion"},
        {"hard_example_fraction": 0.5, "augment": "flip,mixup"},
        {"precision": "bf16", "optimizer": "sgd"},
        {"precision": "fp16", "optimizer": "lion"},
    ],
    ids=str,
)
def test_captured_steps_equal_eager_steps(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, values: dict
) -> None:
    """The learning rate changes with each step, and the last of four batches is smaller than the others."""
    captured_functions = []
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: captured_functions.append(work) or work)
    reference, trainer = (make_trainer(tiny(ema_decay=0.9, batch_size=48, **values)) for _ in range(2))
    use_optimized_step(trainer, cuda_graph=True)
    assert len(captured_functions) == 2 * len(set(trainer.resolved.phases))  # a full step and the last one
    for epoch in range(2):
        for owner in (reference, trainer):
            owner.progress.epoch = epoch
            for batch in owner.batches(epoch):
                owner.train_step(batch)
    assert_equal_state(trainer, reference)


def test_captured_step_rejects_inputs_of_other_shapes_or_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: work)
    images, labels = torch.zeros(32, 3, 32, 32, dtype=torch.uint8), torch.zeros(32, dtype=torch.int64)
    captured = cuda_graphed(lambda images, labels: None, (images, labels))
    expected = "must be (32, 3, 32, 32) torch.uint8 on cpu, got (16, 3, 32, 32) torch.uint8 on cpu; call the eager step"
    with pytest.raises(ValueError, match=re.escape(expected)):
        captured(images[:16], labels[:16])
    with pytest.raises(ValueError, match=r"input 1 .*int64.*int32"):
        captured(images, labels.int())


@pytest.mark.slow
def test_freed_memory_is_kept_with_glibc() -> None:
    code = "from fastcifar.training.compilation import keep_freed_memory; print(keep_freed_memory())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_captured_forward_equals_eager_forward(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Compare three batches, the last of them short, with weights that change between them."""
    trainer = make_trainer(tiny(device=device))
    if device == "cpu":
        monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: work)
    batch = next(trainer.loader.batches(0))[0]
    monkeypatch.setattr(evaluate, "EVAL_BATCH_SIZE", len(batch))
    state = [value.clone() for value in trainer.model.state_dict().values()]
    captured_forward = evaluate.optimize_forward(trainer.model, trainer.forward, trainer.device, False, True)
    assert all(map(torch.equal, trainer.model.state_dict().values(), state))
    results = []
    with evaluate.eval_mode(trainer.model):
        for images in (batch, batch.flip(0), batch[:5]):
            next(trainer.model.parameters()).mul_(1.1)
            results.append((captured_forward(images), trainer.forward(images)))
    tolerance = 1e-5 if device == "cpu" else 1e-4
    for logits, expected in results:  # later replays must not change earlier results
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_each_compiled_function_has_its_own_code_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the ninth network of a process would exceed TorchDynamo's recompilation limit."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def make_function(number: int) -> Callable[..., int]:
        return lambda add=1: number + add

    functions = [compile_function(make_function(number)) for number in range(3)]
    assert [function(10) for function in functions] == [10, 11, 12]
    assert [function() for function in functions] == [1, 2, 3]
    assert len({id(function.__code__) for function in functions}) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["lookahead:sgd", *OPTIMIZERS])
def test_steps_in_a_cuda_graph_equal_eager_steps(
    tiny: Callable[..., Recipe], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_eps = "eps" in inspect.signature(find_optimizer(optimizer.rpartition(":")[2]).build).parameters
    opt = {"eps": 1e-3} if has_eps else {}  # otherwise gradients that are only rounding errors make full steps
    recipe = tiny(device="cuda", loader="tensor", ema_decay=0.9, lr=1e-3, optimizer=optimizer, optimizer_arg=opt)
    reference, trainer = make_trainer(recipe), make_trainer(recipe)
    for setting, value in (("benchmark", False), ("deterministic", True)):
        monkeypatch.setattr(torch.backends.cudnn, setting, value)
    use_optimized_step(trainer, cuda_graph=True)
    for batch in full_batches(trainer, 20):
        reference.train_step(batch)
        trainer.train_step(batch)
    atol = 1e-4 if optimizer == "muon" else 1e-5  # Muon computes in bf16
    for tensor, expected in zip(trainer.state_tensors(), reference.state_tensors(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=atol)


@pytest.mark.medium
@pytest.mark.parametrize("optimizer", ["sgd", "muon", "lion"])
def test_replay_of_several_steps_equals_single_steps(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: work)
    single, several = (make_trainer(tiny(optimizer=optimizer, ema_decay=0.9, dropout=0.1)) for _ in range(2))
    several.resolved = replace(several.resolved, execution=replace(several.execution, cuda_graph=True))
    replay = several.build_step_block(3)
    batches = full_batches(single, 6)
    torch.manual_seed(1)
    for batch in batches:
        single.step(*batch)
    torch.manual_seed(1)
    for start in (0, 3):
        replay(*(tensor for batch in batches[start : start + 3] for tensor in batch))
    assert_equal_state(several, single)
    assert single.meter.compute() == several.meter.compute()


@pytest.mark.slow
def test_compiled_global_max_pool_has_the_eager_gradient_in_bf16() -> None:
    """The compiled gradient of `amax` would be 0 / 0: the recomputed activation differs from its saved maximum."""
    images = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()

    def gradient(function: Callable) -> torch.Tensor:
        leaf = images.detach().requires_grad_()
        function(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    def function(x: torch.Tensor) -> torch.Tensor:
        return global_max_pool(torch.nn.functional.silu(x)).float().sum()

    torch.testing.assert_close(gradient(compile_function(function)), gradient(function), rtol=0, atol=0)
