"""SIGINT and SIGTERM as something that the loop asks for between steps, one answer for all ranks of a run."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

from fastcifar.errors import Interrupted
from fastcifar.training.distributed import World
from fastcifar.training.run_dir import Run

AGREE_EVERY = 10  # steps after which several ranks look whether one of them was told to stop


class Stop:
    """SIGINT and SIGTERM as a flag that the loop reads between steps; a second SIGINT stops at once.

    `caught`: the signal that this process has got. `signal`: the one that the run stops by.
    """

    CODES: ClassVar = {"SIGINT": 130, "SIGTERM": 143}

    def __init__(self) -> None:
        self.caught = self.signal = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in self.CODES:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _: FrameType | None) -> None:
        if self.caught == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number).name

    def asked(self, world: World, step: int = 0) -> str:
        """The signal to stop by after `step`, "" if there is none.

        Several ranks agree on one every AGREE_EVERY steps: none may leave while another waits for its gradients.
        """
        names = ["", *self.CODES]
        if step % AGREE_EVERY == 0 or world.ranks == 1:
            self.signal = names[world.largest(names.index(self.caught))]
        return self.signal

    def interruption(self, run: Run, step: int) -> Interrupted:
        """The error that ends the process with the signal's exit code, once the checkpoint is written."""
        return Interrupted(self.signal, self.CODES[self.signal], step, str(run.checkpoint("last")))
