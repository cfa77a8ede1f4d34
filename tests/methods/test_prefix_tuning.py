"""Prefix tuning: PEFT and the base with real tokens in front as references, and what is refused."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, PreTrainedModel

from families import DECODERS, VOCAB, tiny_gemma2, tiny_gptj
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import LlamaAdapter, LoRA, PrefixTuning, PTuningV2
from tunesmith.methods.contract import Method
from tunesmith.methods.prefix_tuning import Encoder
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import NAME, enable_segments
from tunesmith.models.attention_layers import AttentionLayer
from tunesmith.models.loading import load_model, load_tokenizer
from tunesmith.models.settings import ModelSettings

Trained = Callable[[TunedModel], TunedModel]
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
WINDOWED = {"gemma2", "gemma3_text", "mistral"}
UNWINDOWED = {name: make for name, make in DECODERS.items() if name not in WINDOWED}
"""PEFT puts a prefix into the cache, where a short sliding window loses sight of it."""
every_family = pytest.mark.parametrize(
    "make",
    # PEFT makes as many key heads as Falcon's config has, which with multi_query has one.
    [make for name, make in UNWINDOWED.items() if name != "falcon"],
    ids=[name for name in UNWINDOWED if name != "falcon"],
)


def peft_prefix(base: PreTrainedModel, directory: Path, **settings: object) -> PeftModel:
    """Save a random prefix made by PEFT; return its model."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
    model = peft.get_peft_model(deepcopy(base), config)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("make", [*UNWINDOWED.values(), tiny_gemma2], ids=[*UNWINDOWED, "gemma2"])
def test_the_start_is_the_base_with_the_tokens_in_front(
    make: Callable[[], PreTrainedModel],
) -> None:
    model = make()
    torch.manual_seed(4)
    front = torch.randint(VOCAB, (1, 5)).expand(2, -1)
    expected = model(torch.cat([front, IDS], dim=1)).logits[:, 5:]
    torch.manual_seed(4)
    attach(model, PrefixTuning(length=5))
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("projection", [False, True])
def test_a_directory_that_peft_saved_gives_pefts_logits(
    make: Callable[[], PreTrainedModel], projection: bool, tmp_path: Path
) -> None:
    base = make()
    settings = {"prefix_projection": True, "encoder_hidden_size": 5} if projection else {}
    expected = peft_prefix(base, tmp_path / "a", **settings)(IDS).logits
    tuned = load_adapter(base, tmp_path / "a")
    logits = base(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    # and what is saved again says the same
    tuned.save(tmp_path / "b")
    load_adapter(tuned.detach(), tmp_path / "b")
    assert torch.equal(base(IDS).logits, logits)


@every_family
@pytest.mark.parametrize("save", [TunedModel.save, TunedModel.export_peft])
def test_peft_loads_what_is_saved_here_with_equal_logits(
    make: Callable[[], PreTrainedModel],
    save: Callable[[TunedModel, Path], None],
    trained: Trained,
    tmp_path: Path,
) -> None:
    tuned = trained(attach(make(), PrefixTuning(length=3)))
    expected = tuned.model(IDS).logits
    save(tuned, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@every_family
def test_the_same_prefix_gets_pefts_gradients(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    base = make()
    reference = peft_prefix(base, tmp_path / "a")
    tuned = load_adapter(base, tmp_path / "a")
    base(IDS, labels=IDS).loss.backward()
    reference(IDS, labels=IDS).loss.backward()
    ours = tuned.trainable().values()
    flat = torch.cat([p.grad.transpose(0, 1).flatten(1) for p in ours], dim=1)
    theirs = reference.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(flat, theirs, atol=1e-5, rtol=1e-5)


def test_the_network_is_the_papers_formula() -> None:
    layers = [AttentionLayer(f"{i}", "decoder", 4, 2, 3, 3, torch.device("cpu")) for i in range(2)]
    encoder = Encoder(PrefixTuning(length=5, reparametrise=True, hidden=7), 6, layers).double()
    inner, outer = encoder.inner, encoder.outer
    P = torch.tanh(encoder.P @ inner.weight.T + inner.bias) @ outer.weight.T + outer.bias
    for i in range(2):
        K, V = encoder.prefix(i)
        # rows are positions; of each layer first all heads' keys, then all heads' values
        torch.testing.assert_close(K, P[:, 12 * i : 12 * i + 6].view(5, 2, 3).transpose(0, 1))
        torch.testing.assert_close(V, P[:, 12 * i + 6 : 12 * i + 12].view(5, 2, 3).transpose(0, 1))


@every_family
def test_the_network_trains_and_is_dropped_when_saved(
    make: Callable[[], PreTrainedModel], trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(make(), PrefixTuning(length=3, reparametrise=True, hidden=8)))
    tuned.model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in tuned.trainable().values())
    expected = tuned.model(IDS).logits
    tuned.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert [name for name, x in stored.items() if x.shape[0] == 3] == ["prompt_embeddings"]
    loaded = load_adapter(tuned.detach(), tmp_path / "a")
    assert torch.equal(loaded.model(IDS).logits, expected)
    assert isinstance(loaded.parts[0].method, PrefixTuning)
    assert loaded.parts[0].method.reparametrise


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_the_network_gets_the_same_gradients_with_checkpointing(trained: Trained) -> None:
    tuned = trained(attach(DECODERS["llama"](), PrefixTuning(length=3, reparametrise=True)))
    tuned.model.train()

    def gradients() -> list[Tensor]:
        loss = tuned.model(IDS, labels=IDS).loss
        return list(torch.autograd.grad(loss, list(tuned.trainable().values())))

    plain = gradients()
    tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain)


def test_a_text_starts_the_prefix(tiny_model: Path) -> None:
    model = load_model(str(tiny_model), dtype=torch.float32).model
    words = load_tokenizer(ModelSettings(name=str(tiny_model)))("Sum up: ")["input_ids"]
    expected = model(torch.cat([torch.tensor([words]).expand(2, -1), IDS], dim=1)).logits
    tuned = attach(model, PrefixTuning(length=50, init="text", text="Sum up: "))
    torch.testing.assert_close(model(IDS).logits, expected[:, len(words) :], atol=1e-5, rtol=1e-5)
    assert next(iter(tuned.trainable().values())).shape[1] == len(words) == 8


@pytest.mark.parametrize("method", [PrefixTuning(length=3), PTuningV2(length=3), LlamaAdapter()])
def test_a_static_cache_generates_like_a_dynamic_one(method: Method, trained: Trained) -> None:
    model = trained(attach(DECODERS["qwen3"](), method)).model
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS, **options)
    static = model.generate(IDS, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


@pytest.mark.parametrize("method", [PrefixTuning(length=3), LlamaAdapter()])
def test_a_sliding_window_does_not_slide_past_the_prefix(method: Method, trained: Trained) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, sliding_window=4, **sizes
    )
    model = trained(attach(AutoModelForCausalLM.from_config(config).eval(), method)).model
    ids = torch.arange(3, 12)[None]
    plain = model(ids).logits
    assert enable_segments(model)
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    segments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    positions = torch.arange(9)[None]
    packed = model(ids, position_ids=positions, **segments, max_length_q=9, max_length_k=9).logits
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    # The last token's window does not reach the first ones, but the prefix reaches it.
    prefix = next(iter(model.base_model.layers[0].self_attn.children()))
    assert prefix is not None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    assert not torch.isclose(model(ids).logits[0, -1], plain[0, -1]).all()


