"""Whole runs of tiny encoder-decoders: what is read, what is written, and what comes of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel, PreTrainedModel

import tunesmith
from tiny import VOCAB, tiny_bart, tiny_t5, tiny_tokenizer
from tunesmith import (
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    Full,
    LoRA,
    ModelSettings,
    PrefixTuning,
    Run,
    Source,
    TrainSettings,
)
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.evaluate import evaluate
from tunesmith.jobs.preview import preview
from tunesmith.jobs.result import load_run
from tunesmith.methods.contract import Method
from tunesmith.rollout.chat import stream_reply
from tunesmith.rollout.generate import generate

WORDS = ["red", "blue", "green"]
MODELS = {"t5": tiny_t5, "bart": tiny_bart}


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Make a random model say different things: fresh ones repeat one token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model directory with a tokenizer that has no chat template."""
    path = tmp_path / request.param
    MODELS[request.param]().save_pretrained(path)
    tiny_tokenizer(template=None).save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    content = [
        {"prompt": f"colour {n % 3}" + "!" * (n % 4), "completion": WORDS[n % 3]} for n in range(24)
    ]
    path.write_text("\n".join(json.dumps(row) for row in content))
    return path


def run_of(directory: Path, rows: Path, method: Method | None = None, **data: object) -> Run:
    return Run(
        name="job",
        output=str(rows.parent / "runs"),
        model=ModelSettings(name=str(directory), dtype="float32"),
        method=method or LoRA(rank=4),
        data=DataSettings(train=[Source(path=str(rows))], **{"holdout": 4, **data}),
        train=TrainSettings(max_steps=12, batch_size=4, learning_rate=2e-2),
        evaluation=EvaluationSettings(
            samples=2, max_new_tokens=6, metrics=["accuracy", "rouge_l"], choices=WORDS
        ),
        engine=EngineSettings(device="cpu"),
    )


@pytest.mark.parametrize("method", [LoRA(rank=4), PrefixTuning(length=4)], ids=lambda m: m.name)
def test_a_run_trains_saves_loads_and_generates(
    directory: Path, rows: Path, method: Method
) -> None:
    result = tunesmith.train(run_of(directory, rows, method))
    summary = result.summary
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert {"token_accuracy", "accuracy", "rouge_l"} <= summary["after"].keys()
    assert all(proof["passed"] for proof in summary["proofs"])
    loaded = load_run(result.directory.path)
    prompts = [loaded.tokenizer(text)["input_ids"] for text in ("colour 1", "colour 2!!")]
    one, other = (
        generate(tuned.model, loaded.tokenizer, prompts, max_new_tokens=8)
        for tuned in (result.tuned, loaded.tuned)
    )
    assert one == other
    metrics = evaluate(result.directory.path)
    assert metrics["tuned"]["loss"] == pytest.approx(summary["after"]["loss"])
    assert metrics["base"]["loss"] == pytest.approx(summary["before"]["loss"], rel=0.2)


def test_what_reads_and_writes_apart_has_no_loss_on_general_text(
    directory: Path, rows: Path
) -> None:
    evaluation = EvaluationSettings(samples=0, general="bundled")
    run = run_of(directory, rows).model_copy(update={"evaluation": evaluation})
    with pytest.raises(SpecError, match=r"evaluation\.general: .* reads and writes apart"):
        tunesmith.train(run)


def test_full_training_leaves_positions_that_are_computed_alone(tmp_path: Path, rows: Path) -> None:
    """Marian's are sines and cosines, which its files leave out."""
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=256,
        eos_token_id=2,
        pad_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    directory = tmp_path / "marian"
    MarianMTModel(config).save_pretrained(directory)
    tiny_tokenizer(template=None).save_pretrained(directory)
    result = tunesmith.train(run_of(directory, rows, Full()))
    assert {proof["passed"] for proof in result.summary["proofs"]} == {True}
    trained = result.tuned.trainable()
    assert "model.encoder.embed_positions.weight" not in trained
    saved = AutoModelForSeq2SeqLM.from_pretrained(result.directory.model, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            saved(input_ids=ids, decoder_input_ids=ids).logits,
            result.tuned.model(input_ids=ids, decoder_input_ids=ids).logits,
        )


def test_the_prompt_is_read_and_the_reply_is_written(directory: Path, rows: Path) -> None:
    (sample,), *_ = preview(run_of(directory, rows, shuffle=False, holdout=0), rows=1).rows
    read, written = sample.pieces
    assert (read.text, read.supervised) == ("colour 0", False)
    assert (written.text, written.supervised) == ("red<|im_end|>", True)


def test_several_turns_are_read_line_by_line(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("be brief", "one?", "yes", "two?", "no")
    turns = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]
    path.write_text(json.dumps({"messages": turns}))
    (sample,), *_ = preview(run_of(directory, path, holdout=0), rows=1).rows
    read, written = sample.pieces
    assert read.text == "be brief\none?\nyes\ntwo?"
    assert written.text == "no<|im_end|>"


def test_a_streamed_run_reads_the_same_rows(directory: Path, rows: Path) -> None:
    options = {"shuffle": False, "holdout": 0}
    whole = preview(run_of(directory, rows, **options), rows=6)
    streamed = preview(run_of(directory, rows, streaming=True, **options), rows=6)
    assert streamed.rows == whole.rows


def test_chat_says_what_generate_says(directory: Path) -> None:
    model, tokenizer = tunesmith.load_model(str(directory))
    lively(model)
    messages = [{"role": "user", "content": "colour 1"}]
    said = "".join(stream_reply(model, tokenizer, messages, max_new_tokens=8))
    ids = tokenizer("colour 1")["input_ids"]
    (reply,) = generate(model, tokenizer, [ids], max_new_tokens=8)
    assert said == tokenizer.decode(reply, skip_special_tokens=True)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_generate_is_transformers_own_for_every_prompt(make: Callable[[], PreTrainedModel]) -> None:
    model, tokenizer = lively(make()), tiny_tokenizer(template=None)
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, stop_ids=[])
    assert len({tuple(reply) for reply in together}) > 1
    for prompt, reply in zip(prompts, together, strict=True):
        own = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert own[0, 1:].tolist() == reply


def test_a_merged_model_is_an_encoder_decoder_again(directory: Path, rows: Path) -> None:
    result = tunesmith.train(run_of(directory, rows))
    target = rows.parent / "merged"
    result.tuned.export_model(target, result.tokenizer)
    merged = AutoModelForSeq2SeqLM.from_pretrained(target).eval()
    inputs = {"input_ids": torch.tensor([[5, 6]]), "decoder_input_ids": torch.tensor([[2, 7]])}
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**inputs).logits, result.tuned.model(**inputs).logits, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, r"data\.packing: true: an encoder-decoder's samples are pairs"),
        ({"supervise": "all"}, r"data\.supervise: all: an encoder-decoder predicts what it writes"),
    ],
)
def test_what_pairs_cannot_do_is_refused(
    directory: Path, rows: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tunesmith.train(run_of(directory, rows, **settings))


def test_text_without_a_prompt_is_refused(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "only a text"}))
    with pytest.raises(DataError, match="row 1: has no prompt and reply"):
        tunesmith.train(run_of(directory, path, holdout=0))
