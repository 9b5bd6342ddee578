"""SIGINT and SIGTERM as something that the loop asks for between steps, one answer for all ranks of a run."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

from fastcifar.errors import Interrupted
from fastcifar.training.distributed import World
from fastcifar.training.run_dir import Run

SIGNAL_SYNC_EVERY_STEPS = 10  # steps after which several ranks look whether one of them was told to stop


class SignalHandler:
    """SIGINT and SIGTERM as a flag that the loop reads between steps; a second SIGINT stops at once.

    `caught`: the signal that this process has got. `signal`: the one that the run stops by.
    """

    EXIT_CODES: ClassVar = {"SIGINT": 130, "SIGTERM": 143}

    def __init__(self) -> None:
        self.received_signal = self.agreed_signal = ""
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            for name in self.EXIT_CODES:
                number = signal.Signals[name]
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        if self.received_signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received_signal = signal.Signals(number).name

    def sync_signal(self, world: World, step: int = 0) -> str:
        """The signal to stop by after `step`, "" if there is none.

        Several ranks agree on one every AGREE_EVERY steps: none may leave while another waits for its gradients.
        """
        names = ["", *self.EXIT_CODES]
        if step % SIGNAL_SYNC_EVERY_STEPS == 0 or world.world_size == 1:
            self.agreed_signal = names[world.all_reduce_max(names.index(self.received_signal))]
        return self.agreed_signal

    def interrupted_error(self, run: Run, step: int) -> Interrupted:
        """The error that ends the process with the signal's exit code, once the checkpoint is written."""
        return Interrupted(
            self.agreed_signal, self.EXIT_CODES[self.agreed_signal], step, str(run.checkpoint_path("last"))
        )
