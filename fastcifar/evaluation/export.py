"""`fastcifar export`: a trained network as a file for others, kept only if it computes what the network computes.

Each format is written beside its place, run by its own runtime on real images in several batch sizes, compared with
eager float32, and only then moved to its place, with a model card beside it.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastcifar.data.cifar import Dataset
from fastcifar.data.normalization import normalization_mean_std
from fastcifar.device import as_memory_error, import_optional
from fastcifar.errors import DiskError, UsageError, UserError, first_message_line, lookup
from fastcifar.evaluation.load_run import LoadedRun, load_model
from fastcifar.evaluation.model_card import write_model_card
from fastcifar.training.resolve import model_from_recipe
from fastcifar.training.step import scale_and_shift

NUM_VERIFICATION_IMAGES = 256  # that a file is compared on
VERIFICATION_BATCH_SIZES = (1, 7, NUM_VERIFICATION_IMAGES)
EXPORT_TOLERANCE = 1e-3  # largest absolute difference of a logit or a probability
INPUT_TYPES = ("uint8", "normalized")
OUTPUT_TYPES = ("probabilities", "logits")
ONNX_REMEDY = "pip install onnx onnxscript onnxruntime"

TensorFunction = Callable[[Tensor], Tensor]


class DeployedModel(nn.Module):
    """A network with what surrounds it in use: images as they are stored in, probabilities out.

    inputs   "uint8": images uint8 [n,32,32,3], normalised inside; "normalized": float32 [n,3,32,32]
    outputs  "probabilities" or "logits", float32 [n,classes]
    """

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], input_type: str, output_type: str
    ) -> None:
        super().__init__()
        self.network, self.input_type, self.output_type = network, input_type, output_type
        self.scale: Tensor
        self.shift: Tensor
        scale, shift = scale_and_shift(mean, std)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        if self.input_type == "uint8":
            images = images.permute(0, 3, 1, 2) * self.scale + self.shift
        logits = self.network(images)
        return logits.softmax(1) if self.output_type == "probabilities" else logits


@dataclass(frozen=True)
class ExportFormat:
    """A row of FORMATS. `write` puts a file at a path, `load` makes of the file what computes as it does."""

    suffix: str
    write: Callable[[DeployedModel, Tensor, Path], None]
    load: Callable[[Path, DeployedModel, LoadedRun], TensorFunction]


def write_onnx(deployed: DeployedModel, images: Tensor, path: Path) -> None:
    """Through the dynamo exporter, with any number of images, in one file."""
    import_optional("onnxscript", ONNX_REMEDY)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1)}}
    torch.onnx.export(
        deployed,
        (images,),
        str(path),
        dynamo=True,
        external_data=False,  # one file
        dynamic_shapes=dynamic,
        input_names=["images"],
        output_names=[deployed.output_type],
        verbose=False,
    )


def load_onnx(path: Path, deployed: DeployedModel, _: LoadedRun) -> TensorFunction:
    """ONNX Runtime on the CPU."""
    session = import_optional("onnxruntime", ONNX_REMEDY).InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    return lambda images: torch.from_numpy(session.run([deployed.output_type], {"images": images.numpy()})[0])


def export_program(deployed: DeployedModel, images: Tensor) -> torch.export.ExportedProgram:
    """The program with any number of images of at least one. `images`: an example of more than one."""
    return torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def write_pt2(deployed: DeployedModel, images: Tensor, path: Path) -> None:
    """The exported program, weights and all."""
    torch.export.save(export_program(deployed, images), path)


def load_pt2(path: Path, *_: Any) -> TensorFunction:
    """The program, through torch alone."""
    return torch.export.load(path).module()


def write_aoti(deployed: DeployedModel, images: Tensor, path: Path) -> None:
    """C++ of the program, compiled into a package for this kind of CPU."""
    torch._inductor.aoti_compile_and_package(export_program(deployed, images), package_path=str(path))


def load_aoti(path: Path, *_: Any) -> TensorFunction:
    """The package's compiled code."""
    return torch._inductor.aoti_load_package(str(path))


def write_safetensors(deployed: DeployedModel, _: Tensor, path: Path) -> None:
    """The network's weights alone; what is around them is `Deployed`'s."""
    weights = {key: value.contiguous() for key, value in deployed.network.state_dict().items()}
    save_file(weights, path)


def load_safetensors(path: Path, deployed: DeployedModel, loaded: LoadedRun) -> TensorFunction:
    """The weights in a network that is made anew, between the same input and output."""
    fresh = model_from_recipe(loaded.recipe, len(loaded.classes)).eval()
    fresh.load_state_dict(load_file(path), strict=True)
    return DeployedModel(fresh, *normalization_mean_std(loaded.recipe), deployed.input_type, deployed.output_type)


