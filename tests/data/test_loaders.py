"""The loaders' promises: exact epochs, no state, batches by (seed, epoch) alone, compiled equal to eager."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.data import compiled_augment, loaders
from fastcifar.data.augment import apply_augment, draw_epoch, parse_augment
from fastcifar.data.loaders import LOADERS, TensorLoader, eval_batches
from fastcifar.errors import UsageError

N = 110
SPEC = "crop:4:reflect,flip:0.5:alternating,cutout:8:mean"
LONG_SPEC = "crop:4:zero,flip,cutout:8:mean,crop:3:reflect,flip:0.5:alternating,cutout:5:zero,flip:0.3"
FILL = (125, 7, 255)
LABELS = np.arange(N)  # a label is its sample's number: which samples a batch holds can be read off
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 3, 32, 32), dtype=np.uint8)
IMAGES.flags.writeable = False


def loader(batch_size: int = 32, spec: str = SPEC, **settings: Any) -> TensorLoader:
    settings = {"seed": 0, "compile": False, **settings}
    return TensorLoader(
        IMAGES, LABELS, batch_size=batch_size, augment=parse_augment(spec), device="cpu", fill_color=FILL, **settings
    )  # pyright: ignore[reportArgumentType]


def joined(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_table() -> None:
    assert LOADERS["tensor"] is TensorLoader


@pytest.mark.parametrize("batch_size", [1, 10, 32, 55, 109, 110])
def test_every_sample_comes_once_an_epoch(batch_size: int) -> None:
    it = loader(batch_size, "flip")
    batches = list(it.batches(0))
    assert (it.num_samples, it.batch_size, it.steps_per_epoch) == (N, batch_size, -(-N // batch_size))
    assert [len(labels) for _, labels in batches] == [len(images) for images, _ in batches]
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (it.steps_per_epoch - 1)
    assert len(batches) == it.steps_per_epoch
    assert torch.equal(torch.cat([labels for _, labels in batches]).sort().values, torch.arange(N))


@pytest.mark.parametrize(("batch_size", "steps"), [(10, 11), (32, 3), (109, 1)])
def test_drop_last_drops_the_short_batch_only(batch_size: int, steps: int) -> None:
    it = loader(batch_size, drop_last=True)
    assert it.steps_per_epoch == steps
    images, labels = joined(it.batches(0))
    whole_images, whole_labels = joined(loader(batch_size).batches(0))
    assert len(labels) == steps * batch_size
    assert equal((images, labels), (whole_images[: len(images)], whole_labels[: len(labels)]))


def test_batches_are_uint8_channels_last_and_int64() -> None:
    for images, labels in loader().batches(0):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 32, 32)
        assert images.stride() == (3072, 1, 96, 3)
        assert labels.dtype == torch.int64


def test_without_ops_a_batch_is_its_samples() -> None:
    images, labels = joined(loader(spec="none").batches(0))
    assert np.array_equal(images.numpy(), IMAGES[labels.numpy()])


def test_batches_are_slices_of_the_draws() -> None:
    ops = parse_augment(SPEC)
    draws = draw_epoch(ops, N, epoch=4, seed=9)
    params = tuple({name: torch.from_numpy(array) for name, array in drawn.items()} for drawn in draws.op_params)
    wanted = apply_augment(ops, torch.from_numpy(IMAGES[draws.permutation]), params, FILL)
    assert equal(joined(loader(seed=9).batches(4)), (wanted, torch.from_numpy(draws.permutation)))


def test_batch_size_changes_nothing() -> None:
    assert equal(joined(loader(32).batches(1)), joined(loader(50).batches(1)))


def test_seeds_and_epochs_differ() -> None:
    first, first_labels = joined(loader().batches(0))
    for other, labels in (joined(loader().batches(1)), joined(loader(seed=1).batches(0))):
        assert not torch.equal(labels, first_labels)
        assert not torch.equal(other[labels.argsort()], first[first_labels.argsort()]), "the same augmentation"


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_resuming_in_an_epoch_gives_the_rest_of_it(start_step: int) -> None:
    whole = list(loader(32).batches(2))
    rest = list(loader(32).batches(2, start_step=start_step))
    assert len(rest) == 4 - start_step
    assert all(equal(a, b) for a, b in zip(whole[start_step:], rest, strict=True))


def test_a_loader_has_no_state_and_batches_stay_as_they_were() -> None:
    it = loader(32)
    held = list(it.batches(0))
    copies = [(images.clone(), labels.clone()) for images, labels in held]
    interleaved = zip(it.batches(0), it.batches(1), strict=True)
    assert all(equal(a, b) for (a, _), b in zip(interleaved, copies, strict=True))
    assert all(equal(a, b) for a, b in zip(held, copies, strict=True))
    held[0][0].zero_()
    held[0][1].zero_()
    assert equal(joined(it.batches(0)), joined(iter(copies))), "a batch shares memory with the data set"


def test_batch_larger_than_the_data_set() -> None:
    with pytest.raises(UsageError, match=r"--batch-size 100000 is larger than the 110 training images; choose at most"):
        loader(100_000)


def memory_map(folder: Path) -> np.ndarray:
    np.save(folder / "images.npy", IMAGES)
    return np.load(folder / "images.npy", mmap_mode="r")


def test_a_read_only_memory_map_will_do_without_a_warning(tmp_path: Path) -> None:
    images = memory_map(tmp_path)
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
        assert equal(joined(mapped.batches(0)), joined(loader().batches(0)))
        assert np.array_equal(joined(eval_batches(images, LABELS, 32, "cpu"))[0].numpy(), IMAGES)


def test_large_sets_are_uploaded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = joined(loader().batches(0))
    monkeypatch.setattr(loaders, "UPLOAD_IMAGES", 40)
    assert equal(joined(loader().batches(0)), whole)


@pytest.mark.parametrize("batch_size", [32, 55, 1000])
def test_evaluation_is_the_set_in_order(batch_size: int) -> None:
    batches = list(eval_batches(IMAGES, LABELS, batch_size, torch.device("cpu")))
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)
    images, labels = joined(iter(batches))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(images.numpy(), IMAGES)
    assert np.array_equal(labels.numpy(), LABELS)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_compiled_is_one_kernel_equal_to_eager_and_never_recompiles() -> None:
    from torch._inductor import metrics

    compiled_augment.compile_gather.cache_clear()
    metrics.reset()
    it, plain = loader(30, LONG_SPEC, compile=True), loader(30, LONG_SPEC)
    next(it.batches(0))
    assert metrics.generated_kernel_count == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for epoch in range(3):
            for (images, labels), wanted in zip(it.batches(epoch), plain.batches(epoch), strict=True):
                assert equal((images, labels), wanted)
                assert images.stride() == (3072, 1, 96, 3)
        with torch.inference_mode(False), torch.no_grad():
            assert equal(joined(it.batches(3, start_step=1)), joined(plain.batches(3, start_step=1)))
        again = loader(30, LONG_SPEC, compile=True, seed=5)
        assert equal(joined(again.batches(0)), joined(loader(30, LONG_SPEC, seed=5).batches(0)))


def test_many_settings_in_one_process_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with_inductor = torch.compile

    def compile_quickly(function, *, fullgraph: bool, dynamic: bool, options: dict):  # tracing only: no C++
        return compile_with_inductor(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    compiled_augment.compile_gather.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        for spec, batch_size in (("crop:1", 20), ("crop:1", 40), ("crop:2", 20), ("crop:3", 20), ("flip", 20)):
            images, _ = next(loader(batch_size, spec, compile=True).batches(0))
            assert torch.equal(images, next(loader(batch_size, spec).batches(0))[0])
    compiled_augment.compile_gather.cache_clear()  # these are not the real thing: leave none behind
