"""The architecture table of encoder-decoders against what tiny models compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForSeq2SeqLM,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedModel,
    UMT5Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tiny import tiny_bart, tiny_t5
from tunesmith.errors import MethodError, ModelError
from tunesmith.methods import IA3, Adapter, LastLayer, LoRA
from tunesmith.methods.tuned import attach
from tunesmith.models.families_seq2seq import SEQ2SEQ
from tunesmith.models.sites import Block, find_sites

QKVO = ("q", "k", "v", "o")
READ = torch.tensor([[5, 6, 7, 8]])
WRITTEN = torch.tensor([[2, 9, 10]])


def like(config: type, model: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    sizes = {k: v for k, v in model.config.to_dict().items() if k not in {"model_type", "dtype"}}
    return lambda: AutoModelForSeq2SeqLM.from_config(config(**sizes)).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": tiny_t5,
    "t5 plain": lambda: tiny_t5(feed_forward_proj="relu"),
    "mt5": like(MT5Config, tiny_t5()),
    "umt5": like(UMT5Config, tiny_t5()),
    "bart": tiny_bart,
    "mbart": like(MBartConfig, tiny_bart()),
    "marian": like(MarianConfig, tiny_bart()),
    "pegasus": like(PegasusConfig, tiny_bart()),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def outputs(model: PreTrainedModel, read: Tensor = READ) -> Any:
    with torch.no_grad():
        return model(input_ids=read, decoder_input_ids=WRITTEN, use_cache=False)


def seen(model: PreTrainedModel, path: str) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the module at `path` in one forward pass."""
    found: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: found.append((args[0], output))
    )
    outputs(model)
    hook.remove()
    return found


def module_of(block: Block, name: str) -> str:
    return next(site.module for site in block.sites if site.name == name)


def test_the_cases_cover_the_table() -> None:
    assert {make().config.model_type for make in MODELS.values()} == set(SEQ2SEQ)


@models
def test_every_linear_map_of_both_stacks_is_one_site(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    sites = find_sites(model)
    inside = tuple(f"{block.path}." for block in sites.blocks)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    mapped = [site.module for site in sites.select("all")]
    assert sorted(mapped) == sorted(name for name in linear if name.startswith(inside))
    assert [(block.stack, block.index) for block in sites.blocks] == [
        (stack, index) for stack in ("encoder", "decoder") for index in range(2)
    ]


@models
def test_attention_asks_with_what_the_sites_put_out(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    asked: list[tuple[Tensor, ...]] = []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        asked.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kw)

    AttentionInterface.register("recorded", record)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    sites = find_sites(model)
    parts = [
        [module_of(block, f"{part}.{leaf}") for leaf in QKVO]
        for block in sites.blocks
        for part in (("attention",) if block.cross_out is None else ("attention", "cross"))
    ]
    model.set_attn_implementation("recorded")
    outputs(model)
    assert len(asked) == len(parts)
    for heads, paths in zip(list(asked), parts, strict=True):
        for head, path in zip(heads, paths[:3], strict=True):
            ((_, output),) = seen(model, path)
            torch.testing.assert_close(head.transpose(1, 2).flatten(2), output)


@models
def test_cross_attention_reads_what_the_encoder_gives(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    sites = find_sites(model)
    encoded = outputs(model).encoder_last_hidden_state
    for block in sites.blocks:
        assert (block.cross_out is None) == (block.stack == "encoder")
        if block.cross_out is not None:
            for name in ("cross.k", "cross.v"):
                ((given, _),) = seen(model, module_of(block, name))
                assert torch.equal(given, encoded)
            assert seen(model, block.cross_out)[0][1].shape[1] == WRITTEN.shape[1]


@models
def test_without_its_branches_a_decoder_does_not_see_the_encoder(
    make: Callable[[], PreTrainedModel],
) -> None:
    model = make()
    other = READ + 1
    assert not torch.equal(outputs(model).logits, outputs(model, other).logits)
    for block in find_sites(model).blocks:
        if block.cross_out is not None:
            model.get_submodule(block.cross_out).register_forward_hook(
                lambda module, args, output: output * 0
            )
    assert torch.equal(outputs(model).logits, outputs(model, other).logits)


def test_without_all_branches_only_embedding_and_final_norm_are_left() -> None:
    model = tiny_t5()
    sites = find_sites(model)
    for block in sites.blocks:
        for branch in block.branches:
            model.get_submodule(branch).register_forward_hook(lambda m, args, output: output * 0)
    found = outputs(model)
    embedding = model.get_submodule(sites.embedding)
    assert sites.encoder_norm is not None
    assert sites.final_norm is not None
    read, written = (
        model.get_submodule(norm)(embedding(ids))
        for norm, ids in ((sites.encoder_norm, READ), (sites.final_norm, WRITTEN))
    )
    torch.testing.assert_close(found.encoder_last_hidden_state, read)
    torch.testing.assert_close(found.logits, model.lm_head(written * model.config.d_model**-0.5))


def test_only_mbart_and_pegasus_have_final_norms_among_bart_s_kind() -> None:
    has = {name: find_sites(make()).final_norm is not None for name, make in MODELS.items()}
    assert has == {name: name not in {"bart", "marian"} for name in MODELS}


def test_a_module_that_is_not_known_is_named() -> None:
    model = tiny_t5()
    model.decoder.block[1].layer[1].gate = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"decoder\.block\.1\.layer\.1\.gate \(Linear\) is not"):
        find_sites(model)


def targets(model: PreTrainedModel, *methods: Any) -> set[str]:
    """The sites whose modules have a child with parameters."""
    tuned = attach(model, *methods)
    parents = {name.rsplit(".", 2)[0] for name in tuned.trainable()}
    return {
        s.name for s in tuned.sites.select("all") if any(p.startswith(s.module) for p in parents)
    }


def test_lora_takes_cross_attention_by_default() -> None:
    assert {f"cross.{leaf}" for leaf in QKVO} <= targets(tiny_t5(), LoRA(rank=2))


def test_ia3_rescales_keys_and_values_of_both_attentions() -> None:
    assert IA3().sites_of(find_sites(tiny_t5())) == [
        "attention.k",
        "attention.v",
        "cross.k",
        "cross.v",
        "mlp.down",
    ]
    tuned = attach(tiny_t5(), IA3())
    # Two blocks a stack: keys and values of 32 in six attentions, 48 inside four feed-forwards.
    assert tuned.parameter_counts().trainable == 6 * 2 * 32 + 4 * 48


@pytest.mark.parametrize(
    ("placement", "number"), [("houlsby", 2 * 2 + 2 * 3), ("pfeiffer", 4), ("parallel", 4)]
)
def test_adapters_follow_the_branches(placement: Any, number: int) -> None:
    tuned = attach(tiny_bart(), Adapter(placement=placement, bottleneck=4))
    downs = [name for name in tuned.trainable() if name.endswith("down.weight")]
    assert len(downs) == number


def test_the_last_layer_is_the_decoder_s() -> None:
    names = attach(tiny_t5(), LastLayer(blocks=2)).trainable()
    assert all(name.startswith("decoder.") for name in names)
    with pytest.raises(MethodError, match="3 is more than the 2 blocks of this model's decoder"):
        attach(tiny_t5(), LastLayer(blocks=3))
