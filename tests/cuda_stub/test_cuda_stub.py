"""Training on a stub CUDA runtime, without a GPU: captures, replays, synchronizations and launches (docs/cuda-stub.md).

The cases run in one process, each in a fork of it, and so do the planted faults.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_build import build_library, find_missing_compile_requirement, find_missing_requirement, stub_environment
from stub_cases import CASES, fault_case, find_problems
from stub_faults import FAULTS

CHILD = Path(__file__).parent / "stub_child.py"
COMPILING_CHILD = CHILD.with_name("stub_kernels.py")
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1800

MISSING_REQUIREMENT = find_missing_requirement()
pytestmark = [
    pytest.mark.slow,  # the first test runs all cases
    pytest.mark.skipif(MISSING_REQUIREMENT is not None, reason=str(MISSING_REQUIREMENT)),
]

MISSING_TO_COMPILE = find_missing_compile_requirement()
COMPILED = ("compiled", "kernel loaded in the capture")  # the case and the fault with compiled kernels

ReadResult = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def read_result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, library: Path) -> ReadResult:
    """Run the cases and faults of the collected tests, and return a function that returns the result of one."""
    folder = tmp_path_factory.mktemp("results")
    tests = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    names = [test.callspec.params["name"] for test in tests if hasattr(test, "callspec")]
    environment = stub_environment(library, ROOT) | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, str(CHILD), str(folder), *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    def read(name: str) -> dict[str, Any]:
        path = folder / name / "result.json"
        assert path.is_file(), f"the process ended without a result:\n{run.stdout}{run.stderr}"
        return json.loads(path.read_text())

    return read


def skip_if_it_cannot_be_compiled(name: str) -> None:
    if name in COMPILED and MISSING_TO_COMPILE:
        pytest.skip(MISSING_TO_COMPILE)


@pytest.mark.parametrize("name", CASES)
def test_training_follows_the_rules_of_cuda_graphs(name: str, read_result: ReadResult) -> None:
    skip_if_it_cannot_be_compiled(name)
    assert find_problems(read_result(name), CASES[name]) == []


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str, read_result: ReadResult) -> None:
    skip_if_it_cannot_be_compiled(name)
    _, options, expected = FAULTS[name]
    problems = find_problems(read_result(name), fault_case(options))
    assert any(expected in problem for problem in problems), problems


@pytest.mark.skipif(MISSING_TO_COMPILE is not None, reason=str(MISSING_TO_COMPILE))
def test_kernels_are_compiled_for_other_devices(library: Path, tmp_path: Path) -> None:
    file, capability = tmp_path / "result.json", "8.0"
    environment = stub_environment(library, ROOT, capability) | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(COMPILING_CHILD), str(file), "loader, crop:zero", "no such workload"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert file.is_file(), run.stdout + run.stderr
    document = json.loads(file.read_text())
    assert document["capability"] == capability
    assert [error["workload"] for error in document["errors"]] == ["no such workload"]
    assert document["kernels"]
    for kernel in document["kernels"]:
        assert 0 < kernel["registers"] <= 255
        assert kernel["spill_store_bytes"] == 0


@pytest.mark.parametrize("name", ["capture fails"])
def test_run_continues_without_a_cuda_graph_if_the_capture_fails(name: str, read_result: ReadResult) -> None:
    result = read_result(name)
    outcome = result["outcome"]
    assert outcome["code"] == 0, outcome["stderr"]
    (line,) = outcome["stderr"].splitlines()
    assert line.startswith("fastcifar: warning: the capture of a CUDA graph failed (AcceleratorError: CUDA error: ")
    assert "; continuing with eager steps without a CUDA graph; a report to attach to a bug report is in /" in line
    (report,) = outcome["reports"]
    assert "loss.item()" in report
    assert not outcome["summary"]["cuda_graph"]
    assert "the capture of a CUDA graph failed" in outcome["summary"]["reasons"]["cuda_graph"]
    assert (outcome["summary"]["complete"], result["steps"]) == (True, 6)


@pytest.mark.parametrize("name", ["requested capture fails"])
def test_requested_capture_that_fails_is_an_error(name: str, read_result: ReadResult) -> None:
    outcome = read_result(name)["outcome"]
    assert outcome["code"] == 8
    (line,) = outcome["stderr"].splitlines()
    assert "failed (AcceleratorError: CUDA error: " in line
    assert "; use --no-cuda-graph; a report to attach to a bug report is in /" in line
    assert len(outcome["reports"]) == 1
    assert outcome["summary"] is None


@pytest.mark.parametrize(
    ("name", "code", "outcomes", "verdict"),
    [
        ("check", 0, [None, None], "captured steps agree with eager steps; no compilation (requested)"),
        (
            "check of a capture that fails",
            8,
            [None, "the capture of a CUDA graph failed"],
            "captured steps failed; a run continues with eager steps without a CUDA graph",
        ),
    ],
)
def test_check_of_the_execution(
    name: str, code: int, outcomes: list[str | None], verdict: str, read_result: ReadResult
) -> None:
    outcome = read_result(name)["outcome"]
    assert outcome["code"] == code, outcome["stderr"]
    document = json.loads(outcome["stdout"].splitlines()[-1])["check"]
    assert document["verdict"] == verdict
    assert [mode["mode"] for mode in document["modes"]] == ["eager", "captured"]
    for mode, error in zip(document["modes"], outcomes, strict=True):
        assert (error is None) == (mode["error"] is None)
        assert error is None or error in mode["error"]
    assert len(outcome["reports"]) == (code != 0)


@pytest.mark.parametrize("name", ["torch after a failed capture"])
def test_torch_can_be_used_after_a_failed_capture(name: str, read_result: ReadResult) -> None:
    outcome = read_result(name)["outcome"]
    (message,) = outcome.pop("messages")
    assert "not permitted when stream is capturing" in message
    assert outcome == {"stream": True, "gc": True, "memory": True, "seed": 1, "reuse": True}
