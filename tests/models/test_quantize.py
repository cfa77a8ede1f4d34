"""Quantised bases against the plain models that their codes stand for, and against transformers."""

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    FalconConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith.errors import MethodError, ModelError, SetupError
from tunesmith.methods import AdaLoRA, Adapter, BitFit, Full, LastLayer, LoRA, VeRA
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models import quantize
from tunesmith.models.heads import Head
from tunesmith.models.loading import load_model
from tunesmith.models.quantize import (
    bytes_in_memory,
    dequantise,
    dequantised,
    is_quantised,
    keep_trainable,
    quantise,
)
from tunesmith.models.quantize_linear import Fp8Linear, Nf4Linear
from tunesmith.models.settings import ModelSettings

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(3, 27).reshape(2, 12)
KINDS = ["nf4", "int8", "fp8"]
EXACT = ["nf4", "int8"]
"""Kinds whose products, outside of generation on CUDA, are those of the values of the codes."""
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
kinds = pytest.mark.parametrize("kind", KINDS)
exact_kinds = pytest.mark.parametrize("kind", EXACT)
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
Make = Callable[..., PreTrainedModel]


def wide_llama(**changes: object) -> PreTrainedModel:
    """Wide enough for the layout that bitsandbytes repacks into: whole blocks of 64 in a row."""
    return tiny_llama(hidden_size=64, intermediate_size=64, **changes)


def wide_gpt2(**changes: object) -> PreTrainedModel:
    return tiny_gpt2(n_embd=64, **changes)


WIDE = {tiny_llama: wide_llama, tiny_gpt2: wide_gpt2}


def settings(kind: str, **changes: object) -> ModelSettings:
    return ModelSettings.model_validate({"name": "tiny", "quantize": kind} | changes)


def plain(make: Make = tiny_llama) -> PreTrainedModel:
    torch.manual_seed(0)
    return make(initializer_range=0.2)


def base(kind: str, make: Make = tiny_llama, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = plain(make).to(dtype)
    quantise(model, settings(kind), device="cpu")
    return model


def by_hand(module: nn.Module) -> Tensor:
    """The weight (out, in), float32, by the library's own functions, or its layout."""
    if isinstance(module, Nf4Linear):
        return nf4_by_hand(module)
    if isinstance(module, Fp8Linear):
        return module.weight.view(torch.float8_e4m3fn).float() * module.scales
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.float() * (scales / 127)[:, None]


def nf4_by_hand(module: Nf4Linear) -> Tensor:
    """Every weight in a loop over the blocks, with the library's own scales."""
    absmax = module.absmax
    if module.absmax_scales is not None:
        codes = bnb.functional.QuantState(
            absmax=module.absmax_scales,
            code=module.absmax_levels,
            blocksize=256,
            dtype=torch.float32,
        )
        absmax = bnb.functional.dequantize_blockwise(absmax, codes) + module.absmax_offset
    upper, lower = module.weight.flatten() // 16, module.weight.flatten() % 16
    places = torch.stack([upper, lower], 1).flatten().long()
    count = module.out_features * module.in_features
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")[places][:count]
    values = [part * scale for part, scale in zip(levels.split(64), absmax, strict=True)]
    return torch.cat(values).view(module.out_features, module.in_features)


def reference(kind: str, make: Make = tiny_llama) -> PreTrainedModel:
    """A plain float32 model with the values that the codes of `base` stand for."""
    quantised, model = base(kind, make), plain(make)
    for path, module in model.named_modules():
        codes = quantised.get_submodule(path)
        if is_quantised(codes):
            weight = by_hand(codes)
            module.weight.data = weight.T.clone() if isinstance(module, Conv1D) else weight
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


def gradients(tuned: TunedModel) -> dict[str, Tensor]:
    tuned.model.train()
    tuned.model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in tuned.trainable().items() if p.grad is not None}


def lora_of(model: PreTrainedModel, **changes: object) -> TunedModel:
    """LoRA with a B that is not zero, the same for the same shapes."""
    torch.manual_seed(1)
    tuned = attach(model, LoRA.model_validate({"rank": 4} | changes))
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return tuned


@exact_kinds
@models
def test_logits_and_gradients_are_those_of_the_dequantised_model(kind: str, make: Make) -> None:
    ours, theirs = lora_of(base(kind, make)), lora_of(reference(kind, make))
    found, expected = gradients(ours), gradients(theirs)
    assert found.keys() == ours.trainable().keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ours.model), logits(theirs.model), atol=1e-5, rtol=1e-5)


