"""What people see of a bench document: its table, its chart, and two of them compared."""

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
from fastcifar.reporting.benchmark_tables import bench_panels, bench_table
from fastcifar.reporting.compare import COMPARERS, compare_paths


def row(what: str, speed: float, **settings: Any) -> dict[str, Any]:
    trials = [speed * 0.9, speed, speed * 1.2]
    return {"what": what, **settings, "images_per_s": speed, "cpu_us_per_image": 2.0, "trials": trials, "setup_s": 1.0}


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"device": "a CPU, 2 cores", "versions": {"torch": "2.11"}, "results": list(rows)}


def printed(shown: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def test_the_table_names_rows_by_what_differs_and_shows_a_dash_for_what_was_not_measured() -> None:
    step = {"arch": "se68", "batch_size": 128, "precision": "bf16", "compiled": True, "cuda_graph": False}
    found = document(
        row("loader", 5000.0, loader="tensor", batch_size=128, compiled=True),
        row("step", 160.0, **step, tflop_per_s=0.766, mfu=0.5),
        row("step", 150.0, **step | {"compiled": False}, tflop_per_s=0.7, mfu=0.45),
    )
    lines = printed(bench_table(found)).splitlines()
    assert lines[0].startswith("a CPU, 2 cores, se68, batch 128, bf16")
    assert "median of 3 trials" in lines[1]
    loader, compiled, eager = (line.split() for line in lines[-3:])
    assert loader == ["loader", "5,000", "4,500", "6,000", "2.0", "-", "-", "-", "-", "-"]
    assert compiled[:4] == ["step", "compiled", "160", "144"]
    assert compiled[-5:] == ["0.766", "50", "%", "-", "-"]
    assert eager[:2] == ["step", "eager"]


def test_the_chart_has_a_panel_for_each_kind_and_longer_bars_for_more(tmp_path: Path) -> None:
    conv = {"arch": "se68", "batch_size": 128, "precision": "bf16", "direction": "forward", "flop_per_image": 2e9}
    found = document(
        row("step", 100.0, arch="se68", batch_size=128, compiled=False),
        row("step", 400.0, arch="se68", batch_size=512, compiled=False),
        row("conv", 300.0, conv="3x32x32 -> 64x32x32, 3x3", **conv),
    )
    _, panels = bench_panels(found)
    assert [panel.title for panel in panels] == ["step: images/s", "conv: TFLOP/s"]
    assert panels[0].labels == ["batch 128", "batch 512"]
    assert panels[1].medians == [0.6]
    plot_bar_chart(tmp_path / "chart.png", "a title", panels[:1])
    picture = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).astype(int)
    blue = (abs(picture - [0xA9, 0xCC, 0xE3]).sum(2) == 0).sum(1)
    (short, _), (long, _) = sorted(Counter(blue[blue > 0].tolist()).most_common(2))
    assert long / short == pytest.approx(4, rel=0.05)


def test_two_documents_are_paired_by_their_settings_and_the_rest_is_listed(tmp_path: Path) -> None:
    step = {"arch": "se68", "batch_size": 128, "compiled": True}
    a = document(
        row("loader", 5000.0, batch_size=128, data="here"), row("step", 100.0, **step), row("train", 90.0, **step)
    )
    b = document(row("step", 150.0, **step), row("loader", 5100.0, batch_size=128, data="there"))
    b["results"].append(row("step", 80.0, **step | {"compiled": False}))
    b["versions"] = {"torch": "2.15"}
    (tmp_path / "a.json").write_text(json.dumps(a, indent=1))
    (tmp_path / "b.json").write_text("a line before it\n" + json.dumps(b) + "\n")
    found = compare_paths(tmp_path / "a.json", tmp_path / "b.json")
    assert json.loads(json.dumps(found)) == found
    loader, stepped = found["rows"]
    assert (loader["what"], loader["ratio"], loader["overlap"]) == ("loader", 1.02, True)
    assert (stepped["what"], stepped["ratio"], stepped["overlap"]) == ("step", 1.5, False)  # 90-120 against 135-180
    assert [row["what"] for row in found["only_a"]] == ["train"]
    assert [row["compiled"] for row in found["only_b"]] == [False]
    assert found["differ"] == {"torch": ["2.11", "2.15"]}
    text = printed(COMPARERS[found["kind"]].build_table(found))
    for words in ("torch: 2.11 in A, 2.15 in B", "1.500", "B is faster", "only in A: train, se68", "only in B: step"):
        assert words in text, words


@pytest.mark.parametrize(
    "content",
    [None, "<html>", '{"results": []}', '{"results": [1]}', "[1, 2]", '{"results": [{"what": "step"}]}'],
)
def test_what_is_no_document_is_refused(tmp_path: Path, content: str | None) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps(document(row("loader", 5000.0))))
    wrong = tmp_path / "wrong.json"
    if content is not None:
        wrong.write_text(content)
    with pytest.raises(UserError, match=r"wrong\.json"):
        compare_paths(good, wrong)


def test_two_submissions_are_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ID,Labels\n1,2\n2,3\n")
    (tmp_path / "b.csv").write_text("ID,Labels\n2,3\n1,4\n")
    (tmp_path / "c.json").write_text(json.dumps(document(row("loader", 5000.0))))
    found = compare_paths(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (found["kind"], found["differ"], found["total"]) == ("submission", 1, 2)
    assert "1 of 2 labels" in printed(COMPARERS["submission"].build_table(found))
    with pytest.raises(UsageError, match=r"a\.csv is a submission and .*c\.json is a benchmark"):
        compare_paths(tmp_path / "a.csv", tmp_path / "c.json")
