"""A result as the README quotes it: bench/results/<UTC>_<device>_<what>/, written here and nowhere else.

A folder holds env.json, summary.json, trials.jsonl (every trial, one a line) and what else a bench wants kept. The
environment variable FASTCIFAR_BENCH_RESULTS names another place than bench/results, for what is not to be quoted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastcifar.device import result_folder_name

RESULTS = Path(os.environ.get("FASTCIFAR_BENCH_RESULTS") or Path(__file__).parent / "results")


def write(
    what: str,
    environment: Mapping[str, Any],
    summary: Mapping[str, Any],
    trials: Iterable[Mapping[str, Any]],
    folder: Path | None = None,
    **documents: Mapping[str, Any],
) -> Path:
    """Makes the folder and returns it; `folder` is written anew. `documents`: name -> what NAME.json holds beside."""
    again = folder is not None
    folder = folder or RESULTS / result_folder_name(environment["device"], what)
    folder.mkdir(parents=True, exist_ok=again)
    kept = {key: value for key, value in environment.items() if key != "command"}  # it names the machine's folders
    for name, document in {"env": kept, "summary": summary, **documents}.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(trial) + "\n" for trial in trials)
    (folder / "trials.jsonl").write_text(lines, encoding="utf-8")
    return folder
