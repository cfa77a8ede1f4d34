"""Errors of PyTorch by what they are about, in whatever words and classes they come."""

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from tunesmith.ops.torch_errors import is_of_compiler, is_out_of_memory, memory_error_in


def test_memory_that_ran_out_is_known_by_every_library_s_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    said = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(said))
    for other in (None, RuntimeError("shapes differ"), ValueError("CUDA error: out of memory")):
        assert not is_out_of_memory(other)


def test_an_error_of_the_compiler_is_told_from_one_of_what_it_compiles() -> None:
    own = AssertionError("lift_tracked_freevar_to_input")
    assert not is_of_compiler(own)
    own._torch_dynamo_tracer_output = None  # type: ignore[attr-defined]
    assert is_of_compiler(own)
    assert is_of_compiler(TorchDynamoException("graph break"))


def test_memory_that_ran_out_in_the_compiler_is_what_it_is() -> None:
    error, inner = (
        TorchDynamoException("backend"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    )
    assert memory_error_in(error) is None
    error.inner_exception = ValueError("sizes")  # type: ignore[attr-defined]
    assert memory_error_in(error) is None
    error.inner_exception = inner  # type: ignore[attr-defined]
    assert memory_error_in(error) is inner
