"""Every format computes what the network computes; nothing else is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from typer.testing import CliRunner

from fastcifar.cli.app import app
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.errors import CheckpointError, DataError, DiskError, UsageError, UserError
from fastcifar.evaluation import export as room
from fastcifar.evaluation.export import EXPORT_FORMATS, DeployedModel, example_inputs, export_model
from fastcifar.evaluation.load_run import load_model
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained SE network of 300 synthetic test images and ten classes."""
    out = tmp_path_factory.mktemp("export") / "run"
    recipe = Recipe.make(
        arch="resnet", blocks=(1, 1), channels=(8, 16), se="block", data="synthetic:300", val_size=40, epochs=1,
        batch_size=32, lr=0.01, device="cpu", precision="fp32", compile=False, out=str(out),
    )  # fmt: skip
    return Path(train(recipe)["run"])


@pytest.mark.parametrize("outputs", room.OUTPUT_TYPES)
@pytest.mark.parametrize("format", [name for name in EXPORT_FORMATS if name != "aoti"])
def test_a_format_computes_what_the_run_computes(run: Path, tmp_path: Path, format: str, outputs: str) -> None:
    check(run, tmp_path, format, outputs)


def test_compiled_code_computes_what_the_run_computes(run: Path, tmp_path: Path) -> None:
    check(run, tmp_path, "aoti", "logits")


def check(run: Path, tmp_path: Path, format: str, outputs: str) -> None:
    """Against the training room's own forward pass, which normalises by itself; on batches that export never tried."""
    out = tmp_path / "file.bin"
    found = export_model(str(run), format, out, output_type=outputs)
    assert (found["images"], found["batch_sizes"]) == (256, [1, 7, 256]) or found["images"] < 256
    assert found["difference"] <= room.EXPORT_TOLERANCE
    assert found["bytes"] == out.stat().st_size
    assert found["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    rebuilt = load_model(str(run), device="cpu", precision="fp32")
    deployed = DeployedModel(rebuilt.model, *normalization_mean_std(rebuilt.recipe), "uint8", outputs).eval()
    function = EXPORT_FORMATS[format].load(out, deployed, rebuilt)
    images = torch.randint(256, (13, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = rebuilt.forward(images)
        wanted = wanted.softmax(1) if outputs == "probabilities" else wanted
        assert torch.allclose(function(images.permute(0, 2, 3, 1).contiguous()), wanted, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.bin", "file.bin.md"]


def test_normalised_input_is_the_same_function(run: Path, tmp_path: Path) -> None:
    export_model(str(run), "pt2", tmp_path / "a.pt2", input_type="normalized", output_type="logits")
    rebuilt = load_model(str(run), device="cpu", precision="fp32")
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(of).view(1, 3, 1, 1) for of in normalization_mean_std(rebuilt.recipe))
    function = torch.export.load(tmp_path / "a.pt2").module()
    with torch.no_grad():
        assert torch.allclose(function((images / 255 - mean) / std), rebuilt.forward(images), atol=1e-4)


def test_a_file_that_computes_something_else_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_wrong(*given: object) -> Callable:
        function = room.load_pt2(*given)  # type: ignore[arg-type]
        return lambda images: function(images) + (0.01 if len(images) == 7 else 0)

    monkeypatch.setitem(EXPORT_FORMATS, "pt2", replace(EXPORT_FORMATS["pt2"], load=load_wrong))
    with pytest.raises(UserError, match=r"would differ from the network by 0\.01 and was not kept"):
        export_model(str(run), "pt2", tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_an_exporter_cannot_do_is_one_line(run: Path, tmp_path: Path) -> None:
    none = config.patch("cpp.cxx", (None, "/nowhere/g++"))
    with none, pytest.raises(UserError, match=r"a\.pt2 cannot be made: \w+: .*No working C\+\+ compiler") as caught:
        export_model(str(run), "aoti", tmp_path / "a.pt2")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_what_the_run_recorded(run: Path) -> None:
    found = export_model(str(run), "safetensors")
    assert Path(found["file"]) == run / "resnet.safetensors"
    card = Path(found["card"]).read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for expected in (
        found["sha256"],
        f"{summary['params']:,} trainable parameters",
        f"test accuracy {100 * summary['test_acc']:.2f} %, {summary['correct']} of {summary['total']}, n = 1 seed",
        f"calibration error {summary['ece']:.4f}",
        "held out of training to choose by: 40 images",
        "seed 0, 1 epochs, lookahead:sgd",
        "not the official files",
    ):
        assert expected in card, expected
    other = export_model(str(run / "checkpoints" / "last.pt"), "safetensors", run / "x.safetensors", arch="resnet")
    assert "has not met these weights" in Path(other["card"]).read_text(encoding="utf-8")
    other = export_model(str(run), "safetensors", run / "y.safetensors", normalize="kuangliu")
    card = Path(other["card"]).read_text(encoding="utf-8")
    assert "not measured with this normalisation, only with `cifar10`" in card
    assert "test accuracy" not in card


def test_published_weights_are_exported_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    net = build_model("coconut_sep").state_dict()
    file = tmp_path / "ckpt.pth"
    torch.save({"net": {f"module.{key}": value for key, value in net.items()}, "acc": 95.0, "epoch": 3}, file)
    found = export_model(str(file), "safetensors", arch="coconut_sep", data="synthetic:20")
    assert Path(found["file"]).name == "coconut_sep.safetensors"
    assert "`kuangliu`" in Path(found["card"]).read_text(encoding="utf-8")
    torch.save({"net": {**net, "extra.weight": torch.ones(1)}}, file)
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        export_model(str(file), "safetensors", arch="coconut_sep", data="synthetic:20")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"format": "onxx"}, UsageError, "onnx"),
        ({"input_type": "float"}, UsageError, "--input"),
        ({"output_type": "labels"}, UsageError, "--output"),
        ({"out": Path("/nowhere/at/all.pt2")}, DiskError, "/nowhere/at/all.pt2"),
        ({"run": "/nowhere"}, CheckpointError, "/nowhere"),
        ({"data": "/nowhere"}, DataError, "/nowhere"),
        ({"eval_weights": "ema"}, CheckpointError, "no average"),
    ],
)
def test_bad_input(run: Path, changes: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        export_model(**{"run": str(run), "format": "pt2", **changes})


def test_a_missing_library_is_named_with_its_install_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UsageError, match="pip install onnx"):
        export_model(str(run), "onnx")
    assert not list(run.glob("*.onnx*"))


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    done = CliRunner().invoke(app, ["export", str(run), "--format", "pt2", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["file"] == str(out)


def test_example_images_are_the_test_sets(run: Path) -> None:
    rebuilt = load_model(str(run), device="cpu", precision="fp32")
    from fastcifar.data import cifar

    data = cifar.load_dataset(rebuilt.recipe.data)
    deployed = DeployedModel(rebuilt.model, *normalization_mean_std(rebuilt.recipe), "uint8", "logits")
    images = example_inputs(deployed, data)
    assert torch.equal(images.permute(0, 3, 1, 2), torch.from_numpy(data.test.images[: room.NUM_VERIFICATION_IMAGES]))
