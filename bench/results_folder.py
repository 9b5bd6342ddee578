"""Result folders for the README: bench/results/<UTC>_<device>_<label>/.

A folder contains env.json, summary.json, trials.jsonl (one trial per line) and optional further documents. The
environment variable FASTCIFAR_BENCH_RESULTS replaces bench/results, for results that the README does not show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastcifar.device import Environment, result_folder_name

RESULTS = Path(os.environ.get("FASTCIFAR_BENCH_RESULTS") or Path(__file__).parent / "results")


def write(
    label: str,
    environment: Environment,
    summary: Mapping[str, Any],
    trials: Iterable[Mapping[str, Any]],
    folder: Path | None = None,
    **documents: Mapping[str, Any],
) -> Path:
    """Write a result and return its folder; `folder` is overwritten. `documents`: name -> content of NAME.json."""
    overwrite = folder is not None
    folder = folder or RESULTS / result_folder_name(environment.device, label)
    folder.mkdir(parents=True, exist_ok=overwrite)
    environment_document = environment.model_dump(exclude={"command"})  # the command contains paths of this machine
    for name, document in {"env": environment_document, "summary": summary, **documents}.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(trial) + "\n" for trial in trials)
    (folder / "trials.jsonl").write_text(lines, encoding="utf-8")
    return folder
