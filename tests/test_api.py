"""The Python interface: networks, images and transforms of the user, from training to prediction."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from fastcifar import Dataset, LoadedRun, Recipe, Result, Split, Trainer, batches, load_dataset, load_run, train
from fastcifar.cli.app import app
from fastcifar.data.image_files import decode_image
from fastcifar.errors import CheckpointError, Interrupted, UserError
from fastcifar.evaluation.prediction_files import PredictionFormat
from fastcifar.format import format_option_value, option_flag
from fastcifar.models import MODELS
from fastcifar.training.train import train as train_by_name

Tiny = Callable[..., Recipe]


class Net(nn.Module):
    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = round(4 * width)
        self.layers = nn.Sequential(nn.Conv2d(3, channels, 4, 4), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64 * channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images))


def resnet18(num_classes: int) -> nn.Module:
    return Net(num_classes)


def linear(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, outputs))


def add_noise(images: Tensor) -> Tensor:
    """Use the generators of torch, NumPy and Python."""
    noise = torch.randint(0, 2, images.shape, dtype=torch.uint8, device=images.device)
    return images ^ noise ^ np.random.randint(0, 4) ^ random.randrange(4)


def rotate(image: Image.Image) -> Image.Image:
    return image.rotate(random.uniform(-9, 9) + np.random.uniform(-9, 9) + float(torch.rand(())))


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("synthetic:200")


@pytest.fixture
def recipe(tiny: Tiny) -> Recipe:
    """The recipe `tiny` without a network or data set of its own."""
    values = tiny().model_dump(exclude_unset=True)
    return Recipe(
        **{name: value for name, value in values.items() if name not in ("arch", "blocks", "channels", "data")}
    )


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def test_a_run_records_the_names_of_its_objects(recipe: Recipe, data: Dataset) -> None:
    rows: list[Any] = []
    result = train(recipe, model=Net, data=data, batch_transform=add_noise, callbacks=[rows.append], progress=False)
    assert isinstance(result, Result)
    assert result.folder == Path(result.summary.run)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[1]["val_acc"] == result.summary.val_acc
    assert isinstance(result.model, Net)
    assert not result.model.training
    saved = Recipe.make(str(result.folder / "recipe.toml"))
    assert (saved.arch, saved.data, saved.augment) == (
        "Net", "python", "crop:4:zero,flip:0.5:random,batch_transform:add_noise",
    )  # fmt: skip
    assert json.loads((result.folder / "summary.json").read_text())["data_digest"] == data.digest


NAMES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a class": (Net, {}, "Net"),
    "an option": (Net, {"width": 2.0}, "Net"),
    "a module": (Net(10), {}, "Net"),
    "a function": (lambda num_classes: Net(num_classes), {}, "lambda"),
    "a function without arguments": (lambda: Net(10), {}, "lambda"),
    "a name in the recipe": (lambda num_classes: Net(num_classes), {"arch": "my net"}, "my net"),
    "a recipe of another network": (Net, {"arch": "speednet"}, "Net"),
    "a name that is taken": (resnet18, {}, f"{__name__}:resnet18"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_networks(case: str, recipe: Recipe, data: Dataset) -> None:
    model, options, name = NAMES[case]
    trainer = Trainer.from_recipe(recipe.model_copy(update=options), model=model, data=data)
    assert trainer.recipe.arch == name
    assert isinstance(trainer.model, Net)
    assert trainer.model.head.in_features == 256 * options.get("width", 1)
    assert model is trainer.model or not isinstance(model, nn.Module)
    assert name not in MODELS


def test_a_module_is_trained_in_place_from_its_weights(recipe: Recipe, data: Dataset) -> None:
    network = Net(10).eval()
    before = weights_of(network)
    start = Trainer.from_recipe(recipe, model=network, data=data)
    assert all(np.array_equal(before[name], value) for name, value in weights_of(network).items())
    assert start.model is network
    result = train(recipe, model=network, data=data, progress=False)
    assert result.model is network
    assert not np.array_equal(before["head.weight"], weights_of(network)["head.weight"])
    other = Net(10)
    run = load_run(result.folder, model=other, data=data)
    assert run.model is other
    assert all(np.array_equal(value, weights_of(other)[name]) for name, value in weights_of(network).items())


@pytest.mark.medium
def test_a_loop_of_ones_own_computes_what_train_computes(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    recipe = recipe.model_copy(update={"ema_decay": 0.9, "schedule": "plateau:1", "tta": "flip"})
    rows: list[Any] = []
    result = train(recipe, model=Net, data=data, callbacks=[rows.append], progress=False)
    trainer = Trainer.from_recipe(recipe, model=Net, data=data)
    trainer.optimize()
    for epoch in range(recipe.epochs):
        for batch in trainer.batches(epoch):
            trainer.train_step(batch)
        assert trainer.end_epoch().items() <= rows[epoch].items()
        trainer.save(tmp_path / "own" / f"{epoch}.pt")
    scores, ema_acc, tta_acc = trainer.test()
    summary = result.summary
    assert scores is not None
    assert (scores.accuracy, ema_acc, tta_acc) == (summary.test_acc, summary.test_acc_ema, summary.test_acc_tta)
    assert all(
        np.array_equal(value, weights_of(result.model)[name]) for name, value in weights_of(trainer.model).items()
    )
    resumed = Trainer.from_recipe(recipe, model=Net, data=data)
    resumed.load(tmp_path / "own" / "0.pt")
    assert (resumed.progress.epoch, resumed.progress.step) == (1, 5)
    for batch in resumed.batches(1):
        resumed.train_step(batch)
    assert resumed.end_epoch() == trainer_row(rows[1])
    assert resumed.test() == (scores, ema_acc, tta_acc)
    assert load_run(tmp_path / "own" / "1.pt", model=Net, data=data).evaluate()["test_acc"] == summary.test_acc


def trainer_row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("images_per_s", "seconds")}


def test_checkpoints_that_do_not_fit_a_loop_are_refused(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    Trainer.from_recipe(recipe, model=Net, data=data).save(tmp_path / "own.pt")
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks 1\.bias, 1\.weight"):
        Trainer.from_recipe(recipe, model=linear(10), data=data).load(tmp_path / "own.pt")
    reversed_data = replace(data, train=Split(data.train.images[::-1], data.train.labels[::-1]))
    with pytest.raises(CheckpointError, match="other images or labels"):
        Trainer.from_recipe(recipe, model=Net, data=reversed_data).load(tmp_path / "own.pt")
    best = Trainer.from_recipe(recipe.model_copy(update={"eval_weights": "best"}), model=Net, data=data)
    with pytest.raises(UserError, match="the best epoch was not saved; give its checkpoint"):
        best.test()


@pytest.mark.medium
@pytest.mark.parametrize("own", [{"batch_transform": add_noise}, {"transform": rotate}], ids=["batch", "image"])
def test_a_resumed_run_needs_the_same_objects_and_is_identical(
    own: dict[str, Any], recipe: Recipe, data: Dataset, tmp_path: Path
) -> None:
    recipe = recipe.model_copy(update={"workers": 0, "augment": "crop:2:zero,cutmix:1"})
    objects: dict[str, Any] = {"model": Net, "data": data, **own}
    whole = train(recipe.model_copy(update={"out": str(tmp_path / "whole")}), **objects, progress=False)
    stopped = train(recipe.model_copy(update={"max_steps": 7}), **objects, progress=False)
    again = Recipe(resume=str(stopped.folder))
    without = {
        "model": "unknown architecture 'Net'; give --import FILE.py for a network of your own, in Python model=",
        "data": "the data set was given from Python; pass it again as data=",
        **{name: rf"given from Python; give {function.__name__} as {name}=" for name, function in own.items()},
    }
    for name, message in without.items():
        with pytest.raises(UserError, match=message):
            train(again, **{key: value for key, value in objects.items() if key != name}, progress=False)
    with pytest.raises(UserError, match=f"give {next(iter(own.values())).__name__} as .*=, not lambda"):
        train(again, **{**objects, **dict.fromkeys(own, lambda images: images)}, progress=False)
    reversed_data = replace(data, train=Split(data.train.images[::-1], data.train.labels[::-1]))
    with pytest.raises(CheckpointError, match="other images or labels than those of synthetic:200"):
        train(again, **{**objects, "data": reversed_data}, progress=False)
    resumed = train(again, **objects, progress=False)
    assert resumed.folder == stopped.folder
    assert (resumed.summary.steps, resumed.summary.test_loss) == (whole.summary.steps, whole.summary.test_loss)
    assert all(
        np.array_equal(value, weights_of(resumed.model)[name]) for name, value in weights_of(whole.model).items()
    )


def test_the_message_of_an_interrupted_run_is_a_call(recipe: Recipe, data: Dataset) -> None:
    def interrupt(row: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"continue with: train\(Recipe\(resume='.*/run'\), model=..., data=...\)$"):
        train(recipe, model=Net, data=data, callbacks=[interrupt], progress=False)


def test_a_callback_ends_a_run_by_a_string_only(recipe: Recipe, data: Dataset) -> None:
    result = train(recipe, model=Net, data=data, callbacks=[lambda row: 7, lambda row: "enough"], progress=False)
    assert (result.summary.epochs, result.summary.stop_reason, result.summary.complete) == (1, "enough", False)
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        train(recipe, model=Net, data=data, callbacks=[lambda row: Path("no-such-folder/rows").touch()], progress=False)


@pytest.mark.slow
def test_progress_shows_what_the_command_shows(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny(epochs=1)
    train(recipe, progress=False)
    assert capsys.readouterr().out == ""
    train(recipe)
    shown = capsys.readouterr().out.splitlines()
    options = {name: value for name, value in recipe.non_default_options().items() if name != "compile"}
    flags = [f"{option_flag(name)}={format_option_value(value)}" for name, value in options.items()]
    assert app(["train", *flags, "--no-compile", "--no-plots"], standalone_mode=False) == 0
    by_command = capsys.readouterr().out.splitlines()[: len(shown)]
    # but for the number of the run folder and, at the end of a row, the speed
    assert [re.sub(r"/run-\d| +[\d,.]+ +\d+$", "", line) for line in shown] == [
        re.sub(r"/run-\d| +[\d,.]+ +\d+$", "", line) for line in by_command
    ]


@pytest.fixture
def run(recipe: Recipe, data: Dataset) -> Result:
    return train(recipe, model=Net, data=data, progress=False)


@pytest.mark.medium
def test_a_loaded_run_evaluates_predicts_and_exports(run: Result, data: Dataset, tmp_path: Path) -> None:
    network = Net(10)
    loaded = load_run(run.folder, model=network, data=data, tta="flip")
    assert isinstance(loaded, LoadedRun)
    scores = loaded.evaluate(plots_dir=tmp_path / "plots")
    assert (scores["test_acc"], scores["val_acc"]) == (run.summary.test_acc, run.summary.val_acc)
    assert scores["test_acc_tta"] is not None
    assert (tmp_path / "plots" / "confusion.png").is_file()
    result = loaded.export("safetensors", tmp_path / "net.safetensors")
    assert result["images"] == 40
    assert loaded.model is network
    predictions = load_run(run.folder, model=network, data=data).predict(data.test.images)
    correct = predictions.labels == data.test.labels
    assert correct.mean() == run.summary.test_acc
    assert predictions.probabilities.shape == (40, 10)
    assert np.allclose(predictions.probabilities.sum(1), 1)
    predictions.save(tmp_path / "submission.csv")
    rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert rows[:2] == ["ID,Labels", f"0,{predictions.labels[0]}"]


def test_predict_takes_every_layout_and_paths(run: Result, data: Dataset, tmp_path: Path) -> None:
    loaded = load_run(run.folder, model=Net, data=data)
    expected = loaded.predict("data:test").probabilities
    images = np.array(data.test.images)
    np.save(tmp_path / "images.npy", images)
    for given in (images, images.transpose(0, 2, 3, 1), torch.from_numpy(images), str(tmp_path / "images.npy")):
        assert np.array_equal(loaded.predict(given).probabilities, expected)
    for wrong in (images.astype(np.float32), images[:, :2], images[:0]):
        with pytest.raises(UserError, match=r"give uint8 \[n, 32, 32, 3\] or \[n, 3, 32, 32\]"):
            loaded.predict(wrong)
    with pytest.raises(UserError, match="images of 32x16 pixels, expected 32x32 RGB; give --resize 32"):
        loaded.predict(images[:, :, :16])
    resizing = load_run(run.folder, model=Net, data=data, resize=32)
    assert np.array_equal(resizing.predict(images).probabilities, expected)
    assert len(resizing.predict(images[:, :, :16]).ids) == 40
    with pytest.raises(UserError, match="no known file suffix"):
        loaded.predict(images).save(tmp_path / "submission.txt")
    with pytest.raises(UserError, match="not calibrated; use `fastcifar predict --calibrated`"):
        loaded.predict(images).save(tmp_path / "a.csv", PredictionFormat(with_probabilities=True, is_calibrated=True))
    assert not (tmp_path / "a.csv").exists()


def test_a_loaded_run_needs_its_network_and_data(run: Result, data: Dataset) -> None:
    with pytest.raises(UserError, match=r"unknown architecture 'Net'; give .*, in Python model=") as error:
        load_run(run.folder)
    assert "\n" not in str(error.value)
    for network in (linear(10), lambda num_classes: Net(num_classes, width=2)):
        with pytest.raises(CheckpointError, match=r"last.pt (lacks|has other shapes for) "):
            load_run(run.folder, model=network)
    with pytest.raises(UserError, match=r"architecture Net returns float32 of shape \[2, 3\]"):
        load_run(run.folder, model=Net(3))
    loaded = load_run(run.folder, model=Net)
    assert len(loaded.predict(data.test.images).labels) == 40  # which needs no data set
    with pytest.raises(UserError, match="the data set was given from Python; pass it again as data="):
        loaded.evaluate()
    with pytest.raises(UserError, match=r"the classes of .* are not those that"):
        load_run(run.folder, model=Net, data=replace(data, classes=data.classes[::-1]))
    reversed_data = replace(data, train=Split(data.train.images[::-1], data.train.labels[::-1]))
    scores = load_run(run.folder, model=Net, data=reversed_data).evaluate()
    assert (scores["test_acc"], scores["val_acc"]) == (run.summary.test_acc, None)
    assert "other images or labels" in str(scores["temperature_missing"])
    assert load_run(run.folder, model=Net, data="synthetic:200").evaluate()["val_acc"] == run.summary.val_acc


def test_weights_of_another_project(data: Dataset, tmp_path: Path) -> None:
    network = Net(10)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "own.pth")
    loaded = load_run(tmp_path / "own.pth", model=Net, device="cpu", precision="fp32")
    images = torch.from_numpy(np.array(data.test.images[:5]))
    logits = loaded.model(torch.zeros(5, 3, 32, 32))
    assert torch.equal(logits, network.eval()(torch.zeros(5, 3, 32, 32)))
    assert loaded.forward(images).shape == (5, 10)


class TorchDataset(torch.utils.data.Dataset[Any]):
    """Pairs of PIL images and labels, as the data sets of torchvision return them."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.split.images[index].transpose(1, 2, 0)), int(self.split.labels[index])


