"""The memory allocator of a peer's process: glibc's with its defaults, or configured as that of fastcifar on a CPU."""

from __future__ import annotations

import ctypes
import os

from fastcifar.training.compilation import MALLOC_SETTINGS

SAME_ALLOCATOR = "+allocator"  # the end of the name of a loop that runs with the allocator of fastcifar
TUNABLES = ":".join(f"glibc.malloc.{name}={value}" for name, (_, value) in MALLOC_SETTINGS.items())
BLOCK_BYTES = 2**26  # above the largest size that glibc's default settings may serve from the heap


class Mallinfo2(ctypes.Structure):
    """The statistics of glibc's `mallinfo2`: `hblks` blocks mapped on their own, `fordblks` free bytes in the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def process_environment(same_allocator: bool) -> dict[str, str]:
    """Return the variables of this process for a new one, with the allocator of fastcifar or with the default one."""
    variables = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    return variables | ({"GLIBC_TUNABLES": TUNABLES} if same_allocator else {})


def keeps_freed_memory() -> bool | None:
    """Return whether malloc in this process takes large blocks from the heap; None if glibc 2.33 is not used."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Mallinfo2, ctypes.c_void_p, [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    before = libc.mallinfo2()
    # more than what is free: a block that was freed earlier would be reused whatever the settings are
    block = libc.malloc(ctypes.c_size_t(max(BLOCK_BYTES, before.fordblks + 1)))
    mapped = libc.mallinfo2().hblks - before.hblks
    libc.free(block)
    return not mapped
