"""Data-parallel training under torchrun. Evaluation and checkpoints use rank 0's running BatchNorm statistics."""

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

PROCESS_GROUP_TIMEOUT = timedelta(minutes=10)  # longer than a compilation that other ranks wait for
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes, which must call collective methods together."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which alone writes files, prints and evaluates."""
        return self.rank == 0

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor, images: int) -> Tensor:
        """Average the gradients in place, and return the mean of `loss`, over the images of all ranks.

        Both are reduced in one buffer, so that a non-finite value on one rank reaches all ranks.
        """
        if self.world_size == 1:
            return loss
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        # in memory order, because a flattened copy of a channels_last gradient would be in another order
        views = [gradient.as_strided((gradient.numel(),), (1,)) for gradient in gradients]
        sums = torch.cat([*views, loss.detach().float().view(1), torch.ones_like(loss, dtype=torch.float32).view(1)])
        dist.all_reduce(sums.mul_(images))
        means = sums.div_(sums[-1].clone()).split(
            [*(view.numel() for view in views), 1, 1]
        )  # the last sum counts images
        torch._foreach_copy_(views, list(means[:-2]))
        return means[-2].view(())

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Return the sum, or another reduction, of `tensor` over the ranks."""
        result = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(result, operation)
        return result

    def broadcast_object(self, value: Any) -> Any:
        """Return the `value` of rank 0."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the `value` of every rank, in rank order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


SINGLE_PROCESS = World()


def get_world() -> World:
    """Return the world of this process, SINGLE_PROCESS outside of `process_group`."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else SINGLE_PROCESS


def is_distributed_launch() -> bool:
    """Return whether torchrun, or a similar launcher, started this process as one of several."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """Initialize the process group of `device`, "cuda" or "cpu"; raise `DeviceError` if a process fails."""
    if not is_distributed_launch() or dist.is_initialized():
        yield get_world()
        return
    if device == "cuda":
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            problem = f"local rank {local_rank} has no GPU: this machine has {num_gpus}"
            raise DeviceError(problem, f"start torchrun with --nproc-per-node {num_gpus}")
        torch.cuda.set_device(local_rank)
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:  # Gloo looks the host name up
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PROCESS_GROUP_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = first_message_line(error, type(error).__name__)
        raise DeviceError(f"cannot connect the processes of this run: {reason}", "see torchrun's output") from None
    try:
        yield get_world()
    except RuntimeError as error:
        # torch has a class for failures of NCCL; Gloo raises RuntimeError
        gloo_messages = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")
        if not isinstance(error, dist.DistError) and not any(message in str(error) for message in gloo_messages):
            raise
        problem = f"another process of this run failed: {first_message_line(error, type(error).__name__)}"
        raise DeviceError(problem, "see its output, then continue with --resume auto") from None
    finally:
        cuda_graph.reset_cuda_graphs()
        dist.destroy_process_group()
