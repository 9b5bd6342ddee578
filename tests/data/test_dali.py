"""DALI's batches are the tensor loader's, whatever the chunk or the order of asking; its threads come and go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar.data import cifar
from fastcifar.data.augment import parse_augment
from fastcifar.data.dali import DALI_OPS, DaliLoader, DaliPipeline, count_dali_ops, pad_reflect
from fastcifar.data.loaders import TensorLoader
from fastcifar.errors import DeviceError
from fastcifar.recipe import Recipe
from fastcifar.training.train import train

pytest.importorskip("nvidia.dali", reason="DALI does not import here")

N = 110
FILL = (125, 7, 255)
SPEC = "crop:4:zero,flip,cutout:8:mean"
LABELS = np.arange(N)
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 3, 32, 32), dtype=np.uint8)
IMAGES.flags.writeable = False
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
Batch = tuple[torch.Tensor, ...]


def made(kind: type, spec: str = SPEC, batch_size: int = 20, device: str = "cpu", **settings: Any) -> Any:
    settings = {"seed": 0, "compile": False, **settings}
    return kind(
        IMAGES, LABELS, batch_size=batch_size, augment=parse_augment(spec), device=device, fill_color=FILL, **settings
    )


def dali(*arguments: Any, **settings: Any) -> DaliLoader:
    return made(DaliLoader, *arguments, **settings)


def tensor(*arguments: Any, **settings: Any) -> TensorLoader:
    return made(TensorLoader, *arguments, **settings)


def differing(a: Iterator[Batch], b: Iterator[Batch]) -> int:
    """Elements of images and labels that differ; the batches must be as many and of the same shapes."""
    total = 0
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
            total += int((x != y).sum())
    return total


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("spec", "inside"),
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
def test_batches_are_the_tensor_loaders(device: str, spec: str, inside: int) -> None:
    assert count_dali_ops(parse_augment(spec)) == inside
    ours, theirs = dali(spec, device=device, chunk_size=45), tensor(spec, device=device)
    for epoch in (0, 1, 2):
        start = 2 if epoch == 2 else 0
        assert differing(ours.batches(epoch, start), theirs.batches(epoch, start)) == 0


@pytest.mark.parametrize(("name", "word"), DALI_OPS)
def test_every_face_is_exact_alone(name: str, word: str) -> None:
    spec = f"{name}:{0.5 if name in ('flip', 'erase') else 9}:{word}"
    assert count_dali_ops(parse_augment(spec)) == 1
    assert differing(dali(spec).batches(0), tensor(spec).batches(0)) == 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_chunk_threads_and_ranks_change_nothing(device: str) -> None:
    whole = list(tensor(batch_size=24, device=device).batches(1))
    for settings in ({"chunk_size": 1}, {"chunk_size": 50, "num_threads": 1}, {"chunk_size": 10_000, "num_threads": 3}):
        assert differing(dali(batch_size=24, device=device, **settings).batches(1), iter(whole)) == 0
    for rank in range(4):
        share = ((images[rank::4], labels[rank::4]) for images, labels in whole)
        assert (
            differing(dali(batch_size=24, device=device, rank=rank, world_size=4, chunk_size=12).batches(1), share) == 0
        )


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_any_epoch_at_any_time_and_batches_stay_as_they_were(device: str) -> None:
    ours, theirs = dali(chunk_size=20, device=device), tensor(device=device)
    held = list(ours.batches(5))
    for epoch, start in ((6, 0), (6, 3), (0, 1), (6, 0), (7, 6), (7, 0)):
        assert differing(ours.batches(epoch, start), theirs.batches(epoch, start)) == 0
    for one, other, first, second in zip(
        ours.batches(0), ours.batches(1), theirs.batches(0), theirs.batches(1), strict=True
    ):
        assert differing(iter([one, other]), iter([first, second])) == 0
    del ours
    assert differing(iter(held), theirs.batches(5)) == 0


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile")
def test_ops_after_dalis_are_compiled_once() -> None:
    spec = "flip,crop:4:reflect"
    compiled, plain = dali(spec, compile=True, chunk_size=50), tensor(spec)
    next(compiled.batches(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for epoch in range(2):
            assert differing(compiled.batches(epoch), plain.batches(epoch)) == 0


@pytest.mark.parametrize("margin", [1, 4, 16])
def test_the_source_reflects_as_numpy_does(margin: int) -> None:
    wanted = np.pad(IMAGES[:5], ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="reflect")
    assert np.array_equal(pad_reflect(IMAGES[:5], margin), wanted)


def ended(it: Iterator[Batch]) -> None:
    for _ in it:
        pass


def broken(it: Iterator[Batch]) -> None:
    for _ in it:
        break


def interrupted(it: Iterator[Batch]) -> None:
    def loop() -> None:
        for _ in it:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()


def test_threads_stay_over_epochs_and_end_with_the_loader_or_an_unfinished_epoch() -> None:
    before, ours = threads(), dali()
    assert threads() == before, "threads before the first batch: a capture could not follow"
    ended(ours.batches(0))
    running = threads()
    assert running > before
    for epoch in range(1, 4):
        ended(ours.batches(epoch))
        assert threads() == running
    for leave in (broken, interrupted):
        leave(ours.batches(0))
        assert threads() == before
        assert differing(ours.batches(4), tensor().batches(4)) == 0
    del ours
    assert threads() == before


def test_a_failing_source_is_an_error_at_once_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    before, ours = threads(), dali(chunk_size=20)
    it = ours.batches(0)
    next(it)
    monkeypatch.setattr(ours._source, "images", IMAGES[:0])
    started = time.perf_counter()
    with pytest.raises(IndexError):
        ended(it)
    assert time.perf_counter() - started < 5
    assert threads() == before
    monkeypatch.undo()
    assert differing(ours.batches(0), tensor().batches(0)) == 0


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended(dali().batches(0))


def test_fault18_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(
        DeviceError, match=r"nvidia.dali cannot be imported .* use --loader tensor, or on Linux pip"
    ) as it:
        dali()
    assert it.value.exit_code == 8


def test_dali_is_not_imported_before_a_loader_is_made() -> None:
    code = (
        "import sys, numpy as np; from fastcifar.data.loaders import LOADERS; assert 'nvidia.dali' not in sys.modules;"
        "made = LOADERS['dali'](np.zeros((8,3,32,32), np.uint8), np.arange(8), batch_size=4, augment=(), seed=0,"
        "device='cpu'); assert 'nvidia.dali' in sys.modules; it = made.batches(0); next(it); print('left open')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "left open\n", "")


def test_a_run_equals_the_tensor_loaders(tiny: Callable[..., Recipe]) -> None:
    plain, other = train(tiny()), train(tiny(loader="dali"))
    assert (plain["loader"], other["loader"]) == ("tensor", "dali")
    assert (other["test_loss"], other["val_acc"]) == (plain["test_loss"], plain["val_acc"])


def test_a_run_starts_dali_once(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], DaliPipeline._build_pipeline
    monkeypatch.setattr(DaliPipeline, "_build_pipeline", lambda self, plan: built.append(plan) or build(self, plan))
    train(tiny(loader="dali", epochs=2))
    assert len(built) == 1


@pytest.mark.gpu
def test_a_run_on_the_gpu_captures_its_step_before_dali_starts(tiny: Callable[..., Recipe]) -> None:
    settings = {"device": "cuda", "cuda_graph": True, "compile": True, "drop_last": True}
    summary = train(tiny(loader="dali", **settings))
    assert (summary["loader"], summary["cuda_graph"]) == ("dali", True)
    assert summary["test_loss"] == pytest.approx(train(tiny(loader="tensor", **settings))["test_loss"], rel=1e-2)


@pytest.mark.gpu
def test_a_capture_while_dali_runs() -> None:
    from fastcifar.training.cuda_graph import capture_cuda_graph

    ours = dali(device="cuda", chunk_size=20)
    it = ours.batches(0)
    first, total = next(it), torch.zeros((), device="cuda")
    static = first[0].clone()
    torch.cuda.synchronize()
    replay = capture_cuda_graph(lambda: total.add_(static.sum()))
    replay()
    assert int(total) == int(static.sum())
    assert differing(it, tensor(device="cuda").batches(0, 1)) == 0


@pytest.mark.gpu
def test_a_busy_gpu_does_not_see_dalis_memory_reused() -> None:
    """Every batch is used late: behind it in the stream lies work that keeps the GPU busy while DALI goes on."""
    ours, wanted, busy = dali(device="cuda", chunk_size=20), [], torch.randn(4096, 4096, device="cuda")
    seen = []
    for epoch in range(20):
        for images, _ in ours.batches(epoch):
            busy = torch.tanh(busy @ busy)
            seen.append((images.float() * torch.arange(images.numel(), device="cuda").view_as(images)).sum())
    for epoch in range(20):
        for images, _ in tensor(device="cuda").batches(epoch):
            wanted.append((images.float() * torch.arange(images.numel(), device="cuda").view_as(images)).sum())
    assert torch.equal(torch.stack(seen), torch.stack(wanted))


@pytest.mark.skipif("FASTCIFAR_DATA" not in os.environ, reason="needs the real images: FASTCIFAR_DATA is not set")
@pytest.mark.filterwarnings("ignore:.*unofficial files")
def test_three_epochs_of_the_real_images_across_a_resume() -> None:
    split = cifar.load_dataset(None, "cifar10").train
    ops = parse_augment("crop:4:reflect,flip,cutout:8:mean")

    def loader(kind: type, **settings: Any) -> Any:
        return kind(
            split.images, split.labels, batch_size=512, augment=ops, seed=1, device="cpu", fill_color=FILL, **settings
        )

    theirs, ours = loader(TensorLoader), loader(DaliLoader)
    for epoch in (0, 1):
        assert differing(ours.batches(epoch), theirs.batches(epoch)) == 0
    resumed = loader(DaliLoader, chunk_size=2000)
    assert differing(resumed.batches(2, 49), theirs.batches(2, 49)) == 0


def test_a_memory_map_is_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    loader = DaliLoader(
        mapped, LABELS, batch_size=20, augment=parse_augment(SPEC), seed=0, device="cpu", fill_color=FILL
    )
    assert np.shares_memory(loader._source.images, mapped)
    assert differing(loader.batches(0), tensor().batches(0)) == 0
