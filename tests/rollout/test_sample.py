"""Sampling: what it draws, that the batch does not matter, and that training sees the same."""

import pytest
import torch
from torch._dynamo.utils import counters

from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tunesmith import LoRA, PromptTuning, ReFT, attach
from tunesmith.errors import DataError, ModelError
from tunesmith.rollout import compiled
from tunesmith.rollout.draw import Drawing, row_seeds, uniform
from tunesmith.rollout.sample import Reply, Stops, sample

PROMPTS = [[5, 9, 11], [7, 30, 31, 32, 40, 41, 8], [90], [12, 13, 14, 15, 16]]


def replies(model: torch.nn.Module, prompts: list[list[int]], **changes: object) -> list[Reply]:
    settings: dict[str, object] = {
        "seeds": row_seeds(3, range(len(prompts))),
        "max_new_tokens": 12,
        "stops": Stops(),
        "pad_token_id": 2,
    }
    return sample(model, prompts, **(settings | changes))


def test_uniform_numbers_are_uniform_and_differ_by_row_and_step() -> None:
    seeds = torch.arange(20_000)
    first, second = uniform(seeds, torch.tensor(0)), uniform(seeds, torch.tensor(1))
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    for numbers in (first, second):
        counts = torch.histc(numbers, bins=20, min=0, max=1)
        # 1000 expected in each of 20 bins: chi-square with 19 degrees stays under 43.8 (p 0.001).
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8
    correlation = torch.corrcoef(torch.stack([first, second, first.roll(1)]))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.03


def test_tokens_come_as_often_as_the_model_says() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -0.5]).expand(50_000, -1)
    drawn = Drawing(temperature=0.7)(logits, torch.arange(50_000), torch.tensor(4))
    expected = (logits[0] / 0.7).softmax(-1)
    seen = torch.bincount(drawn.tokens, minlength=5) / 50_000
    torch.testing.assert_close(seen, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.log_probs, logits[0].log_softmax(-1)[drawn.tokens])


@pytest.mark.parametrize(
    ("drawing", "kept"),
    [(Drawing(top_k=2), {2, 4}), (Drawing(top_p=0.5), {2}), (Drawing(top_p=0.8), {2, 4})],
)
def test_top_k_and_top_p_leave_the_rest_out(drawing: Drawing, kept: set[int]) -> None:
    logits = torch.tensor([0.1, 0.05, 0.5, 0.04, 0.31]).log().expand(4000, -1)
    drawn = drawing(logits, torch.arange(4000), torch.tensor(0))
    assert set(drawn.tokens.tolist()) == kept


