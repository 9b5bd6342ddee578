"""Transforms given from Python: of one image, in workers of the torchvision loader, or of a batch, on the device."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcifar.data.augment import AugmentOp
from fastcifar.errors import UsageError, first_message_line

BATCH_REMEDY = "it should return a tensor of the shape, dtype and device of its argument, uint8 [n, 3, 32, 32]"
IMAGE_REMEDY = "it should return a PIL image or a tensor, uint8 [3, 32, 32]; omit ToTensor and Normalize"


@contextmanager
def seeded_generators(seed_key: Sequence[int], device: torch.device | None = None) -> Iterator[None]:
    """Seed the generators of torch (also that of a GPU), NumPy and Python; restore their states after the block."""
    seed = int(np.random.SeedSequence(seed_key).generate_state(1, np.uint64)[0])
    numpy_state, python_state = np.random.get_state(), random.getstate()
    gpus = [device] if device and device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        for _ in gpus:
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def to_uint8_tensor(image: Image.Image | Tensor) -> Tensor:
    """Return the PIL image or the tensor that a transform returned as uint8 [3, h, w]."""
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def transform_batch(op: AugmentOp, images: Tensor, seed_key: Sequence[int]) -> Tensor:
    """Return the transformed images, uint8 channels_last [b,3,32,32] in and out; `seed_key` seeds the generators."""
    assert op.function, op
    with torch.no_grad(), seeded_generators(seed_key, images.device):
        return op.function(images).contiguous(memory_format=torch.channels_last)


def check_transform(op: AugmentOp, images: np.ndarray, device: torch.device, takes_images: bool) -> None:
    """Try a transform on `images`, uint8 [n,3,h,w]. Raises `UsageError` if it fails or returns something else.

    `takes_images`: whether the loader transforms single images.
    """
    assert op.function, op
    name = f"{op.name}={op.variant}"
    if op.name == "transform" and not takes_images:
        remedy = "use --loader torchvision, or give a function of batches as batch_transform="
        raise UsageError(f"{name}: only the loader torchvision transforms single images", remedy)
    batch = torch.from_numpy(np.array(images)).to(device).contiguous(memory_format=torch.channels_last)
    is_batch = op.name == "batch_transform"
    example = batch if is_batch else Image.fromarray(np.ascontiguousarray(images[0].transpose(1, 2, 0)))
    remedy = BATCH_REMEDY if is_batch else IMAGE_REMEDY
    try:
        with torch.no_grad(), seeded_generators((0,), device):
            output = op.function(example.clone() if isinstance(example, Tensor) else example)
    except Exception as error:
        problem = f"{name} fails: {type(error).__name__}: {first_message_line(error, 'no message')}"
        raise UsageError(problem, "correct its code") from error
    if isinstance(output, Image.Image) and not is_batch:
        output = to_uint8_tensor(output)
    expected = batch if is_batch else batch[0]
    if not isinstance(output, Tensor):
        returned = f"a {type(output).__name__}"
    elif (output.dtype, output.shape) != (expected.dtype, expected.shape):
        returned = f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
    elif is_batch and output.device != batch.device:
        returned = f"a tensor on {output.device}"
    else:
        return
    source = f"uint8 {list(batch.shape)}" if is_batch else "a PIL image of {}x{} pixels".format(*images.shape[:1:-1])
    raise UsageError(f"{name} returns {returned} for {source}", remedy)
