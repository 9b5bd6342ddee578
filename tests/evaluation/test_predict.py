"""Test predictions against a simple forward pass, for every layout of the input images."""

from __future__ import annotations

import csv
import io
import json
import math
import pickle
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

import fastcifar
from fastcifar.cli.tables import predictions_table
from fastcifar.data import cifar, normalization, splits
from fastcifar.data.cifar import Split
from fastcifar.device import choose_execution
from fastcifar.errors import CheckpointError, DataError, DiskError, NonFiniteError, UsageError, UserError
from fastcifar.evaluation import load_run
from fastcifar.evaluation.load_run import LoadedModel
from fastcifar.evaluation.predict import predict_to_file
from fastcifar.evaluation.prediction_files import PredictionFormat
from fastcifar.models import build_model
from fastcifar.recipe import Recipe
from fastcifar.training import checkpoint
from fastcifar.training.resolve import model_from_recipe
from fastcifar.training.train import train

DATA = "synthetic:1000"  # 200 test images
CPU_OPTIONS: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return cifar.load_dataset(DATA).test.images


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray) -> list[str]:
    """Save two networks that distinguish the images: batch-norm statistics of the images and a scaled linear layer."""
    recipe = Recipe.make(arch="resnet", blocks=(1, 1), channels=(8, 16), data=DATA, val_size=40, device="cpu")
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = model_from_recipe(recipe, 10)
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.momentum = None  # use the statistics of the single batch below
        with torch.no_grad():
            model(normalized(images))
            linear = model.get_submodule("linear")
            assert isinstance(linear, nn.Linear)
            linear.weight *= 30
            linear.bias -= model.eval()(normalized(images)).mean(0)
        paths.append(folder / f"{seed}.pt")
        names = list(cifar.load_dataset(DATA).classes)
        state = {"recipe": recipe.model_dump(mode="json"), "classes": names, "model": model.state_dict(), "ema": None}
        checkpoint.save_checkpoint(paths[-1], state)
    return [str(path) for path in paths]


def normalized(images: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization.NORMALIZATIONS["cifar10"])
    return (torch.from_numpy(images).float() / 255 - mean) / std


def reference_logits(run: str, images: np.ndarray) -> Tensor:
    """Return the logits of an independent forward pass in one batch, NCHW and float32."""
    saved = checkpoint.load_checkpoint(Path(run))
    model = model_from_recipe(Recipe(**saved["recipe"]), 10)
    model.load_state_dict(saved["model"])
    with torch.no_grad():
        return model.eval()(normalized(images))


def read_labels(path: Path) -> dict[int, int]:
    rows = list(csv.reader(path.read_text().splitlines()))
    return {int(key): int(label) for key, label in rows[1:]}


def write_pickle(path: Path, images: np.ndarray, ids: list[int], key: Callable[[str], Any] = str) -> str:
    path.write_bytes(pickle.dumps({key("data"): images, key("ids"): ids}, protocol=2))
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "out").mkdir()
    yield tmp_path / "out" / "a.csv"
    assert not list(tmp_path.glob("out/.*")), "a temporary file remains"


@pytest.mark.medium
def test_fault12_the_same_images_in_every_layout_have_the_same_labels(
    runs: list[str], images: np.ndarray, tmp_path: Path, out: Path
) -> None:
    ids = np.random.default_rng(0).permutation(5000)[:200].tolist()
    expected = dict(zip(ids, reference_logits(runs[0], images).argmax(1).tolist(), strict=True))
    assert len(set(expected.values())) >= 5, "too few classes to detect wrongly decoded images"
    shuffled = np.random.default_rng(1).permutation(200)
    for layout in (images.reshape(200, 3072), images.transpose(0, 2, 3, 1), images):
        for key in (str, str.encode):
            for order in (np.arange(200), shuffled):
                source = write_pickle(tmp_path / "in", layout[order], [ids[index] for index in order], key)
                predict_to_file(runs[0], source, out, **CPU_OPTIONS)
                assert read_labels(out) == expected
                assert list(read_labels(out)) == [ids[index] for index in order]


