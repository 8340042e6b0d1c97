"""Out of memory on a GPU or CPU: recognises the error and replaces it by one clear line.

Read `reports_out_of_memory`, which `loop.Loop.run` uses, then `retry_with_fewer_rows`, with which a
`Trainer` continues. `keep_freed_memory`, at the end, makes steps on a CPU faster. A run that the
system kills (the out-of-memory killer of Linux) cannot report it, but it can continue from its last
saved state.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

# messages of the CPU's allocator, of oneDNN, and of CUDA and cuBLAS outside PyTorch's allocator
MESSAGES = (
    "can't allocate memory", "could not create a memory object", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class OutOfMemory(ValueError):
    """The settings of a run need more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, in PyTorch on any device or in Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def retry_with_fewer_rows(
    work: Callable[[], T], rows: dict[str, int], kind: str, forget: Callable[[], None]
) -> T:
    """Call `work`; whenever memory runs out, halve `rows[kind]` and call it again.

    Args:
        rows: rows in a pass, by the kind of pass; `work` reads `rows[kind]`.
        forget: undoes what a failed `work` has done.
    Raises:
        RuntimeError, MemoryError: `work` failed for another reason, or even with one row.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows[kind] == 1:
                raise
        # only now, because the error has kept the tensors of the pass alive
        rows[kind] = (rows[kind] + 1) // 2
        forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def reports_out_of_memory(what: Callable[[], str]) -> Iterator[None]:
    """Within the block, a failed allocation becomes `OutOfMemory` with the text of `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {what()}") from error


ONEDNN_PROGRAMS = 256  # those of a few steps of training, or of a text of 64 tokens


def keep_freed_memory() -> None:
    """Make this process keep the memory of freed tensors for later ones, if it runs on glibc.

    By default glibc returns the memory of each large tensor to the system. A training step
    allocates the same tensors every time, and the system would clear all their pages again.

    It also makes oneDNN, which multiplies in bf16, keep fewer of the programs that it generates. It
    makes one for each new shape and would keep 1,024 of them, together several GB, while making
    them again takes no time that could be measured. The user's own setting is left alone; it has no
    effect if something was multiplied in bf16 before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_PROGRAMS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # the numbers are from malloc.h
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: from this size on, a block is requested by mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes that are kept at the end of the heap
