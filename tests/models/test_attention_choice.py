"""Which kernel a batch of segments takes, and what is remembered of it."""

from pathlib import Path

import pytest
import torch

from tiny import tiny_llama
from tunesmith.models.attention import enable_segments
from tunesmith.models.attention_choice import AttentionChoice, known, remember
from tunesmith.ops import attention_choice
from tunesmith.ops.attention_choice import Shape

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "segments", "longest", "tokens", "expected"),
    [
        ("cudnn", 4, 512, 2048, "cudnn"),
        ("flash", 1, 512, 512, "flash"),
        ("cudnn", 4, 512, 2047, "varlen"),
        ("cudnn", 64, 32, 2048, "varlen"),
    ],
)
def test_only_long_segments_of_one_length_take_a_dense_kernel(
    asked: str, segments: int, longest: int, tokens: int, expected: str
) -> None:
    choice = AttentionChoice(tiny_llama(), asked)
    assert choice.backend(segments, longest, tokens, CUDA) == expected
    assert choice.backend(segments, longest, tokens, CPU) == "varlen"


def test_what_was_measured_is_known_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    shape = Shape(2, 512, 4, 2, 64, torch.bfloat16)
    assert known(shape, CPU) == {}
    remember(shape, CPU, {"cudnn": 0.1, "flash": 0.2})
    remember(shape._replace(length=1024), CPU, {"flash": 0.3})
    assert list(known(shape, CPU).items()) == [("cudnn", 0.1), ("flash", 0.2)]
    assert known(shape._replace(segments=3), CPU) == {}
    (tmp_path / "attention.json").write_text("{ half", "utf-8")
    assert known(shape, CPU) == {}


def test_batches_of_many_forms_do_not_each_get_a_kernel_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    choice = AttentionChoice(tiny_llama())
    for length in range(300, 320):
        shape = Shape(1, length, 4, 2, 8, torch.float32)
        remember(shape, CUDA, {"cudnn": 0.1})
    chosen = [choice.backend(1, length, length, CUDA) for length in range(300, 320)]
    assert chosen.count("cudnn") == 8
    assert choice.backend(1, 300, 300, CUDA) == "cudnn"


@pytest.mark.parametrize("backend", ["math", "varlen"])
def test_the_check_accepts_a_right_kernel_and_refuses_a_wrong_one(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(2, 16, 4, 2, 8, torch.float32)
    assert attention_choice._is_right(shape, CPU, backend)
    right = attention_choice.attend
    monkeypatch.setattr(
        attention_choice,
        "attend",
        # Wrong in bfloat16's place only, so that the reference stays right.
        lambda *x, **more: right(*x, **more) * (1.0 if more["backend"] == "math" else 1.2),
    )
    assert attention_choice._is_right(shape, CPU, backend) == (backend == "math")


def test_a_model_gives_the_same_through_the_dense_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().train()
    assert enable_segments(model)
    length, segments = 6, 3
    bounds = torch.arange(0, 19, length, dtype=torch.int32)
    batch = {
        "input_ids": torch.randint(3, 300, (1, length * segments)),
        "position_ids": torch.arange(length).repeat(segments)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds.clone(),
        "max_length_q": length,
        "max_length_k": length,
    }
    expected = model(**batch).logits
    taken = []
    monkeypatch.setattr(
        AttentionChoice, "backend", lambda self, *form: taken.append(form) or "math"
    )
    torch.testing.assert_close(model(**batch).logits, expected)
    assert taken == [(segments, length, length * segments, CPU)]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)
    assert len(taken) == 1