@pytest.mark.parametrize("content", [pickle.dumps({"data": np.zeros((4, 28, 28, 3), np.uint8)}), b"<html>404</html>"])
def test_fault13_malformed_input_writes_nothing(runs: list[str], tmp_path: Path, out: Path, content: bytes) -> None:
    """The malformed inputs are those of tests/data/test_predict_inputs.py; these are two of them."""
    (tmp_path / "in.pkl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        predict_to_file(runs[0], str(tmp_path / "in.pkl"), out, plot_path=out.with_suffix(".png"), **CPU_OPTIONS)
    assert caught.value.exit_code == 3
    assert not list(out.parent.iterdir())


def test_fault13_csv_is_a_kaggle_submission(runs: list[str], images: np.ndarray, tmp_path: Path, out: Path) -> None:
    ids = list(range(199, -1, -1))
    source = write_pickle(tmp_path / "in.pkl", images, ids)
    result = predict_to_file(runs[0], source, out, **CPU_OPTIONS)
    lines = out.read_text().split("\n")
    assert (lines[0], len(lines), lines[-1]) == ("ID,Labels", 202, "")
    assert [line.split(",")[0] for line in lines[1:-1]] == [str(value) for value in ids]
    assert {line.split(",")[1] for line in lines[1:-1]} <= set("0123456789")
    assert sum(result["counts"].values()) == result["images"] == 200
    assert result["images_per_s"] == pytest.approx(200 / result["seconds"]["predict"])
    assert predictions_table(result)
    predict_to_file(runs[0], source, out, format=PredictionFormat("id,label", True), **CPU_OPTIONS)
    assert out.read_text().startswith("id,label\n199,")
    assert {line.split(",")[1] for line in out.read_text().split("\n")[1:-1]} <= set(cifar.load_dataset(DATA).classes)


@pytest.mark.medium
def test_logits_are_averaged_over_views_and_members(runs: list[str], images: np.ndarray, out: Path) -> None:
    out = out.with_suffix(".jsonl")
    flipped = np.ascontiguousarray(images[..., ::-1])
    logits = sum(reference_logits(run, view) for run in runs for view in (images, flipped)) / 4
    assert isinstance(logits, Tensor)
    result = predict_to_file(
        runs[0],
        "data:test",
        out,
        ensemble=runs[1:],
        tta="flip",
        format=PredictionFormat(top_k=3, with_probabilities=True),
        **CPU_OPTIONS,
    )
    assert [member["checkpoint"] for member in result["members"]] == runs
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    classes = list(cifar.load_dataset(DATA).classes)
    probabilities = torch.tensor([[row[name] for name in classes] for row in rows])
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-3, atol=1e-4)
    assert [row["Labels"] for row in rows] == probabilities.argmax(1).tolist()
    for row, row_probabilities in zip(rows, probabilities, strict=True):
        best = row_probabilities.topk(3)
        assert [row[f"top_{rank}_probability"] for rank in (1, 2, 3)] == pytest.approx(best.values.tolist())
        assert [row[classes[row[f"top_{rank}"]]] for rank in (1, 2, 3)] == pytest.approx(best.values.tolist())


@pytest.mark.medium
def test_calibrated_probabilities_are_those_at_the_temperature_of_each_run(
    tiny: Callable[..., Recipe], tmp_path: Path, out: Path
) -> None:
    """The temperature of each run minimizes the loss on its 40 validation images, with the same two views."""
    trained = [train(tiny(seed=seed, out=str(tmp_path / f"run{seed}"))) for seed in (0, 1)]
    runs = [f"{summary.run}/checkpoints/last.pt" for summary in trained]
    data = cifar.load_dataset("synthetic:200")
    _, indices = splits.stratified_split(data.train.labels, 40, 0)
    labels = torch.from_numpy(data.train.labels[indices])

    def two_view_logits(run: str, images: np.ndarray) -> Tensor:
        flipped = np.ascontiguousarray(images[..., ::-1])
        return (reference_logits(run, images) + reference_logits(run, flipped)) / 2

    options: dict[str, Any] = {"ensemble": runs[1:], "tta": "flip", **CPU_OPTIONS}
    format = PredictionFormat(with_probabilities=True, is_calibrated=True)
    result = predict_to_file(runs[0], "data:test", out, format=format, **options)
    scaled_logits = []
    for run, member in zip(runs, result["members"], strict=True):
        logits = two_view_logits(run, data.train.images[indices])
        losses = {step: F.cross_entropy(logits / math.exp(step / 50), labels).item() for step in range(-230, 231)}
        temperature = member["temperature"] or 0.0
        assert temperature == pytest.approx(math.exp(min(losses, key=losses.__getitem__) / 50), rel=0.021)
        scaled_logits.append(two_view_logits(run, data.test.images) / temperature)
    expected = torch.stack(scaled_logits).mean(0).softmax(1)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    probabilities = torch.tensor([[float(row[name]) for name in data.classes] for row in rows])
    torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-4)
    assert result["confidence"] == pytest.approx(expected.amax(1).mean().item(), rel=1e-3)
    table = Console(width=200, file=io.StringIO(), record=True)
    table.print(predictions_table(result))
    first, second = (member["temperature"] for member in result["members"])
    assert f"logits divided by {first:.3f}, {second:.3f}, fitted on the validation split" in table.export_text()
    uncalibrated = predict_to_file(runs[0], "data:test", out, **options)
    assert [member["temperature"] for member in uncalibrated["members"]] == [None, None]
    assert uncalibrated["confidence"] != pytest.approx(result["confidence"], rel=1e-2)