def test_scores_that_are_capped_stay_eager_attention_bit_for_bit(trained: Trained) -> None:
    model = tiny_gemma2()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    expected = model(IDS, attention_mask=mask).logits
    tuned = trained(attach(model, PrefixTuning(length=3), LlamaAdapter()))
    assert not torch.equal(model(IDS, attention_mask=mask).logits[0], expected[0])
    with tuned.disabled():
        # A row of padding alone sees nothing, and what it then computes means nothing.
        got = model(IDS, attention_mask=mask).logits
        assert torch.equal(got[mask == 1], expected[mask == 1])
    assert tuned.detach().config._attn_implementation == "eager"


def test_methods_in_the_attention_compose_with_each_other_and_lora(trained: Trained) -> None:
    model = DECODERS["llama"]()
    base = model(IDS).logits
    tuned = attach(model, PrefixTuning(length=3), LlamaAdapter(), LoRA(rank=2), name="a")
    tuned = trained(attach(tuned, PrefixTuning(length=2), name="b"))
    both = model(IDS).logits
    with tuned.disabled("b"):
        assert not torch.equal(model(IDS).logits, both)
    with tuned.disabled():
        assert torch.equal(model(IDS).logits, base)
    tuned.attachments[0].detach()
    assert model.config._attn_implementation == NAME
    assert not torch.equal(model(IDS).logits, base)


def test_segments_can_be_enabled_before_or_after(trained: Trained) -> None:
    model = DECODERS["llama"]()
    tuned = attach(model, PrefixTuning(length=3))
    assert enable_segments(model)
    tuned.detach()
    assert model.config._attn_implementation == NAME
    attach(model, PrefixTuning(length=3)).detach()
    assert model.config._attn_implementation == NAME
    assert enable_segments(model)


def test_positions_are_counted_without_padding(trained: Trained) -> None:
    model = trained(attach(DECODERS["gpt2"](), PrefixTuning(length=3))).model
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    padded = model(IDS[:1], attention_mask=mask).logits[:, 2:]
    alone = model(IDS[:1, 2:]).logits
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    whole = model(inputs_embeds=model.transformer.wte(IDS)).logits
    torch.testing.assert_close(whole, model(IDS).logits)


