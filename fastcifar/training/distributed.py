"""Several processes as one run: torchrun's environment, the mean gradient, what rank 0 says; nothing for one process.

Every rank computes on its share of a step; gradients are averaged over all images before they are clipped, so that all
ranks take the same update. Running statistics of BatchNorm are each rank's own; rank 0's are evaluated and kept.
Nothing here writes a file.
"""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcifar.errors import DeviceError, first_message_line
from fastcifar.training import cuda_graph

PROCESS_GROUP_TIMEOUT = timedelta(minutes=10)  # a compilation that others wait for takes less
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # torchrun sets them


@dataclass(frozen=True)
class World:
    """This process, `rank` of `ranks`; the methods are for all ranks at the same time, and do nothing for one alone."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Rank 0: it alone writes, shows and evaluates."""
        return self.rank == 0

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor, images: int) -> Tensor:
        """The mean loss over the images of all ranks; the gradients of `parameters` become means in the same way.

        `loss`: this rank's mean over its `images`, which may be one more or fewer than another's. Loss and gradients
        travel in one buffer: whatever is not finite on one rank is so on all of them.
        """
        if self.world_size == 1:
            return loss
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        parts = [*gradients, loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)]
        summed = torch.cat([part.flatten() for part in parts]).mul_(images)
        dist.all_reduce(summed)
        means = summed.div_(summed[-1].clone()).split([part.numel() for part in parts])
        torch._foreach_copy_(
            gradients, [mean.view(old.shape) for mean, old in zip(means[: len(gradients)], gradients, strict=True)]
        )
        return means[-2].view(())

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """`tensor` becomes its sum over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, which JSON can hold; what the others give is not looked at."""
        if self.world_size == 1:
            return value
        return json.loads(self._broadcast_bytes(json.dumps(value).encode() if self.is_main_process else b"", 0))

    def broadcast_tensors(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """Rank 0's `state`, as a checkpoint can hold it, or None."""
        if self.world_size == 1:
            return state
        return _deserialize(self._broadcast_bytes(_serialize(state) if self.is_main_process else b"", 0))

    def all_gather_object(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's `state`, by rank."""
        if self.world_size == 1:
            return [state]
        return [_deserialize(self._broadcast_bytes(_serialize(state), rank)) for rank in range(self.world_size)]

    def _broadcast_bytes(self, content: bytes, source: int) -> bytes:
        """The `content` of rank `source`."""
        length = torch.tensor(len(content))
        dist.broadcast(length, source)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, source)
        return buffer.numpy().tobytes()

    def all_reduce_max(self, value: int) -> int:
        """The largest of the ranks' whole numbers: a flag that one of them raised. The host waits for all of them."""
        if self.world_size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


SINGLE_PROCESS = World()


def _serialize(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _deserialize(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def get_world() -> World:
    """This process's place; alone outside of `joined`."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else SINGLE_PROCESS


def is_distributed_launch() -> bool:
    """Whether torchrun, or something that sets its variables, started this process as one of several."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """All ranks together, for as long as the context lasts; on a GPU each rank has the one of its local rank.

    `device`: "cuda" or "cpu". Errors: `DeviceError` where the ranks cannot find each other, a GPU is missing, or
    another rank ends in between.
    """
    if not is_distributed_launch() or dist.is_initialized():
        yield get_world()
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise DeviceError(f"local rank {local} has no GPU: this machine has {found}", f"--nproc-per-node {found}")
        torch.cuda.set_device(local)
    _set_gloo_loopback_interface()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PROCESS_GROUP_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"the ranks did not find each other: {first_message_line(error, type(error).__name__)}",
            "see torchrun's output",
        ) from None
    try:
        yield get_world()
    except RuntimeError as error:
        if not _is_peer_failure(error):
            raise
        remedy = "see its own output, and go on with --resume auto"
        raise DeviceError(
            f"another process of this run ended: {first_message_line(error, type(error).__name__)}", remedy
        ) from None
    finally:
        cuda_graph.reset_cuda_graphs()
        dist.destroy_process_group()


def _set_gloo_loopback_interface() -> None:
    """Gloo looks up its own host's name; where that does not resolve, it is told to talk to itself."""
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _is_peer_failure(error: RuntimeError) -> bool:
    """Whether a collective failed: torch has a class for NCCL's failures, and gloo's come as plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")
    )