def test_calibration_without_probabilities_or_a_validation_split_is_refused(
    runs: list[str], tmp_path: Path, out: Path
) -> None:
    with pytest.raises(UsageError, match="add --probabilities or --top K"):
        predict_to_file(runs[0], "data:test", out, format=PredictionFormat(is_calibrated=True), **CPU_OPTIONS)
    saved = checkpoint.load_checkpoint(Path(runs[0]))
    for name, recipe, state, reason in (
        ("none", {"val_size": 0}, {}, "the run had no validation split; omit --calibrated"),
        ("larger", {"val_size": 2000}, {}, "the run's validation split has 2,000 images, but .* 1,000"),
        ("zero", {}, {"linear.weight": 0}, "no temperature from 0.01 to 100 minimizes the loss"),
    ):
        model = {key: value * state.get(key, 1) for key, value in saved["model"].items()}
        torch.save({**saved, "model": model, "recipe": {**saved["recipe"], **recipe}}, tmp_path / f"{name}.pt")
        format = PredictionFormat(top_k=1, is_calibrated=True)
        with pytest.raises(UsageError, match=rf"{name}\.pt cannot be calibrated: {reason}"):
            predict_to_file(str(tmp_path / f"{name}.pt"), "data:test", out, format=format, **CPU_OPTIONS)
    assert not list(out.parent.iterdir())


