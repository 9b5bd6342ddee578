"""Checkpoints and run folders of other people: what loads, and that they choose neither paths nor sizes."""

from __future__ import annotations

import _codecs
import io
import json
import os
import pickle
import resource
import socket
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcifar.errors import CheckpointError, DiskError, UserError
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.evaluation.load_run import load_model
from fastcifar.files import load_toml, open_regular_file, read_json_object
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.reporting import compare, records, runs
from fastcifar.training import checkpoint
from fastcifar.training.train import train
from tests.faults.children import run_fastcifar
from tests.faults.runs import contents
from tests.reporting.run_folders import write_run

MakeRecipe = Callable[..., Recipe]
SMALL = "synthetic:100"  # 20 test images
MAX_MEMORY_GROWTH = 200 * 2**20


class Network(nn.Module):
    """A network under an attribute, as a LightningModule has it."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        setattr(self, name, network)


def network() -> nn.Module:
    torch.manual_seed(3)
    return build_model("speednet").eval()


# name of a layout -> function that wraps a network as another project would save it
LAYOUTS: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda model: model.state_dict(),
    "net": lambda model: {"net": model.state_dict(), "acc": 91.0, "epoch": 3},
    "state_dict": lambda model: {"state_dict": model.state_dict(), "epoch": 3},
    "model": lambda model: {"model": model.state_dict()},
    "model_state_dict": lambda model: {"model_state_dict": model.state_dict(), "optimizer_state_dict": {}},
    "state_dict_ema": lambda model: {
        "state_dict": model.state_dict(), "state_dict_ema": build_model("speednet").state_dict(), "arch": "x"
    },
    "only state_dict_ema": lambda model: {"state_dict_ema": model.state_dict()},
    "module": lambda model: {"module": model.state_dict(), "dp_world_size": 8},
    "lightning": lambda model: {
        "state_dict": Network("model", model).state_dict(), "pytorch-lightning_version": "2.0", "epoch": 1
    },
    "lightning, other name": lambda model: {"state_dict": Network("backbone", model).state_dict()},
    "lightning, compiled": lambda model: {"state_dict": Network("net", Network("_orig_mod", model)).state_dict()},
    "swa": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "data parallel": lambda model: {"state_dict": nn.DataParallel(model).state_dict()},
    "no counters": lambda model: {
        key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key
    },
    "ordered dict with attributes": lambda model: _with_attributes(model.state_dict()),
}  # fmt: skip


def _with_attributes(weights: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    ordered = OrderedDict(weights)
    ordered.__dict__.update(_metadata={"version": 1}, keys="hides a method")
    return ordered


@pytest.mark.medium
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fault49_layouts_of_other_projects_load(layout: str, tmp_path: Path) -> None:
    model, file = network(), tmp_path / "other.pth"
    torch.save(LAYOUTS[layout](model), file)
    loaded = load_model(str(file), arch="speednet", device="cpu", precision="fp32", compile=False)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784))
    inputs = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(loaded.forward(images), model(inputs), atol=1e-4)
    with pytest.raises(CheckpointError, match="does not name the architecture of its weights; set --arch speednet"):
        load_model(str(file))


def test_fault49_weights_of_timm_have_an_average(tmp_path: Path) -> None:
    torch.save(LAYOUTS["state_dict_ema"](network()), tmp_path / "timm.pth")
    saved = checkpoint.load_any_checkpoint(tmp_path / "timm.pth", "speednet")
    assert saved["ema"] is not None
    assert not torch.equal(saved["ema"]["linear.weight"], saved["model"]["linear.weight"])
    assert load_model(str(tmp_path / "timm.pth"), "ema", "speednet", device="cpu").weights == "published"


def test_fault49_cifar100_weights_are_recognized(tmp_path: Path) -> None:
    torch.save({"state_dict": build_model("speednet", 100).state_dict()}, tmp_path / "hundred.pth")
    scores = evaluate_run(str(tmp_path / "hundred.pth"), arch="speednet", data=SMALL, device="cpu", precision="fp32")
    assert (len(scores["classes"]), scores["total"], scores["normalize"]) == (100, 20, "cifar100")
    torch.save(build_model("speednet", 12).state_dict(), tmp_path / "twelve.pth")
    with pytest.raises(CheckpointError, match=r"has other shapes for linear\.bias, linear\.weight"):
        load_model(str(tmp_path / "twelve.pth"), arch="speednet")


def test_fault49_safetensors_of_this_and_other_projects_load(tiny: MakeRecipe, tmp_path: Path) -> None:
    import safetensors.torch

    summary = train(tiny(epochs=1, normalize="kuangliu"))
    loaded = load_model(str(tmp_path / "run" / "weights.safetensors"), data="synthetic:200", device="cpu")
    assert (loaded.recipe.blocks, loaded.recipe.normalize) == ((1, 1), "kuangliu")
    assert loaded.evaluate(loaded.load_dataset().test).accuracy == summary.test_acc
    safetensors.torch.save_file(network().state_dict(), tmp_path / "other.safetensors")
    assert load_model(str(tmp_path / "other.safetensors"), arch="speednet", device="cpu").weights == "published"
    safetensors.torch.save_file(network().state_dict(), tmp_path / "older.safetensors", {"arch": "speednet"})
    assert len(load_model(str(tmp_path / "older.safetensors"), device="cpu").classes) == 10


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(network(), torch.zeros(1, 3, 32, 32)), buffer)
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# name of a file -> its content, and what the message says about it
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "script.pt": (torchscript, "is a TorchScript program, which contains code; save the state_dict"),
    "whole.pth": (lambda: saved(Network("net", nn.Linear(2, 2))), "it refers to .*Network, .* whole network"),
    "list.pth": (lambda: saved([1, 2]), "contains a list, not a dict of weights"),
    "strings.pth": (lambda: saved({"state_dict": {"a": "b"}}), "contains no weights; its keys: 'state_dict'"),
    "keras.h5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "net.onnx": (lambda: b"\x08\x08\x12\x07pytorch" + bytes(100), "is an ONNX file"),
    "page.pth": (lambda: b"<!DOCTYPE html><html>", "is an HTML or XML page, not a checkpoint; download"),
    "pointer.pth": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "cut.safetensors": (lambda: (100).to_bytes(8, "little") + b"{" + bytes(150), "is not a .safetensors file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fault49_other_files_are_named_for_what_they_are(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / name), arch="speednet")


def deflated(content: bytes) -> bytes:
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return target.getvalue()


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def doubled(levels: int) -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def looped() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["loop"] = value
    return value


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


# Files of at most 20 MB that need gigabytes, or forever, if they are read without care, and the message
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "deflated": (lambda: deflated(saved({"weight": torch.zeros(2**25)})), r"unpacks to 134,\d{3},\d{3}"),
    "expanded tensor": (lambda: saved({"weight": torch.zeros(1).expand(10**5, 10**5)}), "not stored in full"),
    "many views of one storage": (
        lambda: saved(dict.fromkeys(map(str, range(50_000)), torch.zeros(10**5))), r"expands to 20,0\d\d,"
    ),
    "bytearray": (lambda: saved({"weight": Call(bytearray, 10**11)}), "it refers to bytearray, which is not allowed"),
    "repeated encoding": (lambda: saved({"w": Call(_codecs.encode, "x" * 10**6, "utf-32")}), "only allowed in NumPy"),
    "meta tensor": (lambda: saved({"weight": torch.empty(10**6, 10**6, device="meta")}), "it refers to .*meta_tensor"),
    "sparse tensor": (
        lambda: saved({"w": torch.sparse_coo_tensor(torch.zeros(2, 0), [], (10**9, 10**9))}), "it refers to .*sparse"
    ),
    "doubled lists": (lambda: saved({"recipe": {"arch": doubled(40)}, "model": {}}), r"expands to \d+(,\d{3}){4}"),
    "loop": (lambda: saved(looped()), "contain themselves"),
    "nested lists": (lambda: saved({"recipe": nested(200), "model": {}}), "nested more than 50 times"),
    "older file, huge storage": (
        lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02M\xe9\x03." + bytes(40),
        "is not a checkpoint: (?!.*weights_only)",
    ),
}  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize("name", BOMBS)
def test_fault36_bombs_are_refused_without_memory(name: str, tmp_path: Path) -> None:
    build, message = BOMBS[name]
    (tmp_path / "bomb.pt").write_bytes(build())
    assert (tmp_path / "bomb.pt").stat().st_size < 20 * 2**20
    memory_before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / "bomb.pt"), arch="speednet")
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before) < MAX_MEMORY_GROWTH
    assert time.monotonic() - start < 10


# options in a checkpoint of a stranger that would need more than this machine has
HUGE: dict[str, dict[str, Any]] = {
    "channels": {"channels": [2**20, 2**20], "max_params": 10**18},
    "blocks": {"blocks": [10**9, 10**9], "max_params": 10**18},
    "many stages": {"blocks": [1] * 900, "channels": [2**20] * 900, "max_params": 10**18},
    "width": {"width": 16.0, "channels": [10**6, 10**6], "max_params": 10**18},
    "another architecture": {"arch": "resnet18", "blocks": None, "channels": None, "max_params": 10**18},
}


@pytest.mark.parametrize("name", HUGE)
def test_fault36_sizes_in_a_checkpoint_are_checked_before_the_network_is_built(
    name: str, tiny: MakeRecipe, tmp_path: Path
) -> None:
    train(tiny(max_steps=1))
    file = tmp_path / "stranger.pt"
    state: dict[str, Any] = dict(checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt"))
    torch.save({**state, "recipe": {**state["recipe"], **HUGE[name]}}, file)
    memory_before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for use in (lambda: load_model(str(file)), lambda: train(Recipe(resume=str(file), out=str(tmp_path / "new")))):
        with pytest.raises(UserError):
            use()
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before) < MAX_MEMORY_GROWTH
    assert time.monotonic() - start < 30
    assert not (tmp_path / "new").exists()


DAMAGED_PARTS: dict[str, dict[str, Any]] = {
    "recipe keys": {"recipe": {1: 2}},
    "model": {"model": [1]},
    "classes": {"classes": 10},
    "class names": {"classes": [1, 2]},
    "samples": {"samples": "all"},
    "epoch": {"epoch": -1},
    "step": {"step": 10**400},
    "best": {"best": float("nan")},
    "clock": {"clock": {}},
    "random": {"random": None},
    "optimizer": {"optimizer": {"inner": 3}},
    "schedule": {"schedule": []},
    "meter": {"meter": torch.zeros(1000)},
    "scaler": {"scaler": [1]},
}


@pytest.mark.parametrize("part", DAMAGED_PARTS)
def test_fault38_parts_of_other_types_in_a_checkpoint_are_refused(part: str, tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny(max_steps=1))
    file = tmp_path / "stranger.pt"
    state: dict[str, Any] = dict(checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt"))
    torch.save({**state, **DAMAGED_PARTS[part]}, file)
    with pytest.raises(UserError):
        train(Recipe(resume=str(file), out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


@pytest.mark.medium
def test_fault36_a_checkpoint_does_not_choose_where_a_resumed_run_writes_and_tracks(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(max_steps=3))
    folder, victim = tmp_path / "run", tmp_path / "victim"
    state: dict[str, Any] = dict(checkpoint.load_checkpoint(folder / "checkpoints" / "last.pt"))
    state["recipe"] |= {"out": str(victim / "run"), "track": "tensorboard"}
    torch.save(state, tmp_path / "stranger.pt")
    (folder / "env.json").write_text(json.dumps({"recipe": "../../victim/x"}))
    checkpoint.save_checkpoint(folder / "checkpoints" / "last.pt", state)
    (folder / "recipe.toml").write_text(Recipe(**state["recipe"]).to_toml())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Path(train(Recipe(resume=str(tmp_path / "stranger.pt"))).run).parent == Path("runs")
    assert train(Recipe(resume=str(folder / "checkpoints" / "last.pt"))).run == f"{folder}-2"
    assert train(Recipe(resume=str(folder))).run == str(folder)
    assert load_toml(folder / "recipe.toml")["out"] == str(folder)
    assert load_model(str(tmp_path / "stranger.pt")).recipe.out is None
    assert not victim.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "run", "run-2", "stranger.pt"]
    assert not list((tmp_path / "here").rglob("tensorboard"))


@pytest.mark.medium
@pytest.mark.parametrize("name", ["checkpoints", "metrics.csv", "summary.json", "weights.safetensors", "recipe.toml"])
def test_fault36_links_in_a_run_folder_do_not_choose_what_is_overwritten(
    name: str, tiny: MakeRecipe, tmp_path: Path
) -> None:
    train(tiny(max_steps=3))
    victim, path = tmp_path / "victim", tmp_path / "run" / name
    os.rename(path, victim)
    before = contents(victim) if victim.is_dir() else victim.read_bytes()
    path.symlink_to(victim)
    if name == "checkpoints":
        with pytest.raises(DiskError, match="checkpoints is a symbolic link"):
            train(Recipe(resume=str(tmp_path / "run")))
    else:
        train(Recipe(resume=str(tmp_path / "run")))
        assert not path.is_symlink()
    assert (contents(victim) if victim.is_dir() else victim.read_bytes()) == before


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # the name of a socket has at most 107 characters
        server.bind(path.name)
        os.fchdir(here)
        os.close(here)


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "FIFO": make_fifo,
    "socket": make_socket,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a FIFO": lambda path: (os.mkfifo(path.with_suffix(".fifo")), path.symlink_to(path.with_suffix(".fifo")))[
        1
    ],
    "folder": lambda path: path.mkdir(),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "sparse file of 2 TB": lambda path: (path.touch(), os.truncate(path, 2**41))[0],
}
READ_FILES = (
    "recipe.toml",
    "env.json",
    "metrics.csv",
    "summary.json",
    "checkpoints/last.pt",
    "checkpoints/manifest.json",
)


def in_time(function: Callable[[], Any], seconds: float = 20) -> Any:
    """Return what `function` returns or raises; fail if that takes longer than `seconds`."""
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(function())
        except UserError as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "it still waits, or it raised an error that is not a UserError"
    return result[0]


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize("name", READ_FILES)
def test_fault37_special_files_in_a_run_folder_do_not_block(kind: str, name: str, tmp_path: Path) -> None:
    good, bad = (write_run(tmp_path / "runs" / folder, [0.5]) for folder in ("good", "bad"))
    (bad / "checkpoints").mkdir()
    (bad / name).unlink(missing_ok=True)
    SPECIAL_FILES[kind](bad / name)
    entries = in_time(lambda: runs.list_runs(tmp_path / "runs"))
    assert [entry["state"] for entry in entries if entry["name"] == str(good)] == ["finished"]
    assert len(in_time(lambda: records.read_records([good, bad]))) == 2 or name == "recipe.toml"
    in_time(lambda: compare.compare_paths(good, bad))
    error = in_time(lambda: train(Recipe(resume=str(bad), out=str(bad), device="cpu", data="nowhere")))
    assert isinstance(error, UserError)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "link to a device", "broken link"])
def test_fault37_special_files_as_arguments_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    SPECIAL_FILES[kind](tmp_path / "x.csv")
    file = str(tmp_path / "x.csv")
    readers: list[Callable[[], Any]] = [
        lambda: load_model(file, arch="speednet"),
        lambda: Recipe.make(file),
        lambda: train(Recipe(resume=file)),
        lambda: train(Recipe(data=file, device="cpu")),
        lambda: compare.compare_paths(tmp_path / "x.csv", tmp_path / "x.csv"),
        lambda: records.read_records([tmp_path / "x.csv"]),
        lambda: train(Recipe(augment=f"autoaugment:{file}")),
    ]
    for reader in readers:
        assert isinstance(in_time(reader), UserError)
    assert read_json_object(tmp_path / "x.csv") == {}


def test_fault37_a_file_that_is_replaced_by_a_fifo_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    regular = os.stat(tmp_path / "file")
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr("fastcifar.files.os.stat", lambda _: regular)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular_file(tmp_path / "file")


@pytest.mark.medium
def test_fault37_commands_end_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pkl")
    write_run(tmp_path / "runs" / "good", [0.5])
    for arguments, code in (
        (["predict", "runs/good", "fifo.pkl", "--out", "p.csv"], 4),
        (["eval", "fifo.pkl"], 4),
        (["sweep", "fifo.pkl", "--dry-run"], 2),
        (["data", "verify", "--data", "fifo.pkl"], 3),
    ):
        result = run_fastcifar(*arguments, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (code, 1), (arguments, result.stderr)


# changes of a finished run's summary.json that make it damaged
DAMAGED_SUMMARIES: dict[str, dict[str, Any]] = {
    "infinite epochs": {"epochs": float("inf")},
    "huge total": {"total": 10**400},
    "huge macs": {"macs": 10**400},
    "nan": {"test_loss": float("nan")},
    "surrogate": {"recipe": "\ud800"},
    "negative": {"seed": -1},
    "containers": {"per_class": [1], "seconds": []},
    "nested confusion": {"confusion": [[[1]]]},
}
DAMAGED_TEXTS = {
    "list": "[1, 2]",
    "nested lists": "[" * 20_000,
    "nested dicts": '{"a":' * 20_000,
    "huge exponent": '{"epochs": 1e999}',
    "not UTF-8": "\udcff",
    "empty": "",
}


@pytest.mark.parametrize("name", [*DAMAGED_SUMMARIES, *DAMAGED_TEXTS])
def test_fault38_a_damaged_summary_is_listed_and_the_other_runs_as_they_are(name: str, tmp_path: Path) -> None:
    good, bad = (write_run(tmp_path / folder, [0.5], 0.25, seed=seed) for folder, seed in (("good", 1), ("bad", 2)))
    file = bad / "summary.json"
    text = DAMAGED_TEXTS.get(name) or json.dumps(json.loads(file.read_text()) | DAMAGED_SUMMARIES.get(name, {}))
    file.write_bytes(text.encode(errors="surrogateescape") if name != "empty" else b"")
    assert {entry["name"]: entry["state"] for entry in runs.list_runs(tmp_path)} == {
        str(good): "finished", str(bad): "damaged"
    }  # fmt: skip
    states = {record.folder: record.state for record in records.read_records([good, bad])}
    assert states == {good: "done", bad: "damaged"}
    with pytest.raises(UserError, match=r"bad: summary\.json"):
        compare.compare_paths(good, bad)


@pytest.mark.parametrize("file", ["recipe.toml", "env.json", "metrics.csv", "events.jsonl"])
@pytest.mark.parametrize(
    "text", [*DAMAGED_TEXTS.values(), "a = " + "[" * 20_000, "epochs = nan", "save_every = '\u00b2e'"]
)
def test_fault38_other_damaged_documents_of_a_run(file: str, text: str, tmp_path: Path) -> None:
    good, bad = (write_run(tmp_path / folder, [0.5], 0.25) for folder in ("good", "bad"))
    (bad / file).write_bytes(text.encode(errors="surrogateescape"))
    states = {entry["name"]: entry["state"] for entry in runs.list_runs(tmp_path)}
    assert states[str(good)] == "finished"
    assert states[str(bad)] in ("finished", "damaged")
    assert len(records.read_records([good, bad])) == 2
    assert isinstance(in_time(lambda: train(Recipe(resume=str(bad), epochs=1, data="nowhere"))), UserError)


@pytest.mark.parametrize("sort", ["arch", "recipe", "date", "seconds", "val_acc"])
def test_fault38_a_listing_is_sorted_with_values_of_strangers(sort: str, tmp_path: Path) -> None:
    for name, changes in (("a", {"arch": ""}), ("b", {}), ("c", {"arch": "x"})):
        write_run(tmp_path / name, [0.5], environment={"started": "9" * 400, "recipe": name and "[/x]"})
        recipe = (tmp_path / name / "recipe.toml").read_text()
        (tmp_path / name / "recipe.toml").write_text(recipe.replace('"se68"', json.dumps(changes.get("arch", "se68"))))
    os.utime(tmp_path / "b" / "recipe.toml", (0, 2**40))
    (tmp_path / "b" / "env.json").write_text("{}")
    assert len(runs.list_runs(tmp_path, sort)) == 3
