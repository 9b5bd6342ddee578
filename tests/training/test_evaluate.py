"""Scores against values worked out by hand; evaluation changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as images_as_torchvision

from fastcifar.data.cifar import Split
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.build import build_trainer
from fastcifar.training.evaluate import (
    VIEWS,
    apply_view,
    compute_scores,
    eval_mode,
    evaluate,
    expected_calibration_error,
    optimize_forward,
    predict_logits,
)
from fastcifar.training.resolve import resolve
from fastcifar.training.train import train


def test_scores_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.2, 1e-9], [0.4, 0.6, 1e-9], [0.7, 0.3, 1e-9]]).log()
    scores = compute_scores(logits, torch.tensor([0, 0, 1]))
    assert (scores.correct, scores.total, scores.accuracy) == (1, 3, 1 / 3)
    assert scores.loss == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.3)) / 3, rel=1e-6)
    assert scores.per_class == [0.5, 0.0, None]
    # three bins of one image each: |0.8 - 1|, |0.6 - 0|, |0.7 - 0|
    assert scores.ece == pytest.approx((0.2 + 0.6 + 0.7) / 3, rel=1e-6)


def test_calibration_error_averages_within_a_bin() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    assert expected_calibration_error(logits, torch.tensor([True, False])) == pytest.approx(0.4, rel=1e-6)


def test_fault26_evaluation_changes_no_parameter_and_no_buffer(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(dropout=0.5)
    parts = build_trainer(resolve(recipe))
    parts.model.train()
    before = {key: value.clone() for key, value in parts.model.state_dict().items()}
    first = evaluate(parts.model, parts.forward, parts.data.test, parts.device)
    assert first == evaluate(parts.model, parts.forward, parts.data.test, parts.device)
    assert parts.model.training
    assert all(torch.equal(value, before[key]) for key, value in parts.model.state_dict().items())


def test_logits_come_in_the_images_order(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny()
    parts = build_trainer(resolve(recipe))
    whole = predict_logits(parts.model, parts.forward, parts.data.test, parts.device)
    monkeypatch.setattr("fastcifar.training.evaluate.BATCH_SIZE", 7)
    by_seven = predict_logits(parts.model, parts.forward, parts.data.test, parts.device)
    torch.testing.assert_close(whole, by_seven, rtol=1e-5, atol=1e-5)
    assert whole.shape == (len(np.asarray(parts.data.test.labels)), 10)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
CPU = torch.device("cpu")


class Odd(torch.nn.Module):
    """Far from linear, and blind to no pixel: the mean of its logits over views is that over these views alone."""

    def forward(self, images: Tensor) -> Tensor:
        places = torch.arange(images[0].numel()).view(images.shape[1:]) % 101
        return torch.stack([(images.float() * places * scale / 1e4).sin().sum((1, 2, 3)) for scale in (1, 2, 3)], 1)


def mirrored(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return 0.5 * forward(images) + 0.5 * forward(images.flip(3))


def six_views(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """As airbench describes it, by padding and cutting."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [mirrored(forward, padded[:, :, at : at + 32, at : at + 32]) for at in (0, 2)]
    return 0.5 * mirrored(forward, images) + 0.25 * (moved[0] + moved[1])


def ten_crops(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    crops = images_as_torchvision.ten_crop(F.pad(images, (4, 4, 4, 4), mode="reflect"), [32, 32])
    return torch.stack([forward(crop) for crop in crops]).mean(0)


PLAIN: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "none": lambda forward, images: forward(images),
    "flip": mirrored,
    "6view": six_views,
    "10crop": ten_crops,
}


@pytest.mark.parametrize("tta", VIEWS)
def test_views_against_plain_computations(tta: str) -> None:
    odd = Odd()
    logits = predict_logits(odd, odd, Split(IMAGES, np.arange(5)), CPU, tta)
    torch.testing.assert_close(logits, PLAIN[tta](odd, torch.from_numpy(IMAGES).float()), rtol=1e-4, atol=1e-3)
    assert sum(view.weight for view in VIEWS[tta]) == pytest.approx(1)
    assert not any(VIEWS[tta][0][1:]), "the image itself comes first"


def test_a_view_is_uint8_and_channels_last() -> None:
    images = torch.from_numpy(IMAGES).contiguous(memory_format=torch.channels_last)
    for view in VIEWS["10crop"]:
        found = apply_view(images, view)
        assert (found.dtype, found.shape) == (torch.uint8, images.shape)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_view_is_named(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(tta="6veiw")
    with pytest.raises(UsageError, match="did you mean '6view'"):
        build_trainer(resolve(recipe))


def test_the_summary_has_the_accuracy_over_views_if_asked(tiny: Callable[..., Recipe]) -> None:
    plain, asked = train(tiny()), train(tiny(tta="10crop", ema_decay=0.5, eval_weights="ema"))
    assert plain["test_acc_tta"] is None
    parts = build_trainer(resolve(tiny()))
    saved = torch.load(f"{asked['run']}/checkpoints/last.pt", weights_only=True)
    parts.model.load_state_dict(saved["ema"])
    images = torch.from_numpy(parts.data.test.images)
    with eval_mode(parts.model):
        hits = ten_crops(parts.forward, images.float()).argmax(1) == torch.from_numpy(parts.data.test.labels)
    assert asked["test_acc_tta"] == hits.double().mean().item()


def test_a_compiled_evaluation_equals_the_eager_one_and_changes_nothing(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(dropout=0.5)
    parts = build_trainer(resolve(recipe))
    parts.model.train()
    before = {key: value.clone() for key, value in parts.model.state_dict().items()}
    few = Split(parts.data.test.images[:7], parts.data.test.labels[:7])
    fast = optimize_forward(parts.model, parts.forward, CPU, True, False)
    for weights in (0, 1):
        with torch.no_grad():
            next(parts.model.parameters()).add_(weights)  # training goes on: the compiled pass sees it
        wanted = predict_logits(parts.model, parts.forward, few, CPU, "flip")
        torch.testing.assert_close(predict_logits(parts.model, fast, few, CPU, "flip"), wanted, rtol=1e-4, atol=1e-5)
        assert wanted.shape == (7, 10)
    assert parts.model.training
    first = next(iter(before))
    assert all(torch.equal(value, before[key]) for key, value in parts.model.state_dict().items() if key != first)


def test_training_compiles_its_evaluations_where_they_repay_it(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    monkeypatch.setattr("fastcifar.training.trainer.COMPILE_FROM", 400)
    monkeypatch.setattr("fastcifar.training.trainer.fast_forward", lambda *args: made.append(args[3]) or args[1])
    # each epoch 40 images, twice with an average; at the end 40, and 40 for the average and for each of two views
    for enough, extra in ((9, {}), (4, {"ema_decay": 0.9}), (7, {"tta": "flip"})):
        for epochs in (enough - 1, enough):
            recipe = tiny(epochs=epochs, **extra)
            parts = build_trainer(resolve(recipe))
            parts.execution = replace(parts.execution, compile=True)
            parts.build_eval_forward()
    assert made == [False, True] * 3