def test_a_cache_counts_positions_on() -> None:
    model = attach(DECODERS["gpt2"](), PrefixTuning(length=3)).model
    expected = model(IDS).logits[:, 4:]
    first = model(IDS[:, :4], use_cache=True)
    rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, expected, atol=1e-5, rtol=1e-5)


def test_parameters_are_two_vectors_a_position_and_layer() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config())
    counts = attach(model, PrefixTuning(length=10, init="random")).parameter_counts()
    assert counts.trainable == 10 * 12 * 2 * 768
    assert round(100 * counts.trainable / counts.base, 1) == 0.1


@pytest.mark.parametrize("method", [PrefixTuning(), PTuningV2(), LlamaAdapter()])
def test_attention_that_is_not_routed_is_refused(method: Method) -> None:
    model = tiny_gptj()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(MethodError, match=r"GPTJForCausalLM has attention code of its own.* lora"):
        attach(model, method)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("method", [PrefixTuning(), PTuningV2(), LlamaAdapter()])
def test_another_attention_than_sdpa_is_refused(method: Method) -> None:
    model = DECODERS["llama"]()
    model.set_attn_implementation("eager")
    with pytest.raises(MethodError, match=r"model\.attention: .*'eager'.*; use auto"):
        attach(model, method)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("method", [PrefixTuning(), PTuningV2(), LlamaAdapter()])
def test_attention_that_is_changed_later_is_noticed(method: Method) -> None:
    tuned = attach(DECODERS["llama"](), method)
    tuned.model.set_attn_implementation("sdpa")
    with pytest.raises(MethodError, match="changed to 'sdpa'"):
        tuned.model(IDS)
    with tuned.disabled():
        tuned.model(IDS)


@pytest.mark.parametrize("method", [PrefixTuning(length=128), PTuningV2(length=128)])
def test_a_prefix_longer_than_the_context_is_refused(method: Method) -> None:
    model = DECODERS["llama"]()
    with pytest.raises(MethodError, match=r"method\.length: a prefix of 128 .* at most 127"):
        attach(model, method)
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in model.parameters())


def test_a_text_longer_than_the_positions_left_is_refused() -> None:
    model = attach(DECODERS["gpt2"](), PTuningV2(length=100)).model
    with pytest.raises(MethodError, match="100 and 29 tokens are more than the 128 positions"):
        model(torch.zeros(1, 29, dtype=torch.int64))
    model(torch.zeros(1, 28, dtype=torch.int64))


def test_the_same_name_twice_is_refused() -> None:
    tuned = attach(DECODERS["llama"](), PrefixTuning(length=2))
    with pytest.raises(MethodError, match="named 'default' is already attached"):
        attach(tuned, PrefixTuning(length=3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": 0},
        {"init": "text"},
        {"text": "words"},
        {"reparametrise": True, "init": "vocabulary"},
        {"hidden": 0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PrefixTuning.model_validate(wrong)


def test_a_text_needs_a_tokenizer_and_tokens(tiny_model: Path) -> None:
    with pytest.raises(MethodError, match=r"method\.text: .* no tokenizer"):
        attach(DECODERS["llama"](), PrefixTuning(init="text", text="words"))
    with pytest.raises(MethodError, match=r"method\.text: it has no tokens"):
        attach(load_model(str(tiny_model)).model, PrefixTuning(init="text", text=""))


def test_a_prefix_of_another_size_or_kind_is_refused(tmp_path: Path) -> None:
    base = DECODERS["llama"]()
    attach(base, PrefixTuning(length=3)).export_peft(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_transformer_submodules": 2}))
    with pytest.raises(AdapterError, match="encoder-decoder"):
        load_adapter(DECODERS["llama"](), tmp_path)
    file.write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.zeros(3, 5)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"\(3, 5\) .* needs \(3, 64\)"):
        load_adapter(DECODERS["llama"](), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(length=3),
        PrefixTuning(length=3, reparametrise=True),
        PTuningV2(length=3),
        LlamaAdapter(length=3, layers=2),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_compiles_as_one_graph(method: Method, family: str, trained: Trained) -> None:
    torch._dynamo.reset()
    tuned = trained(attach(DECODERS[family](), method))
    expected = tuned.model(IDS).logits
    with tuned.disabled():
        off = tuned.model(IDS).logits
    for block in tuned.sites.blocks:
        tuned.model.get_submodule(block.path).compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuned.model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    with tuned.disabled():
        torch.testing.assert_close(tuned.model(IDS).logits, off, atol=1e-5, rtol=1e-5)
    tuned.model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tuned.trainable().values())
