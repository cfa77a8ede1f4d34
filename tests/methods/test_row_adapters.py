"""A batch in which each row uses its own adapter is each row computed alone."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from families import FAMILIES
from families import VOCAB as FAMILY_VOCAB
from tiny import VOCAB, tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError
from tunesmith.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    LastLayer,
    LlamaAdapter,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
)
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.attention import enable_segments

Trained = Callable[[TunedModel], TunedModel]

PAIRS: dict[str, tuple[Method, Method]] = {
    "lora": (LoRA(rank=4), LoRA(rank=2, alpha=1, targets=["attention.q", "mlp.down"])),
    "rslora": (LoRA(rank=4, rslora=True), LoRA(rank=3)),
    "dora": (LoRA(rank=4, dora=True), LoRA(rank=2, dora=True)),
    "pissa": (LoRA(rank=4, init="pissa"), LoRA(rank=2, init="olora")),
    "adalora": (AdaLoRA(rank=4, target_rank=2), LoRA(rank=2)),
    "prompts": (PromptTuning(tokens=3), PromptTuning(tokens=5, init="random")),
    "prefixes": (PrefixTuning(length=3), PrefixTuning(length=6, init="random")),
    "encoded prefix": (PrefixTuning(length=3, reparametrise=True, hidden=8), PTuningV2(length=2)),
    "deep prompts": (PTuningV2(length=3), PTuningV2(length=5)),
    "mixed": (PrefixTuning(length=3), PromptTuning(tokens=4)),
    "prompt beside lora": (PromptTuning(tokens=4), LoRA(rank=4)),
    "encoded prompt": (PTuning(tokens=4), PromptTuning(tokens=2)),
}
PEACEFUL = {name: pair for name, pair in PAIRS.items() if name != "dora"}
"""Those that may act in one row."""
ROWS = ["a", "b", None, "a"]
LENGTHS = [7, 4, 2, 5]


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def tuned(request: pytest.FixtureRequest, model: PreTrainedModel, trained: Trained) -> TunedModel:
    a, b = request.param
    return trained(attach(attach(model, a, name="a"), b, name="b"))


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def left_padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), 2), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def alone(tuned: TunedModel, row: Tensor, name: str | Sequence[str] | None) -> Tensor:
    tuned.use(name)
    return tuned.model(input_ids=row[None]).logits[0]


def test_each_row_is_the_row_alone(tuned: TunedModel) -> None:
    expected = [alone(tuned, row, name) for row, name in zip(samples(), ROWS, strict=True)]
    tuned.enable(True)
    with tuned.rows(ROWS):
        found = tuned.model(**left_padded(samples())).logits
    for row, logits in zip(found, expected, strict=True):
        torch.testing.assert_close(row[-len(logits) :], logits, atol=1e-5, rtol=1e-5)


def test_rows_of_equal_length_need_no_mask(tuned: TunedModel, input_ids: Tensor) -> None:
    expected = [alone(tuned, row, name) for row, name in zip(input_ids, [None, "b"], strict=True)]
    with tuned.rows([None, "b"]):
        found = tuned.model(input_ids).logits
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuned", PEACEFUL.values(), ids=PEACEFUL.keys(), indirect=True)
def test_a_row_may_use_several_adapters(tuned: TunedModel) -> None:
    names = [["a", "b"], "a", [], ["b", "a"]]
    expected = [alone(tuned, row, name) for row, name in zip(samples(), names, strict=True)]
    with tuned.rows(names):
        found = tuned.model(**left_padded(samples())).logits
    for row, logits in zip(found, expected, strict=True):
        torch.testing.assert_close(row[-len(logits) :], logits, atol=1e-5, rtol=1e-5)


def test_generation_gives_each_row_its_own_tokens(tuned: TunedModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = []
    for row, name in zip(samples(), ROWS, strict=True):
        tuned.use(name)
        mask = torch.ones_like(row)[None]
        out = tuned.model.generate(row[None], attention_mask=mask, **options)
        expected.append(out[0, len(row) :])
    batch = left_padded(samples())
    with tuned.rows(ROWS):
        found = tuned.model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], **options
        )
    assert torch.equal(found[:, max(LENGTHS) :], torch.stack(expected))


def test_decoding_by_hand_is_the_full_forward(tuned: TunedModel, input_ids: Tensor) -> None:
    expected = [alone(tuned, row, name) for row, name in zip(input_ids, ["b", "a"], strict=True)]
    with tuned.rows(["b", "a"]):
        first = tuned.model(input_ids[:, :5], use_cache=True)
        cache = first.past_key_values
        found = [first.logits]
        for place in (5, 6):
            mask = torch.ones(2, place + 1, dtype=torch.int64)
            positions = torch.full((2, 1), place)
            step = input_ids[:, place : place + 1]
            out = tuned.model(
                step, attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_prompts_by_row_stay_within_a_sliding_window(family: str, trained: Trained) -> None:
    model = FAMILIES[family].make()  # of a window of 4
    tuned = attach(attach(model, PromptTuning(tokens=3), name="a"), PTuning(tokens=2), name="b")
    trained(tuned)
    rows = [row % FAMILY_VOCAB for row in samples()]
    names = ["a", "b", None, ["a", "b"]]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    logits, replies = [], []
    for row, name in zip(rows, names, strict=True):
        logits.append(alone(tuned, row, name))
        mask = torch.ones_like(row)[None]
        replies.append(model.generate(row[None], attention_mask=mask, **options)[0, len(row) :])
    batch = left_padded(rows)
    with tuned.rows(names):
        found = model(**batch).logits
        generated = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], **options
        )
    for row, expected in zip(found, logits, strict=True):
        torch.testing.assert_close(row[-len(expected) :], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(generated[:, max(LENGTHS) :], torch.stack(replies))


def test_decoding_behind_prompts_needs_neither_mask_nor_positions(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = attach(model, PromptTuning(tokens=3), name="a")
    trained(attach(tuned, PromptTuning(tokens=5), name="b"))
    with tuned.rows(["b", None]):
        whole = model(input_ids).logits
        first = model(input_ids[:, :5], use_cache=True)
        rest = model(input_ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-5, rtol=1e-5)


def gradients(tuned: TunedModel) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in tuned.trainable().items() if p.grad is not None}
    tuned.model.zero_grad()
    return found


def nll(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    batch = left_padded(rows)
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    # Padding before the first token predicts it, and no row alone does.
    starts = (batch["attention_mask"].cumsum(1) == 1)[:, 1:]
    labels = labels.masked_fill(starts, -100).flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def test_each_adapter_learns_from_its_own_rows(tuned: TunedModel) -> None:
    total: dict[str, Tensor] = {}
    for row, name in zip(samples(), ROWS, strict=True):
        if name is not None:
            tuned.use(name)
            nll(tuned.model, [row]).backward()
            for key, gradient in gradients(tuned).items():
                total[key] = total.get(key, torch.zeros_like(gradient)) + gradient
    with tuned.rows(ROWS):
        nll(tuned.model, samples()).backward()
    found = gradients(tuned)
    assert found.keys() == total.keys() == tuned.trainable().keys()
    # sums over the batch in another order
    torch.testing.assert_close(found, total, atol=1e-5, rtol=1e-4)


def test_checkpointing_inside_the_block_gives_equal_gradients(tuned: TunedModel) -> None:
    tuned.model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
        with tuned.rows(ROWS):
            nll(tuned.model, samples()).backward()
        found.append(gradients(tuned))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_checkpointing_with_backward_after_the_block_is_refused(
    make: Callable[[], PreTrainedModel], reentrant: bool, trained: Trained
) -> None:
    model = make().train()
    tuned = attach(attach(model, LoRA(rank=4), name="a"), PromptTuning(tokens=3), name="b")
    trained(tuned)
    with tuned.rows(ROWS):
        nll(model, samples()).backward()
    expected = gradients(tuned)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with tuned.rows(ROWS):
        nll(model, samples()).backward()
        torch.testing.assert_close(gradients(tuned), expected)
        late = [nll(model, samples()) for _ in range(2)]
    refused = pytest.raises(MethodError, match="inside its `with` block")
    with refused:
        late[0].backward()
    with tuned.rows(["b", "a", None, "b"]), refused:
        late[1].backward()  # another block is not its own
    assert not gradients(tuned)
    assert not any(_is_watched(module) for module in model.modules())


def _is_watched(module: nn.Module) -> bool:
    hooks = module._forward_hooks.values()
    return any("_backward_inside" in getattr(hook, "__qualname__", "") for hook in hooks)


def test_without_checkpointing_backward_may_come_after_the_block(
    tuned: TunedModel,
) -> None:
    with tuned.rows(ROWS):
        nll(tuned.model, samples()).backward()
    expected = gradients(tuned)
    with tuned.rows(ROWS):
        late = nll(tuned.model, samples())
    late.backward()
    torch.testing.assert_close(gradients(tuned), expected)


def test_adapters_that_fight_are_refused_in_one_row_only(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = attach(model, LoRA(rank=2, dora=True), name="a")
    trained(attach(tuned, LoRA(rank=3, dora=True), name="b"))
    tuned.use("a")
    before = model(input_ids).logits
    refused = pytest.raises(
        MethodError, match=r"lora \('a'\) and lora \('b'\) both train .*choose one"
    )
    with refused:
        tuned.use(["a", "b"])
    with refused, tuned.rows(["a", ["b", "a"]]):
        pass
    assert torch.equal(model(input_ids).logits, before)
    with tuned.rows(["a", "b"]):
        assert torch.equal(model(input_ids).logits[0], before[0])


def test_the_switches_are_as_before_afterwards(tuned: TunedModel, input_ids: Tensor) -> None:
    tuned.use("b")
    before = tuned.model(input_ids).logits
    with tuned.rows(["a", None]):
        tuned.model(input_ids)
    assert torch.equal(tuned.model(input_ids).logits, before)
    assert [part.attachment.enabled for part in tuned.parts] == [False, True]


ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
    "pad_token_id": 1,
}


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
@pytest.mark.parametrize(
    "methods",
    [
        (LoRA(rank=4), LoRA(rank=2)),
        (PTuningV2(length=3), PrefixTuning(length=5)),
        (PromptTuning(tokens=3), PromptTuning(tokens=2)),
    ],
    ids=["lora", "prefixes", "prompts"],
)
def test_rows_of_an_encoder_are_each_the_row_alone(
    methods: tuple[Method, Method], kind: type[PreTrainedModel], trained: Trained
) -> None:
    config = {BertModel: BertConfig, RobertaModel: RobertaConfig}[kind](**ENCODER)
    model = kind(config).eval()
    a, b = methods
    tuned = trained(attach(attach(model, a, name="a"), b, name="b"))
    rows, names = samples(), ["a", "b", None, ["a", "b"]]
    longest = max(LENGTHS)
    ids = torch.stack([nn.functional.pad(row, (0, longest - len(row)), value=1) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
    with tuned.rows(names):
        found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, name, hidden in zip(rows, names, found, strict=True):
        tuned.use(name)
        expected = model(input_ids=row[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[: len(row)], expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_an_encoder_decoder_is_not_chosen_by_row() -> None:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    tuned = attach(model, PromptTuning(tokens=2), name="a")
    with pytest.raises(MethodError, match="not chosen by row on encoder-decoders"):
        tuned.rows(["a", None]).__enter__()
    assert tuned.attachments[0].enabled


def test_a_row_of_the_base_is_the_base_bitwise_beside_lora(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    base = model(input_ids).logits
    tuned = trained(attach(model, LoRA(rank=4), name="a"))
    with tuned.rows(["a", None]):
        logits = model(input_ids).logits
    assert torch.equal(logits[1], base[1])
    assert not torch.equal(logits[0], base[0])


def test_biases_act_in_their_rows_only(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = trained(attach(model, BitFit(add_missing=True), name="a"))
    expected = [alone(tuned, row, name) for row, name in zip(input_ids, ["a", None], strict=True)]
    with tuned.rows(["a", None]):
        found = model(input_ids).logits
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [IA3(), LastLayer(), LlamaAdapter(length=2, layers=1)])
def test_a_method_of_whole_batches_says_so_and_leaves_all_as_it_was(
    method: Method, input_ids: Tensor, trained: Trained
) -> None:
    model = tiny_llama()
    tuned = trained(attach(attach(model, LoRA(rank=2), name="a"), method, name="b"))
    before = model(input_ids).logits
    with pytest.raises(MethodError, match="acts on whole batches"), tuned.rows(["a", "b"]):
        pass
    assert torch.equal(model(input_ids).logits, before)
    with tuned.rows(["a", "a"]):  # not asked for, so not in the way
        model(input_ids)


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), PromptTuning(tokens=2), PTuningV2(length=2)], ids=lambda m: m.name
)
def test_a_batch_of_other_size_is_refused(method: Method, input_ids: Tensor) -> None:
    tuned = attach(tiny_llama(), method, name="a")
    with pytest.raises(MethodError, match=r"3 rows .* has 2"), tuned.rows(["a", None, "a"]):
        tuned.model(input_ids)
    with pytest.raises(MethodError, match="this batch has 4"), tuned.rows(["a", None]):
        tuned.model.generate(input_ids, num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), PromptTuning(tokens=2), PTuningV2(length=2)], ids=lambda m: m.name
)
def test_a_packed_batch_is_refused(method: Method) -> None:
    model = tiny_llama()
    tuned = attach(model, method, name="a")
    assert enable_segments(model)
    rows = samples()
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
    refusal = pytest.raises(MethodError, match="without packed samples")
    with refusal, tuned.rows(["a", None, "a", "a"]):
        model(**packed)
    if isinstance(method, PromptTuning):  # of one row, whose segments are rows of nobody
        refusal = pytest.raises(MethodError, match="this batch is packed")
        with refusal, tuned.rows(["a"]):
            model(**packed)


def test_unknown_names_and_no_rows_are_refused() -> None:
    tuned = attach(tiny_llama(), LoRA(rank=2), name="a")
    with pytest.raises(MethodError, match="no adapter is named 'x'"), tuned.rows(["a", "x"]):
        pass
    with pytest.raises(MethodError, match="rows: there are none"), tuned.rows([]):
        pass


@pytest.mark.slow
def test_a_compiled_block_stays_one_graph(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    torch._dynamo.reset()
    tuned = attach(attach(model, LoRA(rank=4), name="a"), LoRA(rank=2, dora=True), name="b")
    trained(attach(tuned, PTuningV2(length=3), name="c"))
    with tuned.rows(["a", "c"]):
        first = model(input_ids).logits
    with tuned.rows(["b", None]):
        second = model(input_ids).logits
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(fullgraph=True, backend="aot_eager")
    with tuned.rows(["a", "c"]):
        torch.testing.assert_close(model(input_ids).logits, first, atol=1e-5, rtol=1e-5)
    with tuned.rows(["b", None]):
        torch.testing.assert_close(model(input_ids).logits, second, atol=1e-5, rtol=1e-5)
