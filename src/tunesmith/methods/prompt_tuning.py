"""Prompt tuning: a learned prompt of soft tokens (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tunesmith.errors import AdapterError, MethodError, TunesmithError
from tunesmith.methods.child import Child, ChildAttachment
from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.input_rows import InputRows, input_children, require_room
from tunesmith.methods.peft_format import PeftConfig, common_config, read_peft_config
from tunesmith.methods.tensors import check_against
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Attachment
    from tunesmith.models.sites import Sites

COMMON = 5000
"""Vocabulary that starting rows are drawn from: the most common tokens (section 3.2)."""


class PromptTuning(Method):
    """Train the embeddings of a prompt P that goes before the input: [P; X].

    In an encoder-decoder, the paper's T5, that is the encoder's input; the decoder attends to what
    the encoder makes of P as well.
    """

    default_learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    name: Literal["prompt_tuning"] = "prompt_tuning"
    """A learned prompt before the input."""
    tokens: int = Field(default=20, ge=1)
    """Length of the prompt: 20 to 100 in the paper, which finds little gain beyond 20."""
    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """Start of the prompt: embeddings of common tokens, uniform in [-0.5, 0.5], or of `text`, cut
    or repeated to the length."""
    text: str | None = None
    """What the prompt starts as, with init text: say the task, or the labels."""

    @model_validator(mode="after")
    def _text_goes_with_its_init(self) -> Self:
        """Refuse a text without its init, and the other way round."""
        if (self.init == "text") != bool(self.text):
            raise ValueError("text: is needed by init text, and used by no other; set both")
        return self

    def attach(self, model: nn.Module, sites: Sites, *, name: str = "default") -> PromptAttachment:
        """Hang the prompt under the stack of blocks.

        Raises:
            MethodError: the prompt is as long as the context, init is text and the model has no
                tokenizer, or the name is taken.
        """
        return attach_prompt(model, sites, self, name=name)

    @classmethod
    def attach_peft(
        cls,
        files: PeftFiles,
        model: PreTrainedModel,
        sites: Sites,
        *,
        recorded: Method | None,
        name: str,
    ) -> tuple[Method, Attachment]:
        """Attach a prompt that PEFT's files describe; see `Method.attach_peft`."""
        values = read_peft_rows(files, model, plain="prompt tuning")
        method = recorded
        if not isinstance(method, PromptTuning):
            method = cls(tokens=len(values))
        return method, attach_prompt(model, sites, method, name=name, values=values)


class PeftPrompt(PeftConfig):
    """What is read of PEFT's PromptTuningConfig."""

    num_virtual_tokens: int = Field(ge=1)
    num_transformer_submodules: int | None = None


WITHOUT_EFFECT = {
    "num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text",
    "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
"""Its keys that change nothing about what a finished prompt computes."""


def read_peft_rows(
    files: PeftFiles, model: PreTrainedModel, *, plain: str, without_effect: Collection[str] = ()
) -> Tensor:
    """Return the rows (tokens, width) before the input that PEFT's files hold.

    Args:
        files: PEFT's configuration and tensors.
        model: the base model.
        plain: the method's name in messages.
        without_effect: keys, besides prompt tuning's, that change nothing about finished rows.

    Raises:
        AdapterError: they are for a model of another size or kind.
    """
    ignored = {*WITHOUT_EFFECT, *without_effect}
    config = read_peft_config(files, PeftPrompt, without_effect=ignored, plain=plain)
    copies = config.num_transformer_submodules or 1
    if copies > (2 if model.config.is_encoder_decoder else 1):
        raise AdapterError(
            f"{files.file}: num_transformer_submodules {copies} is for encoder-decoder models, "
            f"and {type(model).__name__} is none"
        )
    width = model.get_input_embeddings().embedding_dim
    shape = torch.Size((copies * config.num_virtual_tokens, width))
    check_against({"prompt_embeddings": shape}, files.tensors)
    # Of an encoder-decoder PEFT stores two prompts and uses the first, before the encoder.
    return files.tensors["prompt_embeddings"][: config.num_virtual_tokens]


def attach_prompt(
    model: PreTrainedModel,
    sites: Sites,
    method: PromptTuning,
    *,
    name: str,
    values: Tensor | None = None,
) -> PromptAttachment:
    """Hang a prompt under the stack of blocks: `values` (tokens, width), or a fresh start.

    Raises:
        MethodError: it does not fit, its text cannot be read, or the name is taken.
    """
    require_room(model, method.tokens, "tokens")
    embedding = model.get_input_embeddings().weight.detach()
    start = _start(method, embedding, model) if values is None else values
    prompt = Prompt(start).to(embedding.device)
    children = input_children(model, sites, prompt, attribute=f"prompt_{name}", name=name)
    return PromptAttachment(model, children, prompt)


def _start(method: PromptTuning, embedding: Tensor, model: PreTrainedModel) -> Tensor:
    """Return the rows (tokens, width) float32 that the prompt starts as."""
    if method.init == "random":
        return torch.rand(method.tokens, embedding.shape[1]) - 0.5
    if method.init == "vocabulary":
        chosen = torch.randint(min(COMMON, len(embedding)), (method.tokens,))
    else:
        ids = _text_ids(method.text or "", model)
        chosen = torch.tensor([ids[i % len(ids)] for i in range(method.tokens)])
    return embedding[chosen.to(embedding.device)].float()


def _text_ids(text: str, model: PreTrainedModel) -> list[int]:
    """Return the tokens of `text`; raise MethodError where the model's tokenizer is not known."""
    try:
        tokenizer = load_tokenizer(ModelSettings(name=model.name_or_path or "."))
    except TunesmithError as error:
        raise MethodError(
            f"method.init: text needs the tokenizer of the model, and {model.name_or_path!r} has "
            f"none ({error}); use init vocabulary"
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise MethodError(f"method.text: {text!r} has no tokens; write some words")
    return ids


class Prompt(InputRows):
    """P (tokens, width), float32."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(len(start))
        self.P = nn.Parameter(start.detach().to(torch.float32, copy=True))

    def rows(self) -> Tensor:
        """Return P."""
        return self.P


class PromptAttachment(ChildAttachment):
    """One prompt on one model."""

    identity_at_start: ClassVar[bool] = False
    title: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_keys: ClassVar[dict[str, str]] = {"prompt_tuning_init": "RANDOM"}
    """What PEFT wants to read besides, though it has no effect."""

    def __init__(self, model: nn.Module, children: dict[str, Child], prompt: InputRows) -> None:
        super().__init__(model, children)
        self.prompt = prompt

    def merge(self) -> None:
        """Refuse: a prompt is input and no weight.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            f"{self.title} adds input and changes no weight, so it cannot merge; save the adapter "
            "and load it beside the base"
        )

    def nearest_tokens(self, count: int = 3) -> list[list[tuple[int, float]]]:
        """Return the `count` nearest tokens of the vocabulary to each row, with their cosine."""
        embedding = self.model.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
        rows = self.prompt.final().to(embedding.device)
        cosine = nn.functional.normalize(rows) @ nn.functional.normalize(embedding).T
        best = cosine.topk(count)
        return [
            list(zip(ids, values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def export_peft(self) -> PeftFiles:
        """Return the prompt as PEFT writes it."""
        P = self.prompt.final()
        settings = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        config = common_config(self.model, self.peft_type) | {
            "num_virtual_tokens": len(P),
            "token_dim": P.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": settings.num_attention_heads,
            "num_layers": settings.num_hidden_layers,
        }
        return PeftFiles(config | self.peft_keys, {"prompt_embeddings": P})