def test_temperature_0_takes_the_most_likely() -> None:
    logits = torch.randn(6, 50)
    drawn = Drawing(temperature=0)(logits, torch.arange(6), torch.tensor(0))
    assert torch.equal(drawn.tokens, logits.argmax(-1))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_row_is_the_same_in_any_batch(make: type) -> None:
    model = make()
    seeds = row_seeds(3, range(4))
    together = replies(model, PROMPTS, seeds=seeds)
    alone = [replies(model, [p], seeds=[s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    backwards = replies(model, PROMPTS[::-1], seeds=seeds[::-1], batch_size=3)[::-1]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.tokens for r in together] == [r.tokens for r in backwards]
    assert len({tuple(r.tokens) for r in together}) == 4


def test_another_seed_gives_another_reply() -> None:
    model = tiny_llama()
    one, other = replies(model, [PROMPTS[0]] * 2)
    assert one.tokens != other.tokens


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_log_probs_agree_with_the_training_forward(make: type) -> None:
    model = make()
    attach(model, LoRA(rank=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    for prompt, reply in zip(PROMPTS, replies(model, PROMPTS), strict=True):
        ids = torch.tensor([prompt + reply.tokens])
        logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(reply.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.log_probs), expected, atol=1e-4, rtol=0)


def test_greedy_replies_are_those_of_generate() -> None:
    model = tiny_llama()
    for prompt, reply in zip(
        PROMPTS, replies(model, PROMPTS, drawing=Drawing(temperature=0)), strict=True
    ):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert reply.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_fixed_cache_gives_what_a_growing_one_does(make: type) -> None:
    model = make()
    attach(model, LoRA(rank=4))
    long = [*PROMPTS, list(range(10, 130)), PROMPTS[1]]  # beyond 128 columns, and one prompt twice
    growing = replies(model, long, decoding="growing", max_new_tokens=20)
    fixed = replies(model, long, decoding="fixed", max_new_tokens=20)
    assert [r.tokens for r in fixed] == [r.tokens for r in growing]
    assert fixed[1].tokens != fixed[5].tokens
    for one, other in zip(fixed, growing, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=0
        )


def test_a_fixed_cache_is_refused_where_it_does_not_serve() -> None:
    model = tiny_llama()
    attach(model, PromptTuning(tokens=3))
    with pytest.raises(ModelError, match="fixed"):
        replies(model, PROMPTS, decoding="fixed")
    assert len(replies(model, PROMPTS, decoding="auto")) == 4


def test_a_reply_ends_with_its_stop_token() -> None:
    model = tiny_llama()
    whole = replies(model, PROMPTS)
    stop = whole[1].tokens[4]
    cut = replies(model, PROMPTS, stops=Stops(tokens=frozenset({stop})))
    for before, after in zip(whole, cut, strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 12
        assert after.tokens == before.tokens[:end]
        assert after.ended == (stop in before.tokens)
        assert len(after.log_probs) == end


def test_a_reply_ends_with_the_token_that_completes_a_stop_string() -> None:
    tokenizer = tiny_tokenizer()
    stops = Stops(strings=("ab",), text=tokenizer.decode)
    ids = tokenizer("xxabyy")["input_ids"]
    assert stops.end_of(ids) == 4
    assert stops.end_of(ids[:3]) is None


def test_sampling_leaves_mode_and_generators_alone() -> None:
    model = tiny_llama().train()
    before = torch.get_rng_state()
    replies(model, PROMPTS)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(DataError, match="prompt 1"):
        replies(tiny_llama(), [[4], [5] * 256])


@pytest.mark.parametrize("decoding", ["growing", "fixed"])
def test_a_longer_prompt_in_the_batch_takes_no_room_from_a_reply(decoding: str) -> None:
    """Of the 256 positions the second prompt leaves 6, the last 4."""
    model = tiny_llama()
    prompts = [[5, 9, 11], [7] * 250, [90] * 3, [12] * 252]
    together = replies(model, prompts, decoding=decoding)
    assert [len(reply.tokens) for reply in together] == [12, 6, 12, 4]
    for prompt, seed, reply in zip(prompts, row_seeds(3, range(4)), together, strict=True):
        (alone,) = replies(model, [prompt], seeds=[seed], decoding=decoding)
        assert alone.tokens == reply.tokens


def test_a_compiled_step_is_one_graph_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # the capture is what differs
    torch._dynamo.reset()
    counters.clear()
    model = tiny_llama(num_hidden_layers=3)
    attach(model, LoRA(rank=4))
    found = replies(model, PROMPTS, decoding="fixed", compiled=True, max_new_tokens=4)
    assert [r.tokens for r in found] == [
        r.tokens for r in replies(model, PROMPTS, max_new_tokens=4)
    ]
    # One for the blocks, one for the drawing.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert all(block._compiled_call_impl is None for block in model.model.layers)


def test_a_compiled_step_knows_which_blocks_have_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=3)
    tuned = attach(model, ReFT(rank=4, layers=[2]))
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(torch.randn_like(parameter))
    plain = replies(model, PROMPTS, decoding="fixed", compiled=False, max_new_tokens=4)
    found = replies(model, PROMPTS, decoding="fixed", compiled=True, max_new_tokens=4)
    for expected, reply in zip(plain, found, strict=True):
        torch.testing.assert_close(
            torch.tensor(reply.log_probs), torch.tensor(expected.log_probs), atol=1e-4, rtol=0
        )


def test_a_step_that_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    model = tiny_llama()
    plain = replies(model, PROMPTS, max_new_tokens=4)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    found = replies(model, PROMPTS, decoding="fixed", compiled=True, max_new_tokens=4)
    assert [r.tokens for r in found] == [r.tokens for r in plain]
    assert "not compiled" in caplog.text
