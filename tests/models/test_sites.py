"""The architecture table against what tiny models of each family compute.

None of the checks reads the table's names: they act on a site's columns and watch the model.
"""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError, ModelError
from tunesmith.models.families import FAMILIES
from tunesmith.models.families_encoders import ENCODERS
from tunesmith.models.families_moe import MIXTURES
from tunesmith.models.families_seq2seq import SEQ2SEQ
from tunesmith.models.sites import Block, Site, find_sites, weight_of

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
LLAMA = IDS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = LLAMA | {"num_key_value_heads": 2}
WINDOW = GROUPED | {"sliding_window": 16}
GPT2 = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 32}
HEAD8 = {"head_dim": 8}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "arcee": ("Arcee", GROUPED),
    "bloom": ("Bloom", IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "cohere": ("Cohere", GROUPED),
    "cohere with head norms": ("Cohere", GROUPED | {"use_qk_norm": True}),
    "cohere2": ("Cohere2", WINDOW),
    "ernie4_5": ("Ernie4_5", GROUPED | HEAD8),
    "exaone4": ("Exaone4", WINDOW),
    "falcon multi-query": ("Falcon", FALCON | {"alibi": False, "multi_query": True}),
    "falcon multi-head": (
        "Falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "falcon grouped": (
        "Falcon",
        FALCON | {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "gemma": ("Gemma", GROUPED | HEAD8),
    "gemma2": ("Gemma2", WINDOW | HEAD8 | {"query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3Text", WINDOW | HEAD8 | {"query_pre_attn_scalar": 8}),
    "glm4": ("Glm4", GROUPED | HEAD8),
    "gpt2": ("GPT2", GPT2),
    "gpt_bigcode multi-query": ("GPTBigCode", GPT2),
    "gpt_bigcode multi-head": ("GPTBigCode", GPT2 | {"multi_query": False}),
    "gpt_neo": (
        "GPTNeo",
        LLAMA | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("GPTNeoX", LLAMA),
    "gptj": ("GPTJ", GPT2 | {"rotary_dim": 4}),
    "granite": ("Granite", GROUPED),
    "helium": ("Helium", GROUPED | HEAD8),
    "llama": ("Llama", GROUPED),
    "ministral": ("Ministral", WINDOW | HEAD8),
    "mistral": ("Mistral", WINDOW),
    "mpt": ("Mpt", IDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "olmo": ("Olmo", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", WINDOW),
    "opt": ("OPT", OPT),
    "phi": ("Phi", LLAMA),
    "phi with head norms": ("Phi", LLAMA | {"qk_layernorm": True}),
    "phi3": ("Phi3", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | HEAD8),
    "smollm3": ("SmolLM3", GROUPED),
    "stablelm": ("StableLm", GROUPED),
    "stablelm with head norms": ("StableLm", GROUPED | {"qk_layernorm": True}),
    "starcoder2": ("Starcoder2", GROUPED),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def build(case: str) -> PreTrainedModel:
    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to be far from uniform
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def run(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 10)[None]
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def columns_of(site: Site) -> Tensor:
    ranges = site.columns or ((0, site.out_features),)
    return torch.cat([torch.arange(*r) for r in ranges])


def site_named(block: Block, name: str) -> Site:
    return next(site for site in block.sites if site.name == name)


def capture(
    model: PreTrainedModel, block: Block, into: str, *, negated: Site | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the block's projections, and the input of its projection `into`.

    `negated` is a site whose columns change their sign on the way.
    """
    outputs: dict[str, Tensor] = {}
    inputs: list[Tensor] = []

    def keep(path: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            sign = torch.ones(output.shape[-1], dtype=output.dtype)
            if negated is not None and path == negated.module:
                sign[columns_of(negated)] = -1
            outputs[path] = (output * sign).detach().requires_grad_()
            return outputs[path].clone()  # Falcon adds to it in place

        return hook

    paths = {site.module for site in block.sites}
    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    last = model.get_submodule(site_named(block, into).module)
    handles.append(last.register_forward_pre_hook(lambda _module, args: inputs.append(args[0])))
    run(model)
    for handle in handles:
        handle.remove()
    return outputs, inputs[0]


def reaching(output: Tensor, source: Tensor) -> set[int]:
    """Columns of the first token of `source` that change `output`."""
    weighted = (output * torch.randn_like(output)).sum()
    gradient = torch.autograd.grad(weighted, source, retain_graph=True, allow_unused=True)[0]
    if gradient is None:
        return set()
    first = gradient.reshape(-1, gradient.shape[-1])[0]
    return set(first.abs().gt(1e-9).nonzero().flatten().tolist())


@every_case
def test_columns_are_those_of_query_key_and_value(case: str) -> None:
    """The first token's query changes nothing (it sees one key), its key changes what later tokens
    take, and only its value changes what it takes itself."""
    model = build(case)
    block = find_sites(model).blocks[-1]
    outputs, mixed = capture(model, block, "attention.o")
    for name, later, itself in (("q", 0, 0), ("k", 1, 0), ("v", 1, 1)):
        site = site_named(block, f"attention.{name}")
        mine = set(columns_of(site).tolist())
        assert len(mine) == site.out_features
        source = outputs[site.module]
        first = mixed.reshape(-1, mixed.shape[-1])[:1]
        assert reaching(mixed, source) & mine == (mine if later else set())
        assert reaching(first, source) & mine == (mine if itself else set())


@every_case
def test_down_takes_up_linearly_and_the_gate_not(case: str) -> None:
    model = build(case)
    block = find_sites(model).blocks[-1]
    gated = any(site.name == "mlp.gate" for site in block.sites)
    _, plain = capture(model, block, "mlp.down")
    _, turned = capture(model, block, "mlp.down", negated=site_named(block, "mlp.up"))
    assert torch.allclose(turned, -plain) == gated
    assert not torch.allclose(turned, plain)
    if gated:
        _, other = capture(model, block, "mlp.down", negated=site_named(block, "mlp.gate"))
        assert not torch.allclose(other, -plain)
        assert not torch.allclose(other, plain)


@every_case
def test_without_its_two_branches_a_block_hands_its_input_on(case: str) -> None:
    model = build(case)
    block = find_sites(model).blocks[-1]
    for path in (block.attention_out, block.mlp_out):
        model.get_submodule(path).register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    seen: list[tuple[Tensor, Tensor]] = []
    model.get_submodule(block.path).register_forward_hook(
        lambda _m, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
    )
    run(model)
    torch.testing.assert_close(seen[0][0], seen[0][1])


@every_case
def test_every_parameter_of_a_block_is_at_a_site_or_a_norm(case: str) -> None:
    model = build(case)
    sites = find_sites(model)
    for block in sites.blocks:
        known = {site.module for site in block.sites} | set(block.norms)
        owned = {id(p) for path in known for p in model.get_submodule(path).parameters()}
        assert {id(p) for p in model.get_submodule(block.path).parameters()} == owned


@every_case
def test_embedding_head_and_backbone_are_found(case: str) -> None:
    model = build(case)
    sites = find_sites(model)
    assert model.get_submodule(sites.embedding) is model.get_input_embeddings()
    assert sites.head is not None
    assert model.get_submodule(sites.head) is model.get_output_embeddings()
    assert model.get_submodule(sites.backbone) is model.base_model
    assert sites.final_norm is not None
    norm_outputs: list[Tensor] = []
    model.get_submodule(sites.final_norm).register_forward_hook(
        lambda _m, _a, out: norm_outputs.append(out)
    )
    assert torch.equal(run(model), norm_outputs[0])


@every_case
def test_widths_are_those_of_the_weight(case: str) -> None:
    model = build(case)
    for block in find_sites(model).blocks:
        for site in block.sites:
            weight = weight_of(model.get_submodule(site.module), site.kind)
            assert weight.shape[1] == site.in_features
            assert weight[columns_of(site)].shape[0] == site.out_features


def test_the_cases_cover_the_table() -> None:
    built = {build(case).config.model_type for case in CASES}
    elsewhere = {*ENCODERS, *SEQ2SEQ, *MIXTURES}  # each with tests of its own
    assert built == set(FAMILIES) - elsewhere


def test_weight_of_is_a_view_in_both_layouts() -> None:
    model = tiny_gpt2()
    weight = weight_of(model.transformer.h[0].mlp.c_fc, "conv1d")
    x = torch.randn(3, 32)
    torch.testing.assert_close(
        x @ weight.T + model.transformer.h[0].mlp.c_fc.bias, model.transformer.h[0].mlp.c_fc(x)
    )
    assert weight.data_ptr() == model.transformer.h[0].mlp.c_fc.weight.data_ptr()


def test_select_goes_block_by_block() -> None:
    sites = find_sites(tiny_llama())
    chosen = sites.select(["mlp.down", "attention.q"])
    assert [(site.block, site.name) for site in chosen] == [
        (0, "attention.q"),
        (0, "mlp.down"),
        (1, "attention.q"),
        (1, "mlp.down"),
    ]
    assert len(sites.select("all")) == 2 * 7


def test_select_refuses_an_unknown_name_and_lists_the_known() -> None:
    with pytest.raises(MethodError) as caught:
        find_sites(tiny_gpt2()).select(["qkv"])
    assert str(caught.value) == (
        "method.targets: 'qkv' is not a site of model type 'gpt2'; use one of attention.q, "
        "attention.k, attention.v, attention.o, mlp.up, mlp.down"
    )


def test_a_backbone_alone_has_no_head() -> None:
    sites = find_sites(AutoModel.from_config(tiny_llama().config))
    assert (sites.backbone, sites.head, sites.embedding) == ("", None, "embed_tokens")
    assert sites.blocks[1].path == "layers.1"


def test_quantised_linears_are_sites_too() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear4bit(32, 48, bias=False)
    assert find_sites(model).blocks[0].sites[5].out_features == 48


def test_an_architecture_outside_the_table_is_refused() -> None:
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    with pytest.raises(ModelError, match=r"MambaForCausalLM \(model type 'mamba'\) is not in"):
        find_sites(AutoModelForCausalLM.from_config(config))


def test_a_module_the_table_does_not_explain_is_named() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.extra = nn.Linear(32, 32)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.extra \(Linear\)"):
        find_sites(model)


def test_a_projection_that_is_no_linear_layer_is_named() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = nn.Bilinear(32, 32, 32)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj is a Bilinear"):
        find_sites(model)


def test_a_missing_branch_end_is_named() -> None:
    model = tiny_llama()
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(ModelError, match=r"model\.layers\.1 has no mlp\.down_proj"):
        find_sites(model)


def test_a_model_without_its_stack_is_refused() -> None:
    model = tiny_llama()
    del model.model.layers
    with pytest.raises(ModelError, match=r"has no blocks at model\.layers"):
        find_sites(model)
    model.model.layers = nn.Identity()
    with pytest.raises(ModelError, match=r"model\.layers of LlamaForCausalLM is no list"):
        find_sites(model)


def test_a_fused_projection_of_another_width_is_refused() -> None:
    model = tiny_gpt2()
    model.transformer.h[0].attn.c_attn.nf = 97
    with pytest.raises(ModelError, match=r"the 97 outputs of transformer\.h\.0\.attn\.c_attn"):
        find_sites(model)
