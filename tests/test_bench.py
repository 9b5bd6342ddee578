"""The README's tables are generated from recorded results, and current."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_tables_are_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: accuracy -->" in text
    assert script("tables").renewed(text) == text


def test_results_hold_no_path_of_a_machine() -> None:
    files = [path for path in (ROOT / "bench" / "results").rglob("*") if path.is_file()]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "/tmp" not in text, path
        assert "/work" not in text, path


def trial(seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    names = ("arch", "recipe", "device", "precision", "weights", "run", "stop_reason")
    figures = {"params": 10, "macs": 100, "epochs": 2, "images_trained": 1000, "test_acc": accuracy, "complete": True}
    absent = dict.fromkeys(("test_acc_ema", "val_acc"))
    config = {"lr": 0.1, "seed": seed, "out": "here", "data": "there"}
    return {**dict.fromkeys(names, "x"), **figures, **absent, "test_loss": 1.0, "images_per_s": 5.0, "seed": seed,
            "config": config, "seconds": {"total": 9.0}, **changes}  # fmt: skip


def write(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(document))
    (folder / "env.json").write_text(json.dumps({"device": "a CPU, 2 cores", "command": ["here"]}))
    return folder


def test_record_keeps_every_trial_and_their_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = script("record")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    runs = [write(tmp_path / f"run{seed}", trial(seed, accuracy)) for seed, accuracy in ((0, 0.8), (1, 0.9))]
    folder = record.record("quick", runs)
    assert folder.name.endswith("Z_a-cpu-2-cores_quick")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["n"], summary["seeds"]) == (2, [0, 1])
    assert summary["test_acc"]["mean"] == pytest.approx(0.85)
    assert summary["test_acc"]["std"] == pytest.approx(0.0707, abs=1e-3)
    assert summary["train_flops"] == 6 * 100 * 1000
    assert "val_acc" not in summary
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [entry["test_acc"] for entry in trials] == [0.8, 0.9]
    assert "out" not in trials[0]["config"]
    assert "command" not in json.loads((folder / "env.json").read_text())


def test_record_refuses_cut_runs_and_other_recipes(tmp_path: Path) -> None:
    record = script("record")
    whole = write(tmp_path / "whole", trial(0, 0.8))
    cut = write(tmp_path / "cut", trial(1, 0.8, complete=False))
    other = write(tmp_path / "other", trial(1, 0.8, config={"lr": 0.2}))
    for wrong in (cut, other):
        with pytest.raises(SystemExit):
            record.record("quick", [whole, wrong])
