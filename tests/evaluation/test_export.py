"""Test that every export format reproduces the outputs of the network, and that other files are not kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torch._inductor import config as inductor_config
from typer.testing import CliRunner

from fastcifar._version import __version__
from fastcifar.cli.app import app
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.errors import CheckpointError, DataError, DiskError, UsageError, UserError
from fastcifar.evaluation import export
from fastcifar.evaluation.export import EXPORT_FORMATS, DeployedModel, export_model
from fastcifar.evaluation.load_run import load_model
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.training.train import train

OWN = "class folders of images"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small SE-ResNet on synthetic images of ten classes and return its run folder."""
    out = tmp_path_factory.mktemp("export") / "run"
    recipe = Recipe.make(
        arch="resnet", blocks=(1, 1), channels=(8, 16), se="block", data="synthetic:300", val_size=40, epochs=1,
        batch_size=32, lr=0.01, device="cpu", precision="fp32", compile=False, out=str(out),
    )  # fmt: skip
    return Path(train(recipe).run)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("format", "output_type"),
    [
        *((name, kind) for name in EXPORT_FORMATS if name != "aoti" for kind in export.OUTPUT_TYPES),
        pytest.param("aoti", "logits", marks=pytest.mark.slow),
    ],
)
@inductor_config.patch({"aot_inductor.precompile_headers": False})  # which are used only once
def test_exported_file_reproduces_the_outputs(run: Path, tmp_path: Path, format: str, output_type: str) -> None:
    """Compare the file with the forward pass of training, on a batch size that the export did not verify."""
    out = tmp_path / "file.bin"
    result = export_model(str(run), format, out, output_type=output_type)
    assert (result["images"], result["batch_sizes"]) == (256, [1, 7, 256]) or result["images"] < 256
    assert result["difference"] <= 1e-3
    assert result["bytes"] == out.stat().st_size
    assert result["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    loaded = load_model(str(run), device="cpu", precision="fp32")
    deployed = DeployedModel(loaded.model, loaded.recipe, "uint8", output_type).eval()
    data = loaded.load_dataset()
    assert torch.equal(export.example_inputs(deployed, data)[3].permute(2, 0, 1), torch.from_numpy(data.test.images[3]))
    function = EXPORT_FORMATS[format].load(out, deployed)
    images = torch.randint(256, (13, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded.forward(images)
        expected = expected.softmax(1) if output_type == "probabilities" else expected
        assert torch.allclose(function(images.permute(0, 2, 3, 1).contiguous()), expected, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.bin", "file.bin.md"]


@pytest.mark.medium
def test_normalized_input_gives_the_same_outputs(run: Path, tmp_path: Path) -> None:
    export_model(str(run), "pt2", tmp_path / "a.pt2", input_type="normalized", output_type="logits")
    loaded = load_model(str(run), device="cpu", precision="fp32")
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization_mean_std(loaded.recipe))
    function = torch.export.load(tmp_path / "a.pt2").module()
    with torch.no_grad():
        assert torch.allclose(function((images / 255 - mean) / std), loaded.forward(images), atol=1e-4)


@pytest.mark.medium
def test_file_with_different_outputs_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pt2 = EXPORT_FORMATS["pt2"]

    def load_wrong(path: Path, deployed: DeployedModel) -> Callable:
        function = pt2.load(path, deployed)
        return lambda images: function(images) + (0.01 if len(images) == 7 else 0)

    monkeypatch.setitem(EXPORT_FORMATS, "pt2", replace(pt2, load=load_wrong))
    with pytest.raises(UserError, match=r"differ from the network's by 0\.01, .* not kept"):
        export_model(str(run), "pt2", tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_failed_export_is_reported_in_one_line(run: Path, tmp_path: Path) -> None:
    no_compiler = config.patch("cpp.cxx", (None, "/nowhere/g++"))
    with (
        no_compiler,
        pytest.raises(UserError, match=r"cannot export .*a\.pt2: \w+: .*No working C\+\+ compiler") as caught,
    ):
        export_model(str(run), "aoti", tmp_path / "a.pt2")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_model_card_contains_the_records_of_the_run(run: Path) -> None:
    result = export_model(str(run), "safetensors")
    assert Path(result["file"]) == run / "resnet.safetensors"
    card = Path(result["card"]).read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for expected in (
        result["sha256"],
        f"{summary['params']:,} trainable parameters",
        f"test accuracy {100 * summary['test_acc']:.2f} %, {summary['correct']} of {summary['total']}, n = 1 seed",
        f"calibration error {summary['ece']:.4f}",
        "validation split: 40 of the training images",
        "seed 0, 1 epochs, lookahead:sgd",
        "not the official files",
    ):
        assert expected in card, expected
    other = export_model(str(run / "checkpoints" / "last.pt"), "safetensors", run / "x.safetensors", arch="resnet")
    assert "were not evaluated on the test set in this run" in Path(other["card"]).read_text(encoding="utf-8")
    other = export_model(str(run), "safetensors", run / "y.safetensors", normalize="kuangliu")
    card = Path(other["card"]).read_text(encoding="utf-8")
    assert "not evaluated with this normalization, only with `cifar10`" in card
    assert "test accuracy" not in card


@pytest.mark.medium
@pytest.mark.parametrize("init", ["", "checkpoints/last.pt"])
def test_model_card_names_initial_weights_and_frozen_layers(run: Path, tmp_path: Path, init: str) -> None:
    recipe = load_model(str(run), device="cpu").recipe.model_copy(
        update={"init": str(run / init), "freeze": "conv1", "out": str(tmp_path / "tuned"), "compile": False}
    )
    folder = Path(train(recipe).run)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    card = Path(export_model(str(folder), "safetensors")["card"])
    text = card.read_text(encoding="utf-8")
    assert f"- initial weights (`--init`): `run`, SHA-256 of the weights `{summary['init_sha256']}`\n" in text
    trained = f"{summary['trained_params']:,} of {summary['params']:,} parameters were trained"
    assert summary["trained_params"] < summary["params"]
    assert f"- layers that were not trained (`--freeze`): `conv1`; {trained}\n" in text
    assert str(run) not in text
    (folder / "summary.json").unlink()
    export_model(str(folder), "safetensors")
    assert "- layers that were not trained (`--freeze`): `conv1`\n" in card.read_text(encoding="utf-8")
    plain = Path(export_model(str(run), "safetensors", tmp_path / "plain.safetensors")["card"])
    assert not {"--init", "--freeze"} & set(plain.read_text(encoding="utf-8").replace("`", " ").split())


def read_card_head(card: Path) -> dict:
    return pytest.importorskip("yaml").safe_load(card.read_text(encoding="utf-8").split("---\n")[1])


def test_head_of_the_model_card_is_that_of_hugging_face(run: Path, tmp_path: Path) -> None:
    """The keys are those of https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    card = Path(export_model(str(run), "safetensors", tmp_path / "a.safetensors")["card"])
    assert card.read_text(encoding="utf-8").startswith("---\n# license: ")
    head = read_card_head(card)
    assert head.pop("model-index") == [
        {
            "name": "resnet",
            "results": [
                {
                    "task": {"type": "image-classification", "name": "Image Classification"},
                    "dataset": {"type": "synthetic images", "name": "synthetic images", "split": "test"},
                    "metrics": [{"type": "accuracy", "name": "Test accuracy", "value": summary["test_acc"]}],
                }
            ],
        }
    ]
    assert head == {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resnet", "fastcifar"],
        "metrics": ["accuracy"],
    }
    other = export_model(str(run), "safetensors", tmp_path / "b.safetensors", normalize="kuangliu")
    assert "model-index" not in read_card_head(Path(other["card"]))


@pytest.mark.parametrize(
    ("changes", "dataset"),
    [
        ({"source": "data", "source_type": "archive"}, "cifar10"),
        ({"source": "data", "name": "cifar100", "classes": ("a", "b"), "source_type": "archive"}, "cifar100"),
        ({"source": "data", "classes": ("a", "b"), "source_type": OWN, "own_images": True}, None),
        ({"source": "data", "name": "cifar100", "classes": ("a", "b"), "source_type": OWN, "own_images": True}, None),
        ({"source": "data", "source_type": OWN, "own_images": True}, "cifar10"),
    ],
)
def test_model_card_names_cifar_only_if_the_images_are_those_of_cifar(
    run: Path, tmp_path: Path, changes: dict, dataset: str | None
) -> None:
    loaded = load_model(str(run), device="cpu", precision="fp32")
    data = replace(loaded.load_dataset(), **changes)
    (tmp_path / "a.md").write_text(export._card_head("onnx", loaded, data, run))
    head = read_card_head(tmp_path / "a.md")
    assert (head["library_name"], head.get("datasets")) == ("onnx", [dataset] if dataset else None)
    assert head["model-index"][0]["results"][0]["dataset"]["type"] == (dataset or OWN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("input_type", "expected"),
    [
        ("uint8", {"input_layout": "NHWC", "input_dtype": "uint8", "normalization": "in the network"}),
        ("normalized", {"input_layout": "NCHW", "input_dtype": "float32", "normalization": "before the network"}),
    ],
)
def test_onnx_file_contains_the_classes_and_the_normalization(
    run: Path, tmp_path: Path, input_type: str, expected: dict[str, str]
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    export_model(str(run), "onnx", tmp_path / "a.onnx", input_type=input_type, output_type="logits")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert onnxruntime.InferenceSession(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map == metadata
    expected = {**expected, "input_colors": "RGB", "output": "logits", "arch": "resnet", "weights": "last"}
    assert metadata == metadata | expected | {"run": "run", "fastcifar_version": __version__}
    assert json.loads(metadata["classes"])[:2] == ["airplane", "automobile"]
    # the mean and standard deviation over the pixels of CIFAR-10, with the four digits in wide use
    assert json.loads(metadata["mean"]) == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert json.loads(metadata["std"]) == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)


@pytest.mark.medium
def test_published_weights_are_exported_and_mismatches_refused(tmp_path: Path) -> None:
    state_dict = build_model("coconut_sep").state_dict()
    file = tmp_path / "ckpt.pth"
    torch.save({"net": {f"module.{key}": value for key, value in state_dict.items()}, "acc": 95.0, "epoch": 3}, file)
    result = export_model(str(file), "safetensors", arch="coconut_sep", data="synthetic:20")
    assert Path(result["file"]).name == "coconut_sep.safetensors"
    assert "`kuangliu`" in Path(result["card"]).read_text(encoding="utf-8")
    torch.save({"net": {**state_dict, "extra.weight": torch.ones(1)}}, file)
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        export_model(str(file), "safetensors", arch="coconut_sep", data="synthetic:20")


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"format": "onxx"}, UsageError, "onnx"),
        ({"input_type": "float"}, UsageError, "--input"),
        ({"output_type": "labels"}, UsageError, "--output"),
        ({"out": Path("/nowhere/at/all.pt2")}, DiskError, "/nowhere/at/all.pt2"),
        ({"run": "/nowhere"}, CheckpointError, "/nowhere"),
        ({"data": "/nowhere"}, DataError, "/nowhere"),
        ({"eval_weights": "ema"}, CheckpointError, "no EMA weights"),
    ],
)
def test_invalid_arguments_are_refused(run: Path, changes: dict, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        export_model(**{"run": str(run), "format": "pt2", **changes})


def test_missing_library_is_reported_with_the_install_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[onnx\]'"):
        export_model(str(run), "onnx")
    assert not list(run.glob("*.onnx*"))


def test_export_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    result = CliRunner().invoke(app, ["export", str(run), "--format", "safetensors", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["file"] == str(out)
