"""What a run that judges has of its own: labelled rows or judged replies, a head, batches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tunesmith.data.asked import AskedData, prepare_asked
from tunesmith.data.classification import LabelledData, prepare_labelled
from tunesmith.data.classification_collate import LabelledCollator
from tunesmith.data.pairs import prepare_pairs
from tunesmith.data.prepare import prepare
from tunesmith.data.stream import EpochStream
from tunesmith.errors import SpecError
from tunesmith.models.context import longest_row
from tunesmith.models.heads import Head, reads_last_token
from tunesmith.models.loading import is_encoder_decoder
from tunesmith.models.zoo import cache_dir
from tunesmith.objectives import Classification, Preference, Reward, TokenClassification
from tunesmith.objectives.reward import OUTPUT
from tunesmith.objectives.sampling import FromReplies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tunesmith.data.classification_rows import Kind
    from tunesmith.data.prepare import PreparedData
    from tunesmith.data.tokenise import Progress
    from tunesmith.spec import Run

NUMBER = ("value",)
"""What the one output of a regression is called."""


def classifies(run: Run) -> bool:
    """Return whether the run learns labels of texts or words."""
    return isinstance(run.objective, Classification | TokenClassification)


def compares(run: Run) -> bool:
    """Return whether the run learns from judged replies."""
    return isinstance(run.objective, Preference | Reward)


def has_head(run: Run) -> bool:
    """Return whether the run gives its model a head instead of the language model's."""
    return classifies(run) or isinstance(run.objective, Reward)


def reads_rows(run: Run, model: PreTrainedModel) -> bool:
    """Return whether the run's head needs rows of a batch: all but a decoder's of texts."""
    return has_head(run) and not reads_last_token(model)


def read_data(
    run: Run, tokenizer: PreTrainedTokenizerFast, progress: Progress | None = None
) -> tuple[Run, PreparedData]:
    """Return the run's rows, and the run with the labels that were found in them.

    Raises:
        DataError: see `prepare` and `prepare_labelled`.
    """
    objective = run.objective
    if run.data.pretraining and not isinstance(objective, FromReplies):
        raise SpecError(
            f"data.pretraining: texts beside the replies that a run learns from, and the objective "
            f"{objective.name} samples none; name them in data.train, or use ppo or grpo"
        )
    if isinstance(objective, FromReplies):
        return _ask(run, objective, tokenizer, progress)
    if isinstance(objective, Preference | Reward):
        if is_encoder_decoder(run.model):
            raise SpecError(
                f"objective.name: {objective.name} learns from replies that stand behind their "
                "prompt in one sequence, and this model reads and writes apart; use a causal model"
            )
        return run, prepare_pairs(run.data, tokenizer, objective.judgement, seed=run.seed)
    if not isinstance(objective, Classification | TokenClassification):
        data = prepare(
            run.data,
            tokenizer,
            seed=run.seed,
            cache=cache_dir() / "tokens",
            encoder_decoder=is_encoder_decoder(run.model),
            progress=progress,
        )
        return run, data
    kind: Kind = objective.kind if isinstance(objective, Classification) else "tokens"
    labelled = prepare_labelled(run.data, tokenizer, kind, labels=objective.labels, seed=run.seed)
    if objective.labels is None and labelled.classes:
        objective = objective.model_copy(update={"labels": list(labelled.classes)})
        run = run.model_copy(update={"objective": objective})
    return run, labelled


def _ask(
    run: Run,
    objective: FromReplies,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress | None,
) -> tuple[Run, AskedData]:
    """Return the prompts of a run that writes the replies itself, and the texts beside them."""
    require_causal(run)
    if objective.rollout.prompt_tokens is not None:
        _require_bare_text(tokenizer)
    asked = prepare_asked(
        run.data,
        tokenizer,
        seed=run.seed,
        reply_length=objective.rollout.max_new_tokens,
        prompt_tokens=objective.rollout.prompt_tokens,
    )
    if not run.data.pretraining:
        return run, asked
    alone = {"train": run.data.pretraining, "pretraining": [], "evaluation": [], "holdout": 0}
    texts = prepare(
        run.data.model_copy(update=alone),
        tokenizer,
        seed=run.seed,
        cache=cache_dir() / "tokens",
        progress=progress,
    ).train
    assert isinstance(texts, EpochStream)  # noqa: S101 - prompts are never streamed
    return run, replace(asked, texts=texts)


