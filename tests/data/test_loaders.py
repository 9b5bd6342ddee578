"""Tests of the tensor loader: complete epochs, no state, batches that depend on seed and epoch only, compilation."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.data import batch_loader, loaders
from fastcifar.data.augment import apply_augment, draw_epoch, parse_augment
from fastcifar.data.loaders import LOADERS, TensorLoader, eval_batches
from fastcifar.errors import UsageError

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


def concatenate(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_table() -> None:
    assert LOADERS["tensor"] is TensorLoader


@pytest.mark.parametrize("batch_size", [1, 10, 32, 55, 109, 110])
def test_every_sample_appears_once_per_epoch(batch_size: int) -> None:
    loader = make_loader(batch_size, "flip")
    batches = list(loader.batches(0))
    assert (loader.num_samples, loader.batch_size, loader.steps_per_epoch) == (N, batch_size, -(-N // batch_size))
    assert [len(labels) for _, labels in batches] == [len(images) for images, _ in batches]
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (loader.steps_per_epoch - 1)
    assert len(batches) == loader.steps_per_epoch
    assert torch.equal(torch.cat([labels for _, labels in batches]).sort().values, torch.arange(N))


@pytest.mark.parametrize(("batch_size", "steps"), [(10, 11), (32, 3), (109, 1)])
def test_drop_last_drops_the_short_batch_only(batch_size: int, steps: int) -> None:
    loader = make_loader(batch_size, drop_last=True)
    assert loader.steps_per_epoch == steps
    images, labels = concatenate(loader.batches(0))
    all_images, all_labels = concatenate(make_loader(batch_size).batches(0))
    assert len(labels) == steps * batch_size
    assert equal((images, labels), (all_images[: len(images)], all_labels[: len(labels)]))


def test_batches_are_uint8_channels_last_and_int64() -> None:
    for images, labels in make_loader().batches(0):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 32, 32)
        assert images.stride() == (3072, 1, 96, 3)
        assert labels.dtype == torch.int64


def test_without_augmentations_the_samples_are_unchanged() -> None:
    images, labels = concatenate(make_loader(spec="none").batches(0))
    assert np.array_equal(images.numpy(), IMAGES[labels.numpy()])


def test_batches_use_slices_of_the_epoch_parameters() -> None:
    ops = parse_augment(SPEC)
    epoch_params = draw_epoch(ops, N, epoch=4, seed=9)
    params = tuple({name: torch.from_numpy(array) for name, array in op.items()} for op in epoch_params.op_params)
    expected = apply_augment(ops, torch.from_numpy(IMAGES[epoch_params.permutation]), params, FILL)
    assert equal(concatenate(make_loader(seed=9).batches(4)), (expected, torch.from_numpy(epoch_params.permutation)))


def test_batch_size_does_not_change_the_images() -> None:
    assert equal(concatenate(make_loader(32).batches(1)), concatenate(make_loader(50).batches(1)))


def test_different_seeds_and_epochs_give_different_batches() -> None:
    first, first_labels = concatenate(make_loader().batches(0))
    for other, labels in (concatenate(make_loader().batches(1)), concatenate(make_loader(seed=1).batches(0))):
        assert not torch.equal(labels, first_labels)
        assert not torch.equal(other[labels.argsort()], first[first_labels.argsort()]), "the same augmentation"


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_resuming_within_an_epoch_gives_the_remaining_batches(start_step: int) -> None:
    complete = list(make_loader(32).batches(2))
    remaining = list(make_loader(32).batches(2, start_step=start_step))
    assert len(remaining) == 4 - start_step
    assert all(equal(a, b) for a, b in zip(complete[start_step:], remaining, strict=True))


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


def test_batch_larger_than_the_data_set() -> None:
    with pytest.raises(UsageError, match=r"--batch-size 100000 is larger than the 110 training images; choose at most"):
        make_loader(100_000)


def test_a_read_only_memory_map_causes_no_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = TensorLoader(
            images,
            LABELS,
            batch_size=32,
            augment=parse_augment(SPEC),
            seed=0,
            device="cpu",
            fill_color=FILL,
            compile=False,
        )
        assert equal(concatenate(mapped.batches(0)), concatenate(make_loader().batches(0)))
        assert np.array_equal(concatenate(eval_batches(images, LABELS, 32, "cpu"))[0].numpy(), IMAGES)


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
