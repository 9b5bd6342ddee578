"""Networks of the user through every command: `--import`, `--arch MODULE:NAME`, and what is refused before training."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.cli.app import app
from fastcifar.cli.completion import networks_in_file
from fastcifar.errors import UsageError
from fastcifar.models import MODELS, architecture_names, build_for_inspection, build_model
from fastcifar.models.count import count_conv_calls, count_macs, feature_map_bytes_per_image, layer_table
from fastcifar.models.imports import IMPORTED, ModelSource, import_models, import_options, imported_sources
from fastcifar.recipe import Recipe
from fastcifar.sweep import executors
from fastcifar.sweep.sweep import prepare_sweep
from fastcifar.training.checkpoint import matching_architectures
from fastcifar.training.train import train

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_network.py"
TINY = ("--data", "synthetic:200", "--val-size", "40", "--augment", "flip", "--epochs", "1", "--batch-size", "32",
        "--no-compile", "--precision", "fp32", "--device", "cpu")  # fmt: skip
NETWORKS = """
import torch
from torch import nn

def linear(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))

class Settings(dict):
    pass

def mine(num_classes):
    return linear(3072, num_classes)

def ten():
    return linear(3072, 10)

def three_logits(num_classes):
    return linear(3072, 3)

def wrong_width(num_classes):
    return linear(100, num_classes)

def text(num_classes):
    return "network"

def frozen(num_classes):
    return linear(3072, num_classes).requires_grad_(False)

def se68(num_classes):
    return linear(3072, num_classes)

def error(num_classes):
    raise ValueError("two\\nlines")

