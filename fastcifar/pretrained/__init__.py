"""Trained weights that the package contains, in this folder: `pretrained:NAME` wherever a run or checkpoint is given.

A NAME.safetensors file contains the weights of convolutions and linear layers in half precision, and NAME.md its card.
"""

from pathlib import Path

from fastcifar.errors import CheckpointError, suggest_name

PREFIX = "pretrained:"


def pretrained_weights() -> dict[str, Path]:
    """Return the weights in the package: name -> .safetensors file."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.safetensors"))}


def is_pretrained(run: str) -> bool:
    """Return whether `run` names weights of the package instead of a path."""
    return run.startswith(PREFIX)


def pretrained_path(run: str) -> Path:
    """Return the file that `pretrained:NAME` refers to. Raises `CheckpointError` for an unknown name."""
    name, files = run.removeprefix(PREFIX), pretrained_weights()
    if name not in files:
        raise CheckpointError(f"no pretrained weights {name!r}", suggest_name(name, files))
    return files[name]
