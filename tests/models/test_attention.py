"""The attention "tunesmith" against transformers' sdpa, and segments against separate forwards."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
    T5Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import ModelError
from tunesmith.models.attention import NAME, ExtraKeyValues, attention, enable_segments

LENGTHS = (1, 6, 3, 11)
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CUDA = torch.cuda.is_available()
both = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])


def tokens(lengths: tuple[int, ...]) -> list[Tensor]:
    return [torch.randint(3, VOCAB, (1, length)) for length in lengths]


def packed(rows: list[Tensor]) -> dict[str, Any]:
    lengths = [row.shape[1] for row in rows]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def enabled(model: PreTrainedModel) -> PreTrainedModel:
    assert enable_segments(model)
    return model


def small(config: type[PreTrainedConfig], **changes: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config(**SMALL | changes)).eval()


@both
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_without_segments_it_is_sdpa_bit_for_bit(
    make: Callable[[], PreTrainedModel], padding: str
) -> None:
    model = make()
    ids = torch.cat(tokens((8, 8)), dim=0)
    mask = torch.ones_like(ids)
    mask[1, {"none": slice(0), "left": slice(3), "right": slice(5, 8)}[padding]] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    got = enabled(model)(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(got, expected)


@both
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_is_that_of_sdpa(make: Callable[[], PreTrainedModel], cache: str) -> None:
    model = make()
    ids = torch.cat(tokens((8, 8)), dim=0)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
        "eos_token_id": None,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, **options)
    got = enabled(model).generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.scores), torch.stack(expected.scores))


@both
def test_segments_give_the_logits_of_separate_forwards(
    make: Callable[[], PreTrainedModel],
) -> None:
    model = make()
    rows = tokens(LENGTHS)
    expected = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
    got = enabled(model)(**packed(rows)).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_segments_give_the_gradients_of_separate_forwards(
    make: Callable[[], PreTrainedModel], *, checkpointing: bool
) -> None:
    model = make().train()
    rows = tokens(LENGTHS)
    parameters = list(model.parameters())
    alone = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
    expected = torch.autograd.grad(alone.square().sum(), parameters)
    enabled(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    together = model(**packed(rows)).logits
    got = torch.autograd.grad(together.square().sum(), parameters)
    # Sums over all tokens in another order; gradients reach 1e2.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_recomputes_with_the_same_segments() -> None:
    model = enabled(tiny_llama()).train()
    batch = packed(tokens(LENGTHS))
    plain = torch.autograd.grad(model(**batch).logits.sum(), list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(model(**batch).logits.sum(), list(model.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_no_quadratic_mask_is_built_for_segments() -> None:
    model = enabled(tiny_llama())
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**packed(tokens(LENGTHS)))
    assert [mask.numel() for mask in seen] == [1]


def test_a_sliding_window_acts_inside_each_segment() -> None:
    model = small(MistralConfig, num_key_value_heads=2, sliding_window=4)
    rows = tokens((9, 2, 12))
    expected = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
    got = enabled(model)(**packed(rows)).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert model.config.sliding_window == 4


def test_segments_of_an_encoder_see_both_ways() -> None:
    model = AutoModel.from_config(BertConfig(**SMALL)).eval()
    rows = tokens(LENGTHS)
    expected = torch.cat([model(input_ids=row).last_hidden_state for row in rows], dim=1)
    got = enabled(model)(**packed(rows)).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BloomConfig, "its own attention path"),
        (StableLmConfig, "does not hand the segments on"),
        (T5Config, "two stacks"),
    ],
)
def test_models_that_cannot_are_refused_and_left_alone(
    config: type[PreTrainedConfig], why: str
) -> None:
    sizes = SMALL if config is not T5Config else {"d_model": 32, "num_layers": 1, "d_ff": 64}
    model = AutoModel.from_config(config(**sizes)).eval()
    before = model.config._attn_implementation
    assert not enable_segments(model), why
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks


def test_enabling_twice_adds_one_hook() -> None:
    model = enabled(enabled(tiny_llama()))
    assert len(model.model._forward_pre_hooks) == 1


def test_enabling_keeps_training_mode_and_the_random_state() -> None:
    model = tiny_llama().train()
    state = torch.get_rng_state()
    enabled(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "unsupported",
    [{"s_aux": 1.0}, {"position_bias": 1.0, "cu_seq_lens_q": torch.tensor([0, 3])}],
    ids=["sinks", "capped scores within segments"],
)
def test_what_is_not_computed_is_an_error(unsupported: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ModelError, match=next(iter(unsupported))):
        attention(nn.Module(), q, q, q, None, **unsupported)


class Extra(nn.Module, ExtraKeyValues):
    """Random keys and values for two heads of width 4, float64."""

    def __init__(self, length: int, *, separate: bool = False) -> None:
        super().__init__()
        self.enabled, self.separate = True, separate
        self.k, self.v = torch.randn(2, 1, 2, length, 4, dtype=torch.float64)
        self.strength = torch.randn(4, dtype=torch.float64)

    def key_values(self, layer: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def gate(self) -> Tensor:
        return self.strength


def plainly(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """Softmax over the keys that are `seen`, query head h reading key head h // 2."""
    k, v = (x.expand(q.shape[0], -1, -1, -1).repeat_interleave(2, dim=1) for x in (k, v))
    scores = 0.3 * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
