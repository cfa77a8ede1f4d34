"""Streaming: the pieces are the reply, and no piece is a broken character."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny import CHATML, tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith.errors import DataError
from tunesmith.models.loading import load_model
from tunesmith.rollout.chat import stream_reply
from tunesmith.rollout.generate import generate

MESSAGES = [{"role": "user", "content": "\u4f60\u597d"}]


def prompt_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def reciting(text: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model that says `text` whatever it is asked: position p's hidden state names a token."""
    say = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    start = len(prompt_ids(tokenizer)) - 1
    model = tiny_gpt2(n_embd=256, tie_word_embeddings=False)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.eye_(model.transformer.wpe.weight)
    torch.nn.init.ones_(model.transformer.ln_f.weight)
    for offset, token in enumerate(say):
        model.lm_head.weight.data[token, start + offset] = 1
    return model


@pytest.mark.parametrize(
    "text", ["plain words", "\u4f60\u597d\uff0c\u4e16\u754c", "a\U0001f600b\u00e9"]
)
def test_pieces_join_to_the_reply_and_none_is_a_broken_character(text: str) -> None:
    tokenizer = tiny_tokenizer()
    pieces = list(stream_reply(reciting(text, tokenizer), tokenizer, MESSAGES))
    assert pieces == list(text)


def test_a_reply_cut_within_a_character_says_so_only_at_its_end() -> None:
    tokenizer = tiny_tokenizer()
    model = reciting("a\u4f60", tokenizer)
    pieces = list(stream_reply(model, tokenizer, MESSAGES, max_new_tokens=3))
    assert "".join(pieces) == "a\ufffd"
    assert pieces[0] == "a"


def test_a_reply_that_ends_at_once_has_no_pieces() -> None:
    tokenizer = tiny_tokenizer()
    assert list(stream_reply(reciting("", tokenizer), tokenizer, MESSAGES)) == []


def test_a_greedy_stream_equals_generate() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    (ids,) = generate(model, tokenizer, [prompt_ids(tokenizer)], max_new_tokens=20)
    pieces = stream_reply(model, tokenizer, MESSAGES, max_new_tokens=20)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_among_one_token_is_greedy(narrow: dict[str, float]) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    stream: Callable[..., object] = lambda **how: "".join(  # noqa: E731
        stream_reply(model, tokenizer, MESSAGES, max_new_tokens=20, **how)
    )
    assert stream(temperature=2.0, **narrow) == stream(temperature=2, **narrow) == stream()


def test_sampling_depends_on_the_seed_alone() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    state = torch.random.get_rng_state()
    one, two, other = (
        "".join(
            stream_reply(model, tokenizer, MESSAGES, max_new_tokens=20, temperature=2.0, seed=seed)
        )
        for seed in (1, 1, 2)
    )
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mode_and_gradients_are_the_caller_s_again_when_the_stream_is_left() -> None:
    model = tiny_llama().train()
    stream = stream_reply(model, tiny_tokenizer(), MESSAGES, max_new_tokens=50)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training


def test_a_conversation_longer_than_the_context_is_refused() -> None:
    stream = stream_reply(tiny_gpt2(n_positions=8), tiny_tokenizer(), MESSAGES)
    with pytest.raises(DataError, match=r"the conversation has .* context holds 8"):
        next(stream)


@pytest.mark.zoo
def test_a_real_model_answers_a_question() -> None:
    model, tokenizer = load_model("smollm2-135m-instruct")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    reply = "".join(stream_reply(model, tokenizer, question, max_new_tokens=20))
    assert reply == "The capital of France is Paris."


def test_a_turn_that_the_template_refuses_is_named() -> None:
    """As Gemma's template refuses a system turn."""
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = tiny_tokenizer(refusing + CHATML)
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    with pytest.raises(DataError, match=r"turns system, user \(no system\)"):
        list(stream_reply(tiny_llama(), tokenizer, messages))