@exact_kinds
def test_an_evaluation_before_training_changes_no_gradient(kind: str) -> None:
    ours, theirs = lora_of(base(kind, wide_llama)), lora_of(reference(kind, wide_llama))
    ours.model.eval()
    logits(ours.model)
    found = gradients(ours)
    assert found.keys() == ours.trainable().keys()
    torch.testing.assert_close(found, gradients(theirs), atol=1e-5, rtol=1e-5)


def by_transformers(kind: str, make: Make, folder: Path) -> PreTrainedModel:
    """The model as transformers quantises it, saved plain in `folder` before."""
    plain(make).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    how = {"nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}[kind]
    if kind == "nf4":
        how |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(**how),
    )
    keep_trainable(model)
    return model


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="bitsandbytes repacks on AVX512-BF16 only"
)
def test_weights_that_were_repacked_for_inference_are_refused(tmp_path: Path) -> None:
    model = by_transformers("nf4", wide_llama, tmp_path)
    expected = logits(model)
    assert torch.equal(logits(model), expected)
    for module in model.modules():
        if is_quantised(module):
            module.support_avx512bf16_for_cpu = True  # as bitsandbytes has it
    assert not torch.equal(logits(model), expected)
    with pytest.raises(ModelError, match=r"q_proj was run before .*load the model again"):
        attach(model, LoRA(rank=4))


@exact_kinds
@models
def test_codes_and_logits_are_those_of_transformers(kind: str, make: Make, tmp_path: Path) -> None:
    # bitsandbytes' CPU kernel takes wrong scales where a row is not whole blocks of 64.
    theirs = by_transformers(kind, WIDE[make], tmp_path)
    ours = load_model(settings(kind, name=str(tmp_path)), dtype=torch.float32).model
    found = [path for path, module in ours.named_modules() if is_quantised(module)]
    assert found == [path for path, module in theirs.named_modules() if is_quantised(module)]
    for path in found:
        codes = theirs.get_submodule(path).weight.data
        assert torch.equal(ours.get_submodule(path).weight.data, codes)
    expected = logits(theirs)
    torch.testing.assert_close(logits(ours), expected)
    assert torch.equal(logits(attach(theirs, LoRA(rank=4)).model), expected)


@kinds
@models
def test_only_the_linear_maps_of_the_blocks_are_quantised(kind: str, make: Make) -> None:
    before, after = plain(make), base(kind, make)
    changed = {path for path, module in after.named_modules() if is_quantised(module)}
    linear = {p for p, m in before.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert changed == linear - {"lm_head"}
    same = {n: p for n, p in before.named_parameters() if n.removesuffix(".weight") not in changed}
    assert all(torch.equal(after.get_parameter(name), p) for name, p in same.items())
    tied = before.lm_head.weight is before.get_input_embeddings().weight
    assert (after.lm_head.weight is after.get_input_embeddings().weight) == tied


def test_what_the_architecture_wants_in_float32_stays() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    quantise(model, settings("nf4"), device="cpu")
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert is_quantised(feed_forward.wi)
    assert not is_quantised(feed_forward.wo)
    assert model(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()


def test_a_linear_class_of_an_architecture_is_quantised_too() -> None:
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    quantise(model, settings("nf4"), device="cpu")
    assert isinstance(model.transformer.h[0].mlp.dense_h_to_4h, Nf4Linear)
    plain_again = deepcopy(model)
    dequantise(plain_again)
    assert type(plain_again.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
    torch.testing.assert_close(logits(model), logits(plain_again))


def test_double_quantisation_saves_three_of_eight_bits_a_weight_in_scales() -> None:
    modules, scales = {}, {}
    for double in (False, True):
        model = plain(lambda **c: tiny_llama(hidden_size=256, intermediate_size=512, **c))
        quantise(model, settings("nf4", double_quantize=double), device="cpu")
        modules[double] = [module for module in model.modules() if is_quantised(module)]
        codes = sum(module.weight.numel() for module in modules[double])
        scales[double] = 8 * (bytes_in_memory(modules[double]) - codes) / (2 * codes)
    assert scales[False] == 32 / 64
    # 8 / 64 + 32 / (64 * 256), as in the paper, and four bytes a layer for the mean.
    assert scales[True] == pytest.approx(8 / 64 + 32 / (64 * 256), abs=2e-3)


@kinds
def test_parameters_are_counted_as_weights_and_not_as_bytes(kind: str) -> None:
    assert (
        attach(base(kind), LoRA(rank=4)).parameter_counts()
        == attach(plain(), LoRA(rank=4)).parameter_counts()
    )


@kinds
@models
@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4, dora=True),
        LoRA(rank=4, init="pissa"),
        LoRA(rank=4, init="olora"),
        VeRA(rank=4),
        AdaLoRA(rank=4, target_rank=2),
    ],
    ids=["dora", "pissa", "olora", "vera", "adalora"],
)
def test_what_reads_the_weight_starts_as_the_quantised_base(
    kind: str, make: Make, method: Method
) -> None:
    tuned = attach(base(kind, make), method)
    assert torch.equal(logits(tuned.model), logits(base(kind, make)))


