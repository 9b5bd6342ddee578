"""Tests of drawing the next epoch in a background thread, and of the memory block that is uploaded for an epoch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastcifar.data.augment import parse_augment
from fastcifar.data.epoch_draws import ALIGNMENT, DrawAhead, PackedArrays
from fastcifar.data.loaders import LOADERS, Loader, TensorLoader

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), dtype=np.uint8)
MAIN = threading.main_thread().name


class Draws:
    """Draw function that records in which thread each epoch was drawn, and fails for the epochs in `failing`."""

    def __init__(self) -> None:
        self.threads: list[tuple[int, str]] = []
        self.failing: set[int] = set()

    def __call__(self, epoch: int) -> str:
        is_main = threading.current_thread().name == MAIN
        self.threads.append((epoch, "main" if is_main else "background"))
        time.sleep(0 if is_main else 0.1)  # the epoch is needed before the thread has finished
        if epoch in self.failing:
            raise MemoryError(f"epoch {epoch}")
        return f"draws of epoch {epoch}"


def make_loader(name: str = "tensor", spec: str = "crop:2:zero,flip,mixup", **options: Any) -> Loader:
    ops = parse_augment(spec)
    options = {"batch_size": 20, "seed": 0, "workers": 0, "compile": False, **options}
    return LOADERS[name](IMAGES, np.arange(50), augment=ops, device="cpu", **options)


def test_an_epoch_is_drawn_once_and_ahead() -> None:
    draws = Draws()
    cache = DrawAhead(draws)
    for epoch in range(3):
        for _ in range(2):
            assert cache.get(epoch) == f"draws of epoch {epoch}"
        cache.start(epoch + 1)
        cache.get(epoch)  # waits for the thread
        cache.start(epoch + 1)
    assert draws.threads == [(0, "main"), (1, "background"), (2, "background"), (3, "background")]
    cache.get(0)
    cache.get(3)
    assert draws.threads[4:] == [(0, "main"), (3, "main")], "results of earlier epochs must be discarded"


def test_an_error_in_the_thread_is_raised_where_the_epoch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    unhandled: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    draws = Draws()
    draws.failing = {1}
    cache = DrawAhead(draws)
    cache.start(1)
    assert cache.get(0) == "draws of epoch 0"
    with pytest.raises(MemoryError, match="epoch 1"):
        cache.get(1)
    draws.failing = set()
    assert cache.get(1) == "draws of epoch 1"
    assert unhandled == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork a process")
def test_a_forked_process_draws_an_epoch_whose_thread_it_does_not_have() -> None:
    program = """
import os, sys, threading
from fastcifar.data.epoch_draws import DrawAhead
proceed = threading.Event()
def draw(epoch):
    if threading.current_thread() is not threading.main_thread():
        proceed.wait()
    return epoch
cache = DrawAhead(draw)
cache.start(1)
if os.fork() == 0:
    result = cache.get(1)
    cache.start(2)
    proceed.set()
    assert (result, cache.get(2)) == (1, 2)
    sys.exit(0)  # waits for the threads of this process
