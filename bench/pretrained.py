"""Write the weights of a finished run as `pretrained:NAME` of the package, with a card of their origin and accuracy.

    python bench/pretrained.py RUN NAME [--data PATH --selection TEXT]

Writes fastcifar/pretrained/NAME.safetensors and NAME.md. The weights are those that the run evaluated. Filters and
matrices are rounded to half precision. The accuracies in the card are those of the rounded weights, in float32.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import safetensors.torch
import torch

from fastcifar import pretrained
from fastcifar.data.cifar import Split
from fastcifar.evaluation.load_run import LoadedModel, load_model
from fastcifar.format import format_option_value, format_percent, option_flag
from fastcifar.models import count_parameters
from fastcifar.recipe import Recipe, section_fields
from fastcifar.training.checkpoint import state_dict_sha256
from fastcifar.training.checkpoint_reader import safetensors_metadata
from fastcifar.training.environment import read_environment
from fastcifar.training.summary import RunSummary, read_summary

CARD = """# pretrained:{name}

`{arch}` on CIFAR-10: {params:,} trainable parameters, images of 32 x 32 pixels, classes {classes}.

- test accuracy of these weights in float32: {plain}, with six views (`--tta 6view`) {tta}
- origin: `{command}`, seed {seed}, {epochs} epochs, all {images:,} training images, precision {precision}
- test accuracy of the run before rounding: {run_plain}, with six views {run_tta}; {selection}
- environment of the run: {environment}
- filters and matrices in half precision, other tensors in float32; {bytes:,} bytes
- SHA-256 of the file `{sha256}`, of the weights of the run `{run_sha256}`

The training images are those of CIFAR-10 (Krizhevsky, 2009). The network classifies every image as one of its ten
classes. It is less accurate on images that differ from the training images.
"""


def half_precision(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Return the state dict with tensors of two and more dimensions in half precision."""
    state = {name: value.contiguous() for name, value in loaded.model.state_dict().items()}
    return {name: value.half() if value.ndim > 1 else value for name, value in state.items()}


def describe_accuracy(loaded: LoadedModel, test: Split, tta: str) -> str:
    """Return the accuracy on `test` with its numbers of images."""
    predicted, total = loaded.predict_logits(test, tta).argmax(1), len(test.labels)
    correct = int((predicted == torch.from_numpy(test.labels)).sum())
    return f"{format_percent(correct / total)} ({correct:,} of {total:,})"


def training_command(summary: RunSummary) -> str:
    """Return the command that trains the network again, without the options of this machine."""
    base, options = Recipe.make(summary.recipe).model_dump(mode="json"), summary.config
    differing = [name for name in base if options.get(name, base[name]) != base[name]]
    left_out = ("data", "out", *section_fields("execution"))
    flags = [f"{option_flag(name)} {format_option_value(options[name])}" for name in differing if name not in left_out]
    return " ".join(["fastcifar train --recipe", summary.recipe, *flags])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the weights of a run as pretrained weights of the package.")
    parser.add_argument("run", type=Path, help="folder of a finished run without a validation split")
    parser.add_argument("name", help="NAME in pretrained:NAME")
    parser.add_argument("--data", help="data set, as for fastcifar train")
    parser.add_argument("--selection", default="n = 1 run", help="how the run was selected, for the card")
    arguments = parser.parse_args()
    summary, environment = read_summary(arguments.run), read_environment(arguments.run)
    if summary is None or not summary.complete:
        raise SystemExit(f"{arguments.run} is not a finished run")
    loaded = load_model(str(arguments.run), device="cpu", precision="fp32")
    recipe = loaded.recipe.model_dump(mode="json")
    file = Path(pretrained.__file__).parent / f"{arguments.name}.safetensors"
    file.write_bytes(safetensors.torch.save(half_precision(loaded), safetensors_metadata(recipe, loaded.classes, None)))
    rounded = load_model(f"{pretrained.PREFIX}{arguments.name}", data=arguments.data, device="cpu", precision="fp32")
    test = rounded.load_dataset().test
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items() if version)
    card = CARD.format(
        name=arguments.name,
        arch=loaded.recipe.arch,
        params=count_parameters(loaded.model),
        classes=", ".join(loaded.classes),
        plain=describe_accuracy(rounded, test, "none"),
        tta=describe_accuracy(rounded, test, "6view"),
        command=training_command(summary),
        seed=summary.seed,
        epochs=summary.epochs,
        images=sum(summary.classes.values()),
        precision=summary.precision,
        run_plain=format_percent(summary.test_acc),
        run_tta=format_percent(summary.test_acc_tta),
        selection=arguments.selection,
        environment=f"{environment.device}, Python {environment.python}, {versions}",
        bytes=file.stat().st_size,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        run_sha256=state_dict_sha256(loaded.model.state_dict()),
    )
    file.with_suffix(".md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
