"""Masks: expected token by token from pieces written by hand."""

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny import CHATML, CHATML_UNMARKED, tiny_tokenizer
from tunesmith.data.conversation import Conversation, Text
from tunesmith.data.render import Renderer
from tunesmith.data.rows import TokenRow
from tunesmith.errors import DataError

Piece = tuple[str, bool]


def turn(role: str, content: str) -> dict[str, object]:
    return {"role": role, "content": content}


def chat(*contents: str) -> Conversation:
    """Turns of user and assistant by turns."""
    roles = ("user", "assistant")
    return Conversation(tuple(turn(roles[i % 2], text) for i, text in enumerate(contents)))


def check(row: TokenRow, tokenizer: PreTrainedTokenizerFast, *pieces: Piece) -> None:
    """Compare a row with pieces of text, each tokenised on its own, supervised or not."""
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    ids = [token for part in parts for token in part]
    mask = [on for part, (_, on) in zip(parts, pieces, strict=True) for _ in part]
    assert row.input_ids.tolist() == ids
    assert row.supervised.tolist() == mask
    assert row.segments == (len(ids),)


# ChatML in the ways its authors mark it: all must give the same mask.
VARIANTS = {
    "marked": CHATML,
    "unmarked": CHATML_UNMARKED,
    "marked without end of turn": CHATML.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    ),
    "marked with line break": CHATML.replace(
        "{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}"
    ),
    "dashes": CHATML.replace("{% generation %}", "{%- generation -%}"),
}