EXPORT_FORMATS: dict[str, ExportFormat] = {
    "onnx": ExportFormat(".onnx", write_onnx, load_onnx),
    "pt2": ExportFormat(".pt2", write_pt2, load_pt2),
    "aoti": ExportFormat(".aoti.pt2", write_aoti, load_aoti),
    "safetensors": ExportFormat(".safetensors", write_safetensors, load_safetensors),
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
) -> dict[str, Any]:
    """Writes `run`'s network to a file that was seen to compute the same, and a model card beside it.

    format   a row of FORMATS
    out      the file; default: the architecture's name, in the run folder or beside the checkpoint
    inputs, outputs  what goes in and comes out, see `Deployed`
    weights, arch, changes: as for `rebuild`
    Returns `file`, `card`, `bytes`, `sha256`, `difference` (the largest, absolute), `images`, `batch_sizes`.
    Errors: `UsageError`, `CheckpointError`, `DataError`; `UserError` if it cannot be made, or computes something else.
    """
    row = lookup(EXPORT_FORMATS, format, "format")
    for value, allowed, name in ((input_type, INPUT_TYPES, "--input"), (output_type, OUTPUT_TYPES, "--output")):
        if value not in allowed:
            raise UsageError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    # One that reads a file reads it on any machine, so it is made of float32 on the CPU.
    found = load_model(run, eval_weights, arch, **overrides, device="cpu", precision="fp32")
    data = found.load_dataset()
    folder = Path(run) if Path(run).is_dir() else found.checkpoint_path.parent
    out = out or folder / f"{found.recipe.arch}{row.suffix}"
    card = out.with_name(f"{out.name}.md")
    deployed = DeployedModel(found.model, *normalization_mean_std(found.recipe), input_type, output_type).eval()
    images = example_inputs(deployed, data)
    compared = {
        "images": len(images),
        "batch_sizes": [size for size in VERIFICATION_BATCH_SIZES if size <= len(images)],
    }
    try:
        compared["difference"] = write_and_verify(row, out, deployed, images, found)
        made_as = {"format": format, "inputs": input_type, "outputs": output_type}
        digest = write_model_card(card, out, found, data, folder, made_as | compared)
    except OSError as error:
        raise DiskError(f"cannot write {out}: {error.strerror or error}", "give another --out") from None
    size = out.stat().st_size
    return {"file": str(out), "card": str(card), "bytes": size, "sha256": digest, **compared, "data": data.source}


def write_and_verify(
    export_format: ExportFormat, out: Path, deployed: DeployedModel, images: Tensor, loaded: LoadedRun
) -> float:
    """Puts the file at `out` if it computes what `deployed` computes, and returns by how much it differs.

    Errors: `UserError`, and `out` is as it was.
    """
    quiet = warnings.catch_warnings(action="ignore")  # what the exporters warn of is theirs; what counts is compared
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as beside, torch.no_grad(), quiet:
        made = Path(beside) / f"made{export_format.suffix}"
        try:
            export_format.write(deployed, images, made)
            difference = max_abs_difference(export_format.load(made, deployed, loaded), deployed, images)
        except (UserError, OSError):
            raise
        except Exception as error:  # exporters, compilers and runtimes have no class of errors in common
            if as_memory_error(error):
                raise
            problem = f"{out} cannot be made: {type(error).__name__}: {first_message_line(error)}"
            raise UserError(problem, "give another --format; `fastcifar doctor` knows the compiler") from error
        if not difference <= EXPORT_TOLERANCE:
            raise UserError(
                f"{out} would differ from the network by {difference:.2g} and was not kept",
                f"at most {EXPORT_TOLERANCE:g} is allowed: please report it",
            )
        os.replace(made, out)
    return difference


def example_inputs(deployed: DeployedModel, data: Dataset) -> Tensor:
    """The first test images as `deployed` takes them."""
    images = torch.from_numpy(np.array(data.test.images[:NUM_VERIFICATION_IMAGES]))
    if deployed.input_type == "uint8":
        return images.permute(0, 2, 3, 1).contiguous()
    return images * deployed.scale + deployed.shift


def max_abs_difference(function: TensorFunction, deployed: DeployedModel, images: Tensor) -> float:
    """Of `function` from eager, over all outputs of all batch sizes; not finite is infinite."""
    wanted = deployed(images)
    differences = []
    for size in VERIFICATION_BATCH_SIZES:
        if size <= len(images):
            differences.append((function(images[:size].clone()) - wanted[:size]).abs().max().item())
    return max(value if np.isfinite(value) else np.inf for value in differences)
