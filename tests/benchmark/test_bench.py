"""The clock: what a document holds and leaves out, that trials are kept, and that the run is left as it was."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from fastcifar.benchmark import bench as clock
from fastcifar.benchmark import workloads
from fastcifar.benchmark.bench import TimedTrial, bench
from fastcifar.benchmark.workloads import BENCHMARKS
from fastcifar.data import cifar
from fastcifar.errors import DataError, UsageError, UserError
from fastcifar.models import MODELS, count_macs
from fastcifar.recipe import Recipe
from fastcifar.training import cuda_graph
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import resolve

MEASURED = {"what", "batch_size", "images_per_s", "cpu_us_per_image", "trials", "peak_memory_bytes",
            "setup_s", "compile_s"}  # fmt: skip
COST = {"flop_per_image", "tflop_per_s", "mfu", "bytes_per_image", "gb_per_s", "mbu"}
NAMED = {
    "loader": {"loader", "augment", "data", "compiled"},
    "step": {"arch", "precision", "compiled", "cuda_graph"} | COST,
    "train": {"arch", "loader", "augment", "precision", "compiled", "cuda_graph", "data"} | COST,
    "infer": {"arch", "precision", "compiled", "cuda_graph"} | COST,
    "conv": {"arch", "precision", "conv", "calls", "direction"} | COST,
    "replay": {"arch", "precision", "compiled", "cuda_graph", "steps_per_replay"} | COST,
}
SHOWN_BY_THE_MACHINE = {"clock_mhz"}
QUICK = 0.02  # seconds
MOST = {"matmul_tflop_per_s": 0.5, "copy_gb_per_s": 10.0}


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring what a device could do takes seconds; test_limits.py does it."""
    monkeypatch.setattr(clock, "measure_roofline", lambda *_: MOST)
    monkeypatch.setitem(workloads.INFERENCE_BATCH_SIZES, "cpu", (1, 16))


@pytest.mark.parametrize("what", BENCHMARKS)
def test_a_row_names_what_its_figure_depends_on_and_no_more(tiny: Callable[..., Recipe], what: str) -> None:
    found = bench(tiny(), what, trials=3, trial_s=QUICK)
    assert found.keys() - {"limits"} == {"device", "versions", "results"}
    assert ("limits" in found) == (what != "loader")
    assert json.loads(json.dumps(found)) == found
    for row in found["results"]:
        own = {"latency_ms"} if what == "infer" and row["batch_size"] == 1 else set()
        assert row.keys() - SHOWN_BY_THE_MACHINE == MEASURED | NAMED[what] | own
        assert row["what"] == what
        assert len(row["trials"]) == 3
        assert row["images_per_s"] == statistics.median(row["trials"])
        assert row["cpu_us_per_image"] > 0
        if what != "loader":
            assert row["mfu"] == pytest.approx(row["flop_per_image"] * row["images_per_s"] / 0.5e12)
            assert row["mbu"] == pytest.approx(row["bytes_per_image"] * row["images_per_s"] / 10e9)


def test_by_default_it_measures_the_loader_the_step_and_both(tiny: Callable[..., Recipe]) -> None:
    rows = bench(tiny(), trials=1, trial_s=QUICK)["results"]
    assert [row["what"] for row in rows] == ["loader", "step", "train"]
    assert "compile_s" not in rows[0]  # prepared with the step, in one
    assert rows[1]["compile_s"] == rows[2]["compile_s"]
    assert rows[1]["flop_per_image"] == 6 * count_macs(build_trainer(resolve(tiny())).model)


