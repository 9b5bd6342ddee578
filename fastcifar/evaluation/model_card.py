"""The model card beside an exported file: what it is, what it was trained on, how good it was measured to be.

A figure that was not measured is said to be so; nothing is copied from anywhere but the run's own records.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastcifar._version import __version__
from fastcifar.data.cifar import Dataset, Split
from fastcifar.data.normalization import normalization_mean_std, normalization_name
from fastcifar.evaluation.load_run import LoadedRun
from fastcifar.files import write_atomically
from fastcifar.format import format_percent
from fastcifar.models import count_macs, count_parameters
from fastcifar.recipe import section_fields
from fastcifar.training.run_dir import read_summary

INPUT_DESCRIPTIONS = {
    "uint8": "`images`: uint8 [n, 32, 32, 3], RGB; normalised inside",
    "normalized": "`images`: float32 [n, 3, 32, 32], RGB in [0, 1], minus the mean, divided by the standard deviation",
}


def write_model_card(
    card_path: Path, exported_file: Path, loaded: LoadedRun, data: Dataset, run_dir: Path, export_info: dict[str, Any]
) -> str:
    """Writes the card of `file` to `path` and returns the file's SHA-256.

    `folder`: the run's, whose summary.json is read if it is there. `made`: format, inputs, outputs, difference, images.
    """
    digest = hashlib.sha256(exported_file.read_bytes()).hexdigest()
    recipe = loaded.recipe
    mean, std = normalization_mean_std(recipe)
    sections = {
        f"{recipe.arch} on {recipe.dataset}": [
            f"- file: `{exported_file.name}` ({export_info['format']}), {exported_file.stat().st_size:,} bytes, sha256 `{digest}`",
            f"- network: {count_parameters(loaded.model):,} trainable parameters, {count_macs(loaded.model) / 1e6:.2f} M "
            "multiply-accumulates an image (convolutions and linear layers)",
            f"- in: {INPUT_DESCRIPTIONS[export_info['inputs']]}",
            f"- out: {export_info['outputs']}, float32 [n, {len(loaded.classes)}], in the order {', '.join(loaded.classes)}",
            f"- normalisation: `{normalization_name(recipe)}`, mean {_format_channel_values(mean)}, std {_format_channel_values(std)} of pixels in "
            "[0, 1]",
            f"- compared with the network in float32 on {export_info['images']} test images: largest absolute difference "
            f"{export_info['difference']:.2g}",
            f"- weights: {loaded.weights}, from `{loaded.checkpoint_path.name}`; made by fastcifar {__version__}",
        ],
        "Data": [
            f"- {data.name}, {'the official files' if data.is_official else 'not the official files'}: {data.source_type}",
            *(f"- {name}: {_format_split(split)}" for name, split in (("train", data.train), ("test", data.test))),
            f"- held out of training to choose by: {recipe.val_size:,} images, `val_seed` {recipe.val_seed}",
        ],
        "Training": _training_section(loaded),
        "Measured": _results_section(loaded, run_dir),
        "Limits": [
            "- It knows these classes only, and says one of them of any image. Images are 32 x 32; a larger one has to "
            "be resized first, and then looks unlike those it was trained on.",
            "- Photographs of CIFAR's kind only: with noise, blur, other cameras or drawings it is right less often.",
            "- One run, one seed: another seed's accuracy differs by a few tenths of a point.",
        ],
    }
    text = "\n".join(f"{'#' if title == next(iter(sections)) else '##'} {title}\n\n" + "\n".join(lines) + "\n"
                     for title, lines in sections.items())  # fmt: skip
    write_atomically(card_path, text.encode())
    return digest


def _format_split(split: Split) -> str:
    """Size and content: MD5s of the pixels and the labels as they are in memory, planar uint8 and int64."""
    pixels, labels = (hashlib.md5(array.tobytes(), usedforsecurity=False).hexdigest() for array in vars(split).values())
    return f"{len(split.labels):,} images, MD5 of the pixels `{pixels}`, of the labels `{labels}`"


def _training_section(loaded: LoadedRun) -> list[str]:
    if loaded.weights == "published":
        return ["- by the project that published the weights; nothing of it is known here"]
    elsewhere = ("data", "out", *section_fields("execution"))  # of the run's place, and of this file's making
    knobs = {name: value for name, value in loaded.recipe.non_default_options().items() if name not in elsewhere}
    return [
        f"- seed {loaded.recipe.seed}, {loaded.recipe.epochs} epochs, {loaded.recipe.optimizer}, augmentation "
        f"`{loaded.recipe.augment}`",
        f"- recipe, where it differs from the defaults: `{json.dumps(knobs)}`",
    ]


def _results_section(loaded: LoadedRun, run_dir: Path) -> list[str]:
    summary = read_summary(run_dir)
    if summary.get("eval_weights") != loaded.weights:
        return [f"- the test set has not met these weights ({loaded.weights}) in this run; see `fastcifar eval`"]
    trained = loaded.recipe.model_copy(update={"normalize": summary["config"]["normalize"]})
    if normalization_mean_std(trained) != normalization_mean_std(loaded.recipe):
        known = normalization_name(trained)
        return [f"- not measured with this normalisation, only with `{known}`; see `fastcifar eval`"]
    right = f"{summary['correct']:,} of {summary['total']:,}"
    return [
        f"- test accuracy {format_percent(summary['test_acc'])}, {right}, n = 1 seed",
        f"- test loss {summary['test_loss']:.4f} nats, expected calibration error {summary['ece']:.4f} (15 bins)",
        f"- complete: {'yes' if summary['complete'] else 'no'}, stopped by {summary['stop_reason']}",
    ]


def _format_channel_values(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4f}" for value in values) + ")"