PADDED = CAUSAL & torch.tensor([[[[False, True, True, True, True]]], [[[True] * 5]]])
VISIBLE = {
    "causal": (5, 5, None, CAUSAL),
    "causal, with places to come in a static cache": (5, 7, None, F.pad(CAUSAL, (0, 2))),
    "padded": (4, 5, PADDED[:, :, 1:], PADDED[:, :, 1:]),
    "one token after a cache": (1, 5, None, torch.ones(1, 5, dtype=torch.bool)),
}


@pytest.mark.parametrize(("queries", "keys", "mask", "seen"), VISIBLE.values(), ids=VISIBLE.keys())
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_extra_keys_are_seen_by_all_and_the_rest_as_before(
    queries: int, keys: int, mask: Tensor | None, seen: Tensor, softcap: float | None
) -> None:
    layer = nn.Module()
    layer.num_key_value_groups = 2
    layer.first, layer.gated, layer.second = Extra(2), Extra(3, separate=True), Extra(1)
    q = torch.randn(2, 4, queries, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, keys, 4, dtype=torch.float64)
    got, _ = attention(layer, q, k, v, mask, scaling=0.3, softcap=softcap)

    front = [layer.first, layer.second]
    all_k = torch.cat([x.k.expand(2, -1, -1, -1) for x in front] + [k], dim=2)
    all_v = torch.cat([x.v.expand(2, -1, -1, -1) for x in front] + [v], dim=2)
    expected = plainly(q, all_k, all_v, F.pad(seen, (3, 0), value=True), softcap)
    everything = torch.ones(queries, 3, dtype=torch.bool)
    beside = plainly(q, layer.gated.k, layer.gated.v, everything, softcap)
    expected = expected + layer.gated.strength[:, None] * beside
    # Where scores are capped the softmax is float32's, as in transformers' own.
    tolerance = 1e-12 if softcap is None else 1e-6
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_transformers_own_keywords_pass_through_to_sdpa() -> None:
    module = nn.Module()
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    options = {"scaling": 0.3, "is_causal": False, "position_bias": torch.randn(1, 2, 3, 3)}
    got, _ = attention(module, q, k, v, None, **options)
    expected, _ = sdpa_attention_forward(module, q, k, v, None, **options)
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_segments_on_the_gpu_are_kept_apart(dtype: torch.dtype, window: int | None) -> None:
    model = small(MistralConfig, num_key_value_heads=2, sliding_window=window).to("cuda", dtype)
    rows = [row.cuda() for row in tokens((9, 2, 12))]
    expected = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
    batch = packed([row.cpu() for row in rows])
    batch |= {name: batch[name].cuda() for name in ("input_ids", "position_ids")}
    got = enabled(model)(**batch).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 keeps 8 bits
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_block_with_segments_compiles_as_one_graph() -> None:
    model = enabled(tiny_llama().to("cuda", torch.bfloat16)).train()
    rows = tokens(LENGTHS)
    batch = {
        name: value.cuda() if name in ("input_ids", "position_ids") else value
        for name, value in packed(rows).items()
    }
    expected = model(**batch).logits
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    # bfloat16 keeps 8 bits, and fused operations round less often.
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0.02, atol=0.02)


@pytest.mark.zoo
def test_smollm2_segments_give_the_loss_of_separate_forwards() -> None:
    from tunesmith.models.loading import load_model

    model, tokenizer = load_model("smollm2-135m-instruct", dtype=torch.float32)
    texts = ("The capital of France is Paris.", "Two and two", "Snow is white, and coal is black.")
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:])
            for row in rows
        ]
        logits = enabled(model)(**packed(rows)).logits
    pieces = zip(torch.split(logits, [row.shape[1] for row in rows], dim=1), rows, strict=True)
    together = [nn.functional.cross_entropy(x[0, :-1], row[0, 1:]) for x, row in pieces]
    torch.testing.assert_close(together, losses, rtol=1e-5, atol=1e-5)


def test_the_name_is_registered() -> None:
    assert NAME == "tunesmith"
    assert tiny_llama(attn_implementation=NAME).config._attn_implementation == NAME
