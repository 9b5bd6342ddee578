"""The table, chart and comparison of benchmark documents."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastcifar.errors import UsageError, UserError
from fastcifar.plotting import plot_bar_chart
from fastcifar.reporting.benchmark_tables import (
    BenchDocument,
    BenchRow,
    bench_panels,
    bench_table,
    benchmark_comparison_table,
    compare_benchmarks,
)
from fastcifar.reporting.compare import compare_paths


def row(what: str, speed: float, **values: Any) -> BenchRow:
    trials = [speed * 0.9, speed, speed * 1.2]
    return BenchRow(what=what, images_per_s=speed, cpu_us_per_image=2.0, trials=trials, setup_s=1.0, **values)


def document(*rows: BenchRow, torch: str = "2.11") -> BenchDocument:
    return BenchDocument(device="a CPU, 2 cores", versions={"torch": torch}, results=list(rows))


def printed(renderable: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable, crop=False)
    return console.export_text()


def test_table_labels_rows_by_differing_settings() -> None:
    step = {"arch": "se68", "batch_size": 128, "precision": "bf16", "compiled": True, "cuda_graph": False}
    results = document(
        row("loader", 5000.0, loader="tensor", batch_size=128, compiled=True),
        row("step", 160.0, **step, tflop_per_s=0.766, mfu=0.5),
        row("step", 150.0, **step | {"compiled": False}, tflop_per_s=0.7, mfu=0.45),
    )
    lines = printed(bench_table(results)).splitlines()
    assert lines[0].startswith("a CPU, 2 cores, se68, batch 128, bf16")
    assert "median of 3 trials" in lines[1]
    loader, compiled, eager = (line.split() for line in lines[-3:])
    assert loader == ["loader", "5,000", "4,500-6,000", "-", "-", "2.0"]
    assert compiled == ["step", "compiled", "160", "144-192", "0.766", "50", "%", "2.0"]
    assert eager[:2] == ["step", "eager"]


def test_tables_show_every_label_in_80_columns() -> None:
    """The labels of convolutions are the longest ones; the other columns of numbers are named below the table."""
    step = {"arch": "se68", "batch_size": 128, "precision": "bf16", "compiled": True, "cuda_graph": False}
    measured = {"tflop_per_s": 0.766, "mfu": 0.5, "latency_ms": 800.0, "gb_per_s": 12.0, "mbu": 0.3}
    shapes = ("3x32x32 -> 64x32x32, 3x3", "64x32x32 -> 128x16x16, 3x3")
    results = document(
        row("loader", 15_000.0, loader="tensor", batch_size=128, augment="crop:4:zero,flip,cutout:8:mean"),
        row("step", 160.0, **step, **measured),
        *(row("conv", 300.0, **step, **measured, conv=shape) for shape in shapes),
    )
    for table in (bench_table(results), benchmark_comparison_table(compare_benchmarks(results, results))):
        text = printed(table, 80)
        assert max(map(len, text.splitlines())) <= 80
        for words in ("loader ", "step ", *(f"conv {shape} " for shape in shapes), " 15,000 ", " 300 "):
            assert words in text, words
    assert "left out to fit 80 columns: GB/s, of copy, CPU us/image; --json" in printed(bench_table(results), 80)
    assert "left out" not in printed(bench_table(results), 120)


def test_chart_panels_and_bar_lengths(tmp_path: Path) -> None:
    conv = {"arch": "se68", "batch_size": 128, "precision": "bf16", "direction": "forward", "flop_per_image": 2e9}
    results = document(
        row("step", 100.0, arch="se68", batch_size=128, compiled=False),
        row("step", 400.0, arch="se68", batch_size=512, compiled=False),
        row("conv", 300.0, conv="3x32x32 -> 64x32x32, 3x3", **conv),
    )
    _, panels = bench_panels(results)
    assert [panel.title for panel in panels] == ["step: images/s", "conv: TFLOP/s"]
    assert panels[0].labels == ["batch 128", "batch 512"]
    assert panels[1].medians == [0.6]
    plot_bar_chart(tmp_path / "chart.png", "a title", panels[:1])
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).astype(int)
    blue = (abs(pixels - [0xA9, 0xCC, 0xE3]).sum(2) == 0).sum(1)
    (short, _), (long, _) = sorted(Counter(blue[blue > 0].tolist()).most_common(2))
    assert long / short == pytest.approx(4, rel=0.05)


def test_another_processor_is_a_difference_and_its_measured_rate_is_not() -> None:
    old = document(row("step", 100.0))
    new = old.model_copy(update={"cpu_family": 25, "cpu_model": 1, "threads": 2, "matmul_tflop_per_s": {"fp32": 0.1}})
    other = new.model_copy(update={"cpu_model": 17, "matmul_tflop_per_s": {"fp32": 0.2}})
    assert compare_benchmarks(old, new).differ == {}, "an earlier document does not name the processor"
    comparison = compare_benchmarks(new, other)
    assert comparison.differ == {"cpu_model": (1, 17)}
    assert "cpu_model: 1 in A, 17 in B" in printed(benchmark_comparison_table(comparison))


def test_documents_are_compared_by_settings(tmp_path: Path) -> None:
    step = {"arch": "se68", "batch_size": 128, "compiled": True}
    a = document(
        row("loader", 5000.0, batch_size=128, data="first"), row("step", 100.0, **step), row("train", 90.0, **step)
    )
    b = document(
        row("step", 150.0, **step),
        row("loader", 5100.0, batch_size=128, data="second"),
        row("step", 80.0, **step | {"compiled": False}),
        torch="2.15",
    )
    (tmp_path / "a.json").write_text(json.dumps(json.loads(a.model_dump_json()), indent=1))
    (tmp_path / "b.json").write_text(f"a progress line\n{b.model_dump_json()}\n")
    comparison, table = compare_paths(tmp_path / "a.json", tmp_path / "b.json")
    assert json.loads(json.dumps(comparison)) == comparison
    loader_row, step_row = comparison["rows"]
    assert (loader_row["what"], loader_row["ratio"], loader_row["overlap"]) == ("loader", 1.02, True)
    assert (step_row["what"], step_row["ratio"], step_row["overlap"]) == ("step", 1.5, False)  # 90-120, 135-180
    assert [row["what"] for row in comparison["only_a"]] == ["train"]
    assert [row["compiled"] for row in comparison["only_b"]] == [False]
    assert comparison["differ"] == {"torch": ["2.11", "2.15"]}
    text = printed(table)
    for words in ("torch: 2.11 in A, 2.15 in B", "1.500", "B is faster", "only in A: train, se68", "only in B: step"):
        assert words in text, words


@pytest.mark.parametrize(
    "content",
    [None, "<html>", '{"results": []}', '{"results": [1]}', "[1, 2]", '{"results": [{"what": "step"}]}'],
)
def test_invalid_documents_are_refused(tmp_path: Path, content: str | None) -> None:
    good = tmp_path / "good.json"
    good.write_text(document(row("loader", 5000.0)).model_dump_json())
    wrong = tmp_path / "wrong.json"
    if content is not None:
        wrong.write_text(content)
    with pytest.raises(UserError, match=r"wrong\.json"):
        compare_paths(good, wrong)


def test_prediction_files_are_compared_by_label(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ID,Labels\n1,2\n2,3\n")
    (tmp_path / "b.csv").write_text("ID,Labels\n2,3\n1,4\n")
    (tmp_path / "c.json").write_text(document(row("loader", 5000.0)).model_dump_json())
    comparison, table = compare_paths(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (comparison["kind"], comparison["differ"], comparison["total"]) == ("submission", 1, 2)
    assert "1 of 2 labels" in printed(table)
    with pytest.raises(UsageError, match=r"a\.csv is a submission and .*c\.json is a benchmark"):
        compare_paths(tmp_path / "a.csv", tmp_path / "c.json")