@pytest.mark.medium
def test_fault46_images_of_a_memory_mapped_file_are_never_in_memory_together(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 60_000
    images = np.lib.format.open_memmap(tmp_path / "many.npy", "w+", np.uint8, (count, 3072))  # a sparse file
    images.flush()

    def read_pixels(member: LoadedModel, split: Split, tta: str) -> Tensor:
        logits = torch.zeros(len(split.labels), 10)
        logits[:, 3] = 1 + torch.from_numpy(split.images.sum((1, 2, 3), dtype=np.int64))
        return logits

    monkeypatch.setattr(LoadedModel, "predict_logits", read_pixels)
    tracemalloc.start()
    try:
        result = predict_to_file(runs[0], str(tmp_path / "many.npy"), tmp_path / "many.csv", compile=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (result["images"], result["counts"]["cat"]) == (count, count)
    assert peak < images.nbytes / 2, f"{peak:,} bytes"


@pytest.mark.medium
def test_folder_of_images_and_plot(runs: list[str], images: np.ndarray, tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(9):
        Image.fromarray(images[number].transpose(1, 2, 0)).save(tmp_path / "in" / f"{number}.png")
    predict_to_file(runs[0], str(tmp_path / "in"), out, plot_path=out.with_suffix(".png"), **CPU_OPTIONS)
    assert read_labels(out) == dict(enumerate(reference_logits(runs[0], images[:9]).argmax(1).tolist()))
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.width > 9 * 100
    predict_to_file(runs[0], "data:test", out, plot_path=out.with_suffix(".png"), **CPU_OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out": Path("a.txt")}, UsageError, "ends in one of .csv"),
        ({"plot_path": Path("a.jpg")}, UsageError, "ends in .png"),
        ({"plot_path": Path("no/such/a.png")}, DiskError, "no folder"),
        ({"tta": "flop"}, UsageError, "did you mean 'flip'"),
        ({"eval_weights": "lats"}, UsageError, "did you mean 'last'"),
        ({"eval_weights": "ema"}, CheckpointError, "no EMA weights"),
        ({"eval_weights": "best"}, UsageError, "0.pt is not best.pt, the checkpoint of the best epoch; give the run"),
        ({"precision": "fp33"}, UsageError, "--precision"),
        ({"ensemble": ["no.pt"]}, CheckpointError, "checkpoint no.pt does not exist"),
        ({"arch": "se68"}, CheckpointError, "contains resnet, not se68"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(
    runs: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    error: type[UserError],
    message: str,
) -> None:
    monkeypatch.chdir(out.parent)
    arguments = {"out": Path("a.csv"), **CPU_OPTIONS, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        predict_to_file(runs[0], "data:test", **arguments)
    assert not list(out.parent.iterdir())


def test_non_finite_logits_and_members_with_other_classes_are_refused(
    runs: list[str], tmp_path: Path, out: Path
) -> None:
    saved = checkpoint.load_checkpoint(Path(runs[0]))
    other = str(tmp_path / "other.pt")
    torch.save({**saved, "classes": saved["classes"][::-1]}, other)
    with pytest.raises(CheckpointError, match="other classes"):
        predict_to_file(runs[0], "data:test", out, ensemble=[other], **CPU_OPTIONS)
    saved["model"]["linear.bias"][3] = torch.nan
    torch.save(saved, other)
    with pytest.raises(NonFiniteError):
        predict_to_file(other, "data:test", out, **CPU_OPTIONS)
    assert not list(out.parent.iterdir())


def test_splits_of_a_data_set_with_other_classes_are_refused(
    runs: list[str], images: np.ndarray, tmp_path: Path, out: Path
) -> None:
    pixels, labels = images[:20].transpose(0, 2, 3, 1), np.arange(20) % 10
    arrays = {"train_images": pixels, "train_labels": labels, "test_images": pixels, "test_labels": labels}
    other = str(tmp_path / "other.npz")
    np.savez(other, classes=np.array(cifar.load_dataset(DATA).classes[::-1]), **arrays)
    loaded = fastcifar.load_run(runs[0], device="cpu", data=other)
    for predict in (
        lambda: predict_to_file(runs[0], "data:test", out, data=other, **CPU_OPTIONS),
        lambda: loaded.predict("data:train"),
    ):
        with pytest.raises(DataError, match=r"the classes of .*other\.npz .* are not those that .* was trained on"):
            predict()
    assert not list(out.parent.iterdir())


@pytest.mark.medium
def test_published_weights(tmp_path: Path, out: Path) -> None:
    torch.manual_seed(0)
    state = {f"module.{key}": value for key, value in build_model("se55").state_dict().items()}
    torch.save({"net": state, "acc": 95.8, "epoch": 1}, tmp_path / "ckpt.pth")
    file = str(tmp_path / "ckpt.pth")
    result = predict_to_file(file, "data:test", out, arch="se55", data="synthetic:20", **CPU_OPTIONS)
    assert (result["members"][0]["eval_weights"], result["images"]) == ("published", 10)
    with pytest.raises(CheckpointError, match="lacks residual_layers"):
        predict_to_file(file, "data:test", out, arch="se68", data="synthetic:20", **CPU_OPTIONS)
    with pytest.raises(CheckpointError, match="set --arch se55"):
        predict_to_file(file, "data:test", out, data="synthetic:20", **CPU_OPTIONS)


def test_compilation_and_cuda_graph_depend_on_the_number_of_images(
    runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, bool]] = []  # (compile, use_cuda_graph)
    monkeypatch.setattr(load_run.evaluate, "optimize_forward", lambda *args: calls.append(args[3:5]) or args[1])
    # The execution plan of a GPU, although the network stays on the CPU.
    gpu_execution = replace(choose_execution(Recipe(compile=True, device="cpu")), cuda_graph=True)
    monkeypatch.setattr(load_run, "choose_execution", lambda recipe: gpu_execution)
    for num_images in (499, 500, 99_999, 100_000):
        load_run.load_model(runs[0]).compile_for(num_images)
    load_run.load_model(runs[0], compile=True).compile_for(10)
    assert calls == [(False, False), (False, True), (False, True), (True, True), (True, False)]


def test_a_network_is_compiled_for_each_number_of_images_and_only_once(
    runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized: list[Any] = []

    def optimize_forward(model: Any, forward: Any, *options: Any) -> Any:
        assert forward is eager, "never the result of an earlier call"
        optimized.append(lambda images: forward(images))
        return optimized[-1]

    monkeypatch.setattr(load_run.evaluate, "optimize_forward", optimize_forward)
    plan = replace(choose_execution(Recipe(compile=True, device="cpu", precision="fp32")), winograd=True)
    monkeypatch.setattr(load_run, "choose_execution", lambda recipe: plan)
    loaded = load_run.load_model(runs[0], arch=None)
    eager = loaded.forward
    used = []
    for num_images in (2, 100_000, 600, 2, 200_000):
        loaded.compile_for(num_images)
        used.append((loaded.forward, loaded.execution.compile, loaded.execution.winograd))
    small, large, medium = optimized
    assert used == [
        (small, False, False), (large, True, True), (medium, False, True), (small, False, False), (large, True, True),
    ]  # fmt: skip
