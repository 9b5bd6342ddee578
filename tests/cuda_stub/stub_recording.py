"""Records what the stub CUDA runtime sees, by cause: which part of the training loop makes each launch.

Used in a process with the stub preloaded.
"""

from __future__ import annotations

import ctypes
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastcifar.training.checkpoint_writer import CheckpointWriter
from fastcifar.training.optimizers import OptimizerWrapper
from fastcifar.training.step import Meter
from fastcifar.training.trainer import Trainer

OUTSIDE = "outside"  # cause of everything that is not part of an epoch's training
EVALUATION = "evaluation"
CHECKPOINT_THREAD = "checkpoint thread"  # it waits for the copy of the state, and launches nothing
# method -> cause of the launches that it makes within an epoch
CAUSES = {
    (OptimizerWrapper, "set_lr"): "learning rate",
    (OptimizerWrapper, "after_step"): "Lookahead",
    (Meter, "compute_delayed"): "metrics",
    (Trainer, "state_dict"): "checkpoint",
    (CheckpointWriter, "save"): "checkpoint",
}
CAPTURE_KINDS = (b"capture", b"captured launch")  # the start of a capture, and a launch in it
STACK_DEPTH = 6

_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
_VISITOR = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long)


class Recording:
    """Counts of the stub by cause, and the source lines of violations, synchronizations and pageable copies.

    `instrument` makes every trainer of this process report its causes.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.cuda_stub_set_listener(listener := _LISTENER(self._receive))
        self._listener = listener  # must outlive this function
        self.cause = OUTSIDE
        self.checkpoint_thread = threading.local()
        self.is_paused = False
        self.steps = self.epochs = 0
        self.events: list[dict[str, str]] = []
        self.graph_memory: list[dict[str, int]] = []  # after each optimization of a trainer
        self.set_cause(OUTSIDE)

    def _receive(self, kind: bytes, name: bytes) -> None:
        is_allowed = self.cause == OUTSIDE or hasattr(self.checkpoint_thread, "is_current")
        if kind in CAPTURE_KINDS or (is_allowed and kind != b"violation"):
            return  # such as a synchronization or pageable copy
        lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-1]]
        place = " < ".join(reversed(lines[-STACK_DEPTH:]))
        self.events.append({"kind": kind.decode(), "name": name.decode(), "cause": self.cause, "place": place})

    def reset(self) -> None:
        """Forget all counts and events."""
        self.library.cuda_stub_reset_counts()
        self.steps = self.epochs = 0
        self.events.clear()

    def set_cause(self, cause: str) -> None:
        """Attribute everything from now on to `cause`."""
        self.cause = cause
        self.library.cuda_stub_set_label(cause.encode())

    @contextmanager
    def attribute(self, cause: str) -> Iterator[None]:
        """Context in which everything is attributed to `cause`."""
        previous = self.cause
        self.set_cause(cause)
        try:
            yield
        finally:
            self.set_cause(previous)

    def document(self) -> dict[str, Any]:
        """The result: counts by cause, kind and name, and the events with their places."""
        counts: dict[str, dict[str, Counter[str]]] = {}

        @_VISITOR
        def visit(label: bytes, kind: bytes, name: bytes, count: int) -> None:
            by_kind = counts.setdefault(label.decode(), {})
            by_kind.setdefault(kind.decode(), Counter())[name.decode()] += count

        self.library.cuda_stub_visit_counts(visit)
        return {
            "steps": self.steps,
            "epochs": self.epochs,
            "counts": counts,
            "events": self.events,
            "graph_memory": self.graph_memory,
        }

    def instrument(self) -> None:
        """Wrap the methods of the training loop so that each sets its cause within an epoch."""
        for (owner, name), cause in CAUSES.items():
            setattr(owner, name, self.with_cause(getattr(owner, name), cause))
        Trainer.batches = self._record_epoch(Trainer.batches)
        Trainer.train_step = self._count_step(Trainer.train_step)
        CheckpointWriter._write = self._mark_thread(CheckpointWriter._write)
        Trainer.warm_up_loader = self._pause(Trainer.warm_up_loader)
        Trainer.optimize = self._record_graph_memory(Trainer.optimize)
        build_train_step = Trainer.build_train_step
        Trainer.build_train_step = lambda *args, **options: self.with_cause(build_train_step(*args, **options), "step")

    def with_cause(self, function: Callable[..., Any], cause: str) -> Callable[..., Any]:
        """`function`, whose events within training are attributed to `cause`."""

        def run(*args: Any, **options: Any) -> Any:
            if self.cause == OUTSIDE:
                return function(*args, **options)
            with self.attribute(cause):
                return function(*args, **options)

        return run

    def _mark_thread(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Attribute everything in the thread that runs `function` to the cause CHECKPOINT_THREAD."""

        def run(*args: Any) -> Any:
            self.checkpoint_thread.is_current = True
            self.library.cuda_stub_set_thread_label(CHECKPOINT_THREAD.encode())
            return function(*args)

        return run

    def _record_epoch(self, batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def run(*args: Any, **options: Any) -> Iterator[Any]:
            if self.is_paused:
                yield from batches(*args, **options)
                return
            self.epochs += 1
            previous = self.cause
            self.set_cause("first batch")
            try:
                for batch in batches(*args, **options):
                    self.set_cause("between steps")
                    yield batch
                    self.set_cause("next batch")
            finally:
                self.set_cause(previous)

        return run

    def _count_step(self, train_step: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            self.steps += not self.is_paused
            train_step(*args)

        return run

    def _record_graph_memory(self, optimize: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            optimize(*args, **options)
            torch._C._cuda_clearCublasWorkspaces()
            segments = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
            self.graph_memory.append(
                {
                    "pools": len({tuple(segment["segment_pool_id"]) for segment in segments}),
                    "reserved_bytes": sum(segment["total_size"] for segment in segments),
                    "live_bytes": sum(segment["allocated_size"] for segment in segments),
                }
            )

        return run

    def _pause(self, function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            self.is_paused = True
            try:
                function(*args)
            finally:
                self.is_paused = False

        return run
