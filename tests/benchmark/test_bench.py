"""The benchmark: contents of its result, all trials are kept, and the state of the trainer is restored."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.benchmark import bench as bench_module
from fastcifar.benchmark import workloads
from fastcifar.benchmark.bench import TimedTrial, bench
from fastcifar.benchmark.workloads import BENCHMARKS
from fastcifar.data import cifar
from fastcifar.errors import DataError, DiskError, UserError
from fastcifar.models import MODELS, count_macs
from fastcifar.recipe import Recipe
from fastcifar.reporting.benchmark_tables import BenchDocument, BenchRow, DeviceLimits
from fastcifar.training.build import build_trainer
from fastcifar.training.resolve import Resolved, resolve

RESULT_KEYS = {"what", "batch_size", "images_per_s", "cpu_us_per_image", "trials", "peak_memory_bytes",
               "setup_s", "compile_s"}  # fmt: skip
COST_KEYS = {"flop_per_image", "tflop_per_s", "mfu", "bytes_per_image", "gb_per_s", "mbu"}
SETTING_KEYS = {
    "loader": {"loader", "augment", "data", "compiled"},
    "step": {"arch", "precision", "compiled", "cuda_graph"} | COST_KEYS,
    "train": {"arch", "loader", "augment", "precision", "compiled", "cuda_graph", "data"} | COST_KEYS,
    "infer": {"arch", "precision", "compiled", "cuda_graph"} | COST_KEYS,
    "conv": {"arch", "precision", "conv", "calls", "direction"} | COST_KEYS,
    "replay": {"arch", "precision", "compiled", "cuda_graph", "steps_per_replay"} | COST_KEYS,
}
MACHINE_DEPENDENT_KEYS = {"clock_mhz"}
TRIAL_S = 0.02
LIMITS = DeviceLimits(matmul_tflop_per_s=0.5, copy_gb_per_s=10.0)


@pytest.fixture(autouse=True)
def fixed_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measurement of the device limits, which takes seconds and is tested in test_roofline.py."""
    monkeypatch.setattr(bench_module, "measure_roofline", lambda *_: LIMITS)
    monkeypatch.setitem(workloads.INFERENCE_BATCH_SIZES, "cpu", (1, 16))


@pytest.mark.medium
@pytest.mark.parametrize("what", BENCHMARKS)
def test_result_row_keys(tiny: Callable[..., Recipe], what: str) -> None:
    result = bench(tiny(), what, trials=3, trial_s=TRIAL_S)
    assert BenchDocument.model_validate_json(result.model_dump_json()) == result
    document = json.loads(result.model_dump_json())
    cpu_keys = {"cpu_family", "cpu_model"}  # absent on other processors than x86
    fields = {"schema_version", "device", "threads", "matmul_tflop_per_s", "versions", "results"}
    assert document.keys() - {"limits"} - cpu_keys == fields
    assert document["matmul_tflop_per_s"].keys() == {"bf16", "fp32"}
    assert ("limits" in document) == (what != "loader")
    for row in document["results"]:
        latency_keys = {"latency_ms"} if what == "infer" and row["batch_size"] == 1 else set()
        assert row.keys() - MACHINE_DEPENDENT_KEYS == RESULT_KEYS | SETTING_KEYS[what] | latency_keys
        assert row["what"] == what
        assert len(row["trials"]) == 3
        assert row["images_per_s"] == statistics.median(row["trials"])
        assert row["cpu_us_per_image"] > 0
        if what != "loader":
            assert row["mfu"] == pytest.approx(row["flop_per_image"] * row["images_per_s"] / 0.5e12)
            assert row["mbu"] == pytest.approx(row["bytes_per_image"] * row["images_per_s"] / 10e9)


@pytest.mark.medium
def test_default_benchmarks(tiny: Callable[..., Recipe]) -> None:
    rows = bench(tiny(), trials=1, trial_s=TRIAL_S).results
    assert [row.what for row in rows] == ["loader", "step", "train"]
    assert rows[0].compile_s is None  # the loader is warmed up together with the step
    assert rows[1].compile_s == rows[2].compile_s
    assert rows[1].flop_per_image == 6 * count_macs(build_trainer(resolve(tiny())).model)