def forms_of(split: Split) -> dict[str, Any]:
    channels_last = np.ascontiguousarray(split.images.transpose(0, 2, 3, 1))
    return {
        "channels first": (split.images, split.labels),
        "channels last": (channels_last, split.labels.astype(np.uint8)),
        "tensors": (torch.from_numpy(channels_last), torch.from_numpy(split.labels)),
        "a list of labels": [split.images, split.labels.tolist()],
        "a split": split,
        "a data set of PyTorch": TorchDataset(split),
    }


@pytest.mark.parametrize("form", forms_of(Split(np.zeros((1, 3, 32, 32), np.uint8), np.zeros(1, np.int64))))
def test_every_form_of_data_is_the_same_data_set(form: str, recipe: Recipe, data: Dataset) -> None:
    train_form, test_form = (forms_of(split)[form] for split in (data.train, data.test))
    trainer = Trainer.from_recipe(recipe, data={"train": train_form, "test": test_form, "classes": data.classes})
    assert trainer.data.digest == data.digest
    assert trainer.data.classes == data.classes
    assert np.array_equal(trainer.data.test.images, data.test.images)
    assert len(trainer.val_split.labels) == 40
    unnamed = Trainer.from_recipe(recipe.model_copy(update={"val_size": None}), data=train_form)
    assert [len(split.labels) for split in unnamed.data.all_splits.values()] == [160, 20, 20]
    (first, _), (expected, _) = (next(batches(item, batch_size=50)) for item in (train_form, "synthetic:200"))
    assert torch.equal(first, expected)


