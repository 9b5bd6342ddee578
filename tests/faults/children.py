"""What runs in a process of its own, to be killed: each is forked from a server that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
# with what a first run would import for two seconds; none of it computes, so no threads are forked
SERVER.set_forkserver_preload(["torch._dynamo", "fastcifar.training.train", "fastcifar.cli.tables"])

TINY = ("--data", "synthetic:200", "--val-size", "40", "--arch", "resnet", "--blocks", "1,1", "--channels", "8,16",
        "--batch-size", "32", "--dropout", "0.1", "--no-compile", "--precision", "fp32", "--device", "cpu")  # fmt: skip


def start(work: Callable[..., None], *arguments: Any) -> Any:
    """`work(*arguments)` in a process of its own: `.pid`, `.join(seconds)`, `.exitcode` (minus the signal)."""
    process = SERVER.Process(target=work, args=arguments)
    process.start()
    return process


def ended(process: Any, seconds: float = 120) -> int:
    """The exit code of a process that must end in time."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Until `condition()` is true, which must be in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing came of it"
        time.sleep(0.005)


def fastcifar(output: Path, pause_s: float, *arguments: str) -> None:
    """The command line, with stdout and stderr in the file `output`; each training step takes `pause_s` longer."""
    import torch

    from fastcifar.cli import app
    from fastcifar.training.optimizers import OptimizerWrapper

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["fastcifar", *arguments]
    between_steps = OptimizerWrapper.after_step

    def slower(self: OptimizerWrapper, *given: Any) -> None:
        between_steps(self, *given)
        time.sleep(pause_s)

    OptimizerWrapper.after_step = slower  # type: ignore[method-assign]
    try:
        app.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def train(output: Path, *arguments: str, pause_s: float = 0.0) -> Any:
    """`fastcifar train` of the tiny network in a process of its own."""
    return start(fastcifar, output, pause_s, "train", *TINY, *arguments)


def save_and_die(folder: Path, call: int) -> None:
    """Saves a second checkpoint and is killed by SIGKILL when it makes its C call number `call`."""
    from fastcifar.training import checkpoint

    left = [call]

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    state = checkpoint_state(2.0)
    sys.setprofile(count)
    checkpoint.save_checkpoint(folder / "last.pt", state)
    sys.setprofile(None)


def checkpoint_state(value: float) -> dict[str, Any]:
    """A small checkpoint whose one weight holds `value`."""
    import torch

    return {"recipe": {"arch": "mine"}, "model": {"weight": torch.full((30, 20), value)}, "ema": None, "step": 7}
