"""P-tuning v2: the base with past keys and values as the reference."""

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from transformers import DynamicCache, PreTrainedModel

from families import DECODERS, VOCAB
from tunesmith.errors import MethodError
from tunesmith.methods import PTuningV2
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


# A short sliding window loses sight of a past in the cache, but not of what stands before the text.
WINDOWED = {"gemma2", "gemma3_text", "mistral"}
UNWINDOWED = {name: make for name, make in DECODERS.items() if name not in WINDOWED}


@pytest.mark.parametrize("make", UNWINDOWED.values(), ids=UNWINDOWED.keys())
def test_prompts_are_a_past_that_the_text_follows(
    make: Callable[[], PreTrainedModel], trained: Trained
) -> None:
    tuned = trained(attach(make(), PTuningV2(length=3)))
    loss = tuned.model(IDS, labels=IDS).loss
    gradients = torch.autograd.grad(loss, list(tuned.trainable().values()))
    values = [p.detach().clone().requires_grad_() for p in tuned.trainable().values()]
    base = tuned.detach()
    rows = [value[None].expand(2, -1, -1, -1) for value in values]
    past = DynamicCache(list(zip(rows[::2], rows[1::2], strict=True)))
    expected = base(IDS, labels=IDS, past_key_values=past).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, values))


def test_the_start_is_small_and_random() -> None:
    tuned = attach(DECODERS["llama"](), PTuningV2(length=100))
    for parameter in tuned.trainable().values():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)


def test_peft_has_no_format_of_its_own_for_it(tmp_path: object) -> None:
    with pytest.raises(MethodError, match="PEFT has no format"):
        attach(DECODERS["llama"](), PTuningV2()).attachments[0].export_peft()


@pytest.mark.parametrize("wrong", [{"length": 0}, {"std": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PTuningV2.model_validate(wrong)