@exact_kinds
@pytest.mark.parametrize("changes", [{"dora": True}, {"init": "pissa"}], ids=["dora", "pissa"])
def test_what_reads_the_weight_reads_what_the_codes_stand_for(
    kind: str, changes: dict[str, object]
) -> None:
    ours, theirs = lora_of(base(kind), **changes), lora_of(reference(kind), **changes)
    # Singular vectors amplify the last bits of the values, in which orders of products differ.
    torch.testing.assert_close(gradients(ours), gradients(theirs), atol=1e-4, rtol=1e-4)


@exact_kinds
@models
def test_merged_is_the_dequantised_model_with_the_update(kind: str, make: Make) -> None:
    ours, theirs = lora_of(base(kind, make)), lora_of(reference(kind, make))
    before = logits(ours.model)
    codes = {path: m.weight for path, m in ours.model.named_modules() if is_quantised(m)}
    copies = {path: weight.data.clone() for path, weight in codes.items()}
    theirs.merge()
    with ours.merged() as merged:
        assert not any(is_quantised(module) for module in merged.modules())
        torch.testing.assert_close(logits(merged), logits(theirs.model), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(ours.model), before)
    for path, weight in codes.items():
        assert ours.model.get_submodule(path).weight is weight
        assert torch.equal(weight.data, copies[path])
    assert gradients(ours).keys() == ours.trainable().keys()


@kinds
def test_detaching_a_merged_method_leaves_the_quantised_base(kind: str) -> None:
    tuned = lora_of(base(kind))
    tuned.merge()
    assert torch.equal(logits(tuned.detach()), logits(base(kind)))


@kinds
def test_what_cannot_merge_leaves_the_codes(kind: str) -> None:
    tuned = attach(base(kind), Adapter(bottleneck=4))
    with pytest.raises(MethodError, match="activation between"):
        tuned.merge()
    assert torch.equal(logits(tuned.model), logits(base(kind)))


@kinds
@models
def test_an_exported_model_is_plain(kind: str, make: Make, tmp_path: Path) -> None:
    tuned = lora_of(base(kind, make))
    with tuned.merged() as merged:
        expected = logits(merged)
    tuned.export_model(tmp_path / "plain")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not hasattr(written.config, "quantization_config")
    assert {p.dtype for p in written.parameters()} == {torch.float32}
    assert torch.equal(logits(written), expected)


@exact_kinds
@models
def test_what_transformers_quantised_is_exported_plain_as_well(
    kind: str, make: Make, tmp_path: Path
) -> None:
    tuned = lora_of(by_transformers(kind, make, tmp_path / "theirs"))
    before = logits(tuned.model)
    with tuned.merged() as merged:
        expected = logits(merged)
    tuned.export_model(tmp_path / "plain")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not any(is_quantised(module) for module in written.modules())
    assert torch.equal(logits(written), expected)
    assert torch.equal(logits(tuned.model), before)
    assert tuned.model.config.quantization_config.quant_method == "bitsandbytes"


@kinds
@models
def test_a_saved_adapter_loads_on_a_quantised_and_on_a_plain_base(
    kind: str, make: Make, tmp_path: Path
) -> None:
    tuned = lora_of(base(kind, make))
    tuned.save(tmp_path / "adapter")
    assert torch.equal(
        logits(load_adapter(base(kind, make), tmp_path / "adapter").model), logits(tuned.model)
    )
    on_plain = load_adapter(plain(make), tmp_path / "adapter")
    state = on_plain.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tuned.state_dict().items())


