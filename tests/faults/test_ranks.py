"""Two processes under torchrun: they train as one, and the loss of one of them loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastcifar.data import cifar
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

SMALL = ("--arch", "resnet", "--blocks", "1,1", "--channels", "8,16", "--se", "block")
PLAIN = ("--device", "cpu", "--precision", "fp32", "--no-compile", "--json")
REAL = pytest.param(
    os.environ.get("FASTCIFAR_DATA"),
    marks=pytest.mark.skipif("FASTCIFAR_DATA" not in os.environ, reason="FASTCIFAR_DATA names no data set"),
    id="real",
)


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Two processes of `fastcifar train`, in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "fastcifar", "train", *SMALL, *PLAIN, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], within_s: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


@pytest.mark.parametrize("data", ["synthetic:500", REAL])
def test_fault20_two_processes_train_as_one_that_averages_their_gradients(data: str, tmp_path: Path) -> None:
    """Ten steps at lr 1e-3 in float32, weights within 1e-6; running statistics are rank 0's."""
    out = tmp_path / "run"
    arguments = ["--data", data, "--val-size", "68", "--batch-size", "48", "--max-steps", "10", "--lr", "1e-3"]
    arguments += ["--optimizer", "sgd", "--schedule", "constant", "--augment", "crop:4:zero,flip", "--out", str(out)]
    code, printed, errors = end(torchrun(*arguments))
    assert code == 0, errors
    lines = printed.strip().splitlines()
    assert len(lines) == 1, "one process speaks"
    assert json.loads(lines[0])["steps"] == 10
    trained = load_file(out / "weights.safetensors")
    expected = averaged_by_hand(Recipe.make(str(out / "recipe.toml"), max_steps=None))
    assert trained.keys() == expected.keys()
    for key, value in expected.items():
        rtol = 1e-5 if "running" in key else 0
        assert torch.allclose(trained[key].double(), value.double(), rtol=rtol, atol=1e-6), key


def averaged_by_hand(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What ten steps leave in rank 0's network when one process computes each rank's share by itself.

    torch's own optimizer and clip on plain means; nothing of `distributed` or `step`.
    """
    dataset = cifar.load_dataset(recipe.data)
    index, _ = cifar.stratified_split(dataset.train.labels, recipe.val_size, recipe.val_seed)
    split = Split(dataset.train.images[index], dataset.train.labels[index])
    torch.manual_seed(recipe.seed)
    network = {"blocks": recipe.blocks, "channels": recipe.channels, "se": recipe.se}
    models = [build_model("resnet", 10, **network).to(memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = torch.optim.SGD(models[0].parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    mean, std = (torch.tensor(of).view(1, 3, 1, 1) for of in normalization_mean_std(recipe))
    whole = list(batches(split, recipe, 10, rank=0, ranks=1))
    shares = [list(batches(split, recipe, 10, rank, ranks=2)) for rank in (0, 1)]
    for step in range(10):
        images, labels = whole[step]
        gradients = []
        for rank, model in enumerate(models):
            share, share_labels = shares[rank][step]
            assert torch.equal(share, images[rank::2])
            assert torch.equal(share_labels, labels[rank::2])
            loss = F.cross_entropy(model((share / 255 - mean) / std), share_labels, reduction="sum") / len(labels)
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for weight, mine, other in zip(models[0].parameters(), *gradients, strict=True):
            weight.grad = mine + other
        torch.nn.utils.clip_grad_value_(models[0].parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for weight, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
                weight.copy_(other)
    return models[0].state_dict()


def batches(split: Split, recipe: Recipe, count: int, rank: int, ranks: int) -> Any:
    """The first `count` batches of the run, from as many epochs as it takes."""
    loader = TensorLoader(
        split.images, split.labels, batch_size=recipe.batch_size, augment=parse_augment(recipe.augment), seed=recipe.seed,
        device="cpu", compile=False, rank=rank, world_size=ranks,
    )  # fmt: skip
    found: list[Any] = []
    for epoch in range(count):
        for batch in loader.batches(epoch):
            found.append(batch)
            if len(found) == count:
                return found
    return found


def test_fault19_one_of_two_processes_is_killed_and_the_restart_goes_on_from_rank_0(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--data", "synthetic:500", "--val-size", "0", "--batch-size", "50", "--epochs", "40", "--lr", "0.01"]
    arguments += [
        "--dropout",
        "0.1",
        "--save-every-steps",
        "7",
        "--save-every-epochs",
        "0",
        "--resume",
        "auto",
        "--out",
        str(out),
    ]
    process = torchrun(*arguments)
    last = out / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 90
    while not last.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    started = time.monotonic()
    code, _, errors = end(process)
    assert code != 0
    assert time.monotonic() - started < 60, errors
    step = checkpoint.load_checkpoint(last)["step"]
    assert 0 < step < 400
    code, printed, errors = end(torchrun(*arguments))
    assert code == 0, errors
    assert f"step {step}" in errors
    summary = json.loads(printed.strip().splitlines()[-1])
    assert summary["steps"] == 400
    assert summary["complete"]
    straight = tmp_path / "straight"
    code, _, errors = end(torchrun(*arguments[:-4], "--out", str(straight)))
    assert code == 0, errors
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (out, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "as if it had never stopped"


def rank_of(torchrun_pid: int, rank: int) -> int:
    """The process id of `rank`, a child of torchrun."""
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


def test_fault16_a_checkpoint_of_two_processes_goes_on_in_one_with_a_warning(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    parts = build_trainer(resolve(recipe))
    state = parts.checkpoint_state(Clock())
    state["random"] = state["random"] * 2
    with pytest.warns(UserWarning, match="had 2 processes and goes on with 1"):
        parts.load_checkpoint_state(state)