def test_result_is_the_median_of_all_trials(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [TimedTrial(100, 1.0, 2.0), TimedTrial(100, 0.5, 4.0), TimedTrial(100, 10.0, 1.0)]
    monkeypatch.setattr(bench_module, "run_trials", lambda *_: trials)
    (row,) = bench(tiny(), "loader", trials=3).results
    assert row.trials == [100.0, 200.0, 10.0]
    assert (row.images_per_s, row.cpu_us_per_image) == (100.0, 20_000.0)


@pytest.mark.medium
def test_grid_measures_all_combinations_without_duplicates(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = partial(MODELS["resnet"], blocks=(1, 1), channels=(8, 8))
    monkeypatch.setitem(MODELS, "mini", mini)
    monkeypatch.setitem(MODELS, "same", mini)
    grid = {"arch": ["mini", "same"], "batch_size": ["16", "32"], "mode": ["eager"]}
    recipe = tiny(blocks=None, channels=None)
    rows = bench(recipe, "loader,step", trials=1, trial_s=TRIAL_S, grid=grid).results
    assert [(row.arch, row.batch_size) for row in rows if row.what == "step"] == [
        ("mini", 16), ("mini", 32), ("same", 16), ("same", 32)
    ]  # fmt: skip
    assert [row.batch_size for row in rows if row.what == "loader"] == [16, 32]


@pytest.mark.parametrize(
    ("what", "arguments", "words"),
    [
        ("step", {"grid": {"mode": ["compild"]}}, "did you mean 'compiled'"),
        ("step", {"grid": {"batch_size": ["0"]}}, "--batch-size should be greater than 0"),
        ("step", {"grid": {"mode": ["captured"]}}, "--cuda-graph needs CUDA"),
        ("step", {"trace": Path("no/such/folder/trace.json")}, "--profile"),
        ("step", {"trace": Path()}, "--profile . is a folder"),
        ("trian", {}, "did you mean 'train'"),
    ],
)
def test_invalid_arguments_are_refused_before_the_trainer_is_built(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, what: str, arguments: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(bench_module, "build_trainer", lambda *_: pytest.fail("a trainer was built"))
    with pytest.raises(UserError, match=words):
        bench(tiny(), what, **arguments)


@pytest.mark.parametrize("what", ["all", "loader,all"])
def test_all_benchmarks_are_measured_once(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    measured: list[str] = []
    row = BenchRow(what="loader", batch_size=1, images_per_s=1.0, cpu_us_per_image=1.0, trials=[1.0])

    def measure_point(resolved: Resolved, names: Sequence[str], *others: Any) -> None:
        measured.extend(names)
        others[3].append(row)

    monkeypatch.setattr(bench_module, "measure_point", measure_point)
    bench(tiny(), what)
    assert measured == list(BENCHMARKS)


@pytest.mark.parametrize("what", ["loader", "step", "train"])
def test_workload_is_endless_and_yields_image_counts(tiny: Callable[..., Recipe], what: str) -> None:
    trainer = build_trainer(resolve(tiny(val_size=0)))
    (case,) = BENCHMARKS[what](trainer)
    images = [next(case.workload) for _ in range(14)]  # two epochs of 200 images in batches of 32
    assert sum(images) == (14 * 32 if what == "step" else 400)


def test_step_workload_does_not_change_weights(tiny: Callable[..., Recipe]) -> None:
    trainer = build_trainer(resolve(tiny()))
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    workload = workloads.step_workload(trainer)
    for _ in range(6):
        next(workload)
    assert all(torch.equal(weight, old) for weight, old in zip(trainer.model.parameters(), before, strict=True))
    assert trainer.meter.compute().images == 6 * 32


def test_inference_workload_uses_evaluation_mode_and_restores_training_mode(tiny: Callable[..., Recipe]) -> None:
    trainer = build_trainer(resolve(tiny()))
    before = [tensor.clone() for tensor in trainer.state_tensors()]
    for case in BENCHMARKS["infer"](trainer):
        next(case.workload)
        assert not trainer.model.training
        case.workload.close()
        assert trainer.model.training
    assert all(torch.equal(tensor, old) for tensor, old in zip(trainer.state_tensors(), before, strict=True))


@pytest.mark.parametrize(("unit_s", "units"), [(0.05, 4), (0.001, 29 * 7), (0.025, 7)])
def test_trials_longer_than_an_epoch_are_whole_epochs(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, unit_s: float, units: int
) -> None:
    """0.2 seconds are 4, 200 and 8 units; an epoch has 7 units."""
    trainer = build_trainer(resolve(tiny(val_size=0)))
    monkeypatch.setattr(bench_module, "time_units", lambda _, units, device: TimedTrial(units, units * unit_s, 0.0))
    assert bench_module.calibrate_units(workloads.loader_workload(trainer.loader), trainer, 0.2) == units


def test_missing_data_set_is_replaced_by_synthetic_images_with_a_warning(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    original_load_dataset = cifar.load_dataset

    def load_dataset(data: str | None, dataset: str, *, download: bool = True, **_: Any) -> cifar.Dataset:
        if data is None:
            assert not download
            raise DataError("cifar10 is not in the cache", "give --data")
        return original_load_dataset("synthetic:300" if data == "synthetic" else data, dataset)

    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setattr(cifar, "load_dataset", load_dataset)
    recipe = tiny().model_copy(update={"data": None})
    with pytest.warns(UserWarning, match="not in the cache; using synthetic images instead"):
        document = bench(recipe, "loader", trials=1, trial_s=TRIAL_S)
    assert str(document.results[0].data).startswith("synthetic")


@pytest.mark.medium
def test_recipes_that_need_a_validation_split_are_measured_without_one(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(schedule="plateau:3", patience=2, eval_weights="best", val_size=None)
    trainer = build_trainer(bench_module.resolve_without_validation(recipe))
    assert len(trainer.train_split.labels) == len(cifar.load_recipe_dataset(recipe).train.labels)
    rows = bench(recipe, "step,train", trials=1, trial_s=TRIAL_S).results
    assert [row.what for row in rows] == ["step", "train"]
    bench_module.resolve_without_validation(Recipe.make("coconut"))


def test_specified_data_set_must_exist(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match="no/such/place"):
        bench(tiny(data="no/such/place"), "loader", trial_s=TRIAL_S)


def test_trace_is_written(tiny: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench(tiny(), "step", trials=1, trace=tmp_path / "trace.json", trial_s=TRIAL_S)
    assert "".join(capfd.readouterr()) == ""
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)


@pytest.mark.medium
def test_trace_is_written_if_the_last_case_was_measured_before(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    """The loader does not depend on the architecture, so the second point of the grid has no case."""
    grid = {"arch": ["se55", "se68"]}
    recipe = tiny(blocks=None, channels=None)
    rows = bench(recipe, "loader", trials=1, trace=tmp_path / "trace.json", trial_s=TRIAL_S, grid=grid).results
    assert len(rows) == 1
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_trace_that_cannot_be_written_is_reported(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_to_full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench_module, "write_atomically", write_to_full_disk)
    with pytest.raises(DiskError, match=r"cannot write the trace .*trace\.json: .*No space left"):
        bench(tiny(), "loader", trials=1, trace=tmp_path / "trace.json", trial_s=TRIAL_S)
