"""What an error of PyTorch is about: memory that ran out, or a compiler that cannot."""

from __future__ import annotations

from typing import Final

import torch
from torch._dynamo.exc import TorchDynamoException

_OUT_OF_MEMORY: Final = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""What libraries say that have no error of their own for it."""
_WHILE_TRACED: Final = "_torch_dynamo_tracer_output"
"""PyTorch hangs this on what ends its tracing, be it an AssertionError of its own."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether `error` says that memory ran out, on whatever device and in whose words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY)


def is_of_compiler(error: BaseException) -> bool:
    """Return whether `error` ended the compiling of a function, which can run as it is then."""
    return isinstance(error, TorchDynamoException) or hasattr(error, _WHILE_TRACED)


def memory_error_in(error: BaseException) -> BaseException | None:
    """Return why compiling ended where that is memory, which is not about the function.

    The compiler runs out of it while it tries kernels out.
    """
    inner = getattr(error, "inner_exception", None)
    return inner if is_out_of_memory(inner) else None