def test_the_median_stands_for_trials_none_of_which_is_left_out(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [TimedTrial(100, 1.0, 2.0), TimedTrial(100, 0.5, 4.0), TimedTrial(100, 10.0, 1.0)]
    monkeypatch.setattr(clock, "run_trials", lambda *_: trials)
    (row,) = bench(tiny(), "loader", trials=3)["results"]
    assert row["trials"] == [100.0, 200.0, 10.0]
    assert (row["images_per_s"], row["cpu_us_per_image"]) == (100.0, 20_000.0)


def test_a_grid_measures_every_value_with_every_other_and_nothing_twice(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = partial(MODELS["resnet"], blocks=(1, 1), channels=(8, 8))
    monkeypatch.setitem(MODELS, "mini", mini)
    monkeypatch.setitem(MODELS, "same", mini)
    grid = {"arch": ["mini", "same"], "batch_size": ["16", "32"], "mode": ["eager"]}
    recipe = tiny(blocks=None, channels=None)
    rows = bench(recipe, "loader,step", trials=1, trial_s=QUICK, grid=grid)["results"]
    assert [(row["arch"], row["batch_size"]) for row in rows if row["what"] == "step"] == [
        ("mini", 16), ("mini", 32), ("same", 16), ("same", 32)
    ]  # fmt: skip
    assert [row["batch_size"] for row in rows if row["what"] == "loader"] == [16, 32]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"mode": ["compild"]}, "did you mean 'compiled'"),
        ({"batch_size": ["0"]}, "--batch-size should be greater than 0"),
        ({"mode": ["captured"]}, "--cuda-graph needs CUDA"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_built(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, grid: clock.BenchGrid, words: str
) -> None:
    monkeypatch.setattr(clock, "build_trainer", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match=words):
        bench(tiny(), "step", grid=grid)


@pytest.mark.parametrize("what", ["loader", "step", "train"])
def test_work_is_endless_and_counts_its_images(tiny: Callable[..., Recipe], what: str) -> None:
    parts = build_trainer(resolve(tiny(val_size=0)))
    (job,) = BENCHMARKS[what](parts, parts.build_train_step())
    images = [next(job.workload) for _ in range(14)]  # two epochs of 200 images in batches of 32
    assert sum(images) == (14 * 32 if what == "step" else 400)


def test_the_fixed_batch_moves_no_weight(tiny: Callable[..., Recipe]) -> None:
    parts = build_trainer(resolve(tiny()))
    before = [weight.detach().clone() for weight in parts.model.parameters()]
    work = workloads.step_workload(parts, parts.build_train_step())
    for _ in range(6):
        next(work)
    assert all(torch.equal(mine, kept) for mine, kept in zip(parts.model.parameters(), before, strict=True))
    assert parts.meter.compute().images == 6 * 32


def test_inference_is_in_evaluation_mode_and_leaves_training_mode(tiny: Callable[..., Recipe]) -> None:
    parts = build_trainer(resolve(tiny()))
    before = [tensor.clone() for tensor in parts.state_tensors()]
    for job in BENCHMARKS["infer"](parts, None):
        next(job.workload)
        assert not parts.model.training
        job.workload.close()
        assert parts.model.training
    assert all(torch.equal(mine, kept) for mine, kept in zip(parts.state_tensors(), before, strict=True))


def test_a_captured_forward_pass_equals_the_plain_one(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "capture_cuda_graph", lambda work: work)
    parts = build_trainer(resolve(tiny()))
    parts.model.eval()
    first, second = (torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8) for _ in range(2))
    with torch.no_grad():
        run = workloads.cuda_graphed_inference(parts.forward, first, parts.forward(first).clone())
        assert torch.equal(run(second), parts.forward(second))


@pytest.mark.parametrize(("unit_s", "units"), [(0.05, 4), (0.001, 29 * 7), (0.025, 7)])
def test_a_trial_beyond_an_epoch_is_of_whole_epochs(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, unit_s: float, units: int
) -> None:
    """Of 0.2 seconds: 4 units, 200 and 8, where an epoch has 7."""
    parts = build_trainer(resolve(tiny(val_size=0)))
    monkeypatch.setattr(clock, "time_units", lambda _, units, device: TimedTrial(units, units * unit_s, 0.0))
    assert clock.calibrate_units(workloads.loader_workload(parts), parts, 0.2) == units


def test_without_a_data_set_it_measures_on_synthetic_images_and_says_so(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = cifar.load_dataset

    def nowhere(data: str | None, dataset: str, *, download: bool = True) -> cifar.Dataset:
        if data is None:
            assert not download
            raise DataError("cifar10 is not in the cache", "give --data")
        return load("synthetic:300" if data == "synthetic" else data, dataset)

    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setattr(cifar, "load_dataset", nowhere)
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
