"""Classification heads: what they read, how they start, and that loading never loses them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from classifiers import CONFIGS, DECODERS, ENCODERS, save_base
from tunesmith.data.classification import LabelledRow
from tunesmith.data.classification_collate import LabelledCollator
from tunesmith.errors import ModelError
from tunesmith.models.attention import enable_segments
from tunesmith.models.heads import Head, head_logits, head_paths, last_tokens
from tunesmith.models.loading import load_model

LABELS = ("a", "b", "c")
PAD = 2


def rows(*lengths: int) -> list[LabelledRow]:
    """Random texts; every second one ends with the pad token, as text."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 250, (length,), generator=generator)
        if number % 2:
            ids[-1] = PAD
            ids[length // 2] = PAD
        made.append(
            LabelledRow(
                ids.int().numpy(),
                torch.zeros(length, dtype=torch.bool).numpy(),
                (length,),
                torch.tensor(number % 3).numpy(),
                None,
            )
        )
    return made


def classifier(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | {"num_labels": 3})
    return AutoModelForSequenceClassification.from_config(config).eval()


def collated(texts: list[LabelledRow], padding: str, *, positions: bool) -> dict[str, torch.Tensor]:
    return LabelledCollator(PAD, padding, positions=positions)(texts)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("padding", ["right", "left", "free"])
def test_a_decoder_reads_the_last_real_token_whatever_is_beside_it(
    family: str, padding: str
) -> None:
    model = classifier(family)
    if padding == "free":
        assert enable_segments(model)
    texts = rows(1, 9, 4, 6, 2)
    together = head_logits(model, collated(texts, padding, positions=True))
    for text, logits in zip(texts, together, strict=True):
        ids = torch.from_numpy(text.input_ids)[None].long()
        hidden = model.base_model(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(logits, model.score(hidden), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_without_pad_tokens_in_the_text_transformers_reads_the_same_token(family: str) -> None:
    model = classifier(family)
    batch = collated(rows(5, 7)[:1] + rows(3)[:1], "right", positions=True)
    labels = batch["labels"]
    expected = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    torch.testing.assert_close(head_logits(model, batch), expected)
    assert labels.tolist() == [0, 0]


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
def test_padding_does_not_change_an_encoders_logits(family: str) -> None:
    model = classifier(family)
    # RoBERTa counts its positions by the pad token, in the text too: such texts are its own.
    texts = [row for row in rows(4, 9, 6, 3, 2) if PAD not in row.input_ids]
    together = head_logits(model, collated(texts, "right", positions=False))
    alone = [head_logits(model, collated([text], "right", positions=False)) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_the_last_token_is_found_by_mask_bounds_or_length() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    assert last_tokens({"input_ids": ids, "attention_mask": mask})[1].tolist() == [2, 0]
    assert last_tokens({"input_ids": ids})[1].tolist() == [3, 3]
    bounds = torch.tensor([0, 1, 4], dtype=torch.int32)
    assert last_tokens({"input_ids": ids[:1], "cu_seq_lens_q": bounds})[1].tolist() == [0, 3]


HEADS = {
    "bert": ("bert.pooler", "classifier"),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "modernbert": ("head", "classifier"),
    "deberta": ("pooler", "classifier"),
    "llama": ("score",),
    "gpt2": ("score",),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_head_is_all_between_hidden_states_and_classes(family: str) -> None:
    assert head_paths(classifier(family)) == HEADS[family]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification"])
def test_a_new_head_comes_from_its_seed_alone(tmp_path: Path, family: str, kind: str) -> None:
    save_base(tmp_path, family)
    found = []
    for seed, before in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(before)
        model = load_model(str(tmp_path), dtype=torch.float32, head=Head(kind, LABELS, seed=seed))
        found.append(model.model.state_dict())
        assert model.model.config.id2label == dict(enumerate(LABELS))
    one, same, other = found
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert differing
    loader = {
        "sequence_classification": AutoModelForSequenceClassification,
        "token_classification": AutoModelForTokenClassification,
    }[kind]
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | {"num_labels": 3})
    paths = head_paths(loader.from_config(config))
    assert all(name.startswith(paths) for name in differing)


def test_new_weights_have_the_configs_spread_and_biases_are_zero(tmp_path: Path) -> None:
    save_base(tmp_path, "roberta")
    head = Head("sequence_classification", LABELS)
    model = load_model(str(tmp_path), dtype=torch.float32, head=head).model
    assert model.classifier.dense.weight.std().item() == pytest.approx(0.15, rel=0.1)
    assert model.classifier.dense.bias.abs().max() == 0


def test_a_head_in_the_files_is_kept(tmp_path: Path) -> None:
    save_base(tmp_path, "bert")
    model = classifier("bert")
    nn.init.ones_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    head = Head("sequence_classification", LABELS)
    loaded = load_model(str(tmp_path), dtype=torch.float32, head=head).model
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_a_head_for_other_classes_starts_anew(tmp_path: Path) -> None:
    save_base(tmp_path, "bert")
    classifier("bert").save_pretrained(tmp_path)
    head = Head("sequence_classification", ("yes", "no"))
    loaded = load_model(str(tmp_path), dtype=torch.float32, head=head).model
    assert loaded.classifier.weight.shape == (2, 32)
    assert loaded.classifier.weight.std().item() == pytest.approx(0.15, rel=0.3)


def test_a_backbone_with_missing_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_base(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has no weights for 1 parameters"):
        load_model(str(tmp_path), head=Head("sequence_classification", LABELS))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        load_model(str(tmp_path), head=Head("sequence_classification", LABELS))


def test_an_architecture_without_such_a_head_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from tiny import VOCAB, tiny_tokenizer

    config = BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2, pad_token_id=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"bloom"', '"mamba"')
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded with a sequence_classification head"):
        load_model(str(tmp_path), head=Head("sequence_classification", LABELS))