@kinds
def test_off_is_the_quantised_base(kind: str) -> None:
    tuned = lora_of(base(kind))
    own = logits(base(kind))
    assert not torch.equal(logits(tuned.model), own)
    with tuned.disabled():
        assert torch.equal(logits(tuned.model), own)


@kinds
@pytest.mark.parametrize("method", [Full(), LastLayer()], ids=["full", "last_layer"])
def test_what_trains_the_codes_is_refused(kind: str, method: Method) -> None:
    with pytest.raises(MethodError, match=r"is quantised .*model\.quantize: none"):
        attach(base(kind), method)


@kinds
@pytest.mark.parametrize("method", [BitFit(), LastLayer(blocks=0, head=True, allow_tied=True)])
def test_what_is_not_quantised_trains(kind: str, method: Method) -> None:
    tuned = attach(base(kind, tiny_gpt2), method)
    assert gradients(tuned).keys() == tuned.trainable().keys()


@kinds
def test_products_in_another_dtype_leave_the_bias_as_it_is(kind: str) -> None:
    model = base(kind, tiny_gpt2)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("bias")} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_the_values_of_codes_are_float32_whatever_the_model_is(
    kind: str, dtype: torch.dtype
) -> None:
    module = base(kind, dtype=dtype).model.layers[0].mlp.up_proj
    weight = dequantised(module)
    assert weight.dtype == torch.float32
    assert weight.shape == (48, 32)
    own = by_hand(module)
    torch.testing.assert_close(weight.to(own.dtype), own)
    again = dequantised(module)
    logits_before = module(torch.ones(1, 32, dtype=dtype))  # moves the scales of int8
    assert logits_before.isfinite().all()
    assert torch.equal(dequantised(module), again)


@kinds
def test_an_adapter_trains_on_a_bfloat16_base(kind: str) -> None:
    tuned = attach(base(kind, dtype=torch.bfloat16), LoRA(rank=4))
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(4):
        tuned.model.train()
        loss = tuned.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}


@kinds
def test_a_classification_head_is_not_quantised(kind: str, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    AutoModelForSequenceClassification.from_config(config).bert.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    head = Head("sequence_classification", ("no", "yes"))
    model = load_model(settings(kind, name=str(tmp_path)), dtype=torch.float32, head=head).model
    plain_one = load_model(str(tmp_path), dtype=torch.float32, head=head).model
    assert is_quantised(model.bert.encoder.layer[0].attention.self.query)
    assert torch.equal(model.classifier.weight, plain_one.classifier.weight)
    assert torch.equal(model.bert.pooler.dense.weight, plain_one.bert.pooler.dense.weight)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SetupError, match=r"^model\.quantize: nf4 .*'tunesmith\[quantize\]'$"):
        load_model(settings("nf4", name="nowhere"))


def test_a_device_that_the_library_does_not_know_is_refused() -> None:
    with pytest.raises(SetupError, match="int8 runs on cpu and cuda and not on 'mps'"):
        load_model(settings("int8", name="nowhere"), device="mps")


@pytest.mark.parametrize(
    ("asked", "instead"),
    [({"quantize": "fp8"}, "nf4"), ({"quantize": "nf4", "products": "float8"}, "dtype")],
    ids=["fp8", "nf4"],
)
def test_a_gpu_without_float8_is_refused(asked: dict[str, object], instead: str) -> None:
    wanted = ModelSettings.model_validate({"name": "tiny"} | asked)
    quantize._require_float8((8, 9), wanted)
    with pytest.raises(SetupError, match=rf"capability 8\.9 or more .*has 8\.6; use .*{instead}$"):
        quantize._require_float8((8, 6), wanted)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_float8_products_of_what_has_none_are_refused(kind: str) -> None:
    with pytest.raises(ValidationError, match="products: float8 has no effect"):
        settings(kind, products="float8")


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_casting_a_model_changes_no_value_of_its_codes(kind: str) -> None:
    module = base(kind).model.layers[0].mlp.up_proj
    before = dequantised(module)
    module.bfloat16()
    assert torch.equal(dequantised(module), before)
    assert set(module.state_dict()) == {"weight"}
