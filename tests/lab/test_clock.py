"""The clock: what a document holds and leaves out, that trials are kept, and that the run is left as it was."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastcifar.data import cifar
from fastcifar.device import choose
from fastcifar.errors import DataError, UsageError
from fastcifar.lab import bench as clock
from fastcifar.lab.bench import WHATS, Trial, bench
from fastcifar.models import macs
from fastcifar.recipe import Recipe
from fastcifar.results.report import bench_table
from fastcifar.training.parts import assemble

MEASURED = {"what", "batch_size", "compiled", "images_per_s", "cpu_us_per_image", "trials", "setup_s"}
NAMED = {
    "loader": {"loader", "augment", "data", "compile_s"},
    "step": {"arch", "precision", "cuda_graph", "compile_s", "tflop_per_s"},
    "train": {"arch", "loader", "augment", "precision", "cuda_graph", "data", "compile_s"},
}
QUICK = 0.02  # seconds


@pytest.mark.parametrize("what", WHATS)
def test_a_row_names_what_its_figure_depends_on_and_no_more(tiny: Callable[..., Recipe], what: str) -> None:
    found = bench(tiny(), what, trials=3, trial_s=QUICK)
    assert found.keys() == {"device", "versions", "results"}
    assert json.loads(json.dumps(found)) == found
    (row,) = found["results"]
    assert row.keys() == MEASURED | NAMED[what]
    assert (row["what"], row["batch_size"], row["compiled"]) == (what, 32, False)
    assert len(row["trials"]) == 3
    assert row["images_per_s"] == statistics.median(row["trials"])
    assert row["cpu_us_per_image"] > 0


def test_all_measures_the_loader_the_step_and_both(tiny: Callable[..., Recipe]) -> None:
    rows = bench(tiny(), trials=1, trial_s=QUICK)["results"]
    assert [row["what"] for row in rows] == ["loader", "step", "train"]
    assert "compile_s" not in rows[0]  # prepared with the step, in one
    assert rows[1]["compile_s"] == rows[2]["compile_s"]
    assert rows[1]["tflop_per_s"] == pytest.approx(
        6 * macs(assemble(tiny(), choose(tiny())).model) * rows[1]["images_per_s"] / 1e12
    )


def test_the_median_stands_for_trials_none_of_which_is_left_out(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [Trial(100, 1.0, 2.0), Trial(100, 0.5, 4.0), Trial(100, 10.0, 1.0)]
    monkeypatch.setattr(clock, "measure", lambda *_: trials)
    (row,) = bench(tiny(), "loader", trials=3)["results"]
    assert row["trials"] == [100.0, 200.0, 10.0]
    assert (row["images_per_s"], row["cpu_us_per_image"]) == (100.0, 20_000.0)


@pytest.mark.parametrize("what", WHATS)
def test_work_is_endless_and_counts_its_images(tiny: Callable[..., Recipe], what: str) -> None:
    parts = assemble(tiny(val_size=0), choose(tiny()))
    work = WHATS[what][0](parts, parts.fast_step())
    images = [next(work) for _ in range(14)]  # two epochs of 200 images in batches of 32
    assert sum(images) == (14 * 32 if what == "step" else 400)


def test_the_fixed_batch_moves_no_weight(tiny: Callable[..., Recipe]) -> None:
    parts = assemble(tiny(), choose(tiny()))
    before = [weight.detach().clone() for weight in parts.model.parameters()]
    work = WHATS["step"][0](parts, parts.fast_step())
    for _ in range(6):
        next(work)
    assert all(torch.equal(mine, kept) for mine, kept in zip(parts.model.parameters(), before, strict=True))
    assert parts.meter.read().images == 6 * 32


def test_a_trial_beyond_an_epoch_is_of_whole_epochs(tiny: Callable[..., Recipe]) -> None:
    parts = assemble(tiny(val_size=0), choose(tiny()))
    units = clock.fitting(WHATS["loader"][0](parts, None), parts, 0.2)
    assert units < 7 or units % 7 == 0


def test_without_a_data_set_it_measures_on_synthetic_images_and_says_so(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = cifar.load

    def nowhere(data: str | None, dataset: str, *, download: bool = True) -> cifar.Dataset:
        if data is None:
            assert not download
            raise DataError("cifar10 is not in the cache", "give --data")
        return load("synthetic:300" if data == "synthetic" else data, dataset)

    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setattr(cifar, "load", nowhere)
    recipe = tiny().model_copy(update={"data": None})
    with pytest.warns(UserWarning, match="not in the cache: measuring on synthetic images"):
        found = bench(recipe, "loader", trials=1, trial_s=QUICK)
    assert found["results"][0]["data"].startswith("synthetic")


def test_a_data_set_that_was_named_has_to_be_there(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match="no/such/place"):
        bench(tiny(data="no/such/place"), "loader", trial_s=QUICK)


def test_a_trace_is_written_after_the_trials(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    bench(tiny(), "step", trials=1, trace=tmp_path / "trace.json", trial_s=QUICK)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)


def test_a_trace_without_a_folder_is_refused_before_anything_is_built(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(UsageError, match="--profile"):
        bench(tiny(data="no/such/place"), "step", trace=Path("no/such/folder/trace.json"))


def test_an_unknown_benchmark_names_the_nearest(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(UsageError, match="did you mean 'train'"):
        bench(tiny(), "trian")


def test_the_table_shows_a_dash_for_what_was_not_measured(tiny: Callable[..., Recipe]) -> None:
    table = bench_table(bench(tiny(), "loader", trials=2, trial_s=QUICK))
    assert table.row_count == 1
    cells = [next(iter(column.cells)) for column in table.columns]
    assert (cells[0], cells[-1]) == ("loader", "-")
    assert "median of 2 trials" in str(table.title)