class Auxiliary(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = linear(3072, num_classes)

    def forward(self, images):
        logits = self.linear(images)
        return (logits, logits) if self.training else logits

class ReadsValues(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.conv, self.linear = nn.Conv2d(3, 2, 3, 2, 1), nn.Linear(512, num_classes)

    def forward(self, images):
        return self.linear(self.conv(images if images.sum().item() < 1e9 else -images).flatten(1))
"""


@pytest.fixture(autouse=True)
def fresh_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a new folder; forget afterwards what a test imports and adds to `MODELS`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules, models = set(sys.modules), dict(MODELS)
    (tmp_path / "my_net.py").write_text(NETWORKS)
    yield
    forget(modules, models)


def forget(modules: set[str], models: dict[str, Any]) -> None:
    IMPORTED.clear()
    MODELS.clear()
    MODELS.update(models)
    for name in [*sys.modules]:
        if name not in modules and name.partition(".")[0] in ("fastcifar_import_my_net", "own_nets", "my_net"):
            del sys.modules[name]


def command(*arguments: str) -> int | None:
    """Run a command as in a new process, which has imported nothing."""
    forget(set(sys.modules), {name: value for name, value in MODELS.items() if name != "tiny_mixer"})
    return app(arguments, standalone_mode=False)


@pytest.mark.slow
def test_example_through_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(EXAMPLE, tmp_path / "my_net.py")
    own = ("--import", "my_net.py")
    assert command("train", *own, "--arch", "plain_cnn", "--width", "0.25", *TINY, "--out", "run", "--no-plots") == 0
    text = capsys.readouterr().out
    assert "fastcifar predict run INPUT --out submission.csv --import my_net.py\n" in text
    assert "fastcifar train --resume run --import my_net.py --epochs 2\n" in text
    assert "my_net" not in (tmp_path / "run" / "recipe.toml").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with pytest.raises(UsageError, match=r"unknown architecture 'plain_cnn'; give --import FILE.py for a network of"):
        command("eval", "run")
    assert command("eval", "run", *own, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["test_acc"] == summary["test_acc"]
    assert command("predict", "run", "data:test", "--out", "a.csv", *own) == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 40
    pytest.importorskip("onnxruntime")
    assert command("export", "run", "--format", "onnx", *own) == 0
    assert (tmp_path / "run" / "plain_cnn.onnx").is_file()


@pytest.mark.slow
def test_example_is_listed_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("models", "--import", str(EXAMPLE), "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows)[-3:] == ["tiny_mixer", "plain_cnn", "PatchMixer"]
    assert (rows["tiny_mixer"]["description"], rows["tiny_mixer"]["params"]) == ("-", 5546)
    assert networks_in_file(EXAMPLE) == ["plain_cnn", "PatchMixer", "tiny_mixer"]
    assert command("models", "--budget", "1e6", "--arch", "plain_cnn", "--import", str(EXAMPLE), "--json") == 0
    assert json.loads(capsys.readouterr().out)["width"] > 2
    with pytest.raises(UsageError, match=r"plain_cnn has 94,762 parameters, 94,662 over the budget of 100"):
        command("train", "--arch", "plain_cnn", "--import", str(EXAMPLE), "--max-params", "100", *TINY)


@pytest.mark.slow
def test_sweep_in_processes_and_on_ray_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "".join(f"{name} = {value}\n" for name, value in {
        "arch": '"mine"', "data": '"synthetic:200"', "val_size": 40, "augment": '"flip"', "epochs": 1,
        "batch_size": 32, "device": '"cpu"', "precision": '"fp32"', "compile": "false",
    }.items())  # fmt: skip
    (tmp_path / "s.toml").write_text(f"[base]\n{options}[grid]\nlr = [0.1, 0.02]\n")
    with pytest.raises(UsageError, match="unknown architecture 'mine'; give --import"):
        command("sweep", "s.toml", "--executor", "processes")
    assert not (tmp_path / "sweeps").exists()
    arguments = ("--executor", "processes", "--jobs", "1", "--cpus", "1", "--json")
    assert command("sweep", "s.toml", *arguments, "--import", "my_net.py") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["done"] == 2
    _, _, trials, _ = prepare_sweep("s.toml", tmp_path / "ray", "ray", None, {})
    sources = imported_sources()
    assert sources == [ModelSource(str(tmp_path / "my_net.py"), str(tmp_path))]
    IMPORTED.clear()
    assert "unknown architecture" in str(executors._ray_task(trials[0], [], 1, socket.gethostname()).reason)
    assert executors._ray_task(trials[0], sources, 1, socket.gethostname()).state == "done"
    missing = [ModelSource(str(tmp_path / "other.py"), str(tmp_path))]
    assert "there is no such file" in str(executors._ray_task(trials[1], missing, 1, "other").reason)


REFUSED_NETWORKS = {
    "three_logits": r"architecture three_logits returns float32 of shape \[2, 3\] for 2 images; it should return",
    "wrong_width": r"wrong_width fails in a forward pass of 32x32 images: RuntimeError: .*2x3072 and 100x10",
    "text": "architecture text is a str; it should return an nn.Module",
    "frozen": "architecture frozen has no trainable parameters",
    "se68": "--arch se68 is ambiguous: a built-in one and my_net:se68; use --arch my_net:se68",
    "error": r"architecture error cannot be built: ValueError: two \(my_net.py, line \d+\); correct its code",
    "Auxiliary": "architecture Auxiliary returns a tuple for 2 images",
    "Auxiliarly": r"no architecture 'Auxiliarly', neither built in nor in .*my_net.py; did you mean 'Auxiliary'\?",
    "other:Net": "--import other: there is no such module; specify a .py file or a module",
    "my_net.py:mine": "--arch: my_net.py is a file, not a module; use --import my_net.py --arch NAME",
    "my_net:missing": "no architecture 'my_net:missing'",
}
REFUSED_FILES = {
    "x = 1\ny = z\n": r"bad.py: NameError: name 'z' is not defined \(bad.py, line 2\); correct the error",
    "def f(:\n": r"bad.py: SyntaxError: invalid syntax \(bad.py, line 1\)",
    "import no_such_package\n": "it imports no_such_package, which is not installed; install no_such_package, or put",
    "raise SystemExit(3)\n": r"bad.py: SystemExit: 3 \(bad.py, line 1\)",
}


@pytest.mark.parametrize("arch", REFUSED_NETWORKS)
def test_fault15_networks_that_cannot_be_trained_are_refused_in_one_line(tmp_path: Path, arch: str) -> None:
    with pytest.raises(UsageError, match=REFUSED_NETWORKS[arch]) as error:
        command("train", "--import", "my_net.py", "--arch", arch, *TINY)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("code", REFUSED_FILES)
def test_fault15_files_that_fail_are_refused_in_one_line(tmp_path: Path, code: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UsageError, match=REFUSED_FILES[code]) as error:
        import_models("bad.py")
    assert "\n" not in str(error.value)
    assert not IMPORTED


def test_fault15_missing_and_equally_named_files_are_refused(tmp_path: Path) -> None:
    for source, words in {"no.py": "there is no such file", "no.such": "there is no such module"}.items():
        with pytest.raises(UsageError, match=words):
            import_models(source)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my_net.py").write_text(NETWORKS)
    import_models("my_net.py")
    module = IMPORTED["my_net"][1]
    import_models(str(tmp_path / "my_net.py"))
    assert IMPORTED["my_net"][1] is module
    with pytest.raises(UsageError, match=r"two files have the name my_net.py; rename one of them"):
        import_models("sub/my_net.py")


def test_modules_and_their_names(tmp_path: Path) -> None:
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "small.py").write_text("from .parts import mine\n")
    (tmp_path / "own_nets" / "parts.py").write_text(NETWORKS)
    recipe = Recipe(arch="own_nets.small:mine", data="synthetic:200", val_size=40, epochs=1, device="cpu", out="run")
    with pytest.raises(UsageError, match=r"unknown architecture 'own_nets.small:mine'; give --import own_nets.small$"):
        train(recipe)
    assert "own_nets.small" not in sys.modules  # a recipe causes no import
    assert command("train", "--arch", "own_nets.small:mine", *TINY, "--no-plots") == 0
    assert [path.name[:19] for path in (tmp_path / "runs").iterdir()] == ["own_nets.small.mine"]
    assert import_options() == " --import own_nets.small"
    import_models("my_net.py")
    assert {"ten", "linear"}.isdisjoint(architecture_names())  # they have no parameter `num_classes`
    assert {"my_net:se68", "three_logits"} < set(architecture_names())  # Settings is a dict
    with pytest.raises(UsageError, match=r"--arch mine is ambiguous: own_nets.small:mine and my_net:mine"):
        build_model("mine")


def test_a_network_that_does_not_support_the_meta_device_is_inspected_on_the_cpu() -> None:
    import_models("my_net.py")
    state = torch.get_rng_state()
    model = build_for_inspection("ReadsValues", 10)
    assert [row["output"] for row in layer_table(model)] == [[2, 16, 16], [10]]
    assert count_macs(model) == 2 * 16 * 16 * 27 + 5120
    assert list(count_conv_calls(model).values()) == [1]
    assert feature_map_bytes_per_image(model, training=False) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert build_for_inspection("mine", 10).get_parameter("1.weight").is_meta
    weights = build_model("ten").state_dict()
    assert matching_architectures(weights, ["ten"]) == [("ten", "cifar10")]
