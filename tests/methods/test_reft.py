"""ReFT: the paper's equations, at the chosen tokens wherever those stand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES
from tiny import tiny_gpt2, tiny_llama
from tunesmith import PromptTuning, ReFT, attach
from tunesmith.errors import MethodError
from tunesmith.methods.reft import DiReFT, LoReFT, orthonormal_rows
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.attention import enable_segments

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

FIRST = ReFT(rank=4, positions=3)
ROWS = [torch.arange(3, 3 + length) for length in (2, 7, 5)]
VARIANTS = [ReFT(rank=4), ReFT(rank=4, variant="direft")]


def gram_schmidt(A: Tensor) -> Tensor:
    """The rows of A made orthonormal, one after the other."""
    rows: list[Tensor] = []
    for a in A:
        rest = a - sum(((a @ q) * q for q in rows), torch.zeros_like(a))
        rows.append(rest / rest.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [LoReFT, DiReFT])
def test_outputs_and_gradients_are_the_papers_equation(kind: type[LoReFT | DiReFT]) -> None:
    edit = kind(16, 4, None)
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    h = torch.randn(2, 5, 16, requires_grad=True)
    direction = torch.randn(2, 5, 16, dtype=torch.float64)
    got = edit.act(edit, (), h)
    (got.double() * direction).sum().backward()

    A, W, b, x = (t.detach().double().requires_grad_() for t in (edit.R, edit.W, edit.b, h))
    if kind is LoReFT:
        R = gram_schmidt(A)
        expected = x + (x @ W.T + b - x @ R.T) @ R
    else:
        expected = x + (x @ W.T + b) @ A
    (expected * direction).sum().backward()
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip((edit.R, edit.W, edit.b, h), (A, W, b, x), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)


def test_the_gradient_of_the_orthonormal_rows_is_right() -> None:
    A = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal_rows, A)
    rows = orthonormal_rows(A)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(orthonormal_rows(rows), rows)


@pytest.mark.parametrize("method", VARIANTS, ids=["loreft", "direft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_base_and_can_leave_it(
    method: ReFT, dtype: torch.dtype, model: PreTrainedModel, input_ids: Tensor, loss: Loss
) -> None:
    model.to(dtype)
    before = model(input_ids).logits
    tuned = attach(model, method)
    assert torch.equal(model(input_ids).logits, before)
    loss(model, input_ids).backward()
    assert any(p.grad.any() for p in tuned.trainable().values())


def test_the_rows_stay_orthonormal_while_training(input_ids: Tensor, loss: Loss) -> None:
    tuned = attach(tiny_llama(), ReFT(rank=4))
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(tuned.model, input_ids)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    for child in tuned.attachments[0].children.values():
        R = orthonormal_rows(child.R)
        torch.testing.assert_close(R @ R.T, torch.eye(4))


def test_only_the_chosen_blocks_are_edited() -> None:
    tuned = attach(tiny_gpt2(), ReFT(rank=2, layers=[1]))
    assert set(tuned.trainable()) == {f"transformer.h.1.reft_default.{leaf}" for leaf in "RWb"}
    assert tuned.parameter_counts().trainable == 2 * 2 * 32 + 2


@torch.no_grad()
def hidden(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    return model.base_model(**inputs).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_edits_at_the_end_of_the_stack_reach_the_first_tokens_only(
    family: str, trained: Trained
) -> None:
    own = FAMILIES[family]
    model = own.make()
    last = model.config.get_text_config().num_hidden_layers - 1
    batch = own.padded(ROWS)
    tuned = attach(model, FIRST.model_copy(update={"layers": [last]}))
    plain = hidden(model, **batch)
    changed = (hidden(trained(tuned).model, **batch) != plain).any(dim=-1)
    for row, seen in zip(ROWS, changed, strict=True):
        expected = [place < 3 for place in range(len(row))]
        assert own.tokens(seen, len(row)).tolist() == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bert", "roberta", "t5"])
def test_first_tokens_are_the_same_in_padded_batches(family: str, trained: Trained) -> None:
    own = FAMILIES[family]
    model = trained(attach(own.make(), FIRST)).model
    with torch.no_grad():
        together = model(**own.padded(ROWS)).logits
        for row, out in zip(ROWS, together, strict=True):
            alone = model(**own.inputs(row[None])).logits[0]
            torch.testing.assert_close(own.tokens(out, len(row)), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_first_tokens_are_the_same_in_packed_batches(family: str, trained: Trained) -> None:
    own = FAMILIES[family]
    model = trained(attach(own.make(), FIRST)).model
    assert enable_segments(model)
    with torch.no_grad():
        alone = torch.cat([model(**own.inputs(row[None])).logits for row in ROWS], dim=1)
        together = model(**own.packed(ROWS)).logits
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_first_tokens_are_the_same_in_cached_generation(family: str, trained: Trained) -> None:
    own = FAMILIES[family]
    model = trained(attach(own.make(), FIRST)).model
    assert torch.equal(own.generated(model, ROWS), own.step_by_step(model, ROWS))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_first_tokens_are_the_same_when_blocks_are_computed_anew(
    family: str, trained: Trained, input_ids: Tensor
) -> None:
    own = FAMILIES[family]
    tuned = trained(attach(own.make().train(), FIRST))
    ids = input_ids % 60 + 3
    own.loss(tuned.model, ids).backward()
    plain = {name: p.grad.clone() for name, p in tuned.trainable().items()}
    tuned.model.zero_grad()
    tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    own.loss(tuned.model, ids).backward()
    again = {name: p.grad for name, p in tuned.trainable().items()}
    torch.testing.assert_close(again, plain)


def test_the_rows_of_a_prompt_count_as_the_first_tokens(
    trained: Trained, input_ids: Tensor
) -> None:
    last = ReFT(rank=4, positions=3, layers=[1])
    model = trained(attach(tiny_llama(), PromptTuning(tokens=2), last)).model
    on = hidden(model, input_ids=input_ids)
    model.get_submodule("model.layers.1.reft_default").enabled = False
    off = hidden(model, input_ids=input_ids)
    assert (on != off).any(dim=-1).tolist() == [[True] + [False] * 6] * 2


def test_a_prompt_that_comes_after_the_count_is_refused(input_ids: Tensor) -> None:
    model = attach(tiny_llama(), FIRST, PromptTuning(tokens=2)).model
    with pytest.raises(MethodError, match="list prompt_tuning or p_tuning before reft"):
        model(input_ids)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ReFT(layers=[0, 2]), r"method\.layers: there is no block 2; this llama has blocks 0 to 1"),
        (ReFT(rank=33), r"method\.rank: 33 dimensions do not fit into a width of 32"),
    ],
)
def test_what_does_not_fit_is_refused(method: ReFT, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        attach(tiny_llama(), method)


def test_merging_is_refused() -> None:
    with pytest.raises(MethodError, match="reft edits the sum"):
        attach(tiny_llama(), ReFT()).merge()
