"""Write the model card of an exported file: its format, training data, training recipe and measured accuracy.

All results come from the records of the run; the card says so if there are none.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastcifar._version import __version__
from fastcifar.data.cifar import Dataset, Split
from fastcifar.data.normalization import normalization_mean_std, normalization_name
from fastcifar.evaluation.load_run import LoadedRun
from fastcifar.files import write_atomically
from fastcifar.format import format_percent
from fastcifar.models import count_macs, count_parameters
from fastcifar.recipe import section_fields
from fastcifar.training.summary import read_summary

if TYPE_CHECKING:  # a circular import otherwise
    from fastcifar.evaluation.export import DeployedModel, ExportResult

INPUT_DESCRIPTIONS = {
    "uint8": "`images`: uint8 [n, 32, 32, 3], RGB; the model normalizes them",
    "normalized": "`images`: float32 [n, 3, 32, 32], RGB in [0, 1], minus the mean, divided by the standard deviation",
}


def write_model_card(
    result: ExportResult, format: str, deployed: DeployedModel, loaded: LoadedRun, data: Dataset, run_dir: Path
) -> None:
    """Write the model card of an exported file, with the results in summary.json of `run_dir` if it exists."""
    recipe = loaded.recipe
    mean, std = normalization_mean_std(recipe)
    sections = {
        f"{recipe.arch} on {recipe.dataset}": [
            f"- file: `{Path(result['file']).name}` ({format}), {result['bytes']:,} bytes, "
            f"SHA-256 `{result['sha256']}`",
            f"- network: {count_parameters(loaded.model):,} trainable parameters, "
            f"{count_macs(loaded.model) / 1e6:.2f} M multiply-accumulates per image (convolutions and linear layers)",
            f"- input: {INPUT_DESCRIPTIONS[deployed.input_type]}",
            f"- output: {deployed.output_type}, float32 [n, {len(loaded.classes)}], in the order "
            f"{', '.join(loaded.classes)}",
            f"- normalization: `{normalization_name(recipe)}`, mean {_format_channel_values(mean)}, "
            f"std {_format_channel_values(std)} of pixels in [0, 1]",
            f"- verification against the float32 network on {result['images']} test images: maximum absolute "
            f"difference {result['difference']:.2g}",
            f"- weights: {loaded.weights}, from `{loaded.checkpoint_path.name}`; exported by fastcifar {__version__}",
        ],
        "Data": [
            f"- {data.name}, {'' if data.is_official else 'not '}the official files: {data.source_type}",
            *(f"- {name}: {_format_split(split)}" for name, split in (("train", data.train), ("test", data.test))),
            f"- validation split: {recipe.val_size:,} of the training images, `val_seed` {recipe.val_seed}",
        ],
        "Training": _training_section(loaded),
        "Results": _results_section(loaded, run_dir),
        "Limitations": [
            "- The model predicts one of these classes for every image. Images are 32 x 32 pixels; a larger image has "
            "to be resized, and then differs from the training images.",
            "- The model was trained on photographs like those of CIFAR. It is less accurate on noisy or blurred "
            "images, images of other cameras, and drawings.",
            "- This is one run with one seed; the accuracy of other seeds differs by a few tenths of a percent.",
        ],
    }
    # The heading of the first section is the title of the card.
    text = "\n".join(f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items())
    write_atomically(Path(result["card"]), text[1:].encode())


def _format_split(split: Split) -> str:
    """Return the size of a split and the MD5 digests of its arrays, planar uint8 pixels and int64 labels."""
    pixels, labels = (hashlib.md5(array.tobytes(), usedforsecurity=False).hexdigest() for array in vars(split).values())
    return f"{len(split.labels):,} images, MD5 of the pixels `{pixels}`, MD5 of the labels `{labels}`"


def _training_section(loaded: LoadedRun) -> list[str]:
    if loaded.weights == "published":
        return ["- trained by the project that published the weights; the checkpoint does not describe the training"]
    # These describe the machines of the run and of the export rather than the training recipe.
    excluded = ("data", "out", *section_fields("execution"))
    options = {name: value for name, value in loaded.recipe.non_default_options().items() if name not in excluded}
    return [
        f"- seed {loaded.recipe.seed}, {loaded.recipe.epochs} epochs, {loaded.recipe.optimizer}, augmentation "
        f"`{loaded.recipe.augment}`",
        f"- options that differ from their defaults: `{json.dumps(options)}`",
    ]


def _results_section(loaded: LoadedRun, run_dir: Path) -> list[str]:
    summary = read_summary(run_dir)
    if not summary or summary.eval_weights != loaded.weights:
        return [
            f"- these weights ({loaded.weights}) were not evaluated on the test set in this run; see `fastcifar eval`"
        ]
    trained = loaded.recipe.model_copy(update={"normalize": summary.config["normalize"]})
    if normalization_mean_std(trained) != normalization_mean_std(loaded.recipe):
        name = normalization_name(trained)
        return [f"- not evaluated with this normalization, only with `{name}`; see `fastcifar eval`"]
    correct = f"{summary.correct:,} of {summary.total:,}"
    return [
        f"- test accuracy {format_percent(summary.test_acc)}, {correct}, n = 1 seed",
        f"- test loss {summary.test_loss:.4f} nats, expected calibration error {summary.ece:.4f} (15 bins)",
        f"- complete: {'yes' if summary.complete else 'no'}, stopped by {summary.stop_reason}",
    ]


def _format_channel_values(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4f}" for value in values) + ")"