def test_a_pair_is_split_in_the_same_way_when_it_is_given_again(recipe: Recipe, data: Dataset) -> None:
    recipe = recipe.model_copy(update={"val_size": None, "val_seed": 3, "resize": 32, "max_steps": 2})
    images = np.array([np.asarray(Image.fromarray(i.transpose(1, 2, 0)).resize((40, 36))) for i in data.train.images])
    pair = (images, data.train.labels)
    result = train(recipe, model=Net, data=pair, progress=False)
    scores = load_run(result.folder, model=Net, data=pair).evaluate()
    assert (scores["test_loss"], scores["val_acc"]) == (result.summary.test_loss, result.summary.val_acc)
    again = train(Recipe(resume=str(result.folder)), model=Net, data=pair, progress=False)
    assert again.summary.data_digest == result.summary.data_digest


def test_a_data_set_names_its_options(recipe: Recipe, data: Dataset) -> None:
    trainer = Trainer.from_recipe(recipe, model=Net, data=load_dataset("synthetic:500", "cifar100"))
    assert (trainer.recipe.dataset, len(trainer.data.classes)) == ("cifar100", 100)


@pytest.mark.medium
def test_a_network_for_the_number_of_classes_of_the_data(recipe: Recipe, data: Dataset, tmp_path: Path) -> None:
    three = Split(data.train.images, data.train.labels % 3)
    splits = {"train": three, "test": three, "classes": ["cat", "dog", "ship"]}
    result = train(recipe, model=Net(3), data=splits, progress=False)
    assert list(result.summary.per_class) == ["cat", "dog", "ship"]
    assert train(recipe, model=lambda: Net(3), data=splits, progress=False).summary.per_class.keys() == {
        "cat",
        "dog",
        "ship",
    }
    assert train(recipe, model=Net, data=splits, progress=False).model.head.out_features == 3  # type: ignore[union-attr]
    for label in range(3):
        for name in ("train", "test"):
            (tmp_path / "folders" / name / str(label)).mkdir(parents=True)
            for number in range(20):
                pixels = data.train.images[20 * label + number].transpose(1, 2, 0)
                Image.fromarray(pixels).save(tmp_path / "folders" / name / str(label) / f"{number}.png")
    folders = recipe.model_copy(update={"val_size": 6})
    assert train(folders, model=Net(3), data=tmp_path / "folders", progress=False).summary.total == 60
    with pytest.raises(UserError, match=r"float32 of shape \[2, 10\] for 2 images; it should return logits .*\[n, 3\]"):
        train(folders, model=Net(10), data=tmp_path / "folders", progress=False)


