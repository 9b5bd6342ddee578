"""Scores against values computed by hand; evaluation changes no weight or running statistic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as torchvision_functional

from fastcifar.data.cifar import Split
from fastcifar.errors import UsageError
from fastcifar.recipe import Recipe
from fastcifar.training.evaluate import (
    VIEWS,
    apply_view,
    compute_scores,
    eval_mode,
    evaluate,
    optimize_forward,
    predict_logits,
)
from fastcifar.training.train import train
from tests.training.optimizer_helpers import make_trainer


def test_scores_equal_hand_computed_values() -> None:
    logits = torch.tensor([[0.8, 0.2, 1e-9], [0.4, 0.6, 1e-9], [0.7, 0.3, 1e-9]]).log()
    scores = compute_scores(logits, torch.tensor([0, 0, 1]))
    assert (scores.correct, scores.total, scores.accuracy) == (1, 3, 1 / 3)
    assert scores.loss == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.3)) / 3, rel=1e-6)
    assert scores.per_class == [0.5, 0.0, None]
    assert scores.confusion == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    # three bins of one image each: |0.8 - 1|, |0.6 - 0|, |0.7 - 0|
    assert scores.ece == pytest.approx((0.2 + 0.6 + 0.7) / 3, rel=1e-6)
    # two images in one bin: |0.9 - 0.5|
    one_bin = compute_scores(torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([0, 1]))
    assert one_bin.ece == pytest.approx(0.4, rel=1e-6)


def test_fault26_evaluation_changes_no_parameter_or_buffer(tiny: Callable[..., Recipe]) -> None:
    trainer = make_trainer(tiny(dropout=0.5))
    trainer.model.train()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    scores = evaluate(trainer.model, trainer.forward, trainer.data.test, trainer.device)
    assert scores == evaluate(trainer.model, trainer.forward, trainer.data.test, trainer.device)
    assert trainer.model.training
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_logits_do_not_depend_on_the_batch_size(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny())
    logits = predict_logits(trainer.model, trainer.forward, trainer.data.test, trainer.device)
    monkeypatch.setattr("fastcifar.training.evaluate.EVAL_BATCH_SIZE", 7)
    small_batch_logits = predict_logits(trainer.model, trainer.forward, trainer.data.test, trainer.device)
    torch.testing.assert_close(logits, small_batch_logits, rtol=1e-5, atol=1e-5)
    assert logits.shape == (len(np.asarray(trainer.data.test.labels)), 10)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
CPU = torch.device("cpu")


class PixelSensitiveModel(torch.nn.Module):
    """A nonlinear model that depends on every pixel, so that mean logits of different views differ."""

    def forward(self, images: Tensor) -> Tensor:
        weights = torch.arange(images[0].numel()).view(images.shape[1:]) % 101
        return torch.stack([(images.float() * weights * scale / 1e4).sin().sum((1, 2, 3)) for scale in (1, 2, 3)], 1)


def flip_views(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return 0.5 * forward(images) + 0.5 * forward(images.flip(3))


def six_views(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the mean logits as airbench defines them, by padding and cropping."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = [flip_views(forward, padded[:, :, start : start + 32, start : start + 32]) for start in (0, 2)]
    return 0.5 * flip_views(forward, images) + 0.25 * (shifted[0] + shifted[1])


def ten_crops(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    crops = torchvision_functional.ten_crop(F.pad(images, (4, 4, 4, 4), mode="reflect"), [32, 32])
    return torch.stack([forward(crop) for crop in crops]).mean(0)


REFERENCE_VIEWS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "none": lambda forward, images: forward(images),
    "flip": flip_views,
    "6view": six_views,
    "10crop": ten_crops,
}


@pytest.mark.parametrize("tta", VIEWS)
def test_views_equal_reference_implementations(tta: str) -> None:
    model = PixelSensitiveModel()
    logits = predict_logits(model, model, Split(IMAGES, np.arange(5)), CPU, tta)
    torch.testing.assert_close(
        logits, REFERENCE_VIEWS[tta](model, torch.from_numpy(IMAGES).float()), rtol=1e-4, atol=1e-3
    )
    assert sum(view.weight for view in VIEWS[tta]) == pytest.approx(1)
    assert not any(VIEWS[tta][0][1:]), "the unchanged image must come first"
    images = torch.from_numpy(IMAGES).contiguous(memory_format=torch.channels_last)
    for view in VIEWS[tta]:
        result = apply_view(images, view)
        assert (result.dtype, result.shape) == (torch.uint8, images.shape)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_unknown_tta_is_rejected(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(UsageError, match="did you mean '6view'"):
        make_trainer(tiny(tta="6veiw"))


@pytest.mark.medium
def test_summary_contains_the_tta_accuracy_if_enabled(tiny: Callable[..., Recipe]) -> None:
    plain, with_tta = train(tiny()), train(tiny(tta="10crop", ema_decay=0.5, eval_weights="ema"))
    assert plain.test_acc_tta is None
    trainer = make_trainer(tiny())
    checkpoint = torch.load(f"{with_tta.run}/checkpoints/last.pt", weights_only=True)
    trainer.model.load_state_dict(checkpoint["ema"])
    images = torch.from_numpy(trainer.data.test.images)
    with eval_mode(trainer.model):
        correct = ten_crops(trainer.forward, images.float()).argmax(1) == torch.from_numpy(trainer.data.test.labels)
    assert with_tta.test_acc_tta == correct.double().mean().item()


@pytest.mark.slow
def test_compiled_evaluation_equals_eager_evaluation_and_changes_nothing(tiny: Callable[..., Recipe]) -> None:
    trainer = make_trainer(tiny(dropout=0.5))
    trainer.model.train()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    split = Split(trainer.data.test.images[:7], trainer.data.test.labels[:7])
    compiled_forward = optimize_forward(trainer.model, trainer.forward, CPU, True, False)
    for increment in (0, 1):
        with torch.no_grad():
            next(trainer.model.parameters()).add_(increment)  # the compiled forward must use the updated weights
        expected = predict_logits(trainer.model, trainer.forward, split, CPU, "flip")
        torch.testing.assert_close(
            predict_logits(trainer.model, compiled_forward, split, CPU, "flip"), expected, rtol=1e-4, atol=1e-5
        )
        assert expected.shape == (7, 10)
    assert trainer.model.training
    changed_key = next(iter(before))
    assert all(
        torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items() if key != changed_key
    )


def test_evaluation_is_compiled_only_for_enough_images(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr("fastcifar.training.trainer.MIN_IMAGES_TO_COMPILE", 400)
    monkeypatch.setattr(
        "fastcifar.training.trainer.optimize_forward", lambda *args: compiled.append(args[3]) or args[1]
    )
    # 40 images per epoch, 80 with EMA; at the end 40, plus 40 for EMA and for each of the two TTA views
    for min_epochs, extra in ((9, {}), (4, {"ema_decay": 0.9}), (7, {"tta": "flip"})):
        for epochs in (min_epochs - 1, min_epochs):
            recipe = tiny(epochs=epochs, **extra)
            trainer = make_trainer(recipe)
            trainer.resolved = replace(trainer.resolved, execution=replace(trainer.execution, compile=True))
            trainer.build_eval_forward()
    assert compiled == [False, True] * 3
