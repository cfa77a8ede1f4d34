"""`tunesmith sites`: the map of a model, from its config alone."""

import json
from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    T5Config,
)

from tunesmith.cli import main
from tunesmith.jobs.sites import map_sites

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    architectures=["LlamaForCausalLM"],
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"])


def saved(config: PreTrainedConfig, directory: Path) -> str:
    """A directory with a config and no weights."""
    config.save_pretrained(directory)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    return str(directory)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_blocks_alike_are_one_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = said(capsys, "sites", saved(LLAMA, tmp_path))
    assert "model.layers.0-2 (decoder, 3 blocks alike)" in shown
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert "attention.k self_attn.k_proj linear 32 -> 16" in lines
    assert "mlp.down mlp.down_proj linear 48 -> 32" in lines
    assert "attention.out self_attn.o_proj output" in lines
    assert "norm input_layernorm norm" in lines
    assert "head lm_head" in lines
    assert "embedding model.embed_tokens" in lines
    assert lines[-1].startswith("targets: [attention.q, attention.k, attention.v, attention.o, mlp")


def test_columns_of_a_fused_projection_are_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shown = said(capsys, "sites", saved(GPT2, tmp_path))
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert "attention.k attn.c_attn conv1d 32 -> 32 32:64" in lines


def test_json_is_the_same_map(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(said(capsys, "sites", "--json", saved(GPT2, tmp_path)))
    (group,) = found["groups"]
    assert (group["path"], group["count"], group["stack"]) == ("transformer.h.0-1", 2, "decoder")
    assert [site["columns"] for site in group["sites"][:3]] == [[[0, 32]], [[32, 64]], [[64, 96]]]
    assert found["head"] == "lm_head"
    assert found["final_norm"] == "transformer.ln_f"


def test_blocks_that_differ_are_tables_of_their_own(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4
    )
    groups = map_sites(saved(config, tmp_path)).groups
    assert [(group.stack, group.path) for group in groups] == [
        ("encoder", "encoder.block.0-1"),
        ("decoder", "decoder.block.0-2"),
    ]
    assert groups[0].cross_out is None
    assert groups[1].cross_out is not None


def test_an_encoder_is_mapped_as_it_was_saved(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        architectures=["BertModel"],
    )
    found = map_sites(saved(config, tmp_path))
    assert found.groups[0].path == "encoder.layer.0-1"
    assert found.head is None
    assert found.backbone == ""


def test_experts_are_counted(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    (group,) = map_sites(saved(config, tmp_path)).groups
    assert group.path == "model.layers.0"
    assert {site.num_experts for site in group.sites if site.name.startswith("mlp.")} == {4}


def test_an_architecture_that_is_not_known_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(SystemExit) as stopped:
        main(["sites", saved(config, tmp_path)])
    assert stopped.value.code == 2
    assert "(model type 'mamba') is not in the architecture table" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, '{"model_type": "nonesuch"}', "{"])
def test_what_is_no_model_is_refused(
    content: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["sites", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: model.name: ")
