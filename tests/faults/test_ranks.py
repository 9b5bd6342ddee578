"""Two processes, also started by torchrun: training equals a single process, and a killed process loses no progress."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastcifar.data import cifar, splits
from fastcifar.data.augment import parse_augment
from fastcifar.data.cifar_files import Split
from fastcifar.data.loaders import TensorLoader
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve
from fastcifar.training.run_dir import Clock
from tests.faults import children
from tests.faults.runs import rows

pytestmark = pytest.mark.xdist_group("processes")
SMALL = ("--arch", "resnet", "--blocks", "1,1", "--channels", "8,16", "--se", "block")
PLAIN = ("--device", "cpu", "--precision", "fp32", "--no-compile", "--no-plots", "--json")
REAL = pytest.param(
    os.environ.get("FASTCIFAR_DATA"),
    marks=pytest.mark.skipif("FASTCIFAR_DATA" not in os.environ, reason="FASTCIFAR_DATA is not set"),
    id="real",
)


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Start torchrun with two processes, which run `arguments`, in a new session."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def train_in_two_processes(
    folder: Path, *arguments: str, max_file_bytes: int = resource.RLIM_INFINITY
) -> tuple[list[int], str, str]:
    """Run `fastcifar train` as two ranks, without torchrun; return the exit codes, and what both print.

    Their files are at most `max_file_bytes` long.
    """
    folder.mkdir()
    port = children.free_port()
    files = [[folder / f"{rank}.{stream}" for stream in ("out", "err")] for rank in range(2)]
    ranks = [children.start(train_rank, rank, port, files[rank], max_file_bytes, arguments) for rank in range(2)]
    codes = [children.wait_for_exit(rank) for rank in ranks]
    out, errors = ("".join(file.read_text() for file in stream) for stream in zip(*files, strict=True))
    return codes, out, errors


def train_rank(rank: int, port: int, files: list[Path], max_file_bytes: int, arguments: tuple[str, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in values.items()}}
    children.run_in_child(files, Path.cwd(), environment, ("train", *SMALL, *PLAIN, *arguments))


def wait(process: subprocess.Popen[str], timeout_s: float = 400) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of `process`; kill its session after `timeout_s` seconds."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("data", ["synthetic:500", REAL])
def test_fault20_two_processes_equal_one_process_that_averages_gradients(data: str, tmp_path: Path) -> None:
    """Compare the weights after ten float32 steps within 1e-6; the running statistics are those of rank 0."""
    out = tmp_path / "run"
    arguments = ["--data", data, "--val-size", "68", "--batch-size", "48", "--max-steps", "10", "--lr", "1e-3"]
    arguments += ["--optimizer", "sgd", "--schedule", "constant", "--augment", "crop:4:zero,flip", "--out", str(out)]
    codes, printed, errors = train_in_two_processes(tmp_path / "ranks", *arguments)
    assert codes == [0, 0], errors
    lines = printed.strip().splitlines()
    assert len(lines) == 1, "only the main process may print"
    assert json.loads(lines[0])["steps"] == 10
    trained = load_file(out / "weights.safetensors")
    expected = reference_state_dict(Recipe.make(str(out / "recipe.toml"), max_steps=None))
    assert trained.keys() == expected.keys()
    for key, value in expected.items():
        rtol = 1e-5 if "running" in key else 0
        assert torch.allclose(trained[key].double(), value.double(), rtol=rtol, atol=1e-6), key


def reference_state_dict(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the state dict of rank 0 after ten steps, computed in one process with torch alone.

    It uses neither `distributed` nor `step` of fastcifar.
    """
    dataset = cifar.load_dataset(recipe.data)
    index, _ = splits.stratified_split(dataset.train.labels, recipe.val_size or 0, recipe.val_seed)
    split = Split(dataset.train.images[index], dataset.train.labels[index])
    torch.manual_seed(recipe.seed)
    network = {"blocks": recipe.blocks, "channels": recipe.channels, "se": recipe.se}
    models = [build_model("resnet", 10, **network).to(memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = torch.optim.SGD(models[0].parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization_mean_std(recipe))
    global_batches = list(batches(split, recipe, 10, rank=0, world_size=1))
    rank_batches = [list(batches(split, recipe, 10, rank, world_size=2)) for rank in (0, 1)]
    for step in range(10):
        images, labels = global_batches[step]
        gradients = []
        for rank, model in enumerate(models):
            rank_images, rank_labels = rank_batches[rank][step]
            assert torch.equal(rank_images, images[rank::2])
            assert torch.equal(rank_labels, labels[rank::2])
            loss = F.cross_entropy(model((rank_images / 255 - mean) / std), rank_labels, reduction="sum") / len(labels)
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for weight, gradient0, gradient1 in zip(models[0].parameters(), *gradients, strict=True):
            weight.grad = gradient0 + gradient1
        torch.nn.utils.clip_grad_value_(models[0].parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for weight, source in zip(models[1].parameters(), models[0].parameters(), strict=True):
                weight.copy_(source)
    return models[0].state_dict()


def batches(split: Split, recipe: Recipe, count: int, rank: int, world_size: int) -> Iterator[Any]:
    """Yield the first `count` batches of the run, from as many epochs as needed."""
    loader = TensorLoader(
        split.images, split.labels, batch_size=recipe.batch_size, augment=parse_augment(recipe.augment),
        seed=recipe.seed, device="cpu", compile=False, rank=rank, world_size=world_size,
    )  # fmt: skip
    all_batches = (batch for epoch in range(count) for batch in loader.batches(epoch))
    return itertools.islice(all_batches, count)


@pytest.mark.slow
def test_fault19_training_resumes_after_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--data", "synthetic:500", "--val-size", "0", "--batch-size", "50", "--epochs", "10", "--lr", "0.01"]
    arguments += ["--dropout", "0.1", "--save-every-steps", "7", "--save-every-epochs", "0"]
    resume_arguments = ["--resume", "auto", "--out", str(out)]
    process = torchrun("-m", "fastcifar", "train", *SMALL, *PLAIN, *arguments, *resume_arguments)
    last = out / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 90
    while not last.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(rank_pid(process.pid, 1), signal.SIGKILL)
    kill_time = time.monotonic()
    code, _, errors = wait(process)
    assert code != 0
    assert time.monotonic() - kill_time < 60, errors
    step = checkpoint.load_checkpoint(last)["step"]
    assert 0 < step < 100
    codes, printed, errors = train_in_two_processes(tmp_path / "resumed", *arguments, *resume_arguments)
    assert codes == [0, 0], errors
    assert f"step {step}" in errors
    summary = json.loads(printed.strip().splitlines()[-1])
    assert summary["steps"] == 100
    assert summary["complete"]
    uninterrupted = tmp_path / "uninterrupted"
    codes, _, errors = train_in_two_processes(tmp_path / "ranks", *arguments, "--out", str(uninterrupted))
    assert codes == [0, 0], errors
    resumed, expected = (load_file(folder / "weights.safetensors") for folder in (out, uninterrupted))
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    for row, expected_row in zip(rows(out), rows(uninterrupted), strict=True):
        assert (row["train_acc"], row["train_loss"]) == (expected_row["train_acc"], expected_row["train_loss"])


# rank that is killed, module and attribute in whose call it is killed, and the number of the call
RANK_PHASES = {
    "setup of rank 1": (1, "fastcifar.training.train", "build_trainer", 1),
    "second checkpoint of rank 0": (0, "fastcifar.training.checkpoint", "_write_manifest", 3),
}
KILL_AT_CALL = """
import importlib, os, signal
from fastcifar.cli.app import main
rank, module, name, call = {phase!r}
module, calls = importlib.import_module(module), []
function = getattr(module, name)
def kill_at_call(*args, **options):
    calls.append(1)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **options)
if os.environ["RANK"] == str(rank):
    setattr(module, name, kill_at_call)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", RANK_PHASES)
def test_fault50_a_rank_killed_in_a_phase_ends_all_and_the_run_is_resumed(name: str, tmp_path: Path) -> None:
    out, script = tmp_path / "run", tmp_path / "child.py"
    script.write_text(KILL_AT_CALL.format(phase=RANK_PHASES[name]))
    arguments = ["--data", "synthetic:200", "--val-size", "40", "--batch-size", "40"]
    arguments += ["--epochs", "3", "--resume", "auto", "--out", str(out)]
    started = time.monotonic()
    code, _, errors = wait(torchrun(str(script), "train", *SMALL, *PLAIN, *arguments))
    assert code != 0
    assert time.monotonic() - started < 120, errors
    for path in out.glob("checkpoints/*.pt"):
        assert checkpoint.load_checkpoint(path)["step"] % 4 == 0
    codes, printed, errors = train_in_two_processes(tmp_path / "ranks", *arguments)
    assert codes == [0, 0], errors
    summary = json.loads(printed.strip().splitlines()[-1])
    assert (summary["steps"], summary["complete"]) == (12, True)


@pytest.mark.slow
def test_ranks_with_unequal_shares_of_a_short_last_batch_call_the_same_functions(tmp_path: Path) -> None:
    """Rank 0 has a full share of the last batch of 28 images, and the others do not.

    Functions are called where a GPU would capture and replay them, so their collective operations must agree.
    """
    port = children.free_port()
    weights = []
    for captured in (False, True):
        folder = tmp_path / str(captured)
        folder.mkdir()
        processes = [children.start(children.train_rank, rank, 3, port, folder, captured) for rank in range(3)]
        assert [children.wait_for_exit(process) for process in processes] == [0, 0, 0]
        weights.append([torch.load(folder / f"{rank}.pt") for rank in range(3)])
    for key, expected in weights[0][0].items():
        for state in (*weights[0], *weights[1]):
            assert torch.equal(state[key], expected), key


@pytest.mark.medium
def test_fault07_all_processes_report_that_a_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    arguments = ["--data", "synthetic:500", "--val-size", "0", "--batch-size", "50", "--epochs", "400"]
    arguments += ["--save-every-steps", "7", "--out", str(tmp_path / "run")]
    codes, _, errors = train_in_two_processes(tmp_path / "ranks", *arguments, max_file_bytes=30_000)
    assert 0 not in codes
    assert errors.count("last.pt") == 2, errors
    assert errors.count("File too large") == 2
    assert "another process of this run failed" not in errors
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def rank_pid(torchrun_pid: int, rank: int) -> int:
    """Return the process ID of `rank`, a child process of torchrun."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == torchrun_pid and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"no rank {rank}")


def test_fault16_checkpoint_of_two_processes_continues_in_one_with_a_warning(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    trainer = build_trainer(resolve(recipe))
    state = trainer.state_dict(Clock())
    state["random"] = state["random"] * 2
    with pytest.warns(UserWarning, match="from 2 processes and this run has 1"):
        trainer.load_state_dict(state)
