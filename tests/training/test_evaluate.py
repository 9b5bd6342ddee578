"""Scores against values worked out by hand; evaluation changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastcifar.device import choose
from fastcifar.recipe import Recipe
from fastcifar.training.evaluate import calibration_error, evaluate, predict_logits, score
from fastcifar.training.parts import assemble


def test_scores_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.2, 1e-9], [0.4, 0.6, 1e-9], [0.7, 0.3, 1e-9]]).log()
    scores = score(logits, torch.tensor([0, 0, 1]))
    assert (scores.correct, scores.total, scores.accuracy) == (1, 3, 1 / 3)
    assert scores.loss == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.3)) / 3, rel=1e-6)
    assert scores.per_class == [0.5, 0.0, None]
    # three bins of one image each: |0.8 - 1|, |0.6 - 0|, |0.7 - 0|
    assert scores.ece == pytest.approx((0.2 + 0.6 + 0.7) / 3, rel=1e-6)


def test_calibration_error_averages_within_a_bin() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    assert calibration_error(logits, torch.tensor([True, False])) == pytest.approx(0.4, rel=1e-6)


def test_fault26_evaluation_changes_no_parameter_and_no_buffer(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(dropout=0.5)
    parts = assemble(recipe, choose(recipe))
    parts.model.train()
    before = {key: value.clone() for key, value in parts.model.state_dict().items()}
    first = evaluate(parts.model, parts.forward, parts.data.test, parts.device)
    assert first == evaluate(parts.model, parts.forward, parts.data.test, parts.device)
    assert parts.model.training
    assert all(torch.equal(value, before[key]) for key, value in parts.model.state_dict().items())


def test_logits_come_in_the_images_order(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny()
    parts = assemble(recipe, choose(recipe))
    whole = predict_logits(parts.model, parts.forward, parts.data.test, parts.device)
    monkeypatch.setattr("fastcifar.training.evaluate.BATCH_SIZE", 7)
    by_seven = predict_logits(parts.model, parts.forward, parts.data.test, parts.device)
    torch.testing.assert_close(whole, by_seven, rtol=1e-5, atol=1e-5)
    assert whole.shape == (len(np.asarray(parts.data.test.labels)), 10)
