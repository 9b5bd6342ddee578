"""Export a trained network to a file and compare the outputs of the two: the implementation of `fastcifar export`."""

import copy
import errno
import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fastcifar._version import __version__
from fastcifar.data.cifar import DATASETS, Dataset
from fastcifar.data.normalization import normalization_mean_std, normalization_name
from fastcifar.device import import_optional
from fastcifar.errors import UserError, as_memory_error, disk_errors, first_message_line, lookup
from fastcifar.evaluation.load_run import FineTuning, LoadedModel, load_model
from fastcifar.files import write_atomically
from fastcifar.format import format_percent
from fastcifar.models import count_macs, count_parameters
from fastcifar.pretrained import is_pretrained
from fastcifar.recipe import Recipe, section_fields
from fastcifar.training import compilation
from fastcifar.training.checkpoint_reader import safetensors_metadata
from fastcifar.training.step import scale_and_shift
from fastcifar.training.summary import RunSummary, read_summary

NUM_VERIFICATION_IMAGES = 256
VERIFICATION_BATCH_SIZES = (1, 7, NUM_VERIFICATION_IMAGES)
EXPORT_TOLERANCE = 1e-3  # maximum absolute difference of logits or probabilities
INPUT_DESCRIPTIONS = {
    "uint8": "`images`: uint8 [n, 32, 32, 3], RGB; the model normalizes them",
    "normalized": "`images`: float32 [n, 3, 32, 32], RGB in [0, 1], minus the mean, divided by the standard deviation",
}
OUTPUT_TYPES = ("probabilities", "logits")
BATCH_DIMENSION = {0: torch.export.Dim("batch", min=1)}

DISK_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC))

TensorFunction = Callable[[Tensor], Tensor]
Metadata = dict[str, str]  # see `build_metadata`

# the head of a model card, in the format of https://huggingface.co/docs/hub/model-cards
CARD_HEAD = """---
# license: add the license of the weights, such as apache-2.0
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, {arch}, fastcifar]
{datasets}metrics: [accuracy]
{model_index}---

"""
MODEL_INDEX = """model-index:
- name: {arch}
  results:
  - task: {{type: image-classification, name: Image Classification}}
    dataset: {{type: "{dataset}", name: "{dataset}", split: test}}
    metrics:
    - {{type: accuracy, name: Test accuracy, value: {accuracy}}}
"""


class ExportResult(TypedDict):
    """The document of `fastcifar export --json`."""

    file: str
    card: str
    bytes: int
    sha256: str
    images: int  # number of test images in the verification
    batch_sizes: list[int]
    difference: float  # largest absolute difference of the outputs
    data: str