status = os.waitstatus_to_exitcode(os.wait()[1])
proceed.set()
sys.exit(status or cache.get(1) - 1)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("leave", "returncode"), [("", 0), ("raise KeyboardInterrupt", -2)])
def test_the_interpreter_ends_while_an_epoch_is_drawn(leave: str, returncode: int) -> None:
    program = f"""
from fastcifar.data.epoch_draws import DrawAhead
cache = DrawAhead(lambda epoch: time.sleep(0.5))
cache.start(1)
{leave}
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == returncode


@pytest.mark.parametrize("name", LOADERS)
def test_the_next_epoch_is_drawn_while_a_loader_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOADERS[name], "chunk_images", {"cpu": 1})
    loader = make_loader(name, batch_size=5)
    draws = loader._epochs._draw
    threads: list[tuple[int, str]] = []

    def record(epoch: int) -> Any:
        threads.append((epoch, threading.current_thread().name))
        return draws(epoch)

    loader._epochs._draw = record
    for epoch in range(2):
        assert len(list(loader.batches(epoch))) == 10
    assert [epoch for epoch, _ in threads][:2] == [0, 1]
    assert [name == MAIN for _, name in threads][:2] == [True, False]


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_is_freed_when_its_last_reference_is_deleted(name: str) -> None:
    loader = make_loader(name)
    next(loader.batches(0))
    list(loader.batches(0))
    reference = weakref.ref(loader)
    del loader
    assert reference() is None, "a reference cycle would keep the images in GPU memory, and the threads of DALI"


def test_changing_a_batch_does_not_change_later_epochs() -> None:
    loader = make_loader()
    expected = [[tensor.clone() for tensor in batch] for batch in loader.batches(0)]
    for batch in loader.batches(0):
        for tensor in batch:
            tensor.zero_()
    for batch, tensors in zip(loader.batches(0), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, tensors, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_number_of_images_per_chunk_does_not_change_the_batches(
    compile: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_size": 6, "rank": rank, "world_size": 2}
    for start_step in (0, 1, 4, 8, 9):
        expected = list(make_loader(**options).batches(1, start_step))
        for chunk_images in (6, 9, 1000):
            with monkeypatch.context() as context:
                context.setattr(LOADERS["tensor"], "chunk_images", {"cpu": chunk_images})
                batches = list(make_loader(compile=compile and start_step == 1, **options).batches(1, start_step))
            for batch, tensors in zip(batches, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(batch, tensors, strict=True))


def test_packed_arrays_keep_type_shape_and_values_and_are_aligned() -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "labels": np.arange(7),
        "flip": rng.random((3, 5)) < 0.5,
        "box": rng.integers(0, 255, (3, 5, 4), dtype=np.uint8),
        "weight": rng.random(3).astype(np.float32),
        "strided": np.arange(20, dtype=np.int32)[::3],
    }
    packed = PackedArrays([{"labels": arrays["labels"]}, {}, arrays])
    first, second = packed.upload(torch.device("cpu")), packed.upload(torch.device("cpu"))
    assert [list(group) for group in first] == [["labels"], [], list(arrays)]
    for tensor in first[2].values():
        assert (tensor.data_ptr() - first[0]["labels"].data_ptr()) % ALIGNMENT == 0
        tensor.zero_()
    for name, array in arrays.items():
        assert torch.equal(second[2][name], torch.from_numpy(array.copy()))
    assert PackedArrays([]).upload(torch.device("cpu")) == []


class RecordedStream:
    """A stream of a GPU: the names of all work that is complete when its next operation starts."""

    def __init__(self) -> None:
        self.complete: set[str] = set()

    def launch(self, work: str) -> None:
        self.complete.add(work)

    def wait_stream(self, other: RecordedStream) -> None:
        self.complete |= other.complete


@pytest.mark.parametrize("num_used", [1, 3, 4])
def test_streams_wait_for_each_other_once_per_chunk(num_used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training, loading = RecordedStream(), RecordedStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    loader, started = make_loader(), {}
    assert isinstance(loader, TensorLoader)

    def gather(chunk: int) -> torch.Tensor:
        started[chunk] = set(loading.complete)
        loading.launch(f"chunk {chunk}")
        return torch.full((loader._chunk_size, 3, 32, 32), chunk, dtype=torch.uint8)

    chunks: Any = loader._gather_ahead(gather, range(4), cast(Any, loading))
    for chunk in range(num_used):
        assert next(chunks).unique().tolist() == [chunk]
        assert f"chunk {chunk}" in training.complete, "the images are used before they are complete"
        assert list(started) == list(range(min(chunk + 2, 4))), "the next chunk must be computed during this one"
        training.launch(f"training on {chunk}")
    chunks.close()
    for chunk, complete in started.items():
        # The memory of an earlier chunk may be used again; waiting for the current one would leave no overlap.
        assert complete >= {f"training on {earlier}" for earlier in range(chunk - 1)}
        assert f"training on {chunk - 1}" not in complete
        assert f"chunk {chunk}" in training.complete, "the memory is freed while it is written"


@pytest.mark.gpu
def test_a_chunk_is_not_overwritten_while_a_busy_gpu_still_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is used late: work queued in the stream before it keeps the GPU busy while the loader continues."""
    monkeypatch.setattr(LOADERS["tensor"], "chunk_images", {"cpu": 1, "cuda": 40})
    ops = parse_augment("crop:4:zero,flip,autoaugment")
    expected, actual, busy = [], [], torch.randn(4096, 4096, device="cuda")
    for device, sums in (("cpu", expected), ("cuda", actual)):
        loader = LOADERS["tensor"](IMAGES, np.arange(50), batch_size=20, augment=ops, seed=0, device=device)
        for epoch in range(20):
            for step, (images, _) in enumerate(loader.batches(epoch)):
                if device == "cuda":
                    busy = torch.tanh(busy @ busy)
                sums.append((images.long() * torch.arange(images.numel(), device=device).view_as(images)).sum())
                if (epoch + step) % 7 == 6:  # leave the epoch early
                    break
    assert torch.equal(torch.stack(actual).cpu(), torch.stack(expected))
