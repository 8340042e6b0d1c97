"""Out of memory: how a GPU and a CPU say so, and the one line that a run says instead.

Read `told`, which `loop.Loop.run` uses, then `halving`, with which a `Trainer` goes on. At the end
stands `keep_freed`, which makes steps on a CPU faster.
What the system kills without asking (the out-of-memory killer of Linux) cannot be told; such a run
goes on from its last saved state.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

# of the CPU's allocator, of oneDNN, and of CUDA and cuBLAS outside PyTorch's allocator
MESSAGES = (
    "can't allocate memory", "could not create a memory object", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class OutOfMemory(ValueError):
    """The settings of a run need more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, of PyTorch on any device or of Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def halving(
    work: Callable[[], T], rows: dict[str, int], kind: str, forget: Callable[[], None]
) -> T:
    """What `work` returns; out of memory it begins again, after half of `rows[kind]` is taken away.

    Args:
        rows: rows in a pass, by its kind; what `work` reads of it decides how much memory it needs.
        forget: undo what `work` has left.
    Raises:
        RuntimeError, MemoryError: of `work`, out of memory with one row, or for another reason.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows[kind] == 1:
                raise
        # not before the error is gone, which holds the tensors of the pass
        rows[kind] = (rows[kind] + 1) // 2
        forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def told(what: Callable[[], str]) -> Iterator[None]:
    """Within the block, a failed allocation becomes `OutOfMemory` with these words."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {what()}") from error


def keep_freed() -> None:
    """Let this process keep the memory of freed tensors for the next ones, if it runs on glibc.

    glibc asks the system for each large tensor and gives it back at once. A training step frees and
    makes the same tensors each time, and the system clears every page of them again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # the numbers are those of malloc.h
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: bytes of a block that the system is asked for
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free bytes at the end that are kept
