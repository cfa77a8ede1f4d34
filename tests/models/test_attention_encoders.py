"""Added keys and values, and segments, where attention goes both ways."""

from copy import deepcopy
from itertools import accumulate
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.masking_utils import eager_mask

from tunesmith.methods.prefix import AttentionAttachment, InAttention
from tunesmith.models.attention import enable_segments, has_segments
from tunesmith.models.attention_layers import attention_layers, key_values
from tunesmith.models.sites import find_sites

SIZES: Final = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
DISTIL: Final = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
MODERN: Final = {
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 1,
}
CONFIGS: Final[dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]]] = {
    "bert": (BertConfig, SIZES),
    "distilbert": (DistilBertConfig, DISTIL),
    "electra": (ElectraConfig, SIZES | {"embedding_size": 16}),
    "modernbert": (ModernBertConfig, SIZES | MODERN),
    "roberta": (RobertaConfig, SIZES),
}
POSITIONS: Final = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
every_config = pytest.mark.parametrize("name", list(CONFIGS))
LENGTHS: Final = (1, 6, 3, 11)
WIDTH = 8
"""Of a head."""


def make(config: type[PreTrainedConfig], settings: dict[str, Any]) -> PreTrainedModel:
    """A model in float64, its weights large enough for attention to be far from uniform."""
    model = AutoModel.from_config(config(**settings)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def deberta(**changes: object) -> PreTrainedModel:
    return make(DebertaV2Config, SIZES | POSITIONS | changes)


class Extra(InAttention):
    """Random keys and values for four heads, float64."""

    def __init__(self, length: int, *, separate: bool = False) -> None:
        super().__init__()
        self.separate = separate
        pair = torch.randn(2, 1, 4, length, WIDTH, dtype=torch.float64)
        self.k, self.v = (nn.Parameter(x) for x in pair)
        self.strength = torch.randn(4, dtype=torch.float64)

    def key_values(self, layer: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def gate(self) -> Tensor:
        return self.strength


def extended(model: PreTrainedModel, *extras: Extra) -> AttentionAttachment:
    """Hang the same extras under every attention layer."""
    layers = attention_layers(model, find_sites(model))
    return AttentionAttachment(
        model,
        {f"{layer.path}.extra_{i}": extra for layer in layers for i, extra in enumerate(extras)},
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extras: list[Extra], scaling: float
) -> Tensor:
    """Softmax over [extra | tokens], and one more for each separate extra, times its strength."""
    batch = q.shape[0]
    joined = [x for x in extras if not x.separate]
    K, V = (
        torch.cat([getattr(x, name).expand(batch, -1, -1, -1) for x in joined] + [own], dim=2)
        for name, own in (("k", k), ("v", v))
    )
    scores = scaling * q @ K.transpose(2, 3)
    if mask is not None:
        scores = scores + F.pad(mask, (K.shape[2] - k.shape[2], 0))
    out = scores.softmax(-1) @ V
    for x in extras:
        if x.separate:
            own = (scaling * q @ x.k.transpose(2, 3)).softmax(-1) @ x.v
            out = out + x.strength[:, None, None] * own
    return out.transpose(1, 2)


EXTRAS: list[Extra] = []
"""What the reference adds."""


def reference(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    return plain_attention(query, key, value, attention_mask, EXTRAS, options["scaling"]), None


AttentionInterface.register("reference", reference)
AttentionMaskInterface.register("reference", eager_mask)


def right_padded() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    return {"input_ids": ids.where(mask == 1, 2), "attention_mask": mask}


@every_config
@pytest.mark.parametrize("padding", [True, False])
def test_added_keys_are_what_concatenated_keys_are_in_eager_attention(
    name: str, padding: bool
) -> None:
    model = make(*CONFIGS[name])
    batch = right_padded() if padding else {"input_ids": torch.randint(3, 64, (2, 9))}
    real = batch.get("attention_mask", torch.ones(2, 9)) == 1
    extras = [Extra(2), Extra(3, separate=True), Extra(1)]
    attached = extended(model, *extras)
    got = model(**batch).last_hidden_state[real]
    attached.enable(False)
    EXTRAS[:] = extras
    model.set_attn_implementation("reference")
    expected = model(**batch).last_hidden_state[real]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    EXTRAS.clear()
    assert not torch.allclose(model(**batch).last_hidden_state[real], expected)


@every_config
def test_gradients_of_added_keys_are_those_of_concatenated_keys(name: str) -> None:
    model = make(*CONFIGS[name])
    batch = right_padded()
    real = batch["attention_mask"] == 1
    extra = Extra(2)
    attached = extended(model, extra)
    weights = torch.randn(int(real.sum()), 32, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        out = model(**batch).last_hidden_state[real]
        return torch.autograd.grad((out * weights).sum(), [extra.k, extra.v])

    got = gradients()
    attached.enable(False)
    EXTRAS[:] = [extra]
    model.set_attn_implementation("reference")
    torch.testing.assert_close(got, gradients(), rtol=1e-9, atol=1e-9)
    EXTRAS.clear()


def packed(lengths: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Any]]:
    rows = [torch.randint(3, 64, (1, length)) for length in lengths]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return rows, {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@every_config
@pytest.mark.parametrize("prefix", [False, True])
def test_segments_give_what_separate_forwards_give(name: str, prefix: bool) -> None:
    model = make(*CONFIGS[name])
    if prefix:
        extended(model, Extra(2), Extra(3, separate=True))
    rows, batch = packed(LENGTHS)
    expected = torch.cat([model(input_ids=row).last_hidden_state for row in rows], dim=1)
    assert enable_segments(model)
    got = model(**batch).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_segments_keep_the_kinds_of_their_tokens() -> None:
    model = make(BertConfig, SIZES)
    rows, batch = packed(LENGTHS)
    kinds = [(torch.arange(row.shape[1]) > 2).long()[None] for row in rows]
    pairs = zip(rows, kinds, strict=True)
    alone = [model(input_ids=r, token_type_ids=k).last_hidden_state for r, k in pairs]
    assert enable_segments(model)
    got = model(**batch, token_type_ids=torch.cat(kinds, dim=1)).last_hidden_state
    torch.testing.assert_close(got, torch.cat(alone, dim=1), rtol=1e-10, atol=1e-10)


def test_proving_segments_leaves_the_windows_as_they_were() -> None:
    model = make(*CONFIGS["modernbert"])
    assert enable_segments(model)
    assert model.config.sliding_window == 2
    assert [layer.attn.sliding_window for layer in model.layers] == [None, 3]


def relative_row(query: int, key: int, span: int) -> int:
    """The row of the table of relative positions for this distance, as in the paper's delta."""
    return min(max(query - key + span, 0), 2 * span - 1)


@torch.no_grad()
def disentangled(
    model: PreTrainedModel, hidden: Tensor, seen: Tensor, extras: list[Extra]
) -> Tensor:
    """Equation 4 of DeBERTa (arXiv:2006.03654), pair by pair, over [extra | tokens].

    The last term has delta(i, j), as the code that the checkpoints were trained with, where the
    paper has delta(j, i).

    Args:
        model: its first layer attends.
        hidden: (length, width), what goes into the layer.
        seen: (length,) bool, which tokens are no padding.
        extras: keys and values without a position.
    """
    layer = model.encoder.layer[0].attention.self
    span, table = layer.pos_ebd_size, model.encoder.get_rel_embedding()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, WIDTH)).transpose(0, 1)

    q, k, v = (heads(m(hidden)) for m in (layer.query_proj, layer.key_proj, layer.value_proj))
    shared = layer.share_att_key
    q_r = heads((layer.query_proj if shared else layer.pos_query_proj)(table))
    k_r = heads((layer.key_proj if shared else layer.pos_key_proj)(table))
    scores = q.new_full((4, len(hidden), len(hidden)), -torch.inf)
    for i in range(len(hidden)):
        for j in seen.nonzero().flatten().tolist():
            content = (q[:, i] * k[:, j]).sum(-1)
            to_position = (q[:, i] * k_r[:, relative_row(i, j, span)]).sum(-1)
            from_position = (k[:, j] * q_r[:, relative_row(i, j, span)]).sum(-1)
            scores[:, i, j] = content + to_position + from_position
    scaling = (3 * WIDTH) ** -0.5
    mask = (scores * scaling)[None]
    # The tokens' scores are all in the mask, so their own keys and queries add nothing.
    joined = [x for x in extras if not x.separate]
    fronts = torch.cat([scaling * q[None] @ x.k.transpose(2, 3) for x in joined] + [mask], dim=3)
    out = fronts.softmax(-1) @ torch.cat([x.v for x in joined] + [v[None]], dim=2)
    for x in extras:
        if x.separate:
            own = (scaling * q[None] @ x.k.transpose(2, 3)).softmax(-1) @ x.v
            out = out + x.strength[:, None, None] * own
    return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "lengths", [(2, 0, 1), (0, 3, 0), (2, 3, 1)], ids=["joined", "separate", "both"]
)
def test_deberta_scores_added_keys_without_a_position(
    shared: bool, lengths: tuple[int, int, int]
) -> None:
    first, gated, second = lengths
    wanted = [(first, False), (gated, True), (second, False)]
    extras = [Extra(length, separate=separate) for length, separate in wanted if length]
    model = deberta(share_att_key=shared, max_relative_positions=4, norm_rel_ebd="layer_norm")
    extended(model, *extras)
    batch = right_padded()
    seen: list[tuple[Tensor, Tensor]] = []
    # Registered after the extras' own hooks, so it sees what they put out.
    model.encoder.layer[0].attention.self.register_forward_hook(
        lambda _m, args, out: seen.append((args[0], out[0]))
    )
    model(**batch)
    hidden, out = seen[0]
    for row, mask in enumerate(batch["attention_mask"] == 1):
        expected = disentangled(model, hidden[row], mask, extras)
        # Transformers takes the root of 3 d in float32.
        torch.testing.assert_close(out[row][mask], expected[mask], rtol=1e-6, atol=1e-6)


def test_deberta_gradients_reach_added_keys_with_and_without_checkpointing() -> None:
    model = deberta().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    extra = Extra(2)
    extended(model, extra)
    batch = right_padded()
    weights = torch.randn(3, 9, 32, dtype=torch.float64) * batch["attention_mask"][..., None]

    def gradients() -> tuple[Tensor, ...]:
        out = model(**batch).last_hidden_state
        return torch.autograd.grad((out * weights).sum(), [extra.k, extra.v])

    plain = gradients()
    assert all(g.any() for g in plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain)


def test_deberta_with_its_extras_off_or_gone_is_itself_bit_for_bit() -> None:
    model = deberta()
    batch = right_padded()
    expected = model(**batch).last_hidden_state
    attached = extended(model, Extra(2), Extra(3, separate=True))
    assert not torch.equal(model(**batch).last_hidden_state, expected)
    attached.enable(False)
    assert torch.equal(model(**batch).last_hidden_state, expected)
    attached.detach()
    assert torch.equal(model(**batch).last_hidden_state, expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_deberta_takes_no_segments_and_stays_as_it_was() -> None:
    model = deberta()
    assert not enable_segments(model)
    assert not has_segments(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", [*CONFIGS, "deberta"])
def test_keys_and_values_of_a_text_are_those_of_the_layers(name: str) -> None:
    """Adding to a text its own keys and values changes nothing: each is there twice."""
    model = deberta(relative_attention=False) if name == "deberta" else make(*CONFIGS[name])
    ids = torch.randint(3, 64, (1, 3))  # short enough for ModernBERT's window
    expected = model(input_ids=ids).last_hidden_state
    pairs = key_values(model, ids)
    extras = {path: Extra(3) for path in pairs}
    with torch.no_grad():
        for path, (k, v) in pairs.items():
            extras[path].k.copy_(k)
            extras[path].v.copy_(v)
    AttentionAttachment(model, {f"{path}.extra": extra for path, extra in extras.items()})
    got = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # they come in float32


def test_a_copy_of_deberta_has_its_own_extras() -> None:
    model = deberta()
    extra = Extra(2)
    extended(model, extra)
    batch = right_padded()
    expected = model(**batch).last_hidden_state
    copy = deepcopy(model)
    assert torch.equal(copy(**batch).last_hidden_state, expected)
    with torch.no_grad():
        extra.v.zero_()
    assert torch.equal(copy(**batch).last_hidden_state, expected)
    assert not torch.equal(model(**batch).last_hidden_state, expected)
