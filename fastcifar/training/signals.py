"""SIGHUP, SIGINT and SIGTERM as a flag that the training loop checks between steps, synchronized over all ranks."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from fastcifar.errors import Interrupted
from fastcifar.models.imports import resume_command
from fastcifar.training.distributed import World

SIGNAL_SYNC_EVERY_STEPS = 10  # interval at which several ranks exchange received signals


class SignalHandler:
    """Context manager that records signals for the training loop; a second SIGINT stops immediately.

    SIGHUP, which a terminal sends when it is closed, is not recorded if it is ignored, as under nohup.
    """

    EXIT_CODES: ClassVar = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}

    def __init__(self) -> None:
        self.received_signal = self.agreed_signal = ""  # the signal this process got, and the one that stops all ranks
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            for name in self.EXIT_CODES:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                    continue
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        if self.received_signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received_signal = signal.Signals(number).name

    def interruption(self, step: int, folder: Path) -> Interrupted:
        """Return the error that ends the run in `folder`, whose checkpoint is that of `step`."""
        return Interrupted(self.agreed_signal, self.EXIT_CODES[self.agreed_signal], step, resume_command(folder))

    def sync_signal(self, world: World, step: int = 0) -> str:
        """Return the signal that ends the run after `step`, or "". Ranks agree every SIGNAL_SYNC_EVERY_STEPS steps."""
        names = ["", *self.EXIT_CODES]
        if step % SIGNAL_SYNC_EVERY_STEPS == 0 or world.world_size == 1:
            index = torch.tensor(names.index(self.received_signal))
            self.agreed_signal = names[int(world.all_reduce(index, dist.ReduceOp.MAX))]
        return self.agreed_signal
