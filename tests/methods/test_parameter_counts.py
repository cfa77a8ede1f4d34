"""How many parameters a method trains: the numbers of the papers, on models of their sizes.

The models are on the meta device: shapes without memory.
"""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
)

from tunesmith.methods import (
    IA3,
    Adapter,
    BitFit,
    Compacter,
    LlamaAdapter,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    VeRA,
)
from tunesmith.methods.adapter import Dense
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import attach

LLAMA_7B = LlamaConfig(intermediate_size=11008)  # the rest of the defaults are Llama-7B's
BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
GPT2 = GPT2Config()
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
ROBERTA_BASE = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
T5_BASE = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)


def on_meta(config: Any) -> PreTrainedModel:
    auto = {
        BertConfig: AutoModelForMaskedLM,
        RobertaConfig: AutoModelForMaskedLM,
        T5Config: AutoModelForSeq2SeqLM,
    }.get(type(config), AutoModelForCausalLM)
    with torch.device("meta"):
        return auto.from_config(config)


@cache
def size(config_name: str) -> int:
    return sum(p.numel() for p in on_meta(globals()[config_name]).parameters())


def trained(config: Any, method: Method) -> int:
    with torch.device("meta"):
        tuned = attach(on_meta(config), method)
    return sum(p.numel() for p in tuned.trainable().values())


def test_an_adapters_two_maps_have_2_m_d_weights_and_their_biases() -> None:
    down, up = Dense(1024, 24), Dense(24, 1024)
    assert down.weight.numel() + up.weight.numel() == 49_152
    adapter = Adapter(bottleneck=24).module(1024)
    assert sum(p.numel() for p in adapter.parameters()) == 49_152 + 24 + 1024


def test_lora_has_2_r_d_for_a_square_matrix() -> None:
    count = trained(GPT2, LoRA(rank=4, targets=["attention.o"]))
    assert count == 12 * 2 * 4 * 768


def test_lora_on_q_and_v_of_gpt2_medium_is_the_papers_035_million() -> None:
    """Hu et al. 2021, table 3: 0.35 M at r = 4 in GPT-2 M.

    There q and v have a pair each, here the fused projection's two share A: of the paper's
    24 * 2 * (1024 + 1024) * 4 that leaves out 24 * 1024 * 4.
    """
    papers = 24 * 2 * 2 * 1024 * 4
    assert papers == 393_216
    count = trained(GPT2_MEDIUM, LoRA(rank=4, targets=["attention.q", "attention.v"]))
    assert count == papers - 24 * 1024 * 4


def test_lora_on_roberta_base_is_the_papers_03_million() -> None:
    """Hu et al. 2021, table 2: 0.3 M at r = 8 on q and v."""
    count = trained(ROBERTA_BASE, LoRA(rank=8, targets=["attention.q", "attention.v"]))
    assert count == 12 * 2 * 2 * 8 * 768 == 294_912


def test_vera_and_lora_on_roberta_base_are_those_of_veras_table_1() -> None:
    """Kopiczko et al. 2024, table 1: RoBERTa-base, q and v: LoRA 36.8K and 294.9K, VeRA 18.4K.

    The ranks are 1 and 8, and 1; at rank 256 VeRA has 24.6K.
    """
    qv = ["attention.q", "attention.v"]
    assert trained(ROBERTA_BASE, LoRA(rank=1, targets=qv)) == 36_864
    assert trained(ROBERTA_BASE, LoRA(rank=8, targets=qv)) == 294_912
    assert trained(ROBERTA_BASE, VeRA(rank=1, targets=qv)) == 18_456
    assert trained(ROBERTA_BASE, VeRA(rank=256, targets=qv)) == 24_576


def test_bitfit_on_bert_base_is_under_a_tenth_of_a_percent() -> None:
    share = trained(BERT_BASE, BitFit()) / size("BERT_BASE")
    assert 0.0005 < share < 0.001


def test_bitfits_small_variant_on_bert_large_is_004_percent() -> None:
    """Ben Zaken et al. 2022, table 2: query and mlp-intermediate, 0.04 %."""
    small = BitFit(targets=["attention.q", "mlp.up"])
    assert trained(BERT_LARGE, small) == 24 * (1024 + 4096)
    assert round(100 * trained(BERT_LARGE, small) / size("BERT_LARGE"), 2) == 0.04


