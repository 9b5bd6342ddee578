"""Compiled and captured steps against eager steps; warm-up leaves the state unchanged."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest
import torch
from torch._dynamo.utils import counters

from fastcifar.device import choose_execution
from fastcifar.errors import DeviceError
from fastcifar.models.convnets import global_max_pool
from fastcifar.recipe import Recipe
from fastcifar.training import compilation, cuda_graph
from fastcifar.training.build import build_trainer
from fastcifar.training.compilation import compile_function, precompile
from fastcifar.training.cuda_graph import cuda_graphed, cuda_graphed_forward, pad_batch
from fastcifar.training.evaluate import eval_mode
from fastcifar.training.optimizers import OPTIMIZERS, find_optimizer
from fastcifar.training.resolve import resolve
from fastcifar.training.step import loss_and_correct
from fastcifar.training.trainer import Trainer


def make_trainer(recipe: Recipe) -> Trainer:
    return build_trainer(resolve(recipe))


def full_batches(trainer: Trainer, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the first `count` full batches, over as many epochs as needed."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
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


@pytest.fixture(scope="module", params=["silu", "relu"])
def eager_and_compiled(request: pytest.FixtureRequest) -> tuple[Trainer, Trainer, Callable, Callable]:
    """Return two equal trainers of a small SE-ResNet and their steps, the first eager and the second compiled."""
    recipe = Recipe.make(
        arch="resnet",
        blocks=(1, 1),
        channels=(8, 16),
        se="block",
        activation=request.param,
        data="synthetic:200",
        val_size=40,
        batch_size=32,
        device="cpu",
        precision="fp32",
        compile=False,
        ema_decay=0.9,
        label_smoothing=0.1,
        lr=1e-3,
    )
    eager, compiled = make_trainer(recipe), make_trainer(recipe)
    eager_step = eager.build_step(loss_and_correct(eager.forward, 0.1))
    compiled_step = compiled.build_step(compile_function(loss_and_correct(compiled.forward, 0.1)))
    return eager, compiled, eager_step, compiled_step


def test_compiled_losses_equal_eager_losses(eager_and_compiled: tuple[Trainer, Trainer, Callable, Callable]) -> None:
    eager, compiled, eager_step, compiled_step = eager_and_compiled
    for images, labels in full_batches(eager, 10):
        losses = []
        for trainer, step in ((eager, eager_step), (compiled, compiled_step)):
            trainer.meter.reset()
            step(images, labels)
            losses.append(trainer.meter.compute().loss)
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_compiled_steps_from_the_same_state_equal_eager_steps(
    eager_and_compiled: tuple[Trainer, Trainer, Callable, Callable],
) -> None:
    """Weights agree within 1e-5 relative: each tensor for a smooth activation, all tensors together for ReLU.

    A rounding error of an activation near 0 may change the sign and with it the gradient of ReLU.
    """
    eager, compiled, eager_step, compiled_step = eager_and_compiled
    for trainer in (eager, compiled):
        trainer.optimizer.set_lr(0.1)
    for images, labels in full_batches(eager, 10):
        copy_state(eager, compiled)
        eager_step(images, labels)
        compiled_step(images, labels)
        pairs = list(zip(compiled.model.parameters(), eager.model.parameters(), strict=True))
        difference = torch.cat([(weight - expected).flatten() for weight, expected in pairs]).norm()
        assert difference <= 1e-5 * torch.cat([expected.flatten() for _, expected in pairs]).norm()
        if eager.recipe.activation == "silu":
            for weight, expected in pairs:
                # the absolute tolerance is for biases near their initial value 0
                assert (weight - expected).norm() <= 1e-5 * expected.norm() + 1e-7


@pytest.mark.parametrize("wrap", ["cuda_graphed", "precompile"])
@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9}, {"dropout": 0.3}, {"precision": "fp16", "optimizer": "sgd"}])
def test_warm_up_preserves_weights_buffers_optimizer_and_random_state(
    tiny: Callable[..., Recipe], wrap: str, extra: dict
) -> None:
    trainer = make_trainer(tiny(**extra))
    step = trainer.build_step(loss_and_correct(trainer.forward, 0.0))
    state = [tensor.detach().clone() for tensor in trainer.state_tensors()]
    addresses = [tensor.data_ptr() for tensor in trainer.state_tensors()]
    random_state = torch.get_rng_state()
    example = full_batches(trainer, 1)[0]
    if wrap == "cuda_graphed":
        cuda_graphed(step, example, trainer.state_tensors(), capture_fn=lambda work: work)
    else:
        precompile(step, example, trainer.state_tensors())
    for before, after in zip(state, trainer.state_tensors(), strict=True):
        assert torch.equal(before, after)
    assert [tensor.data_ptr() for tensor in trainer.state_tensors()] == addresses
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("option", ["compile", "cuda_graph"])
@pytest.mark.parametrize("optimizer", ["lion", "lookahead:lion", "ranger", "muon", "rmsprop", "sgd"])
def test_warm_up_preserves_python_state_of_the_optimizer(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, option: str, optimizer: str
) -> None:
    """Compilation and capture, which are slow, are replaced by identity functions; the warm-up is real."""
    monkeypatch.setattr(compilation, "compile_function", lambda function, mode: function)
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: work)
    trainer = make_trainer(tiny(optimizer=optimizer))
    trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, **{option: True}))
    inner = trainer.optimizer.inner
    weights = copy.deepcopy(trainer.optimizer.parameters)
    group_options = str([{key: group[key] for key in group if key != "params"} for group in inner.param_groups])
    state = [tensor.detach().clone() for tensor in trainer.state_tensors()]
    step = trainer.build_train_step()
    assert str([{key: group[key] for key in group if key != "params"} for group in inner.param_groups]) == group_options
    assert all(torch.equal(before, after) for before, after in zip(state, trainer.state_tensors(), strict=True))
    step(*full_batches(trainer, 1)[0])
    assert trainer.meter.compute().all_finite
    assert not any(
        torch.equal(weight, before) for weight, before in zip(trainer.optimizer.parameters, weights, strict=True)
    )


def test_step_for_a_short_last_batch_is_captured(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    captured_functions = []
    monkeypatch.setattr(compilation, "compile_function", lambda function, mode: function)
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: captured_functions.append(work) or work)
    reference, trainer = (make_trainer(tiny(ema_decay=0.9, data="synthetic:100", batch_size=32)) for _ in range(2))
    assert reference.loader.slicing.local_count(reference.loader.steps_per_epoch - 1) not in (0, 32)
    trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, cuda_graph=True, compile=False))
    reference_step, captured_step = reference.build_step(reference.build_loss_function()), trainer.build_train_step()
    assert len(captured_functions) == 2  # a full step and the last one
    for batch in reference.batches(0):
        for step in (reference_step, captured_step):
            step(*batch)
    assert_equal_state(trainer, reference)


def test_capture_disables_garbage_collection_and_graphs_can_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        is_valid = True

        def replay(self) -> None:
            assert self.is_valid

        def reset(self) -> None:
            self.is_valid = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: contextlib.nullcontext())
    gc_enabled = []
    replay = cuda_graph.capture_cuda_graph(lambda: gc_enabled.append(gc.isenabled()))
    assert gc_enabled == [False]
    assert gc.isenabled()
    replay()
    cuda_graph.reset_cuda_graphs()
    with pytest.raises(AssertionError):
        replay()


def test_fault17_optimizers_that_cannot_be_captured(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(optimizer="lookahead:lion")
    execution = replace(choose_execution(recipe), cuda_graph=True)
    trainer = build_trainer(resolve(recipe, execution))
    assert not trainer.execution.cuda_graph
    assert any("lion counts its steps in Python" in line for line in trainer.execution.format_lines())
    assert resolve(tiny(optimizer="rmsprop"), execution).execution.cuda_graph
    with pytest.raises(DeviceError, match="choose from sgd") as caught:
        resolve(Recipe(**{**recipe.model_dump(), "cuda_graph": True}), execution)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", *OPTIMIZERS])
def test_captured_steps_equal_eager_steps(tiny: Callable[..., Recipe], optimizer: str) -> None:
    reference, trainer = (make_trainer(tiny(ema_decay=0.9, optimizer=optimizer)) for _ in range(2))
    eager_step = reference.build_step(loss_and_correct(reference.forward, 0.0))
    step = trainer.build_step(loss_and_correct(trainer.forward, 0.0))
    captured_step = cuda_graphed(
        step, full_batches(trainer, 1)[0], trainer.state_tensors(), capture_fn=lambda work: work
    )
    for completed_steps, (images, labels) in enumerate(full_batches(trainer, 10), start=1):
        for step_function, owner in ((eager_step, reference), (captured_step, trainer)):
            owner.optimizer.set_lr(0.01 / completed_steps)  # the captured step reads it from its device tensor
            step_function(images, labels)
            owner.optimizer.after_step(completed_steps)
    assert_equal_state(trainer, reference)


def test_captured_step_rejects_inputs_of_other_shapes_or_dtypes(tiny: Callable[..., Recipe]) -> None:
    trainer = make_trainer(tiny())
    images, labels = full_batches(trainer, 1)[0]
    step = trainer.build_step(loss_and_correct(trainer.forward, 0.0))
    captured = cuda_graphed(step, (images, labels), trainer.state_tensors(), capture_fn=lambda work: work)
    with pytest.raises(ValueError, match=r"input 0 .*\(32, 3, 32, 32\).*\(16, 3, 32, 32\).*eager step"):
        captured(images[:16], labels[:16])
    with pytest.raises(ValueError, match=r"input 1 .*int64.*int32"):
        captured(images, labels.int())


def test_freed_memory_is_kept_with_glibc() -> None:
    code = "from fastcifar.training.compilation import keep_freed_memory; print(keep_freed_memory())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


def assert_captured_forward_equals_eager(trainer: Trainer, capture_fn: Callable | None, tolerance: float) -> None:
    """Compare three batches, the last of them short, with weights that change between them."""
    batch = next(trainer.loader.batches(0))[0]
    state = [value.clone() for value in trainer.model.state_dict().values()]
    with eval_mode(trainer.model):
        captured_forward = pad_batch(cuda_graphed_forward(trainer.forward, batch, capture_fn), len(batch))
        assert all(
            torch.equal(value, old) for value, old in zip(trainer.model.state_dict().values(), state, strict=True)
        )
        results = []
        for images in (batch, batch.flip(0), batch[:5]):
            next(trainer.model.parameters()).mul_(1.1)
            results.append((captured_forward(images), trainer.forward(images)))
    for logits, expected in results:  # later replays must not change earlier results
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_captured_forward_equals_eager_forward(tiny: Callable[..., Recipe]) -> None:
    assert_captured_forward_equals_eager(make_trainer(tiny()), lambda work: work, 1e-5)


@pytest.mark.gpu
def test_forward_in_a_cuda_graph_equals_eager_forward(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny(device="cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert_captured_forward_equals_eager(trainer, None, 1e-4)


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
    for setting, value in (("allow_tf32", False), ("benchmark", False), ("deterministic", True)):
        monkeypatch.setattr(torch.backends.cudnn, setting, value)
    eager_step = reference.build_step(loss_and_correct(reference.forward, 0.0))
    captured_step = cuda_graphed(
        trainer.build_step(loss_and_correct(trainer.forward, 0.0)), full_batches(trainer, 1)[0], trainer.state_tensors()
    )
    for completed_steps, (images, labels) in enumerate(full_batches(trainer, 20), start=1):
        for step_function, owner in ((eager_step, reference), (captured_step, trainer)):
            step_function(images, labels)
            owner.optimizer.after_step(completed_steps)
    atol = 1e-4 if optimizer == "muon" else 1e-5  # Muon computes in bf16
    for tensor, expected in zip(trainer.state_tensors(), reference.state_tensors(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=atol)


def test_compiled_code_is_reused_from_the_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    monkeypatch.delenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, raising=False)
    assert compilation.enable_compile_cache() == tmp_path / "compiled"
    cache_hits = []
    for _ in range(2):
        torch._dynamo.reset()  # as in a new process
        counters.clear()
        compile_function(lambda x: torch.softmax(x * 3, 1))(torch.ones(5, 7))
        cache_hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert cache_hits == [0, 1]
    assert any((tmp_path / "compiled").rglob("*.so"))


def test_compile_cache_follows_the_environment_or_falls_back_to_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, str(tmp_path / "custom"))
    assert compilation.enable_compile_cache() == tmp_path / "custom"
    (tmp_path / "file").touch()
    monkeypatch.setenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, str(tmp_path / "file" / "below"))
    assert compilation.enable_compile_cache() is None
    monkeypatch.delenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "file"))
    assert compilation.enable_compile_cache() is None
    assert compilation.INDUCTOR_CACHE_DIR_VARIABLE not in os.environ


@pytest.mark.parametrize("optimizer", ["lookahead:sgd", "muon"])
def test_replay_of_several_steps_equals_single_steps(tiny: Callable[..., Recipe], optimizer: str) -> None:
    """The learning rate of each step is an input like its batch, not the value at capture time."""
    single_trainer, block_trainer = (
        make_trainer(tiny(optimizer=optimizer, ema_decay=0.9, dropout=0.1)) for _ in range(2)
    )
    lrs = [torch.tensor(lr) for lr in (0.1, 0.05, 0.02, 0.01, 0.2, 0.3)]

    def make_step(trainer: Trainer) -> Callable[..., None]:
        train_step = trainer.build_step(trainer.build_loss_function())

        def step(lr: torch.Tensor, *batch: torch.Tensor) -> None:
            trainer.optimizer.lr.copy_(lr)
            train_step(*batch)

        return step

    inputs = [(lr, *batch) for lr, batch in zip(lrs, full_batches(single_trainer, 6), strict=True)]
    single_step = make_step(single_trainer)
    torch.manual_seed(1)
    for tensors in inputs:
        single_step(*tensors)
    block = cuda_graph.unroll_steps(make_step(block_trainer), 3)
    example = [tensor for tensors in inputs[3:] for tensor in tensors]
    replayed = cuda_graphed(block, example, block_trainer.state_tensors(), capture_fn=lambda work: work)
    torch.manual_seed(1)
    for start in (0, 3):
        replayed(*(tensor for tensors in inputs[start : start + 3] for tensor in tensors))
    assert_equal_state(block_trainer, single_trainer)
    assert single_trainer.meter.compute() == block_trainer.meter.compute()


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
