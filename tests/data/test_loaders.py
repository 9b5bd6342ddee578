"""Tests of the tensor loader: complete epochs, no state, batches that depend on seed and epoch only, compilation."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from test_loader_contract import concatenate, equal

from fastcifar.data import batch_loader, loaders
from fastcifar.data.augment import apply_augment, draw_epoch, parse_augment
from fastcifar.data.loaders import TensorLoader, eval_batches

N = 110
SPEC = "crop:4:reflect,flip:0.5:alternating,cutout:8:mean"
LONG_SPEC = "crop:4:zero,flip,cutout:8:mean,crop:3:reflect,flip:0.5:alternating,cutout:5:zero,flip:0.3"
FILL = (125, 7, 255)
LABELS = np.arange(N)  # the label of a sample is its index, which tells the samples of a batch
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 3, 32, 32), dtype=np.uint8)
IMAGES.flags.writeable = False


def make_loader(batch_size: int = 32, spec: str = SPEC, **options: Any) -> TensorLoader:
    options = {"seed": 0, "compile": False, **options}
    return TensorLoader(
        IMAGES, LABELS, batch_size=batch_size, augment=parse_augment(spec), device="cpu", fill_color=FILL, **options
    )  # pyright: ignore[reportArgumentType]


def test_batches_use_slices_of_the_epoch_parameters() -> None:
    ops = parse_augment(SPEC)
    epoch_params = draw_epoch(ops, N, epoch=4, seed=9)
    params = tuple({name: torch.from_numpy(array) for name, array in op.items()} for op in epoch_params.op_params)
    expected = apply_augment(ops, torch.from_numpy(IMAGES[epoch_params.permutation]), params, FILL)
    assert equal(concatenate(make_loader(seed=9).batches(4)), (expected, torch.from_numpy(epoch_params.permutation)))


def test_a_loader_has_no_state_and_batches_are_not_overwritten() -> None:
    loader = make_loader(32)
    batches = list(loader.batches(0))
    copies = [(images.clone(), labels.clone()) for images, labels in batches]
    interleaved = zip(loader.batches(0), loader.batches(1), strict=True)
    assert all(equal(a, b) for (a, _), b in zip(interleaved, copies, strict=True))
    assert all(equal(a, b) for a, b in zip(batches, copies, strict=True))
    batches[0][0].zero_()
    batches[0][1].zero_()
    assert equal(concatenate(loader.batches(0)), concatenate(iter(copies))), "a batch shares memory with the data set"


def test_large_data_sets_are_uploaded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = concatenate(make_loader().batches(0))
    monkeypatch.setattr(loaders, "UPLOAD_IMAGES", 40)
    assert equal(concatenate(make_loader().batches(0)), expected)


@pytest.mark.parametrize("batch_size", [32, 55, 1000])
def test_evaluation_batches_are_the_data_in_order(batch_size: int) -> None:
    batches = list(eval_batches(IMAGES, LABELS, batch_size, torch.device("cpu")))
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)
    images, labels = concatenate(iter(batches))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(images.numpy(), IMAGES)
    assert np.array_equal(labels.numpy(), LABELS)


@pytest.mark.medium
@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_compiled_is_one_kernel_equal_to_eager_and_never_recompiles() -> None:
    from torch._inductor import metrics

    batch_loader.compile_gather.cache_clear()
    metrics.reset()
    compiled, eager = make_loader(30, LONG_SPEC, compile=True), make_loader(30, LONG_SPEC)
    next(compiled.batches(0))
    assert metrics.generated_kernel_count == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for epoch in range(3):
            for (images, labels), expected in zip(compiled.batches(epoch), eager.batches(epoch), strict=True):
                assert equal((images, labels), expected)
                assert images.stride() == (3072, 1, 96, 3)
        with torch.inference_mode(False), torch.no_grad():
            assert equal(concatenate(compiled.batches(3, start_step=1)), concatenate(eager.batches(3, start_step=1)))
        other_seed = make_loader(30, LONG_SPEC, compile=True, seed=5)
        assert equal(concatenate(other_seed.batches(0)), concatenate(make_loader(30, LONG_SPEC, seed=5).batches(0)))


@pytest.mark.medium
def test_many_configurations_in_one_process_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_compile = torch.compile

    def trace_only(function, *, fullgraph: bool, dynamic: bool, options: dict):
        return torch_compile(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", trace_only)
    batch_loader.compile_gather.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        for spec, batch_size in (("crop:1", 20), ("crop:1", 40), ("crop:2", 20), ("crop:3", 20), ("flip", 20)):
            images, _ = next(make_loader(batch_size, spec, compile=True).batches(0))
            assert torch.equal(images, next(make_loader(batch_size, spec).batches(0))[0])
    batch_loader.compile_gather.cache_clear()  # other tests must not use the traced functions
