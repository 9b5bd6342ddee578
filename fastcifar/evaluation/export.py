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
from fastcifar.device import optional
from fastcifar.errors import DiskError, UsageError, UserError, first_line, out_of_memory, pick
from fastcifar.evaluation.load_run import Finished, rebuild
from fastcifar.evaluation.model_card import model_card
from fastcifar.training.build_data import normalisation
from fastcifar.training.step import scale_and_shift
from fastcifar.training.trainer import network

IMAGES = 256  # that a file is compared on
BATCH_SIZES = (1, 7, IMAGES)
TOLERANCE = 1e-3  # largest absolute difference of a logit or a probability
INPUTS = ("uint8", "normalised")
OUTPUTS = ("probabilities", "logits")
ONNX = "pip install onnx onnxscript onnxruntime"

Function = Callable[[Tensor], Tensor]


class Deployed(nn.Module):
    """A network with what surrounds it in use: images as they are stored in, probabilities out.

    inputs   "uint8": images uint8 [n,32,32,3], normalised inside; "normalised": float32 [n,3,32,32]
    outputs  "probabilities" or "logits", float32 [n,classes]
    """

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], inputs: str, outputs: str
    ) -> None:
        super().__init__()
        self.network, self.inputs, self.outputs = network, inputs, outputs
        self.scale: Tensor
        self.shift: Tensor
        scale, shift = scale_and_shift(mean, std)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        if self.inputs == "uint8":
            images = images.permute(0, 3, 1, 2) * self.scale + self.shift
        logits = self.network(images)
        return logits.softmax(1) if self.outputs == "probabilities" else logits


@dataclass(frozen=True)
class Format:
    """A row of FORMATS. `write` puts a file at a path, `load` makes of the file what computes as it does."""

    suffix: str
    write: Callable[[Deployed, Tensor, Path], None]
    load: Callable[[Path, Deployed, Finished], Function]


def write_onnx(deployed: Deployed, images: Tensor, path: Path) -> None:
    """Through the dynamo exporter, with any number of images, in one file."""
    optional("onnxscript", ONNX)
    dynamic = {"images": {0: torch.export.Dim("batch", min=1)}}
    torch.onnx.export(
        deployed,
        (images,),
        str(path),
        dynamo=True,
        external_data=False,  # one file
        dynamic_shapes=dynamic,
        input_names=["images"],
        output_names=[deployed.outputs],
        verbose=False,
    )


def load_onnx(path: Path, deployed: Deployed, _: Finished) -> Function:
    """ONNX Runtime on the CPU."""
    session = optional("onnxruntime", ONNX).InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([deployed.outputs], {"images": images.numpy()})[0])


def exported(deployed: Deployed, images: Tensor) -> torch.export.ExportedProgram:
    """The program with any number of images of at least one. `images`: an example of more than one."""
    return torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def write_pt2(deployed: Deployed, images: Tensor, path: Path) -> None:
    """The exported program, weights and all."""
    torch.export.save(exported(deployed, images), path)


def load_pt2(path: Path, *_: Any) -> Function:
    """The program, through torch alone."""
    return torch.export.load(path).module()


def write_aoti(deployed: Deployed, images: Tensor, path: Path) -> None:
    """C++ of the program, compiled into a package for this kind of CPU."""
    torch._inductor.aoti_compile_and_package(exported(deployed, images), package_path=str(path))


def load_aoti(path: Path, *_: Any) -> Function:
    """The package's compiled code."""
    return torch._inductor.aoti_load_package(str(path))


def write_safetensors(deployed: Deployed, _: Tensor, path: Path) -> None:
    """The network's weights alone; what is around them is `Deployed`'s."""
    weights = {key: value.contiguous() for key, value in deployed.network.state_dict().items()}
    save_file(weights, path)


def load_safetensors(path: Path, deployed: Deployed, found: Finished) -> Function:
    """The weights in a network that is made anew, between the same input and output."""
    fresh = network(found.recipe, len(found.classes)).eval()
    fresh.load_state_dict(load_file(path), strict=True)
    return Deployed(fresh, *normalisation(found.recipe), deployed.inputs, deployed.outputs)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", write_onnx, load_onnx),
    "pt2": Format(".pt2", write_pt2, load_pt2),
    "aoti": Format(".aoti.pt2", write_aoti, load_aoti),
    "safetensors": Format(".safetensors", write_safetensors, load_safetensors),
}