@pytest.mark.parametrize("template", VARIANTS.values(), ids=VARIANTS)
def test_only_what_the_assistant_says_is_supervised(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    sample = Conversation(
        (turn("system", "be kind"), *chat("你好", "早上好 🙂", "and?", " good\n\nday ").messages)
    )
    check(
        Renderer(tokenizer).row(sample),
        tokenizer,
        ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("早上好 🙂<|im_end|>", True),
        ("\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", False),
        (" good\n\nday <|im_end|>", True),
        ("\n", False),
    )


@pytest.mark.parametrize("template", VARIANTS.values(), ids=VARIANTS)
def test_the_tokens_are_the_template_s_own(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    sample = chat("ask", "say", "ask more", "say more")
    own = tokenizer.apply_chat_template(list(sample.messages), return_dict=True)["input_ids"]
    assert Renderer(tokenizer).row(sample).input_ids.tolist() == own


def test_the_mask_is_transformers_own_where_it_marks_the_end_of_turn() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    sample = chat("ask", "say", "ask more", "say more")
    own = tokenizer.apply_chat_template(
        list(sample.messages), return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert Renderer(tokenizer).row(sample).supervised.astype(int).tolist() == own


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_a_conversation_that_starts_with_the_assistant(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    sample = Conversation((turn("assistant", "welcome"), turn("user", "thanks")))
    check(
        Renderer(tokenizer).row(sample),
        tokenizer,
        ("<|im_start|>assistant\n", False),
        ("welcome<|im_end|>", True),
        ("\n<|im_start|>user\nthanks<|im_end|>\n", False),
    )


def test_a_first_reply_is_not_mistaken_for_the_template_s_own_words() -> None:
    tokenizer = tiny_tokenizer("{{ 'You are welcome here. ' }}" + CHATML_UNMARKED)
    check(
        Renderer(tokenizer).row(Conversation((turn("assistant", "welcome"),))),
        tokenizer,
        ("You are welcome here. <|im_start|>assistant\n", False),
        ("welcome<|im_end|>", True),
        ("\n", False),
    )


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_two_assistant_turns_in_a_row(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    sample = Conversation((*chat("ask", "one").messages, turn("assistant", "two")))
    check(
        Renderer(tokenizer).row(sample),
        tokenizer,
        ("<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n", False),
        ("one<|im_end|>", True),
        ("\n<|im_start|>assistant\n", False),
        ("two<|im_end|>", True),
        ("\n", False),
    )


@pytest.mark.parametrize("template", VARIANTS.values(), ids=VARIANTS)
def test_a_user_who_says_what_the_assistant_says_is_not_supervised(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    check(
        Renderer(tokenizer).row(chat("same", "same")),
        tokenizer,
        ("<|im_start|>user\nsame<|im_end|>\n<|im_start|>assistant\n", False),
        ("same<|im_end|>", True),
        ("\n", False),
    )


@pytest.mark.parametrize("template", VARIANTS.values(), ids=VARIANTS)
def test_a_turn_of_weight_0_is_read_but_not_learned_from(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    first, wrong, again, right = chat("1+1?", "3", "no", "2").messages
    row = Renderer(tokenizer).row(Conversation((first, wrong | {"weight": 0}, again, right)))
    supervised = tokenizer.decode(row.input_ids[row.supervised])
    assert supervised == "2<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_UNMARKED])
def test_one_empty_reply_among_others_teaches_to_end_the_turn(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    row = Renderer(tokenizer).row(chat("ask", "", "more", "say"))
    assert tokenizer.decode(row.input_ids[row.supervised].tolist()) == "<|im_end|>say<|im_end|>"


@pytest.mark.parametrize("template", VARIANTS.values(), ids=VARIANTS)
def test_a_row_of_empty_replies_has_nothing_supervised(template: str) -> None:
    assert not Renderer(tiny_tokenizer(template)).row(chat("ask", "")).supervised.any()


def test_an_empty_marked_turn_still_ends() -> None:
    tokenizer = tiny_tokenizer(VARIANTS["marked without end of turn"])
    row = Renderer(tokenizer).row(chat("ask", "", "more", "say"))
    assert tokenizer.decode(row.input_ids[row.supervised].tolist()) == "<|im_end|>say<|im_end|>"


def test_supervise_all_takes_every_token() -> None:
    tokenizer = tiny_tokenizer()
    row = Renderer(tokenizer, supervise="all").row(Conversation((turn("user", "alone"),)))
    check(row, tokenizer, ("<|im_start|>user\nalone<|im_end|>\n", True))


def test_text_is_supervised_whole_and_ends_with_eos() -> None:
    tokenizer = tiny_tokenizer(None)
    row = Renderer(tokenizer).row(Text("从前 there was"))
    check(row, tokenizer, ("从前 there was<|im_end|>", True))


def test_text_that_ends_with_eos_gets_no_second_one() -> None:
    row = Renderer(tiny_tokenizer()).row(Text("done<|im_end|>"))
    assert row.input_ids.tolist().count(2) == 1


def test_a_row_without_an_assistant_turn_is_refused() -> None:
    with pytest.raises(DataError, match=r"has no assistant turn to learn from \(its turns: user\)"):
        Renderer(tiny_tokenizer()).row(Conversation((turn("user", "alone"),)))


def test_no_chat_template_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(DataError, match=r"no chat template, .*; set `model.chat_template`"):
        Renderer(tiny_tokenizer(None)).row(chat("a", "b"))


def test_a_template_that_refuses_a_row_is_quoted() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the chat template refuses the row: roles must alternate"):
        Renderer(tiny_tokenizer(template)).row(chat("a", "b"))


def test_a_template_without_end_of_turn_is_refused() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="writes no end-of-turn token"):
        Renderer(tiny_tokenizer(template)).row(chat("a", "b", "c", "d"))


DROPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_explained() -> None:
    sample = chat("a", "<think>hm</think>b", "c", "d")
    with pytest.raises(DataError, match=r"rewrites turn 2 once further turns follow .*one reply"):
        Renderer(tiny_tokenizer(DROPS_THINKING)).row(sample)


def test_a_turn_of_weight_0_may_be_rewritten() -> None:
    tokenizer = tiny_tokenizer(DROPS_THINKING)
    asked, earlier, more, last = chat("a", "<think>hm</think>b", "c", "<think>ah</think>d").messages
    row = Renderer(tokenizer).row(Conversation((asked, earlier | {"weight": 0}, more, last)))
    check(
        row,
        tokenizer,
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", False),
        ("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>ah</think>d<|im_end|>", True),
        ("\n", False),
    )


NO_THINKING = CHATML_UNMARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}",
    "{{ message['content'].split('</think>')[-1] + '<|im_end|>' }}",
)
NO_SYSTEM = CHATML_UNMARKED.replace(
    "{% for message in messages %}",
    "{% for message in messages if message['role'] != 'system' %}",
)


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (NO_THINKING, chat("a", "<think>hm</think>b").messages, r"the reply's thinking \('hm'\)"),
        (
            CHATML,
            (turn("user", "a"), turn("assistant", "b") | {"reasoning_content": "hm"}),
            r"the reply's thinking \('hm'\)",
        ),
        (NO_SYSTEM, (turn("system", "be kind"), *chat("a", "b").messages), "the system turn"),
    ],
    ids=["thinking in the text", "thinking beside it", "system turn"],
)
def test_a_template_that_leaves_words_out_is_refused(
    template: str, messages: tuple[dict[str, object], ...], lost: str
) -> None:
    with pytest.raises(DataError, match=f"the chat template leaves out {lost}"):
        Renderer(tiny_tokenizer(template)).row(Conversation(messages))


def test_thinking_may_be_written_otherwise_than_the_row_has_it() -> None:
    moved = "{{ message['content'].replace('<think>', '<|im_start|>').replace('</think>', '; ') + "
    tokenizer = tiny_tokenizer(CHATML_UNMARKED.replace("{{ message['content'] + ", moved, 1))
    row = Renderer(tokenizer).row(chat("a", "<think>\nhm\n</think>\n\nb"))
    said = tokenizer.decode(row.input_ids[row.supervised].tolist())
    assert said == "<|im_start|>\nhm\n; \n\nb<|im_end|>"


@pytest.mark.parametrize("reply", ["yes", " yes", "\nyes"])
def test_a_header_that_takes_in_white_space_is_not_learned(reply: str) -> None:
    header = CHATML_UNMARKED.replace("<|im_start|>' + message['role']", "<|as|>'")
    tokenizer = tiny_tokenizer(header.replace("<|im_start|>assistant", "<|as|>"))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|as|>", special=True, rstrip=True)]}
    )
    row = Renderer(tokenizer).row(chat("ask", reply))
    assert tokenizer.decode(row.input_ids[row.supervised].tolist()) == "yes<|im_end|>"


def test_a_template_that_rewrites_is_fine_while_it_does_not() -> None:
    tokenizer = tiny_tokenizer(DROPS_THINKING)
    row = Renderer(tokenizer).row(chat("a", "b", "c", "<think>hm</think>d"))
    text = tokenizer.decode(row.input_ids[row.supervised].tolist())
    assert text == "b<|im_end|><think>hm</think>d<|im_end|>"


def test_a_token_that_closes_the_whole_conversation_is_no_rewriting() -> None:
    closing = CHATML_UNMARKED.replace(
        "{% if add_generation_prompt %}",
        "{% if not add_generation_prompt %}{{ '<unk>' }}{% else %}",
    )
    tokenizer = tiny_tokenizer(closing)
    row = Renderer(tokenizer).row(chat("a", "b", "c", "d"))
    assert tokenizer.decode(row.input_ids[row.supervised].tolist()) == "b<|im_end|>d<|im_end|>"


def test_a_header_that_opens_thinking_is_no_rewriting() -> None:
    template = CHATML_UNMARKED.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    tokenizer = tiny_tokenizer(template)
    row = Renderer(tokenizer).row(chat("a", "b"))
    assert tokenizer.decode(row.input_ids[row.supervised].tolist()) == "b<|im_end|>"


def test_a_template_that_marks_only_some_turns_is_refused() -> None:
    template = CHATML.replace(
        "{% if message['role'] == 'assistant' %}",
        "{% if message['role'] == 'assistant' and loop.last %}",
    )
    with pytest.raises(DataError, match="marks only 1 of the row's 2 assistant turns"):
        Renderer(tiny_tokenizer(template)).row(chat("a", "b", "c", "d"))


CALL = {"type": "function", "function": {"name": "tip", "arguments": {"bill": 5}}}
TOOLS = ({"type": "function", "function": {"name": "tip", "parameters": {}}},)
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    + CHATML_UNMARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}",
        "{{ message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '')"
        " + '<|im_end|>' }}",
    )
)