def _require_bare_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that prompts are texts alone, whose first tokens are a beginning to go on with.

    Raises:
        SpecError: the template writes headers, which would be most of what is left of them.
    """
    turn = {"role": "user", "content": "text"}
    shown = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    if shown != turn["content"]:
        raise SpecError(
            "objective.rollout.prompt_tokens: cuts what the chat template writes, which begins "
            f"with {str(shown)[:20]!r} and not with the text; set model.chat_template: text"
        )


def require_causal(run: Run) -> None:
    """Check that the model of a run that samples can be sampled from.

    Raises:
        SpecError: it reads and writes apart.
    """
    if is_encoder_decoder(run.model):
        raise SpecError(
            f"objective.name: {run.objective.name} samples from a causal model, and this model "
            "reads and writes apart; use a causal model"
        )


def head_of_run(run: Run) -> Head | None:
    """Return the head that the run's model is loaded with; None for a language model.

    Raises:
        SpecError: the labels are not known, as in a run file that was never run.
    """
    objective = run.objective
    if isinstance(objective, Reward):
        return Head(objective.head, OUTPUT, objective.problem, run.seed)
    if not isinstance(objective, Classification | TokenClassification):
        return None
    labels: tuple[str, ...] = tuple(objective.labels or ())
    if isinstance(objective, Classification) and objective.kind == "regression":
        labels = NUMBER
    if not labels:
        raise SpecError("objective.labels: the classes are not known; name them")
    return Head(objective.head, labels, objective.problem, run.seed)


def head_learning_rate(run: Run) -> float | None:
    """Return the peak learning rate that the run gives its new head, if it gives one."""
    if not isinstance(run.objective, Classification | TokenClassification | Reward):
        return None
    return run.objective.head_learning_rate


def require_padding(run: Run, model: PreTrainedModel) -> None:
    """Check that the run does not ask for segments side by side where a head reads rows.

    Raises:
        SpecError: it does.
    """
    if run.engine.padding == "free":
        raise SpecError(
            f"engine.padding: free: the head of {type(model).__name__} reads rows of a batch; use "
            "auto or right"
        )


def labelled_collator(
    run: Run,
    model: PreTrainedModel,
    data: PreparedData,
    *,
    pad_token_id: int,
    padding: Literal["free", "right"],
) -> LabelledCollator:
    """Return what makes batches of the run's labelled rows."""
    return LabelledCollator(
        pad_token_id,
        padding,
        positions=reads_last_token(model),
        class_weights=class_weights(run, data),
    )


def class_weights(run: Run, data: PreparedData) -> Tensor | None:
    """Return the weight of each class, (classes,) float32, or None where all count alike.

    Raises:
        SpecError: a class is named that there is not, or one without rows is to be balanced.
    """
    objective = run.objective
    if not isinstance(objective, Classification) or objective.class_weights == "none":
        return None
    labels = objective.labels or []
    if isinstance(objective.class_weights, dict):
        unknown = set(objective.class_weights) - set(labels)
        if unknown:
            raise SpecError(
                f"objective.class_weights: '{min(unknown)}' is no label; there are "
                f"{', '.join(labels)}"
            )
        return torch.tensor([objective.class_weights.get(label, 1.0) for label in labels])
    assert isinstance(data, LabelledData)  # noqa: S101 - read_data makes these for this objective
    for label, count in zip(labels, data.counts, strict=True):
        if count == 0:
            raise SpecError(
                f"objective.class_weights: balanced needs training rows of every label, and "
                f"'{label}' has none"
            )
    rows = sum(data.counts)
    return torch.tensor([rows / (len(labels) * count) for count in data.counts])


def check_lengths(run: Run, model: PreTrainedModel, data: PreparedData) -> None:
    """Check that the model has a position for every token of training and evaluation.

    Raises:
        SpecError: rows are longer than the model takes.
    """
    positions = longest_row(model)
    if positions is None or not isinstance(data, LabelledData):
        return
    trained = int(data.train.corpus.lengths.max())  # type: ignore[union-attr]
    longest = max([trained, *(len(row.input_ids) for row in data.evaluation)])
    if longest > positions:
        raise SpecError(
            f"data.max_length: a row has {longest} tokens after cutting to {run.data.max_length}, "
            f"and {run.model.name} has positions for {positions}; use at most {positions}"
        )


def text_tokens(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many tokens of a new text a finished run's model reads; the rest is cut off."""
    limits = [run.data.max_length, tokenizer.model_max_length, longest_row(model)]
    return min(limit for limit in limits if limit is not None)