def export(
    run: str,
    format: str,
    out: Path | None = None,
    inputs: str = "uint8",
    outputs: str = "probabilities",
    weights: str | None = None,
    arch: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Writes `run`'s network to a file that was seen to compute the same, and a model card beside it.

    format   a row of FORMATS
    out      the file; default: the architecture's name, in the run folder or beside the checkpoint
    inputs, outputs  what goes in and comes out, see `Deployed`
    weights, arch, changes: as for `rebuild`
    Returns `file`, `card`, `bytes`, `sha256`, `difference` (the largest, absolute), `images`, `batch_sizes`.
    Errors: `UsageError`, `CheckpointError`, `DataError`; `UserError` if it cannot be made, or computes something else.
    """
    row = pick(FORMATS, format, "format")
    for value, allowed, name in ((inputs, INPUTS, "--input"), (outputs, OUTPUTS, "--output")):
        if value not in allowed:
            raise UsageError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    # One that reads a file reads it on any machine, so it is made of float32 on the CPU.
    found = rebuild(run, weights, arch, **changes, device="cpu", precision="fp32")
    data = found.data()
    folder = Path(run) if Path(run).is_dir() else found.checkpoint.parent
    out = out or folder / f"{found.recipe.arch}{row.suffix}"
    card = out.with_name(f"{out.name}.md")
    deployed = Deployed(found.model, *normalisation(found.recipe), inputs, outputs).eval()
    images = example(deployed, data)
    compared = {"images": len(images), "batch_sizes": [size for size in BATCH_SIZES if size <= len(images)]}
    try:
        compared["difference"] = write_compared(row, out, deployed, images, found)
        made_as = {"format": format, "inputs": inputs, "outputs": outputs}
        digest = model_card(card, out, found, data, folder, made_as | compared)
    except OSError as error:
        raise DiskError(f"cannot write {out}: {error.strerror or error}", "give another --out") from None
    size = out.stat().st_size
    return {"file": str(out), "card": str(card), "bytes": size, "sha256": digest, **compared, "data": data.source}


def write_compared(row: Format, out: Path, deployed: Deployed, images: Tensor, found: Finished) -> float:
    """Puts the file at `out` if it computes what `deployed` computes, and returns by how much it differs.

    Errors: `UserError`, and `out` is as it was.
    """
    quiet = warnings.catch_warnings(action="ignore")  # what the exporters warn of is theirs; what counts is compared
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as beside, torch.no_grad(), quiet:
        made = Path(beside) / f"made{row.suffix}"
        try:
            row.write(deployed, images, made)
            difference = largest_difference(row.load(made, deployed, found), deployed, images)
        except (UserError, OSError):
            raise
        except Exception as error:  # exporters, compilers and runtimes have no class of errors in common
            if out_of_memory(error):
                raise
            problem = f"{out} cannot be made: {type(error).__name__}: {first_line(error)}"
            raise UserError(problem, "give another --format; `fastcifar doctor` knows the compiler") from error
        if not difference <= TOLERANCE:
            raise UserError(
                f"{out} would differ from the network by {difference:.2g} and was not kept",
                f"at most {TOLERANCE:g} is allowed: please report it",
            )
        os.replace(made, out)
    return difference


def example(deployed: Deployed, data: Dataset) -> Tensor:
    """The first test images as `deployed` takes them."""
    images = torch.from_numpy(np.array(data.test.images[:IMAGES]))
    if deployed.inputs == "uint8":
        return images.permute(0, 2, 3, 1).contiguous()
    return images * deployed.scale + deployed.shift


def largest_difference(function: Function, deployed: Deployed, images: Tensor) -> float:
    """Of `function` from eager, over all outputs of all batch sizes; not finite is infinite."""
    wanted = deployed(images)
    differences = []
    for size in BATCH_SIZES:
        if size <= len(images):
            differences.append((function(images[:size].clone()) - wanted[:size]).abs().max().item())
    return max(value if np.isfinite(value) else np.inf for value in differences)
