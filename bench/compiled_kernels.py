"""Registers, spills and shared memory of all compiled kernels, for GPUs that need not exist.

    python bench/compiled_kernels.py [--capability 8.0 ... --workload NAME ... --record]

For each compute capability (by default 7.5, 8.0, 9.0 and 12.0), torch.compile generates the kernels of the training
steps, the loader for every augmentation, the evaluation and `--fused-ops`, and Triton and ptxas compile them, in all
block sizes among which torch.compile chooses on a GPU. The process uses the stub CUDA runtime of tests/cuda_stub
(docs/cuda-stub.md); the kernels do not run. `--record` writes bench/results/<UTC>_<device>_compiled-kernels/ with
summary.json (one row for each capability and workload) and trials.jsonl (every kernel). Exits 1 after an error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda_stub"))

import results_folder
from stub_build import (
    CAPABILITIES,
    build_cached_library,
    find_missing_compile_requirement,
    find_missing_requirement,
    stub_environment,
)

from fastcifar.device import collect_environment

ROOT = Path(__file__).resolve().parents[1]
CHILD = ROOT / "tests" / "cuda_stub" / "stub_kernels.py"
COLUMNS = ("kernels", "compiled", "registers", "shared_bytes", "spilling", "spill_bytes", "most_spilled")


def compile_kernels(capability: str, workloads: list[str]) -> dict[str, Any]:
    """Return the document of `stub_kernels.py`, by default for all workloads; nothing is read from caches."""
    with tempfile.TemporaryDirectory() as folder:
        environment = stub_environment(build_cached_library(), ROOT, capability)
        environment |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        file = Path(folder) / "result.json"
        run = subprocess.run([sys.executable, str(CHILD), str(file), *workloads], env=environment, check=False)
        if run.returncode or not file.is_file():
            raise SystemExit(f"the process for {capability} ended with exit code {run.returncode}")
        return json.loads(file.read_text())


def summarize(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row of the table: numbers of kernels, and maxima.

    `compiled` counts every block size of a kernel, `kernels` counts names. `spilling` is the number of kernels that
    spill registers in all of their block sizes, so that torch.compile cannot avoid it; `spill_bytes` is the most that
    one of these stores for a thread in the block size that stores least, `most_spilled` its name.
    """
    spills: dict[tuple[str, str], int] = {}
    for kernel in kernels:
        name = (kernel["workload"], kernel["kernel"])
        spills[name] = min(spills.get(name, sys.maxsize), kernel["spill_store_bytes"])
    most = max(spills, key=spills.__getitem__, default=("", ""))
    return {
        "kernels": len(spills),
        "compiled": len(kernels),
        "registers": max((kernel["registers"] for kernel in kernels), default=0),
        "shared_bytes": max((kernel["shared_bytes"] for kernel in kernels), default=0),
        "spilling": sum(spill > 0 for spill in spills.values()),
        "spill_bytes": spills.get(most, 0),
        "most_spilled": most[1] if spills.get(most) else "",
    }


def summary_rows(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all documents: one for each workload, and one for all of them."""
    rows = []
    for document in documents:
        kernels, capability = document["kernels"], document["capability"]
        for workload in dict.fromkeys(kernel["workload"] for kernel in kernels):
            chosen = [kernel for kernel in kernels if kernel["workload"] == workload]
            rows.append({"capability": capability, "workload": workload, **summarize(chosen)})
        rows.append({"capability": capability, "workload": "all", **summarize(kernels)})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    columns = ("capability", "workload", *COLUMNS)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of all compiled kernels.")
    parser.add_argument("--capability", choices=CAPABILITIES, action="append", help="may be repeated; by default all")
    parser.add_argument("--workload", action="append", default=[], help="may be repeated; by default all")
    parser.add_argument("--jobs", type=int, default=1, help="number of capabilities at the same time, by default 1")
    parser.add_argument("--record", action="store_true", help="write a result folder")
    arguments = parser.parse_args()
    if missing := find_missing_requirement() or find_missing_compile_requirement():
        raise SystemExit(f"the stub CUDA runtime {missing}")
    documents = []
    with ThreadPoolExecutor(arguments.jobs) as executor:
        capabilities = arguments.capability or CAPABILITIES
        for document in executor.map(lambda name: compile_kernels(name, arguments.workload), capabilities):
            documents.append(document)
            print(format_table(summary_rows([document])), flush=True)
    errors = [{"capability": document["capability"], **error} for document in documents for error in document["errors"]]
    for error in errors:
        print(f"compute capability {error['capability']}, {error['workload']}: {error['error']}", file=sys.stderr)
    if arguments.record:
        rows = summary_rows(documents)
        summary = {"what": "resources of compiled kernels", "n": 1, "errors": errors, "rows": rows}
        trials = [
            {"capability": document["capability"], **kernel} for document in documents for kernel in document["kernels"]
        ]
        print(results_folder.write("compiled-kernels", collect_environment("cpu"), summary, trials))
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