def test_llama_adapter_on_llama_7b_is_12_million() -> None:
    """Zhang et al. 2023: prompts of 10 in the top 30 layers, 1.2 M, and a gate for each head."""
    count = trained(LLAMA_7B, LlamaAdapter(length=10, layers=30))
    assert count == 30 * (10 * 4096 + 32) == 1_229_760
    assert round(size("LLAMA_7B") / 1e9, 1) == 6.7


@pytest.mark.parametrize("name", ["BERT_BASE", "BERT_LARGE"])
def test_houlsbys_36_percent_lie_between_the_papers_sizes(name: str) -> None:
    """Houlsby et al. 2019, table 1: 3.6 % a task, with the best of 8, 64 and 256 for each."""
    config = globals()[name]
    shares = [trained(config, _houlsby(m)) / size(name) for m in (8, 64, 256)]
    assert shares[0] < 0.004
    assert shares[1] < 0.036 < shares[2]


def test_houlsby_has_two_adapters_a_layer() -> None:
    assert trained(BERT_BASE, _houlsby(64)) == 12 * 2 * (2 * 64 * 768 + 64 + 768)


def _houlsby(bottleneck: int) -> Adapter:
    return Adapter(placement="houlsby", bottleneck=bottleneck)


def test_prefix_tuning_on_gpt2_is_a_tenth_of_a_percent() -> None:
    """Li & Liang 2021: 0.1 % at a prefix of 5 to 10."""
    for config, name in ((GPT2, "GPT2"), (GPT2_MEDIUM, "GPT2_MEDIUM")):
        layers, width = config.n_layer, config.n_embd
        count = trained(config, PrefixTuning(length=5, init="random"))
        assert count == layers * 2 * 5 * width
        assert round(100 * count / size(name), 1) == 0.1


def test_p_tuning_v2_has_two_vectors_a_prompt_and_layer() -> None:
    assert trained(BERT_BASE, PTuningV2(length=20)) == 12 * 2 * 20 * 768


def test_prompt_tuning_has_a_vector_a_token() -> None:
    assert trained(GPT2, PromptTuning(tokens=20, init="random")) == 20 * 768


def test_compacter_on_t5_base_is_the_papers_0073_and_0047_percent() -> None:
    """Mahabadi et al. 2021, table 1: Compacter 0.073 %, Compacter++ 0.047 % of T5-base.

    At n = 4 and a bottleneck of 24. The authors train the model's 62 norms besides (2 in a block of
    the encoder, 3 in one of the decoder, and the final two), and have no adapter after the cross
    attention, as here.
    """
    norms = (12 * 2 + 12 * 3 + 2) * 768
    each = 4 * (768 // 4 + 24 // 4) * 2 + 24 + 768
    full = trained(T5_BASE, Compacter(placement="houlsby", products=4, bottleneck=24))
    plus = trained(T5_BASE, Compacter(placement="pfeiffer", products=4, bottleneck=24))
    assert plus == 24 * each + 4**3
    assert full == 60 * each + 4**3
    assert round(100 * (plus + norms) / size("T5_BASE"), 3) == 0.047
    assert round(100 * (full - 12 * each + norms) / size("T5_BASE"), 3) == 0.073


def test_ia3_on_t5_has_keys_values_and_inner_activations() -> None:
    """Liu et al. 2022, section 3.3: L (d_k + d_v + d_ff) + L (2 d_k + 2 d_v + d_ff)."""
    d_k = d_v = 12 * 64
    expected = 12 * (d_k + d_v + 3072) + 12 * (2 * d_k + 2 * d_v + 3072)
    assert trained(T5_BASE, IA3()) == expected


@pytest.mark.parametrize("config", [GPT2, BERT_BASE])
def test_attaching_adds_nothing_to_the_base(config: Any) -> None:
    model = on_meta(config)
    names = [name for name, _ in model.named_parameters()]
    attach(model, LoRA(rank=1)).detach()
    assert [name for name, _ in model.named_parameters()] == names
