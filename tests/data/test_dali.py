"""Tests of the DALI loader: its batches equal those of the tensor loader for any chunk size and order of requests, and
its threads start and stop as documented."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.data.augment import parse_augment
from fastcifar.data.dali import DALI_OPS, DaliLoader, count_dali_ops, pad_reflect
from fastcifar.data.loaders import TensorLoader
from fastcifar.errors import DeviceError
from fastcifar.recipe import Recipe
from fastcifar.training.dry_run import measure_step_timing
from fastcifar.training.train import train
from fastcifar.training.trainer import Trainer

pytest.importorskip("nvidia.dali", reason="DALI does not import here")

N = 110
FILL = (125, 7, 255)
SPEC = "crop:4:zero,flip,cutout:8:mean"
LABELS = np.arange(N)
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 3, 32, 32), dtype=np.uint8)
IMAGES.flags.writeable = False
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
Batch = tuple[torch.Tensor, ...]


def make_loader(kind: type, spec: str = SPEC, batch_size: int = 20, device: str = "cpu", **options: Any) -> Any:
    options = {"seed": 0, "compile": False, **options}
    return kind(
        IMAGES, LABELS, batch_size=batch_size, augment=parse_augment(spec), device=device, fill_color=FILL, **options
    )


def dali_loader(*args: Any, chunk_size: int = 0, max_threads: int = 4, **options: Any) -> DaliLoader:
    class Loader(DaliLoader):
        pass

    Loader.max_threads = max_threads
    if chunk_size:
        Loader.chunk_images = {"cpu": chunk_size, "cuda": chunk_size}
    return make_loader(Loader, *args, **options)


def tensor_loader(*args: Any, **options: Any) -> TensorLoader:
    return make_loader(TensorLoader, *args, **options)


def count_differences(a: Iterator[Batch], b: Iterator[Batch]) -> int:
    """Count the elements of images and labels that differ; numbers and shapes of the batches must be equal."""
    total = 0
    for batch_a, batch_b in zip(a, b, strict=True):
        for x, y in zip(batch_a, batch_b, strict=True):
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
            total += int((x != y).sum())
    return total


def count_threads() -> int:
    for thread in threading.enumerate():
        if thread.name == "fastcifar-draw-epoch":
            thread.join()
    return len(os.listdir("/proc/self/task"))


def has_threads(count: int) -> bool:
    """Return whether `count` threads run after at most ten seconds: an ended thread is listed a little longer."""
    deadline = time.monotonic() + 10
    while count_threads() != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return count_threads() == count


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("spec", "num_dali_ops"),
    [
        (SPEC, 3),
        ("crop:3:reflect,flip:0.5:alternating,cutout:5:zero", 3),
        ("crop:16:reflect,crop:1:zero", 2),
        ("cutout:7:zero,flip,crop:4:zero", 3),
        ("flip,flip:0.3,cutout:31:mean", 3),
        ("flip,crop:4:reflect,cutout", 1),
        ("crop,flip,erase:0.4:gray,erase:1.0:mean", 4),
        ("crop:4:zero,rotate:20,flip", 1),
        ("none", 0),
    ],
)
def test_batches_equal_the_tensor_loader(device: str, spec: str, num_dali_ops: int) -> None:
    assert count_dali_ops(parse_augment(spec)) == num_dali_ops
    loader, expected = dali_loader(spec, device=device, chunk_size=45), tensor_loader(spec, device=device)
    for epoch in (0, 1, 2):
        start = 2 if epoch == 2 else 0
        assert count_differences(loader.batches(epoch, start), expected.batches(epoch, start)) == 0


@pytest.mark.parametrize(("name", "variant"), DALI_OPS)
def test_every_dali_op_is_exact(name: str, variant: str) -> None:
    spec = f"{name}:{0.5 if name in ('flip', 'erase') else 9}:{variant}"
    assert count_dali_ops(parse_augment(spec)) == 1
    assert count_differences(dali_loader(spec).batches(0), tensor_loader(spec).batches(0)) == 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_chunk_size_threads_and_ranks_do_not_change_the_batches(device: str) -> None:
    expected = list(tensor_loader(batch_size=24, device=device).batches(1))
    for options in ({"chunk_size": 1}, {"chunk_size": 50, "max_threads": 1}, {"chunk_size": 10_000, "max_threads": 3}):
        assert count_differences(dali_loader(batch_size=24, device=device, **options).batches(1), iter(expected)) == 0
    for rank in range(4):
        share = ((images[rank::4], labels[rank::4]) for images, labels in expected)
        loader = dali_loader(batch_size=24, device=device, rank=rank, world_size=4, chunk_size=12)
        assert count_differences(loader.batches(1), share) == 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_epochs_in_any_order_and_batches_are_not_overwritten(device: str) -> None:
    loader, expected = dali_loader(chunk_size=20, device=device), tensor_loader(device=device)
    kept = list(loader.batches(5))
    for epoch, start in ((6, 0), (6, 3), (0, 1), (6, 0), (7, 6), (7, 0)):
        assert count_differences(loader.batches(epoch, start), expected.batches(epoch, start)) == 0
    for batch_0, batch_1, expected_0, expected_1 in zip(
        loader.batches(0), loader.batches(1), expected.batches(0), expected.batches(1), strict=True
    ):
        assert count_differences(iter([batch_0, batch_1]), iter([expected_0, expected_1])) == 0
    del loader
    assert count_differences(iter(kept), expected.batches(5)) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_remaining_augmentations_are_compiled_once() -> None:
    spec = "flip,crop:4:reflect"
    compiled, eager = dali_loader(spec, compile=True, chunk_size=50), tensor_loader(spec)
    next(compiled.batches(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for epoch in range(2):
            assert count_differences(compiled.batches(epoch), eager.batches(epoch)) == 0


@pytest.mark.parametrize("padding", [1, 4, 16])
def test_pad_reflect_equals_numpy(padding: int) -> None:
    expected = np.pad(IMAGES[:5], ((0, 0), (0, 0), (padding, padding), (padding, padding)), mode="reflect")
    assert np.array_equal(pad_reflect(IMAGES[:5], padding), expected)


def exhaust(batches: Iterator[Batch]) -> None:
    for _ in batches:
        pass


def break_off(batches: Iterator[Batch]) -> None:
    for _ in batches:
        break


def interrupt(batches: Iterator[Batch]) -> None:
    def loop() -> None:
        for _ in batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()


def test_threads_persist_over_epochs_and_stop_with_the_loader_or_an_unfinished_epoch() -> None:
    before, loader = count_threads(), dali_loader()
    assert count_threads() == before, "threads before the first batch prevent a CUDA graph capture"
    exhaust(loader.batches(0))
    running = count_threads()
    assert running > before
    for epoch in range(1, 4):
        exhaust(loader.batches(epoch))
        assert count_threads() == running
    for leave in (break_off, interrupt):
        leave(loader.batches(0))
        assert has_threads(before)
        assert count_differences(loader.batches(4), tensor_loader().batches(4)) == 0
    del loader
    assert has_threads(before)


def test_an_error_in_the_source_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before, loader = count_threads(), dali_loader(chunk_size=20)
    batches = loader.batches(0)
    next(batches)
    monkeypatch.setattr(loader._source, "images", IMAGES[:0])
    started = time.perf_counter()
    with pytest.raises(IndexError):
        exhaust(batches)
    assert time.perf_counter() - started < 5
    assert has_threads(before)
    monkeypatch.undo()
    assert count_differences(loader.batches(0), tensor_loader().batches(0)) == 0


def test_fault18_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(
        DeviceError, match=r"nvidia.dali cannot be imported .* use --loader tensor, or on Linux pip"
    ) as caught:
        dali_loader()
    assert caught.value.exit_code == 8


@pytest.mark.slow
def test_dali_is_not_imported_before_a_loader_is_created() -> None:
    code = (
        "import sys, numpy as np; from fastcifar.data.loaders import LOADERS; assert 'nvidia.dali' not in sys.modules;"
        "loader = LOADERS['dali'](np.zeros((8,3,32,32), np.uint8), np.arange(8), batch_size=4, augment=(), seed=0,"
        "device='cpu'); assert 'nvidia.dali' in sys.modules; it = loader.batches(0); next(it); print('left open')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "left open\n", "")


@pytest.mark.medium
def test_a_run_equals_a_run_with_the_tensor_loader(tiny: Callable[..., Recipe]) -> None:
    expected, summary = train(tiny()), train(tiny(loader="dali"))
    assert (expected.loader, summary.loader) == ("tensor", "dali")
    assert (summary.test_loss, summary.val_acc) == (expected.test_loss, expected.val_acc)


@pytest.mark.medium
@pytest.mark.parametrize("with_autotuning", [False, True])
def test_a_run_builds_one_pipeline_after_the_step_is_optimized(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, with_autotuning: bool
) -> None:
    """Also if steps are timed before the first epoch, after which the step is compiled and captured once more."""
    events, build, optimize = [], DaliLoader._build_pipeline, Trainer.optimize

    def autotune(trainer: Trainer) -> None:
        measure_step_timing(trainer)
        trainer.optimize(start_loader=False)

    monkeypatch.setattr(DaliLoader, "_build_pipeline", lambda self: events.append("pipeline") or build(self))
    monkeypatch.setattr(
        Trainer, "optimize", lambda *args, **options: events.append("step") or optimize(*args, **options)
    )
    if with_autotuning:
        monkeypatch.setattr("fastcifar.training.train.autotune", autotune)
    train(tiny(loader="dali", epochs=2, image_size="24:1,32"))
    assert events == ["step", *(["step"] if with_autotuning else []), "pipeline"]


@pytest.mark.gpu
def test_a_run_on_the_gpu_captures_its_step_before_dali_starts(tiny: Callable[..., Recipe]) -> None:
    options = {"device": "cuda", "cuda_graph": True, "compile": True, "drop_last": True}
    summary = train(tiny(loader="dali", **options))
    assert (summary.loader, summary.cuda_graph) == ("dali", True)
    assert summary.test_loss == pytest.approx(train(tiny(loader="tensor", **options)).test_loss, rel=1e-2)


@pytest.mark.gpu
def test_cuda_graph_capture_while_dali_runs() -> None:
    from fastcifar.training.cuda_graph import capture_cuda_graph

    loader = dali_loader(device="cuda", chunk_size=20)
    batches = loader.batches(0)
    first, total = next(batches), torch.zeros((), device="cuda")
    static = first[0].clone()
    torch.cuda.synchronize()
    replay = capture_cuda_graph(lambda: total.add_(static.sum()))
    replay()
    assert int(total) == int(static.sum())
    assert count_differences(batches, tensor_loader(device="cuda").batches(0, 1)) == 0


@pytest.mark.gpu
def test_dali_does_not_reuse_memory_that_a_busy_gpu_still_needs() -> None:
    """Every batch is used late: work queued in the stream before it keeps the GPU busy while DALI continues."""
    loader, expected, busy = dali_loader(device="cuda", chunk_size=20), [], torch.randn(4096, 4096, device="cuda")
    actual = []
    for epoch in range(20):
        for images, _ in loader.batches(epoch):
            busy = torch.tanh(busy @ busy)
            actual.append((images.float() * torch.arange(images.numel(), device="cuda").view_as(images)).sum())
    for epoch in range(20):
        for images, _ in tensor_loader(device="cuda").batches(epoch):
            expected.append((images.float() * torch.arange(images.numel(), device="cuda").view_as(images)).sum())
    assert torch.equal(torch.stack(actual), torch.stack(expected))


def test_a_memory_map_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    loader = DaliLoader(
        mapped, LABELS, batch_size=20, augment=parse_augment(SPEC), seed=0, device="cpu", fill_color=FILL
    )
    assert np.shares_memory(loader._source.images, mapped)
    assert count_differences(loader.batches(0), tensor_loader().batches(0)) == 0