@pytest.mark.medium
def test_batches_with_transforms(data: Dataset) -> None:
    options: dict[str, Any] = {"batch_size": 50, "augment": "none", "epochs": 2}
    plain = list(batches(data, **options))
    assert [(tuple(images.shape), images.dtype) for images, _ in plain] == [((50, 3, 32, 32), torch.uint8)] * 8
    inverted = list(batches(data, **options, batch_transform=lambda images: 255 - images))
    for (images, labels), (other_images, other_labels) in zip(plain, inverted, strict=True):
        assert torch.equal(images, 255 - other_images)
        assert torch.equal(labels, other_labels)
        assert other_images.is_contiguous(memory_format=torch.channels_last)
    listed = batches(data, **{**options, "augment": ["crop:2:zero", "flip"]})
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(
        listed, batches(data, **{**options, "augment": "crop:2:zero,flip"}), strict=True))  # fmt: skip
    gray = (np.full((50, 32, 32, 3), 200, np.uint8), np.arange(50) % 2)
    for augment in ("cutout:16", "cutout:16:mean", "erase:0.33:mean"):  # the mean color of these images
        assert next(batches(gray, batch_size=50, augment=augment))[0].unique().tolist() == [200]
    large = (np.full((50, 40, 48, 3), 7, np.uint8), np.arange(50) % 2)
    assert next(batches(large, batch_size=50, augment="none", resize=32))[0].unique().tolist() == [7]
    del options["augment"]
    flipped = list(batches(data, **options, transform=v2.RandomHorizontalFlip(1.0), workers=0))
    assert all(torch.equal(a, b.flip(3)) for (a, _), (b, _) in zip(plain, flipped, strict=True))
    in_workers = list(batches(data, **options, transform=rotate, workers=2))
    in_this_process = list(batches(data, **options, transform=rotate, workers=0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(in_workers, in_this_process, strict=True))


def test_transforms_are_seeded_and_leave_the_generators_as_they_are(data: Dataset) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]

    before = states()
    for own in ({"batch_transform": add_noise, "augment": "none"}, {"transform": rotate, "workers": 0}):
        options: dict[str, Any] = {"batch_size": 50, "epochs": 2, **own}
        first, second, other = ([images for images, _ in batches(data, **options, seed=seed)] for seed in (1, 1, 2))
        assert all(map(torch.equal, first, second))
        assert not any(map(torch.equal, first, other))
        assert not any(map(torch.equal, first[:4], first[4:]))
    assert states() == before


