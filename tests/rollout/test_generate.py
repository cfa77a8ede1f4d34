"""Batched generation against a loop that knows no cache, no padding and no batch."""

import pytest
import torch
from transformers import PreTrainedModel

from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith import PrefixTuning, PromptTuning, PTuning, PTuningV2, attach
from tunesmith.errors import DataError
from tunesmith.methods.contract import Method
from tunesmith.rollout.generate import generate

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [2, 16], [17, 18, 19]]
NEW = 12


def wide_awake(model: PreTrainedModel) -> PreTrainedModel:
    """Weights so large that replies depend on the prompt; float64, so that no two logits tie."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def plain_greedy(
    model: PreTrainedModel, prompt: list[int], *, stop: int | None = None
) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_batched_greedy_replies_equal_unbatched_ones_in_the_given_order(
    make: type, batch_size: int
) -> None:
    model = wide_awake(make())
    replies = generate(
        model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW, batch_size=batch_size, stop_ids=[]
    )
    assert replies == [plain_greedy(model, prompt) for prompt in PROMPTS]


def test_a_reply_ends_with_its_first_stop_token() -> None:
    model = wide_awake(tiny_llama())
    stop = plain_greedy(model, PROMPTS[0])[4]
    replies = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW, stop_ids=[stop])
    assert replies == [plain_greedy(model, prompt, stop=stop) for prompt in PROMPTS]
    assert replies[0][-1] == stop
    assert len(replies[0]) <= 5


def test_by_default_the_end_of_turn_stops() -> None:
    model, tokenizer = wide_awake(tiny_llama()), tiny_tokenizer()
    end = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[end] = 0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB, dtype=torch.float64))
    model.lm_head.bias.data[end] = 1e4
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=NEW) == [[end]] * len(PROMPTS)


def test_sampling_depends_on_the_seed_alone() -> None:
    model = wide_awake(tiny_llama())
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, two, other = (
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW, temperature=3.0, seed=seed)
        for seed in (5, 5, 6)
    )
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sampling_among_one_token_is_greedy() -> None:
    model, tokenizer = wide_awake(tiny_llama()), tiny_tokenizer()
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=NEW)
    for one in ({"top_k": 1, "temperature": 2.0}, {"top_p": 1e-6, "temperature": 2}):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, **one) == greedy


def test_sampled_tokens_follow_the_model_s_probabilities_and_no_default_top_k() -> None:
    model = tiny_llama()
    draws = generate(
        model,
        tiny_tokenizer(),
        [[5, 6]] * 2000,
        max_new_tokens=1,
        batch_size=2000,
        temperature=1.0,
        stop_ids=[],
    )
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=VOCAB)
    # Near uniform over 300 tokens: 2000 draws hit about 99.9 %, a top_k of 50 at most 17 %.
    assert (counts > 0).float().mean() > 0.98
    chi_squared = ((counts - 2000 * expected) ** 2 / (2000 * expected)).sum()
    assert chi_squared < VOCAB + 5 * (2 * VOCAB) ** 0.5


def test_the_model_s_own_sampling_defaults_do_not_act_and_stay() -> None:
    model = wide_awake(tiny_llama())
    expected = [plain_greedy(model, prompt) for prompt in PROMPTS]
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    replies = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW, stop_ids=[])
    assert replies == expected
    assert model.generation_config.repetition_penalty == 50.0


def test_the_mode_of_every_part_is_restored() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = [part.training for part in model.modules()]
    generate(model, tiny_tokenizer(), PROMPTS[:1], max_new_tokens=2)
    assert [part.training for part in model.modules()] == before


def test_hooks_on_the_model_act_in_generation() -> None:
    model = wide_awake(tiny_llama())
    without = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW, stop_ids=[])
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -2 * output)
    hooked = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=NEW, stop_ids=[])
    assert hooked != without
    assert hooked == [plain_greedy(model, prompt) for prompt in PROMPTS]


def test_nothing_is_warned_about(
    recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    generate(model, tokenizer, PROMPTS, max_new_tokens=2)
    generate(model, tokenizer, PROMPTS, max_new_tokens=2, temperature=1.0)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_no_prompts_give_no_replies() -> None:
    assert generate(tiny_llama(), tiny_tokenizer(), []) == []


def test_a_reply_ends_where_the_context_does() -> None:
    model = tiny_gpt2(n_positions=16)
    (reply,) = generate(model, tiny_tokenizer(), [list(range(5, 17))], stop_ids=[])
    assert len(reply) == 4


@pytest.mark.parametrize(
    "methods",
    [[PrefixTuning(length=3)], [PromptTuning(tokens=3)], [PTuningV2(length=2), PTuning(tokens=1)]],
)
def test_what_stands_before_the_text_takes_its_positions_of_the_context(
    methods: list[Method],
) -> None:
    tuned = attach(tiny_gpt2(n_positions=16), *methods)
    (reply,) = generate(tuned.model, tiny_tokenizer(), [list(range(5, 15))], stop_ids=[])
    assert len(reply) == 3
    with pytest.raises(DataError, match="has 13 tokens, but the model's context holds 13"):
        generate(tuned.model, tiny_tokenizer(), [list(range(13))])
    with tuned.disabled():
        (reply,) = generate(tuned.model, tiny_tokenizer(), [list(range(5, 15))], stop_ids=[])
    assert len(reply) == 6


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], list(range(16))], "prompt 1 has 16 tokens, but the model's context holds 16"),
        ([[5], []], "prompt 1 has no tokens"),
    ],
)
def test_a_prompt_that_does_not_fit_is_named(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(tiny_gpt2(n_positions=16), tiny_tokenizer(), prompts)
