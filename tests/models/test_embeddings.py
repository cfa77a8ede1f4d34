"""Embeddings of texts, against plain formulas over transformers' own hidden states."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from classifiers import CONFIGS, DECODERS, save_base
from tunesmith import Head, ModelSettings
from tunesmith.data.classification import LabelledRow
from tunesmith.data.classification_collate import LabelledCollator
from tunesmith.models.embeddings import Pooling, embed, fingerprint, pool
from tunesmith.models.loading import load_model

TEXTS = [[1, 40, 2], [1, 50, 60, 70, 80, 90, 41, 2], [33]]
"""Unequal lengths; two end with the pad token, which is 2."""


def row(ids: list[int]) -> LabelledRow:
    return LabelledRow(
        np.array(ids, np.int32), np.zeros(len(ids), bool), (len(ids),), np.array(0), None
    )


def loaded(folder: Path, family: str) -> PreTrainedModel:
    save_base(folder, family)
    settings = ModelSettings(name=str(folder), dtype="float32")
    head = Head("sequence_classification", ("a", "b"))
    return load_model(settings, head=head).model


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_batch_gives_what_each_text_gives_alone(
    tmp_path: Path, family: str, pooling: Pooling
) -> None:
    model = loaded(tmp_path, family)
    collate = LabelledCollator(2, "right", positions=family in DECODERS)
    found = embed(model, collate([row(ids) for ids in TEXTS]), pooling)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    for vector, ids in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            states = plain(torch.tensor([ids])).last_hidden_state[0].double()
        expected = {"cls": states[0], "mean": states.sum(0) / len(ids), "last": states[-1]}
        torch.testing.assert_close(
            vector, expected[pooling].float(), atol=2e-5, rtol=1e-4
        )  # batched and single products round differently
    assert found.dtype == torch.float32


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_side_of_the_padding_has_no_part_in_it(
    tmp_path: Path, family: str, pooling: Pooling
) -> None:
    model = loaded(tmp_path, family)
    rows = [row(ids) for ids in TEXTS]
    right = embed(model, LabelledCollator(2, "right", positions=True)(rows), pooling)
    left = embed(model, LabelledCollator(2, "left", positions=True)(rows), pooling)
    torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)


def test_pooling_leaves_out_what_stands_at_padding() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    hidden[mask == 0] = torch.nan
    assert pool(hidden, mask, "cls").tolist() == [[1.0], [4.0]]
    assert pool(hidden, mask, "mean").tolist() == [[1.5], [4.0]]
    assert pool(hidden, mask, "last").tolist() == [[2.0], [4.0]]


def test_the_fingerprint_is_of_the_weights_and_not_of_their_place(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        save_base(tmp_path / name, "bert")
    weights = tmp_path / "three" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    one, two, three = (
        fingerprint(ModelSettings(name=str(tmp_path / name))) for name in ("one", "two", "three")
    )
    assert one == two != three
    assert fingerprint(ModelSettings(name=str(tmp_path / "one"), quantize="int8")) != one