def calling() -> Conversation:
    return Conversation(
        (
            turn("user", "tip?"),
            turn("assistant", "") | {"tool_calls": [CALL]},
            turn("tool", "0.5"),
            turn("assistant", "half"),
        ),
        TOOLS,
    )


def test_tool_calls_go_through_the_template_and_are_supervised() -> None:
    tokenizer = tiny_tokenizer(WITH_TOOLS)
    row = Renderer(tokenizer).row(calling())
    learnt = tokenizer.decode(row.input_ids[row.supervised].tolist())
    assert learnt == (
        '[{"type": "function", "function": {"name": "tip", "arguments": {"bill": 5}}}]<|im_end|>'
        "half<|im_end|>"
    )
    assert '"name": "tip", "parameters"' in tokenizer.decode(row.input_ids.tolist())


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    with pytest.raises(DataError, match="leaves out the row's tools; use a model"):
        Renderer(tiny_tokenizer(CHATML)).row(calling())


def test_a_template_that_leaves_tool_calls_out_is_refused() -> None:
    with pytest.raises(DataError, match="leaves out the tool call 'tip'; use a model"):
        Renderer(tiny_tokenizer(CHATML)).row(Conversation(calling().messages))


def test_the_prompt_is_all_before_the_last_reply_with_the_assistant_s_header() -> None:
    tokenizer = tiny_tokenizer()
    prompt = Renderer(tokenizer).prompt(chat("a", "b", "c", "d"))
    assert tokenizer.decode(prompt.input_ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.reference == ["d"]
    assert prompt.messages == list(chat("a", "b", "c").messages)


def test_a_reply_alone_has_the_tokens_that_a_row_learns() -> None:
    # As Llama's does, this tokenizer writes a text as if a space stood before its first word.
    tokenizer = tiny_tokenizer()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Prepend(" ")
    assert tokenizer.tokenize("yes") == ["\u0120", "y", "e", "s"]
    assert Renderer(tokenizer).reply("yes") == tokenizer.convert_tokens_to_ids(
        ["y", "e", "s", "<|im_end|>"]
    )


def test_the_reference_of_a_tool_call_is_the_call_as_written() -> None:
    sample = Conversation(calling().messages[:2], TOOLS)
    prompt = Renderer(tiny_tokenizer(WITH_TOOLS)).prompt(sample)
    assert prompt.reference == [
        '[{"type": "function", "function": {"name": "tip", "arguments": {"bill": 5}}}]'
    ]


def test_the_reference_of_a_tool_call_is_read_as_the_model_s_replies_are() -> None:
    template = WITH_TOOLS.replace("(message['tool_calls']", "('[CALLS]' + message['tool_calls']")
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[CALLS]"]})
    renderer, sample = Renderer(tokenizer), Conversation(calling().messages[:2], TOOLS)
    row = renderer.row(sample)
    learned = row.input_ids[row.supervised].tolist()
    assert tokenizer.convert_tokens_to_ids("[CALLS]") in learned
    assert renderer.prompt(sample).reference == [
        tokenizer.decode(learned, skip_special_tokens=True)
    ]


def test_nothing_is_asked_by_text_or_by_a_lone_reply() -> None:
    renderer = Renderer(tiny_tokenizer())
    assert renderer.prompt(Text("a")) is None
    assert renderer.prompt(Conversation((turn("assistant", "a"),))) is None


def test_the_mask_does_not_depend_on_the_padding_token() -> None:
    one, two = tiny_tokenizer(), tiny_tokenizer()
    two.pad_token = "<unk>"
    rows = [Renderer(t).row(chat("a", "b")) for t in (one, two)]
    assert np.array_equal(rows[0].supervised, rows[1].supervised)


def test_trimmed_offsets_do_not_lose_white_space() -> None:
    tokenizer = tiny_tokenizer(CHATML_UNMARKED)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    check(
        Renderer(tokenizer).row(chat("a", " b  c ")),
        tokenizer,
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        (" b  c <|im_end|>", True),
        ("\n", False),
    )


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(DataError, match="Slow gives no character offsets"):
        Renderer(slow)


def test_text_needs_an_end_of_text_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-text token \(eos_token\)"):
        Renderer(tokenizer).row(Text("a"))


def test_a_template_that_writes_turns_in_another_order_is_refused() -> None:
    reverses = CHATML_UNMARKED.replace("in messages %}", "in messages | reverse %}")
    with pytest.raises(DataError, match="rewrites turn 2"):
        Renderer(tiny_tokenizer(reverses)).row(chat("a", "b", "c", "d"))


def test_a_tokenizer_that_loses_text_is_noticed() -> None:
    tokenizer = tiny_tokenizer(CHATML_UNMARKED)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("x", "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    with pytest.raises(DataError, match="offsets do not cover the assistant's turn"):
        Renderer(tokenizer).row(chat("a", "xb"))
