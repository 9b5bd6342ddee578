"""Peers run with the memory allocator of their own and with that of fastcifar; bench/ is on the import path."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastcifar.data.cifar import load_dataset
from fastcifar.device import Environment, ExecutionPlan
from fastcifar.models import MODELS
from fastcifar.training import compilation
from fastcifar.training.resolve import resolve

allocator, loops, run, tables = map(importlib.import_module, ("allocator", "loops", "run", "tables"))
METRICS = {"cpu_us_per_image": 1.0, "prepare_s": 2.0, "others_cores": 0.5}


def test_tunables_are_the_allocator_settings_of_fastcifar(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or 1)
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda _: library)
    assert compilation.keep_freed_memory()
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from glibc's malloc.h
    assert set(calls) == {(m_mmap_max, 0), (m_trim_threshold, 2147483647), (m_top_pad, 67108864)}
    tunables = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=67108864"
    assert allocator.process_environment(True)["GLIBC_TUNABLES"] == tunables
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert "GLIBC_TUNABLES" not in allocator.process_environment(False)


@pytest.mark.skipif(allocator.keeps_freed_memory() is None, reason="needs glibc 2.33")
@pytest.mark.parametrize("same_allocator", [False, True])
def test_free_memory_is_not_taken_for_the_other_allocator(same_allocator: bool) -> None:
    """A process that has freed much has a large free block with any allocator: 300 MB that are not at the end."""
    code = """
import allocator
import ctypes
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.free(libc.malloc(30 * 2**20))  # by default, smaller blocks are in the heap from now on
blocks, last = [libc.malloc(10 * 2**20) for _ in range(30)], libc.malloc(2**20)
for block in blocks:
    libc.free(block)
print(allocator.keeps_freed_memory())
"""
    environment = allocator.process_environment(same_allocator) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    assert output == f"{same_allocator}\n"


@pytest.mark.skipif(allocator.keeps_freed_memory() is None, reason="needs glibc 2.33")
@pytest.mark.slow
def test_a_loop_of_a_peer_runs_with_the_allocator_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the variable is set for this process; the statistics are those of glibc in the process of the loop."""
    options = {"arch": "speednet", "batch-size": 8, "data": "synthetic:24", "steps": 1, "rounds": 1, "device": "cpu"}
    options |= {"loops": "eager", "augment": "crop-flip"}
    monkeypatch.setenv("GLIBC_TUNABLES", allocator.TUNABLES)
    monkeypatch.setattr(run.results_folder, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *(f"--{name}={value}" for name, value in options.items())])
    run.main()
    (folder,) = tmp_path.iterdir()
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    measured = [(trial["loop"], trial["keeps_freed_memory"]) for trial in trials]
    assert measured == [("eager", False), ("eager+allocator", True)]
    assert json.loads((folder / "env.json").read_text())["matmul_tflop_per_s"].keys() == {"bf16", "fp32"}


def test_a_trial_with_another_allocator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = {"images_per_s": 1.0, **METRICS, "keeps_freed_memory": True}
    process = SimpleNamespace(returncode=0, stdout=json.dumps(trial))
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: process)
    assert len(run.run_trials(["eager+allocator", "ours"], [], rounds=2, attempts=1)) == 4
    with pytest.raises(SystemExit, match="eager did not run with the intended memory allocator"):
        run.run_trials(["eager"], [], rounds=1, attempts=1)


def test_ratios_to_a_peer_with_both_allocators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"plain_compile": 10.0, "plain_compile+allocator": 12.5, "ours": 15.0}
    trials = [{"round": 0, "loop": name, "images_per_s": speed, **METRICS} for name, speed in speeds.items()]
    summary = run.summarize(trials, arch="se68", batch_size=128, augment="none", precision="fp32")
    assert summary["loops"]["ours"]["times_plain_compile"]["median"] == 1.5
    assert summary["loops"]["ours"]["times_plain_compile+allocator"]["median"] == 1.2
    heading, _, _, ours = run.format_table(summary).splitlines()
    assert "images/s x plain_compile x plain_compile+allocator  CPU us/image" in heading
    assert ours.split() == ["ours", "15.0", "1.50", "1.20", "1", "0.50", "15.0"]
    monkeypatch.setattr(run.results_folder, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    run.results_folder.write("peers-se68", Environment(device="a CPU"), summary, trials)
    assert "| 15.0 | 15.0 | not measured | not measured | 1.50 | 1.20 | 1 |" in tables.peers().splitlines()[-1]
    assert "| a CPU, fp32 |" in tables.peers()


def test_inference_is_compared_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"source_loop": 5.0, "source_loop+allocator": 10.0, "ours": 20.0}
    trials = [{"round": 0, "loop": name, "images_per_s": speed, **METRICS} for name, speed in speeds.items()]
    summary = run.summarize(trials, "infer", arch="se68", batch_size=128)
    monkeypatch.setattr(run.results_folder, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    run.results_folder.write("inference-se68", Environment(device="a CPU"), summary, trials)
    assert (
        tables.inference().splitlines()[-1].startswith("| `se68`, 128 | ours | 1 | 20.0 | 20.0 | 4.00 | 2.00 | 2.0 |")
    )
    assert run.format_table(summary).splitlines()[-1].split()[:4] == ["ours", "20.0", "4.00", "2.00"]


@pytest.mark.medium
@pytest.mark.parametrize("name", ["source_loop", "eager", "ours"])
def test_a_loop_evaluates_the_test_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "mini", partial(MODELS["resnet"], blocks=(1, 1), channels=(8, 16)))
    execution = ExecutionPlan("cpu", "fp32", "tensor", False, False)
    monkeypatch.setattr(loops, "resolve", lambda recipe: resolve(recipe, execution))
    monkeypatch.setattr(loops, "EVAL_BATCH_SIZE", 32)
    images = len(load_dataset("synthetic:80", download=False).test.labels)
    sizes = [min(32, images - start) for start in range(0, images, 32)]
    loop = loops.LOOPS[name](loops.Settings("mini", 32, "crop-flip", "synthetic:80", "cpu", "fp32", "infer"))
    assert [next(loop) for _ in range(len(sizes) + 1)] == [*sizes, sizes[0]]
