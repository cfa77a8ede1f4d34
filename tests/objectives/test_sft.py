"""The SFT loss against transformers' own."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import ModelError
from tunesmith.models.output_head import check_output_head, output_head
from tunesmith.objectives import SFT
from tunesmith.ops import linear_cross_entropy
from tunesmith.types import IGNORE, Batch

LENGTHS = (9, 3, 6)
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.1)).eval()


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)).eval()


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)).eval()


def padded(side: str) -> Batch:
    """Three rows of unequal length with the second half of each supervised."""
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS)
    batch = {
        "input_ids": torch.full((len(LENGTHS), width), 2),
        "labels": torch.full((len(LENGTHS), width), IGNORE),
        "attention_mask": torch.zeros(len(LENGTHS), width, dtype=torch.int64),
    }
    for row, length in enumerate(LENGTHS):
        start = width - length if side == "left" else 0
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        batch["input_ids"][row, start : start + length] = ids
        batch["attention_mask"][row, start : start + length] = 1
        batch["labels"][row, start + length // 2 : start + length] = ids[length // 2 :]
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, gemma2, cohere, granite])
def test_loss_and_gradients_equal_those_of_transformers(make: type, side: str) -> None:
    model, batch = make(), padded(side)
    terms = SFT().loss(model, batch)
    plain = model(**batch).loss * terms.count
    torch.testing.assert_close(terms.total, plain)
    torch.testing.assert_close(gradients(model, terms.total), gradients(model, plain))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_padding_does_not_change_the_loss(make: type) -> None:
    model = make()
    left, right = (SFT().loss(model, padded(side)) for side in ("left", "right"))
    torch.testing.assert_close(left.total, right.total)
    assert left.count == right.count == sum(length - length // 2 for length in LENGTHS)


def test_accuracy_counts_supervised_tokens_that_the_model_would_have_chosen() -> None:
    model, batch = tiny_llama(), padded("right")
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    best = logits[:, :-1].argmax(-1)
    batch["labels"][:, 1:] = torch.where(
        (batch["labels"][:, 1:] != IGNORE) & (torch.arange(8) % 2 == 0),
        best,
        batch["labels"][:, 1:],
    )
    expected = (batch["labels"][:, 1:] == best).sum()
    assert expected > 0
    assert SFT().loss(model, batch).metrics["accuracy"] == expected


def test_the_first_token_of_a_segment_or_row_is_never_a_target() -> None:
    ids = torch.arange(10)[None]
    free = {"labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0, 1]])}
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    left = {"labels": ids, "attention_mask": mask}
    assert SFT().count(free) == 10 - 4
    assert SFT().count(left) == 7 - 1
    assert SFT().count({"labels": ids}) == 9


def test_count_is_that_of_the_loss() -> None:
    batch = padded("right")
    assert SFT().count(batch) == SFT().loss(tiny_llama(), batch).count


@pytest.mark.parametrize("make", [tiny_llama, gemma2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_by_sample_is_that_of_each_sample_alone(make: type, side: str) -> None:
    model, batch = make(), padded(side)
    terms, each = SFT().loss_by_sample(model, batch)
    whole = SFT().loss(model, batch)
    torch.testing.assert_close(terms.total, whole.total)
    assert terms.count == whole.count
    assert terms.metrics == whole.metrics
    alone = [
        SFT().loss(model, {key: values[i : i + 1] for key, values in batch.items()})
        for i in range(len(LENGTHS))
    ]
    torch.testing.assert_close(each.nats, torch.stack([one.total for one in alone]))
    assert each.tokens.tolist() == [one.count for one in alone]


def test_measuring_samples_runs_the_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heights = []
    plain = linear_cross_entropy.F.linear

    def noting(rows: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        heights.append(len(rows))
        return plain(rows, *rest)

    functional = SimpleNamespace(linear=noting)
    monkeypatch.setattr(linear_cross_entropy, "F", functional)
    terms, _ = SFT().loss_by_sample(tiny_llama(), padded("right"))
    assert sum(heights) == terms.count


def test_a_batch_without_supervised_tokens_costs_nothing() -> None:
    model, batch = tiny_llama(), padded("right")
    batch["labels"].fill_(IGNORE)
    terms = SFT().loss(model, batch)
    terms.total.backward()
    assert (terms.total, terms.count) == (0, 0)
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


def test_a_row_of_one_token_has_nothing_to_predict() -> None:
    terms = SFT().loss(
        tiny_llama(), {"input_ids": torch.ones(1, 1).long(), "labels": torch.ones(1, 1).long()}
    )
    assert (terms.total, terms.count) == (0, 0)


def test_the_head_s_bias_is_scaled_with_the_logits() -> None:
    model = granite()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    batch = padded("right")
    terms = SFT().loss(model, batch)
    torch.testing.assert_close(terms.total, model(**batch).loss * terms.count)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, gemma2, cohere, granite])
def test_the_head_s_parts_give_the_model_s_logits(make: type) -> None:
    assert check_output_head(make()) < 1e-5


def test_a_head_that_does_more_than_is_known_is_refused() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(ModelError, match="does more than a linear map"):
        check_output_head(model)


def test_a_transform_before_the_head_is_found() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertLMHeadModel(BertConfig(vocab_size=VOCAB, **sizes, is_decoder=True))
    with pytest.raises(ModelError, match="BertLMHeadModel does more"):
        check_output_head(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear language-model head"):
        output_head(tiny_llama().model)


def test_a_logit_scale_that_is_no_number_is_refused() -> None:
    model = tiny_llama()
    model.config.logit_scale = "inv_sqrt_d_model"
    with pytest.raises(ModelError, match="logit_scale: 'inv_sqrt_d_model'"):
        output_head(model)
