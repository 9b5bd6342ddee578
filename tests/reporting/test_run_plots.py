"""The plots that `fastcifar train` writes: their content, and that no error in them makes a run fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastcifar import plotting
from fastcifar.cli.app import app
from fastcifar.errors import Interrupted
from fastcifar.evaluation.evaluate_run import evaluate_run
from fastcifar.recipe import Recipe
from fastcifar.reporting import run_plots
from fastcifar.reporting.run_plots import plot_finished_run, write_run_plots
from fastcifar.training import evaluate
from fastcifar.training.summary import RunSummary
from fastcifar.training.train import train

NAMES = ["accuracy", "loss", "throughput", "confusion", "batch"]


@pytest.fixture
def summary(tiny: Callable[..., Recipe]) -> RunSummary:
    return train(tiny(augment="crop:4:zero,flip,cutmix:1.0"))


@pytest.mark.medium
def test_plots_of_a_run(summary: RunSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate_run(summary.run)["confusion"]
    monkeypatch.setattr(evaluate, "predict_logits", lambda *_: pytest.fail("a second evaluation"))
    plot_confusion_matrix, plotted = plotting.plot_confusion_matrix, []

    def record_confusion_matrix(path: Path, counts: np.ndarray, classes: list[str], title: str) -> None:
        plotted.append((counts.tolist(), classes, title))
        plot_confusion_matrix(path, counts, classes, title)

    monkeypatch.setattr(plotting, "plot_confusion_matrix", record_confusion_matrix)
    (Path(summary.run) / "plots").mkdir()
    (Path(summary.run) / "plots" / "loss.png").write_text("of the run before it was resumed")
    files = write_run_plots(summary)
    assert files == [Path(summary.run) / "plots" / f"{name}.png" for name in NAMES]
    for file in files:
        with Image.open(file) as image:
            assert min(image.size) > 500, file
    accuracy = f"{100 * summary.test_acc:.2f} %, {summary.correct} of 40 images"  # type: ignore[operator]
    assert plotted == [(expected, list(summary.per_class), f"test set, weights last: {accuracy}")]


@pytest.mark.medium
def test_run_without_validation_split_or_augmentation_has_plots(tiny: Callable[..., Recipe]) -> None:
    assert len(write_run_plots(train(tiny(val_size=0, augment="none", epochs=1)))) == len(NAMES)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, r"matplotlib.* cannot be imported .*; pip install 'matplotlib>=3\.9'; --no-plots omits them"),
        (OSError(28, "No space left on device"), r"cannot write .*accuracy\.png: No space left on device; .*"),
        (RuntimeError("a bug"), "RuntimeError: a bug; --no-plots omits them"),
    ],
)
def test_fault18_errors_of_plots_cause_one_warning(
    summary: RunSummary, monkeypatch: pytest.MonkeyPatch, error: Exception | None, message: str
) -> None:
    def fail(*_: Any) -> None:
        assert error
        raise error

    if error is None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif isinstance(error, OSError):
        monkeypatch.setattr(plotting, "write_atomically", fail)
    else:
        monkeypatch.setattr(run_plots, "plot_first_batch", fail)
    with pytest.warns(UserWarning, match=f"^the plots of the run were not written: {message}") as caught:
        assert plot_finished_run(summary) == []
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "rank", "is_stopped", "is_plotted"),
    [
        ([], "", False, True),
        (["--no-plots"], "", False, False),
        ([], "1", False, False),
        ([], "", True, False),
    ],
)
def test_the_command_plots_a_run_that_reaches_its_end_on_the_first_rank(
    summary: RunSummary,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    rank: str,
    is_stopped: bool,
    is_plotted: bool,
) -> None:
    def finished_run(*_: Any) -> RunSummary:
        if is_stopped:
            raise Interrupted("SIGINT", 130, 3, summary.run)
        return summary

    monkeypatch.setattr("fastcifar.training.train.train", finished_run)
    if rank:
        monkeypatch.setenv("RANK", rank)
    result = CliRunner().invoke(app, ["train", *arguments])
    folder = Path(summary.run) / "plots"
    assert folder.is_dir() == is_plotted
    line = f"plots: {folder} ({', '.join(NAMES)})"
    assert (line in result.output) == is_plotted
    if is_plotted:
        assert result.output.index(line) < result.output.index("next:")