class SizesDataset(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.zeros((32 + index, 32, 3), np.uint8), index


class ItemsDataset(torch.utils.data.Dataset[Any]):
    """The given items, such as pairs of an image and a label."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class StreamDataset(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return iter(SizesDataset())  # type: ignore[call-overload]


PAIR = (np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another type of recipe": ({"recipe": {"epochs": 1}}, "the recipe is of type dict; give a Recipe or"),
    "a name as a network": ({"model": "se68"}, "model= is of type str; give an nn.Module, or a function or class"),
    "no network": ({"model": dict}, r"architecture dict cannot be built: .*|is a dict; it should return an nn.Module"),
    "a failing network": ({"model": nn.Linear(5, 10)}, "architecture Linear fails in a forward pass of 32x32 images"),
    "a failing constructor": ({"model": lambda num_classes: 1 / 0}, "lambda cannot be built: ZeroDivisionError"),
    "other outputs": ({"model": linear(7)}, r"Sequential returns float32 of shape \[2, 7\] .* \[n, 10\], where 10 is"),
    "other outputs of a class": ({"model": lambda num_classes: linear(7)}, r"lambda returns float32 of shape \[2, 7\]"),
    "no logits": ({"model": nn.Identity()}, r"Identity returns float32 of shape \[2, 3, 32, 32\]"),
    "lazy layers": ({"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(10))}, "has lazy layers; give layers"),
    "no parameters": ({"model": linear(10).requires_grad_(False)}, "Sequential has no trainable parameters"),
    "a large network": ({"model": Net, "max_params": 10}, "Net has 2,7.. parameters, .* over the budget of 10"),
    "an unknown option": ({"model": linear(10), "width": 2.0}, "architecture Sequential has no option --width"),
    "a tensor of floats": ({"transform": v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32)])},
        r"transform=Compose returns float32 \[3, 32, 32\] for a PIL image of 32x32 pixels; .*omit ToTensor and Norm"),
    "another size": ({"transform": v2.CenterCrop(28)}, r"transform=CenterCrop returns uint8 \[3, 28, 28\]"),
    "no image": ({"transform": lambda image: None}, "transform=lambda returns a NoneType for a PIL image"),
    "a failing transform": ({"transform": lambda image: image.no}, "transform=lambda fails: AttributeError: .*'no'"),
    "a transform and a loader": ({"transform": v2.RandomHorizontalFlip(), "loader": "tensor"},
        "transform=RandomHorizontalFlip: only the loader torchvision transforms single images; use --loader torchv"),
    "a batch of floats": ({"batch_transform": Tensor.float}, r"batch_transform=float returns float32 \[2, 3, 32, 32\]"),
    "a smaller batch": ({"batch_transform": lambda images: images[:1]}, r"returns uint8 \[1, 3, 32, 32\] for uint8 \["),
    "another layout": ({"batch_transform": lambda images: images.permute(0, 2, 3, 1)}, r"returns uint8 \[2, 32, 32, 3"),
    "arrays": ({"batch_transform": lambda images: images.numpy()}, "batch_transform=lambda returns a ndarray"),
    "no function": ({"batch_transform": 3}, "batch_transform= is of type int; give a function"),
    "no callback": ({"callbacks": ["tensorboard"]}, "callbacks= contains a str; give a list of func"),
    "no list of callbacks": ({"callbacks": print}, "callbacks= is not a list; give a list of functions"),
    "no data": ({"data": 5}, "data= is of type int; give a path, a pair"),
    "a triple": ({"data": (1, 2, 3)}, "data= is of type tuple; give a path, a pair"),
    "an unknown split": ({"data": {"training": PAIR}}, "data= has the key 'training'; give a path"),
    "no training images": ({"data": {"test": PAIR}}, "data= has no training images; give a path"),
    "no pair": ({"data": {"train": PAIR[0]}}, r"data\['train'\] is of type ndarray; give a path, a pair"),
    "float images": ({"data": (PAIR[0] / 255, PAIR[1])}, "images is float64, expected uint8 pixels of 0 to 255"),
    "gray images": ({"data": (PAIR[0][..., 0], PAIR[1])}, "gray images of 32x32 pixels, expected 32x32 RGB"),
    "larger images": ({"data": (np.zeros((20, 48, 48, 3), np.uint8), PAIR[1])}, "images of 48x48 pixels, expected 32"),
    "images of several sizes": ({"data": SizesDataset()}, r"images of the shapes .*; resize them"),
    "a stream": ({"data": StreamDataset()}, "data= has no length or no index; give a map-style data set"),
    "an empty data set": ({"data": ItemsDataset()}, "data= contains no images; give a path, a pair"),
    "items of three": ({"data": ItemsDataset((PAIR[0][0], 0, 1))}, r"data=\[0\] is of 3 values, expected an image"),
    "items without a label": ({"data": ItemsDataset(PAIR[0][0])}, r"data=\[0\] is of type ndarray, expected an image"),
    "images of floats": ({"data": ItemsDataset((Image.new("F", (32, 32)), 0))}, r"data=\[0\]: images of mode F are"),
    "fewer labels": ({"data": (PAIR[0], PAIR[1][:9])}, r"labels is int64 \[9\], expected 20 integers"),
    "negative labels": ({"data": (PAIR[0], PAIR[1] - 1)}, "labels contains the label -1; number the classes from 0"),
    "a gap in the labels": ({"data": (PAIR[0], PAIR[1] + 1)}, "no training images of class 0"),
    "a test label without training images": ({"data": {"train": PAIR, "test": (PAIR[0], PAIR[1] + 5)}},
        "no training images of class 10"),
    "more labels than names": ({"data": {"train": PAIR, "classes": ["a", "b"]}}, "labels of 10 classes and 2 names"),
    "a data set with a large label": ({"data": Dataset("cifar10", Split(np.zeros((2, 3, 32, 32), np.uint8),
        np.array([0, 3])), Split(np.zeros((0, 3, 32, 32), np.uint8), np.zeros(0, np.int64)), ("a", "b"), "", False)},
        "train: labels from 0 to 3; there are 2 classes, numbered from 0"),
    "a missing path": ({"data": "no-such-folder"}, "no such file or folder: no-such-folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_fault15_objects_that_cannot_be_used_are_refused_in_one_line(
    case: str, recipe: Recipe, data: Dataset, tmp_path: Path
) -> None:
    given, message = REFUSED[case]
    options = {name: value for name, value in given.items() if name in Recipe.model_fields and name != "data"}
    objects = {name: value for name, value in given.items() if name not in (*options, "recipe")}
    used = given.get("recipe", recipe.model_copy(update=options))
    with pytest.raises(UserError, match=message) as error:
        train(used, **{"data": data, **objects}, progress=False)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_batches_refuse_what_they_cannot_do(data: Dataset) -> None:
    with pytest.raises(UserError, match="both augment= and transform= are given; give one of them"):
        batches(data, augment="flip", transform=rotate)
    with pytest.raises(UserError, match="cutmix is applied in the training step"):
        batches(data, augment="flip,cutmix")
    with pytest.raises(UserError, match="batch_transform=float returns float32"):
        batches(data, batch_size=10, batch_transform=Tensor.float)
    wrong: dict[str, dict[str, Any]] = {"--batch-size": {"batch_size": 0}, "--seed": {"seed": -1}}
    for flag, options in wrong.items():
        with pytest.raises(UserError, match=flag):
            batches(data, **options)


def test_batches_with_an_empty_list_of_augmentations_are_the_images(data: Dataset) -> None:
    plain = next(batches(data, augment="none"))[0]
    assert all(torch.equal(next(batches(data, augment=augment))[0], plain) for augment in ("", []))
    assert not torch.equal(next(batches(data))[0], plain)


def test_pil_images_of_every_mode_are_read_as_image_files_are(tmp_path: Path) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    images = [Image.fromarray(colors, "RGBA").convert(mode) for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK")]
    dataset = ItemsDataset(*((image, label) for label, image in enumerate(images)))
    batch, labels = next(batches(dataset, batch_size=6, augment="none"))
    assert sorted(labels.tolist()) == list(range(6))
    for pixels, label in zip(batch, labels.tolist(), strict=True):
        suffix = "jpg" if images[label].mode == "CMYK" else "png"
        images[label].save(tmp_path / f"{label}.{suffix}", quality=100, subsampling=0)
        difference = pixels.int() - torch.tensor(decode_image(tmp_path / f"{label}.{suffix}")).int()
        assert difference.abs().max() <= (8 if suffix == "jpg" else 0)


def test_names_of_objects_in_files_cause_one_line(run: Result, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["eval", str(run.folder)], ["train", "--resume", str(run.folder)]):
        with pytest.raises(UserError, match="unknown architecture 'Net'; give --import FILE"):
            app(arguments, standalone_mode=False)
    for options, message in (
        ({"data": "python"}, "the data set was given from Python"),
        ({"augment": "flip,batch_transform:blur"}, "'batch_transform:blur' is given from Python; give blur as"),
    ):
        with pytest.raises(UserError, match=message):
            train_by_name(Recipe(**{"arch": "speednet", "device": "cpu", "data": "synthetic:100", **options}))
