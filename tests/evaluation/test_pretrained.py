"""`pretrained:NAME`: the weights in the package, wherever a run is given, and their recorded accuracy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from fastcifar.device import has_native_bf16
from fastcifar.errors import CheckpointError
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.evaluation.export import export_model
from fastcifar.evaluation.load_run import load_model
from fastcifar.evaluation.predict import predict_to_file
from fastcifar.pretrained import pretrained_path, pretrained_weights
from fastcifar.recipe import Recipe
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train
from tests.training.optimizer_helpers import make_trainer

SPEED94 = "pretrained:speed94"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CORRECT = {"none": 9316, "6view": 9405}  # of the 10,000 test images, in float32


def test_weights_are_small_and_their_card_describes_them() -> None:
    assert list(pretrained_weights()) == ["speed94"]
    path = pretrained_path(SPEED94)
    assert path.stat().st_size <= 4.2e6
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    for count in CORRECT.values():
        assert f"{count:,} of 10,000" in card
    weights = safetensors.torch.load_file(path)
    assert {value.dtype for value in weights.values() if value.ndim > 1} == {torch.float16}


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="no pretrained weights 'speed49'; did you mean 'speed94'"):
        load_model("pretrained:speed49")


def test_predict_needs_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path / "nowhere"))
    Image.fromarray(np.full((48, 40, 3), (110, 160, 220), np.uint8)).save(tmp_path / "sky.png")
    result = predict_to_file(SPEED94, str(tmp_path / "sky.png"), tmp_path / "labels.csv", device="cpu")
    assert list(result["counts"]) == CLASSES
    assert sum(result["counts"].values()) == 1


def test_eval_and_export_take_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = evaluate_run(SPEED94, data="synthetic:64", device="cpu", compile=False)
    assert result["total"] is not None
    exported = export_model(SPEED94, "safetensors", data="synthetic:64")
    assert exported["file"] == "speed94.safetensors", "in the current folder, not in that of the package"
    assert list(pretrained_weights()) == ["speed94"]


def test_training_starts_from_the_weights(tiny: Callable[..., Recipe]) -> None:
    """The run records the name of the weights, not a path of this installation."""
    options = {"arch": "speed94", "blocks": None, "channels": None, "init": SPEED94}
    trainer = make_trainer(tiny(**options))
    assert trainer.recipe.init == SPEED94
    initial = resolve(trainer.recipe).initial
    assert initial
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, initial.weights[name].to(value.dtype), msg=name)
    summary = train(tiny(**options, epochs=1, max_steps=1, batch_size=8))
    saved = json.loads((Path(summary.run) / "summary.json").read_text())
    assert summary.config["init"] == saved["config"]["init"] == SPEED94


@pytest.mark.slow
@pytest.mark.skipif("FASTCIFAR_DATA" not in os.environ, reason="FASTCIFAR_DATA is not set")
@pytest.mark.filterwarnings("ignore:.*unofficial files")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 3), ("bf16", 15)])
def test_recorded_accuracy(precision: str, tolerance: int) -> None:
    if precision == "bf16" and not has_native_bf16("cpu"):
        pytest.skip("emulated bf16 would take a quarter of an hour")
    loaded = load_model(SPEED94, data=os.environ["FASTCIFAR_DATA"], device="cpu", precision=precision)
    test = loaded.load_dataset().test
    predicted = loaded.predict_logits(test).argmax(1)
    assert len(test.labels) == 10_000
    assert (predicted == torch.from_numpy(test.labels)).sum().item() == pytest.approx(CORRECT["none"], abs=tolerance)
