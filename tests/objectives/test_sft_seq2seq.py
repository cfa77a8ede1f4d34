"""The SFT loss of encoder-decoders against transformers' own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedModel,
    UMT5Config,
)

from tiny import VOCAB, tiny_bart, tiny_t5
from tunesmith.data.collate_pairs import PairCollator
from tunesmith.data.rows import TokenRow
from tunesmith.engine.task import num_tokens
from tunesmith.errors import ModelError
from tunesmith.models.encoder_decoder import start_token
from tunesmith.models.output_head import check_output_head
from tunesmith.objectives import SFT
from tunesmith.types import IGNORE, Batch

EOS = 2
SIZES = [(5, 3), (2, 7), (9, 1)]
"""Tokens read and written of each row, eos among the latter."""


def biased_bart() -> PreTrainedModel:
    model = tiny_bart()
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def unscaled_t5() -> PreTrainedModel:
    model = tiny_t5()
    model.config.scale_decoder_outputs = False
    return model


def other(config: type) -> Callable[[], PreTrainedModel]:
    """A tiny model of another type, in the words of T5's or BART's config."""
    like = tiny_t5() if "T5" in config.__name__ else tiny_bart()
    sizes = {k: v for k, v in like.config.to_dict().items() if k not in {"model_type", "dtype"}}
    # mBART takes the last token that is no padding for the one to start from: eos.
    return lambda: AutoModelForSeq2SeqLM.from_config(config(**sizes | {"pad_token_id": 1})).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": tiny_t5,
    "t5 unscaled": unscaled_t5,
    "t5 plain": lambda: tiny_t5(feed_forward_proj="relu"),
    "mt5": other(MT5Config),
    "umt5": other(UMT5Config),
    "bart": biased_bart,
    "mbart": other(MBartConfig),
    "marian": other(MarianConfig),
    "pegasus": other(PegasusConfig),
}


def rows() -> list[TokenRow]:
    generator = np.random.default_rng(0)
    return [
        TokenRow(
            np.append(generator.integers(3, VOCAB, read + written - 1), EOS).astype(np.int32),
            np.arange(read + written) >= read,
            (read + written,),
        )
        for read, written in SIZES
    ]


def batch_of(model: PreTrainedModel, chosen: list[TokenRow]) -> Batch:
    return PairCollator(model.config.pad_token_id, start_token(model))(chosen)


def transformers_own(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Its loss for the same tokens, for which it makes the decoder's inputs itself."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    return model(**inputs).loss


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    model = MODELS[name]()
    batch = batch_of(model, rows())
    terms = SFT().loss(model, batch)
    expected = transformers_own(model, batch)
    assert terms.count == SFT().count(batch) == sum(written for _, written in SIZES)
    torch.testing.assert_close(terms.total / terms.count, expected)
    ours = gradients(model, terms.total / terms.count)
    # The loss sums in another order, over logits up to 100 in T5.
    torch.testing.assert_close(ours, gradients(model, expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_understood(name: str) -> None:
    assert check_output_head(MODELS[name]()) < 1e-5


def test_a_scale_that_is_not_known_is_found() -> None:
    model = tiny_t5()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    with pytest.raises(ModelError, match="does more than a linear map"):
        check_output_head(model)


def test_accuracy_counts_the_likeliest_tokens() -> None:
    model = biased_bart()
    model.final_logits_bias[:, EOS] = 20.0
    batch = batch_of(model, rows())
    inputs = {key: batch[key] for key in batch if key != "labels"}
    right = (model(**inputs).logits.argmax(-1) == batch["labels"]).sum()
    assert SFT().loss(model, batch).metrics["accuracy"] == right == len(SIZES)


@pytest.mark.parametrize("make", [tiny_t5, biased_bart])
def test_padding_does_not_change_the_loss(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    together = SFT().loss(model, batch_of(model, rows())).total
    alone = [SFT().loss(model, batch_of(model, [row])).total for row in rows()]
    torch.testing.assert_close(together, torch.stack(alone).sum())


def test_tokens_are_counted_in_both_stacks() -> None:
    batch = batch_of(tiny_t5(), rows())
    assert num_tokens(batch) == sum(read + written for read, written in SIZES)
    assert int((batch["labels"] != IGNORE).sum()) == sum(written for _, written in SIZES)
