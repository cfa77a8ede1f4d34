"""What a tokenizer lacks is added, and said."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tiny import CHATML, CHATML_UNMARKED, tiny_tokenizer
from tunesmith.errors import ModelError
from tunesmith.models.chat import built_in_template, prepare_tokenizer
from tunesmith.models.settings import ModelSettings

TURNS = [
    {"role": "user", "content": "1 + 1?\n"},
    {"role": "assistant", "content": " Two."},
    {"role": "user", "content": "再见"},
    {"role": "assistant", "content": "Bye"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def without_markers(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that has never heard of ChatML and has no padding token."""
    tokenizer = tiny_tokenizer(template)
    core = tokenizer.backend_tokenizer.to_str()
    for marker in ("<|im_start|>", "<|im_end|>"):
        core = core.replace(marker, marker.replace("im_", ""))
    fresh = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(core),
        eos_token="<|end|>",
        unk_token="<unk>",
    )
    fresh.chat_template = template
    return fresh


def supervised(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, object]]) -> str:
    rendered = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, mask in pairs if mask])


def test_the_models_own_template_and_tokens_are_kept() -> None:
    tokenizer = tiny_tokenizer()
    facts = prepare_tokenizer(tokenizer, ModelSettings())
    assert (facts.pad_token_id, facts.end_of_turn_ids) == (2, (2,))
    assert (facts.template, facts.marks_assistant) == ("model", True)
    assert tokenizer.chat_template == CHATML


def test_a_template_without_markers_is_known_as_such() -> None:
    facts = prepare_tokenizer(tiny_tokenizer(CHATML_UNMARKED), ModelSettings())
    assert not facts.marks_assistant


def test_chatml_markers_in_the_vocabulary_bring_the_chatml_template() -> None:
    tokenizer = tiny_tokenizer(None)
    facts = prepare_tokenizer(tokenizer, ModelSettings())
    assert (facts.template, facts.marks_assistant) == ("built-in chatml", True)
    expected = tiny_tokenizer(CHATML).apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == expected


def test_without_markers_the_plain_template_ends_turns_with_eos() -> None:
    tokenizer = without_markers()
    facts = prepare_tokenizer(tokenizer, ModelSettings())
    assert facts.template == "built-in plain"
    assert facts.end_of_turn_ids == (tokenizer.eos_token_id,)
    assert facts.pad_token_id == tokenizer.eos_token_id
    assert supervised(tokenizer, TURNS) == " Two.<|end|>Bye<|end|>"
    prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "User:\n1 + 1?\n\n\nAssistant:\n"


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_the_prompt_is_the_start_of_the_whole(name: str) -> None:
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer, ModelSettings(chat_template=name))
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    prompt = tokenizer.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)


@pytest.mark.parametrize("name", ["chatml", "smollm2"])
def test_tools_and_calls_are_rendered(name: str) -> None:
    tokenizer = tiny_tokenizer(built_in_template(name))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)
    assert text.startswith('<|im_start|>system\nBe brief.\n\nTools:\n{"type": "function"')
    assert text.count("Be brief.") == 1
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\n2<|im_end|>\n" in text


def test_a_template_file_replaces_the_models(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}")
    tokenizer = tiny_tokenizer()
    facts = prepare_tokenizer(tokenizer, ModelSettings(chat_template=str(file)))
    assert facts.template == f"file {file}"
    assert tokenizer.apply_chat_template(TURNS[:1], tokenize=False) == "[1 + 1?\n]<|im_end|>"


def test_preparing_twice_changes_nothing() -> None:
    tokenizer = tiny_tokenizer(None)
    assert prepare_tokenizer(tokenizer, ModelSettings()) == prepare_tokenizer(
        tokenizer, ModelSettings()
    )


def test_a_reserved_pad_token_is_preferred_to_eos() -> None:
    tokenizer = without_markers()
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    facts = prepare_tokenizer(tokenizer, ModelSettings())
    assert facts.pad_token_id == tokenizer.convert_tokens_to_ids("<pad>")


def test_the_template_s_own_end_comes_before_eos() -> None:
    tokenizer = without_markers("{% for m in messages %}{{ m.content }}<|start|>{% endfor %}")
    tokenizer.add_tokens(["<|start|>"], special_tokens=True)
    ends = prepare_tokenizer(tokenizer, ModelSettings()).end_of_turn_ids
    assert ends == tuple(tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"]))


def test_a_missing_template_file_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"'nope\.jinja' is neither a built-in .*chatml, plain"):
        prepare_tokenizer(tiny_tokenizer(), ModelSettings(chat_template="nope.jinja"))


@pytest.mark.parametrize("broken", ["{% for %}", "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_render_is_one_sentence(broken: str) -> None:
    with pytest.raises(ModelError, match=r"model\.chat_template: it cannot render"):
        prepare_tokenizer(tiny_tokenizer(broken), ModelSettings())


def test_nothing_to_pad_with_is_an_error() -> None:
    tokenizer = without_markers(CHATML)
    tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(ModelError, match="no pad, eos or unk token"):
        prepare_tokenizer(tokenizer, ModelSettings())


def test_nothing_that_ends_a_turn_is_an_error() -> None:
    tokenizer = without_markers("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="generation would never stop"):
        prepare_tokenizer(tokenizer, ModelSettings())
