"""P-tuning: a prompt that a small network makes (Liu et al. 2021, arXiv:2103.10385)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from tunesmith.methods.contract import Method, PeftFiles
from tunesmith.methods.input_rows import InputRows, input_children, require_room
from tunesmith.methods.prompt_tuning import Prompt, PromptAttachment, read_peft_rows
from tunesmith.methods.tensors import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.methods.contract import Attachment
    from tunesmith.models.sites import Sites


class PTuning(Method):
    """Train a prompt through an encoder, [h; X] with h = MLP(LSTM(P)).

    The encoder ties the rows of the prompt to each other. It is there while training only: the
    saved file holds the rows h, and loads as plain rows, which then train as those of prompt tuning
    do. As in the authors' later work the whole prompt goes before the input.
    """

    default_learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str | None] = "P_TUNING"

    name: Literal["p_tuning"] = "p_tuning"
    """A prompt before the input, made by a prompt encoder."""
    tokens: int = Field(default=20, ge=1)
    """Length of the prompt."""
    encoder: Literal["lstm", "mlp"] = "lstm"
    """The prompt encoder: a bidirectional LSTM of two layers and two linear maps with a ReLU
    between them (eq. 2 and 3), or three linear maps with ReLUs, PEFT's default."""
    hidden: int | None = Field(default=None, ge=1)
    """Width inside the encoder, of each direction for lstm. None takes the model's width, and half
    of it for each direction, as the authors' code does."""

    def attach(
        self, model: nn.Module, sites: Sites, *, name: str = "default"
    ) -> EncodedPromptAttachment:
        """Hang the prompt and its encoder under the stack of blocks.

        Raises:
            MethodError: the prompt is as long as the context, or the name is taken.
        """
        base = cast("PreTrainedModel", model)
        return _hang(base, sites, EncodedPrompt(self._fresh(base)), name=name)

    def _fresh(self, model: PreTrainedModel) -> PromptEncoder:
        """Return an encoder that starts as PyTorch starts its parts, P as N(0, 1)."""
        width = model.get_input_embeddings().embedding_dim
        P = torch.randn(self.tokens, width)
        if self.encoder == "mlp":
            hidden = self.hidden or width
            return PromptEncoder(P, None, _mlp(width, hidden, hidden, width))
        hidden = self.hidden or max(1, width // 2)
        lstm = nn.LSTM(
            width, hidden, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float32
        )
        return PromptEncoder(P, lstm, _mlp(2 * hidden, 2 * hidden, width))

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
        """Attach the rows that PEFT's files hold, without encoder; see `Method.attach_peft`."""
        rows = read_peft_rows(files, model, plain="P-tuning", without_effect=_OF_THE_ENCODER)
        method = recorded if isinstance(recorded, PTuning) else cls(tokens=len(rows))
        return method, _hang(model, sites, Prompt(rows), name=name)


_OF_THE_ENCODER = (
    *("encoder_reparameterization_type", "encoder_hidden_size"),
    *("encoder_num_layers", "encoder_dropout"),
)
"""PEFT's keys that say how the rows were made."""


def _mlp(*widths: int) -> nn.Sequential:
    """Return linear maps between `widths`, float32, with ReLUs between them."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following, dtype=torch.float32), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class PromptEncoder(nn.Module):
    """h_i = MLP([LSTM(P_0..i) : LSTM(P_i..m)]), or MLP(P_i) without an LSTM (eq. 2 and 3).

    Args:
        P: (tokens, width), its start.
        lstm: bidirectional, or None.
        mlp: from the LSTM's width, or the model's, to the model's.
    """

    def __init__(self, P: Tensor, lstm: nn.LSTM | None, mlp: nn.Sequential) -> None:
        super().__init__()
        self.P = nn.Parameter(P)
        self.lstm = lstm
        self.mlp = mlp

    def forward(self) -> Tensor:
        """Return h (tokens, width), float32."""
        with torch.autocast(self.P.device.type, enabled=False):
            hidden = self.P if self.lstm is None else self.lstm(self.P[None])[0][0]
            out: Tensor = self.mlp(hidden)
        return out


class EncodedPrompt(InputRows):
    """The rows that an encoder makes."""

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__(len(encoder.P))
        self.encoder = encoder

    def rows(self) -> Tensor:
        """Return h (tokens, width)."""
        h: Tensor = self.encoder()
        return h

    @torch.no_grad()
    def final(self) -> Tensor:
        """Return h whole and on the CPU; the encoder's weights may be sharded."""
        parameters = dict(self.encoder.named_parameters())
        if not any(isinstance(p, DTensor) for p in parameters.values()):
            return whole(self.rows())  # where it trained, so bit for bit what it computes there
        weights = {name: whole(p) for name, p in parameters.items()}
        h: Tensor = functional_call(self.encoder, weights, ())
        return h


class EncodedPromptAttachment(PromptAttachment):
    """One prompt on one model, with the encoder that makes it or without."""

    title: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    # PEFT makes an encoder of this kind, though it reads finished rows past it.
    peft_keys: ClassVar[dict[str, str]] = {"encoder_reparameterization_type": "MLP"}


def _hang(
    model: PreTrainedModel, sites: Sites, prompt: InputRows, *, name: str
) -> EncodedPromptAttachment:
    """Hang `prompt` before the input.

    Raises:
        MethodError: it is as long as the context, or the name is taken.
    """
    require_room(model, prompt.count, "tokens")
    prompt.to(model.get_input_embeddings().weight.device)
    children = input_children(model, sites, prompt, attribute=f"p_tuning_{name}", name=name)
    return EncodedPromptAttachment(model, children, prompt)
