"""Likelihood of choices against one plain forward for each prompt and choice."""

import pytest
import torch
from transformers import PreTrainedModel

from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import DataError
from tunesmith.measure.choices import choice_log_probs, choose

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [2, 16]]
CHOICES = [[20, 21, 22], [23], [20, 24]]


def plain(model: PreTrainedModel, prompt: list[int], choice: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + choice])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(choice)[:, None]).sum()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_scores_equal_those_of_each_text_alone(make: type, batch_size: int) -> None:
    model = make()
    expected = torch.stack(
        [torch.stack([plain(model, prompt, choice) for choice in CHOICES]) for prompt in PROMPTS]
    )
    scores = choice_log_probs(model, PROMPTS, CHOICES, batch_size=batch_size)
    torch.testing.assert_close(scores, expected)


def test_choices_of_one_token_need_no_second_forward() -> None:
    model, calls = tiny_llama(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    scores = choice_log_probs(model, PROMPTS, [[20], [21]])
    assert len(calls) == 1
    torch.testing.assert_close(scores[1, 1], plain(model, PROMPTS[1], [21]))


def test_a_preferred_choice_is_chosen() -> None:
    model = tiny_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    model.lm_head.bias.data[22] = 50
    assert choose(model, PROMPTS, [[20], [21], [22]]) == [2] * len(PROMPTS)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    choice_log_probs(model, PROMPTS, CHOICES)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_scores_are_near_those_of_float32() -> None:
    model = tiny_llama()
    wide = choice_log_probs(model, PROMPTS, CHOICES)
    low = choice_log_probs(model.bfloat16(), PROMPTS, CHOICES)
    # Logits of about 1 keep 8 bits, and a score adds up to three of them.
    torch.testing.assert_close(low, wide, rtol=0, atol=3 * 2**-7)


@pytest.mark.parametrize(
    ("prompts", "choices", "message"),
    [
        ([[5]], [], "at least one"),
        ([[5]], [[6], []], "none without tokens"),
        ([[5], []], [[6]], "prompt 1 has no tokens"),
        ([[5] * 14], [[6, 7, 8]], "prompt 0 has 14 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    prompts: list[list[int]], choices: list[list[int]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        choice_log_probs(tiny_gpt2(n_positions=16), prompts, choices)


def test_a_choice_may_fill_the_context() -> None:
    model = tiny_gpt2(n_positions=16)
    scores = choice_log_probs(model, [[5] * 13], [[6, 7, 8]])
    torch.testing.assert_close(scores[0, 0], plain(model, [5] * 13, [6, 7, 8]))
