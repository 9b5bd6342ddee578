"""Functions that tests run in separate processes and kill; a fork server that has imported torch starts them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
# Modules whose import takes two seconds; importing them starts no threads, which must not exist before a fork
SERVER.set_forkserver_preload(["torch._dynamo", "fastcifar.training.train", "fastcifar.cli.tables"])

TINY = ("--data", "synthetic:200", "--val-size", "40", "--arch", "resnet", "--blocks", "1,1", "--channels", "8,16",
        "--batch-size", "32", "--dropout", "0.1", "--no-compile", "--precision", "fp32", "--device", "cpu",
        "--no-plots")  # fmt: skip


def start(work: Callable[..., None], *arguments: Any) -> Any:
    """Start `work(*arguments)` in a separate process and return the `multiprocessing` process."""
    process = SERVER.Process(target=work, args=arguments)
    process.start()
    return process


def wait_for_exit(process: Any, timeout_s: float = 400) -> int:
    """Return the exit code of `process`; kill it and raise `AssertionError` if it does not end in time."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {timeout_s} s")
    return process.exitcode


def wait_for(condition: Callable[[], Any], timeout_s: float = 400) -> None:
    """Wait until `condition()` is true; raise `AssertionError` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition is still false after {timeout_s} s"
        time.sleep(0.005)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fastcifar(output: Path, pause_s: float, *arguments: str) -> None:
    """Run the command line with stdout and stderr in the file `output`; each training step takes `pause_s` longer."""
    import torch

    from fastcifar.cli import app
    from fastcifar.training.optimizers import OptimizerWrapper

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["fastcifar", *arguments]
    after_step = OptimizerWrapper.after_step

    def after_step_with_pause(self: OptimizerWrapper, *args: Any) -> None:
        after_step(self, *args)
        time.sleep(pause_s)

    OptimizerWrapper.after_step = after_step_with_pause  # type: ignore[method-assign]
    try:
        app.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_fastcifar(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process and wait for it.

    A fork of the server takes a tenth of the time of `python -m fastcifar`, which imports torch. The variables
    FASTCIFAR_DATA and FORCE_COLOR are not set, and those of `environment` are.
    """
    plain = {key: value for key, value in os.environ.items() if key not in ("FASTCIFAR_DATA", "FORCE_COLOR")}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start(run_in_child, files, cwd or Path.cwd(), {**plain, **environment}, arguments)
        code = wait_for_exit(process)
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


def run_in_child(files: list[Path], cwd: Path, environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    """Run the command line in this process, in the folder `cwd`, with stdout and stderr in `files`."""
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    from fastcifar.cli import app

    sys.argv = ["fastcifar", *arguments]
    app.main()


def train(output: Path, *arguments: str, pause_s: float = 0.0) -> Any:
    """Start `fastcifar train` with the tiny network in a separate process."""
    return start(fastcifar, output, pause_s, "train", *TINY, *arguments)


def train_rank(rank: int, world_size: int, port: int, folder: Path, captured: bool) -> None:
    """Train for two epochs as one of several ranks and save the parameters in `folder`.

    With `captured`, use the steps of a GPU; where these would be captured and replayed, functions are called.
    """
    from dataclasses import replace

    import torch

    from fastcifar.recipe import Recipe
    from fastcifar.training import cuda_graph
    from fastcifar.training.build import build_trainer
    from fastcifar.training.distributed import process_group
    from fastcifar.training.resolve import resolve

    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    cuda_graph.capture_cuda_graph = lambda work: work
    recipe = Recipe.make(
        arch="resnet", blocks=(1, 1), channels=(8, 16), data="synthetic:148", val_size=0, batch_size=30, epochs=2,
        lr=0.01, image_size="24:1,32", device="cpu", precision="fp32", compile=False,
    )  # fmt: skip
    with process_group("cpu"):
        trainer = build_trainer(resolve(recipe))
        if captured:
            trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, cuda_graph=True))
        trainer.optimize()
        for epoch in range(recipe.epochs):
            trainer.progress.epoch, trainer.progress.epoch_step = epoch, 0
            for batch in trainer.batches(epoch):
                trainer.train_step(batch)
        torch.save(dict(trainer.model.named_parameters()), folder / f"{rank}.pt")


def save(folder: Path, value: float, in_thread: bool, profile: Callable[..., object] | None = None) -> None:
    """Save `checkpoint_state(value)` as last.pt, or in a thread also as best.pt.

    `profile` is called for every call of a function in the thread that writes; see `sys.setprofile`.
    """
    from fastcifar.training import checkpoint
    from fastcifar.training.checkpoint_writer import CheckpointWriter

    state, last = checkpoint_state(value), folder / "last.pt"
    threading.setprofile(profile)
    if in_thread:
        writer = CheckpointWriter()
        writer.save([folder / "best.pt", last], state)
        writer.wait()
    else:
        sys.setprofile(profile)
        checkpoint.save_checkpoint(last, state)
        sys.setprofile(None)
    threading.setprofile(None)


def save_and_kill(folder: Path, call: int, in_thread: bool) -> None:
    """Save a checkpoint and send SIGKILL to this process at C function call number `call` of the thread that writes."""
    remaining_calls = [call]

    def kill_at_call(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call":
            remaining_calls[0] -= 1
            if remaining_calls[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    save(folder, 2.0, in_thread, kill_at_call)


def checkpoint_state(value: float) -> dict[str, Any]:
    """Return a small checkpoint whose only weight is filled with `value`."""
    import torch

    model, meter = {"weight": torch.full((30, 20), value)}, torch.zeros(4, dtype=torch.float64)
    return {"recipe": {"arch": "custom"}, "model": model, "ema": None, "meter": meter, "step": 7}