class DeployedModel(nn.Module):
    """A network that normalizes uint8 images (see `INPUT_DESCRIPTIONS`) and returns float32 logits or probabilities."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, recipe: Recipe, input_type: str, output_type: str) -> None:
        super().__init__()
        self.network, self.input_type, self.output_type = network, input_type, output_type
        scale, shift = scale_and_shift(*normalization_mean_std(recipe))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        if self.input_type == "uint8":
            images = images.permute(0, 3, 1, 2) * self.scale + self.shift
        logits = self.network(images)
        return logits.softmax(1) if self.output_type == "probabilities" else logits


@dataclass(frozen=True)
class ExportFormat:
    """An export format: its file suffix, the function that writes a file, and the one that loads it for inference."""

    suffix: str
    write: Callable[[DeployedModel, Tensor, Path, Metadata], object]
    load: Callable[[Path, DeployedModel], TensorFunction]


def build_metadata(deployed: DeployedModel, loaded: LoadedModel, run: str) -> Metadata:
    """Return what a program needs to use the exported network; lists are in JSON.

    The `mean` and `std` are those of pixels in [0, 1]; with the input type "uint8", the network itself uses them.
    """
    mean, std = normalization_mean_std(loaded.recipe)
    is_uint8 = deployed.input_type == "uint8"
    return {
        **safetensors_metadata(loaded.recipe.model_dump(mode="json"), loaded.classes, loaded.data_digest),
        "input_layout": "NHWC" if is_uint8 else "NCHW",
        "input_dtype": "uint8" if is_uint8 else "float32",
        "input_colors": "RGB",
        "normalization": "in the network" if is_uint8 else "before the network",
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "output": deployed.output_type,
        "weights": loaded.weights,
        "run": run if is_pretrained(run) else Path(run).resolve().name,
        "fastcifar_version": __version__,
    }


def _write_onnx(deployed: DeployedModel, images: Tensor, path: Path, metadata: Metadata) -> None:
    import_optional("onnxscript")
    names: dict[str, Any] = {"input_names": ["images"], "output_names": [deployed.output_type]}
    shapes = {"images": BATCH_DIMENSION}
    program = torch.onnx.export(deployed, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert program
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _load_onnx(path: Path, deployed: DeployedModel) -> TensorFunction:
    runtime = import_optional("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([deployed.output_type], {"images": images.numpy()})[0])


def _export_program(deployed: DeployedModel, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(deployed, (images,), dynamic_shapes=(BATCH_DIMENSION,))


def _write_pt2(deployed: DeployedModel, images: Tensor, path: Path, metadata: Metadata) -> None:
    buffer = io.BytesIO()  # torch's errors of writing to a file do not say what failed
    torch.export.save(_export_program(deployed, images), buffer)
    path.write_bytes(buffer.getvalue())


def _write_aoti(deployed: DeployedModel, images: Tensor, path: Path, metadata: Metadata) -> None:
    compilation.enable_compile_cache()
    torch._inductor.aoti_compile_and_package(_export_program(deployed, images), package_path=str(path))


def _write_safetensors(deployed: DeployedModel, images: Tensor, path: Path, metadata: Metadata) -> None:
    weights = {key: value.contiguous() for key, value in deployed.network.state_dict().items()}
    path.write_bytes(safetensors.torch.save(weights, metadata))


def _load_safetensors(path: Path, deployed: DeployedModel) -> TensorFunction:
    model = copy.deepcopy(deployed)
    model.network.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return model


EXPORT_FORMATS: dict[str, ExportFormat] = {
    "onnx": ExportFormat(".onnx", _write_onnx, _load_onnx),
    "pt2": ExportFormat(".pt2", _write_pt2, lambda path, _: torch.export.load(path).module()),
    # The file is a compiled package that runs only on the CPU architecture of this machine.
    "aoti": ExportFormat(".aoti.pt2", _write_aoti, lambda path, _: torch._inductor.aoti_load_package(str(path))),
    # The file contains only the weights, not the normalization and the output activation.
    "safetensors": ExportFormat(".safetensors", _write_safetensors, _load_safetensors),
}


def export_model(
    run: str,
    format: str,
    out: Path | None = None,
    input_type: str = "uint8",
    output_type: str = "probabilities",
    eval_weights: str | None = None,
    arch: str | None = None,
    **overrides: Any,
) -> ExportResult:
    """Export the network of `run` to `out`, verify its outputs, and write a model card beside it.

    By default the file is named after the architecture, in the folder of the run, or in the current one for weights of
    the package. `format` is a name in
    `EXPORT_FORMATS`. See `load_model` for the other arguments.
    Raises `UserError` if the export fails or its outputs differ from the network's.
    """
    export_format = lookup(EXPORT_FORMATS, format, "format")
    lookup(INPUT_DESCRIPTIONS, input_type, "--input")
    lookup(dict.fromkeys(OUTPUT_TYPES), output_type, "--output")
    # The exported file must run on any machine, so the network is in float32 on the CPU.
    loaded = load_model(run, eval_weights, arch, **overrides, device="cpu", precision="fp32")
    data = loaded.load_dataset()
    run_dir = Path(run) if Path(run).is_dir() else loaded.checkpoint_path.parent
    out = (
        out
        or (Path() if is_pretrained(run) else run_dir) / f"{loaded.recipe.arch.replace(':', '.')}{export_format.suffix}"
    )
    deployed = DeployedModel(loaded.model, loaded.recipe, input_type, output_type).eval()
    images, metadata = example_inputs(deployed, data), build_metadata(deployed, loaded, run)
    with disk_errors(f"write {out}", "choose another file with --out"):
        difference = _write_and_verify(export_format, out, deployed, images, metadata)
        result: ExportResult = {
            "file": str(out),
            "card": f"{out}.md",
            "bytes": out.stat().st_size,
            "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
            "images": len(images),
            "batch_sizes": _batch_sizes(images),
            "difference": difference,
            "data": data.source,
        }
        _write_model_card(result, format, deployed, loaded, data, run_dir)
    return result


def _batch_sizes(images: Tensor) -> list[int]:
    return [size for size in VERIFICATION_BATCH_SIZES if size <= len(images)]


def _write_and_verify(
    export_format: ExportFormat, out: Path, deployed: DeployedModel, images: Tensor, metadata: Metadata
) -> float:
    """Write `out` if its outputs agree with those of `deployed`; return their largest difference."""
    # The outputs are compared below, so warnings of the exporters give the user no further information.
    ignore_warnings = warnings.catch_warnings(action="ignore")
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as folder, torch.no_grad(), ignore_warnings:
        temporary_file = Path(folder) / f"model{export_format.suffix}"
        expected = deployed(images)
        try:
            export_format.write(deployed, images, temporary_file, metadata)
            function = export_format.load(temporary_file, deployed)
            differences = [function(images[:size].clone()) - expected[:size] for size in _batch_sizes(images)]
        except (UserError, OSError):
            raise
        except Exception as error:  # the errors of exporters, compilers and runtimes have no common base class
            if as_memory_error(error):
                raise
            if isinstance(cause := error.__cause__ or error.__context__, OSError) and cause.errno in DISK_ERRNOS:
                raise cause from None
            problem = f"cannot export {out}: {type(error).__name__}: {first_message_line(error)}"
            remedy = "choose another --format, or check the compiler with `fastcifar doctor`"
            raise UserError(problem, remedy) from error
        difference = torch.cat(differences).abs().max().item()  # NaN if an output is NaN
        if not difference <= EXPORT_TOLERANCE:
            raise UserError(
                f"the outputs of {out} differ from the network's by {difference:.2g}, more than {EXPORT_TOLERANCE:g}; "
                "the file was not kept",
                "choose another --format, and please report the problem",
            )
        os.replace(temporary_file, out)
    return difference


def example_inputs(deployed: DeployedModel, data: Dataset) -> Tensor:
    """Return the first test images, or training images if there is no test set, in the input format of `deployed`."""
    split = data.all_splits.get("test", data.train)
    images = torch.from_numpy(np.array(split.images[:NUM_VERIFICATION_IMAGES]))
    if deployed.input_type == "uint8":
        return images.permute(0, 2, 3, 1).contiguous()
    return images * deployed.scale + deployed.shift


def _write_model_card(
    result: ExportResult, format: str, deployed: DeployedModel, loaded: LoadedModel, data: Dataset, run_dir: Path
) -> None:
    recipe = loaded.recipe
    mean, std = ("(" + ", ".join(f"{x:.4f}" for x in values) + ")" for values in normalization_mean_std(recipe))
    sections = {
        f"{recipe.arch} on {data.title}": [
            f"file: `{Path(result['file']).name}` ({format}), {result['bytes']:,} bytes, SHA-256 `{result['sha256']}`",
            f"network: {count_parameters(loaded.model):,} trainable parameters, "
            f"{count_macs(loaded.model) / 1e6:.2f} M multiply-accumulates per image (convolutions and linear layers)",
            f"input: {INPUT_DESCRIPTIONS[deployed.input_type]}",
            f"output: {deployed.output_type}, float32 [n, {len(loaded.classes)}], in the order "
            f"{', '.join(loaded.classes)}",
            f"normalization: `{normalization_name(recipe)}`, mean {mean}, std {std} of pixels in [0, 1]",
            f"verification against the float32 network on {result['images']} images: maximum absolute "
            f"difference {result['difference']:.2g}",
            f"weights: {loaded.weights}, from `{loaded.checkpoint_path.name}`; exported by fastcifar {__version__}",
        ],
        "Data": [
            data.title
            if data.own_images
            else f"{data.name}, {'' if data.is_official else 'not '}the official files: {data.source_type}",
            *(
                f"{name}: {len(split.labels):,} images, MD5 of the pixels `{_md5(split.images)}`, MD5 of the labels "
                f"`{_md5(split.labels)}`"
                for name, split in data.all_splits.items()
            ),
            *(
                [f"validation split: {recipe.val_size:,} of the training images, `val_seed` {recipe.val_seed}"]
                if recipe.val_size is not None
                else []
            ),
        ],
        "Training": _training_section(loaded, run_dir),
        "Results": _results_section(loaded, run_dir),
        "Limitations": [
            "The model predicts one of these classes for every image. Images are 32 x 32 pixels; a larger image has "
            "to be resized, and then differs from the training images.",
            "The model is less accurate on images that differ from the training images: noisy or blurred ones, images "
            "of other cameras, and drawings.",
            "This is one run with one seed; the accuracy of other seeds differs.",
        ],
    }
    # The heading of the first section is the title of the card.
    text = "\n".join(f"## {title}\n\n- " + "\n- ".join(lines) + "\n" for title, lines in sections.items())
    write_atomically(Path(result["card"]), (_card_head(format, loaded, data, run_dir) + text[1:]).encode())


def _card_head(format: str, loaded: LoadedModel, data: Dataset, run_dir: Path) -> str:
    """Return the YAML head of a model card. The accuracy is that of the run on the test set, if there is one."""
    summary, _ = _find_results(loaded, run_dir)
    has_classes_of_cifar = not data.own_images or DATASETS[data.name].class_names == tuple(data.classes)
    is_cifar = has_classes_of_cifar and not data.source.startswith("synthetic")
    arch, dataset = loaded.recipe.arch, data.name if is_cifar else data.source_type
    return CARD_HEAD.format(
        library="onnx" if format == "onnx" else "pytorch",
        arch=arch,
        datasets=f"datasets: [{dataset}]\n" if is_cifar else "",
        model_index=MODEL_INDEX.format(arch=arch, dataset=dataset, accuracy=summary.test_acc) if summary else "",
    )


def _md5(array: np.ndarray) -> str:
    """Return the digest of planar uint8 pixels or int64 labels."""
    return hashlib.md5(array.tobytes(), usedforsecurity=False).hexdigest()


def _training_section(loaded: LoadedModel, run_dir: Path) -> list[str]:
    if loaded.weights == "published":
        return ["trained by the project that published the weights; the checkpoint does not describe the training"]
    # These describe the machines of the run and of the export rather than the training recipe.
    excluded = ("data", "out", *section_fields("execution"))
    options = {name: value for name, value in loaded.recipe.non_default_options().items() if name not in excluded}
    return [
        f"seed {loaded.recipe.seed}, {loaded.recipe.epochs} epochs, {loaded.recipe.optimizer}, augmentation "
        f"`{loaded.recipe.augment}`",
        f"options that differ from their defaults: `{json.dumps(options)}`",
        *_fine_tuning_lines(loaded.fine_tuning, read_summary(run_dir)),
    ]


def _fine_tuning_lines(fine_tuning: FineTuning, summary: RunSummary | None) -> list[str]:
    """Return what `--init` and `--freeze` did, without the folders of the machine."""
    lines, path = [], Path(fine_tuning.init)
    if fine_tuning.init != "none":
        name = path.parents[1].name if path.parent.name == "checkpoints" else path.name
        lines.append(f"initial weights (`--init`): `{name}`, SHA-256 of the weights `{fine_tuning.init_sha256}`")
    if fine_tuning.freeze != "none":
        lines.append(f"layers that were not trained (`--freeze`): `{fine_tuning.freeze}`")
        if summary and summary.trained_params is not None:
            lines[-1] += f"; {summary.trained_params:,} of {summary.params:,} parameters were trained"
    return lines


def _find_results(loaded: LoadedModel, run_dir: Path) -> tuple[RunSummary | None, str]:
    """Return the summary of a run with the test results of these weights, or None and the reason why there is none."""
    summary = read_summary(run_dir)
    if not summary or summary.eval_weights != loaded.weights:
        return None, f"these weights ({loaded.weights}) were not evaluated on the test set in this run"
    trained = loaded.recipe.model_copy(update={"normalize": summary.config["normalize"]})
    if normalization_mean_std(trained) != normalization_mean_std(loaded.recipe):
        return None, f"not evaluated with this normalization, only with `{normalization_name(trained)}`"
    if summary.test_acc is None:
        return None, "not evaluated on a test set, because the data set of the run has none"
    return summary, ""


def _results_section(loaded: LoadedModel, run_dir: Path) -> list[str]:
    summary, reason = _find_results(loaded, run_dir)
    if not summary:
        return [f"{reason}; see `fastcifar eval`"]
    return [
        f"test accuracy {format_percent(summary.test_acc)}, {summary.correct:,} of {summary.total:,}, n = 1 seed",
        f"test loss {summary.test_loss:.4f} nats, expected calibration error {summary.ece:.4f} (15 bins)",
        f"complete: {'yes' if summary.complete else 'no'}, stopped by {summary.stop_reason}",
    ]
