"""Measuring a model on the evaluation rows: loss, replies, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

from torch import nn

from tunesmith.data.render_pairs import renderer_for
from tunesmith.engine.evaluation import mean_loss
from tunesmith.engine.events import Listener, Sampled
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.batches import interleave
from tunesmith.jobs.examine_preferences import measured_by_row
from tunesmith.jobs.row_sums import ratios
from tunesmith.measure.choices import choose
from tunesmith.measure.text import bleu, exact_match, rouge_l
from tunesmith.models.modes import autocasting
from tunesmith.objectives import SFT, Distillation, Preference
from tunesmith.objectives.preference import KL
from tunesmith.rollout.generate import generate

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.data.pairs import PairRow
    from tunesmith.data.rows import Prompt, TokenRow
    from tunesmith.engine.distribution import Peers
    from tunesmith.engine.settings import EvaluationSettings
    from tunesmith.jobs.assemble import Assembled, Program
    from tunesmith.types import JSON, Batch, Collate, LossTerms

SCORES = {"bleu": bleu, "rouge_l": rouge_l, "exact_match": exact_match}
"""Metrics of generated replies: replies and each one's references to a number."""
ROW_SCORES = {"rouge_l", "exact_match"}
"""Those that are a mean of the replies' own scores."""
T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What the model said to a prompt."""

    prompt: str
    reference: str
    reply: str


class NotingLosses(nn.Module):
    """A program of `sft` or `distillation` that also notes what each sample adds to the means."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self._noted: list[tuple[Tensor, dict[str, Tensor]]] = []

    def forward(self, batch: Batch) -> LossTerms:
        """Return the summed loss of `batch`."""
        program, objective = self.program, self.program.objective
        if isinstance(objective, Distillation):
            terms, found = objective.loss_by_sample(program.model, program.completed(batch))
            sums = {"loss": found.nats, "divergence": found.divergence}
            self._noted.append((found.tokens, sums))
            return terms
        assert isinstance(objective, SFT)  # noqa: S101 - made for no other
        terms, losses = objective.loss_by_sample(program.model, batch)
        self._noted.append((losses.tokens, {"loss": losses.nats}))
        return terms

    def batches(self) -> list[dict[str, list[tuple[float, int]]]]:
        """Return by metric the sum and the supervised tokens of each sample, batch by batch."""
        return [
            {
                name: list(zip(each.tolist(), tokens.tolist(), strict=True))
                for name, each in sums.items()
            }
            for tokens, sums in self._noted
        ]


@dataclass
class Examiner:
    """Measures the assembled model as it is; call it as often as wanted."""

    assembled: Assembled
    peers: Peers
    listeners: Sequence[Listener] = ()
    replies: list[Reply] = field(default_factory=list, init=False)
    """The replies of the last examination: the first `evaluation.samples` prompts."""
    outcomes: dict[str, JSON] = field(default_factory=dict, init=False)
    """Of the last examination, what each row or prompt scored: metric to scores, or to `totals` and
    `counts` whose sums the metric is the ratio of; for BLEU `replies` and `references`."""

    def __post_init__(self) -> None:
        """Check that what is to be measured can be.

        Raises:
            SpecError: accuracy without choices.
        """
        settings = self.assembled.run.evaluation
        if "accuracy" in settings.metrics and len(settings.choices) < 2:
            raise SpecError(
                "evaluation.choices: accuracy scores the replies to choose among; give at least two"
            )

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to measure on."""
        return len(self.assembled.data.evaluation) > 0

    def examine(self, step: int | None = None) -> dict[str, float]:
        """Return all metrics of the model as it is now; every process calls this alike.

        Args:
            step: tells the listeners of the sample replies under this step.
        """
        settings, data = self.assembled.run.evaluation, self.assembled.data
        self.outcomes = {}
        metrics = self._losses(judged_rows(data.evaluation, settings))
        # The objective calls it accuracy; beside the accuracy of choices it needs a fuller name.
        if "accuracy" in metrics:
            metrics["token_accuracy"] = metrics.pop("accuracy")
        prompts = chosen(data.prompts, settings)
        with autocasting(self.peers.device, self.assembled.autocast_dtype):
            if "accuracy" in settings.metrics:
                metrics["accuracy"] = self._accuracy(prompts)
            metrics |= self._score_replies(prompts)
        if step is not None and self.peers.is_main:
            self._tell(step)
        return metrics

    def _losses(self, rows: Sequence[TokenRow]) -> dict[str, float]:
        """Return the loss and the objective's metrics; keep what each row adds to them."""
        program = self.assembled.program
        if isinstance(program.objective, Preference):
            return self._preferences(program.objective, cast("Sequence[PairRow]", rows))
        by_token = isinstance(program.objective, SFT | Distillation)
        noting = NotingLosses(program) if by_token else None
        metrics = mean_loss(
            noting or program,
            rows,
            cast("Collate[TokenRow]", self.assembled.collate),
            batch_size=self.assembled.run.evaluation.batch_size,
            peers=self.peers,
            autocast_dtype=self.assembled.autocast_dtype,
        )
        if noting is not None:
            batches = interleave(self.peers.gather(noting.batches()))
            for name in dict.fromkeys(name for batch in batches for name in batch):
                samples = [sample for batch in batches for sample in batch[name]]
                self.outcomes[name] = ratios(*zip(*samples, strict=True))
        return metrics

    def _preferences(self, objective: Preference, rows: Sequence[PairRow]) -> dict[str, float]:
        """Return the loss and metrics, means over rows, and keep each row's."""
        found = measured_by_row(self.assembled, objective, self.peers, rows)
        # kl is z0, alike in every row: resampled it would look certain.
        self.outcomes |= {name: each.tolist() for name, each in found.items() if name != KL}
        return {name: float(each.mean()) for name, each in found.items()}

    def _score_replies(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        settings = self.assembled.run.evaluation
        wanted = [name for name in settings.metrics if name in SCORES]
        needed = prompts if wanted else prompts[: settings.samples]
        replies = self._replies(needed)
        self.replies = [
            Reply(shown(prompt), prompt.reference[0], reply)
            for prompt, reply in list(zip(needed, replies, strict=True))[: settings.samples]
        ]
        references = [list(prompt.reference) for prompt in needed]
        if wanted:
            self.outcomes["replies"] = list(replies)
            self.outcomes["references"] = [list(texts) for texts in references]
        for name in set(wanted) & ROW_SCORES:
            self.outcomes[name] = [
                SCORES[name]([r], [refs]) for r, refs in zip(replies, references, strict=True)
            ]
        return {name: SCORES[name](replies, references) for name in wanted}

    def _replies(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the model's replies, each process having generated its share."""
        settings, peers = self.assembled.run.evaluation, self.peers
        mine = list(prompts)[peers.rank :: peers.size]
        tokens = generate(
            self.assembled.tuned.model,
            self.assembled.tokenizer,
            [prompt.input_ids for prompt in mine],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )
        texts = [self.assembled.tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
        return interleave(peers.gather(texts))

    def _accuracy(self, prompts: Sequence[Prompt]) -> float:
        settings, peers = self.assembled.run.evaluation, self.peers
        mine = list(prompts)[peers.rank :: peers.size]
        model = self.assembled.tuned.model
        renderer = renderer_for(
            self.assembled.tokenizer,
            supervise="assistant",
            encoder_decoder=model.config.is_encoder_decoder,
        )
        picked = choose(
            model,
            [prompt.input_ids for prompt in mine],
            [renderer.reply(choice) for choice in settings.choices],
            batch_size=settings.batch_size,
        )
        right = [
            float(settings.choices[index].strip() in {text.strip() for text in prompt.reference})
            for index, prompt in zip(picked, mine, strict=True)
        ]
        scores = interleave(peers.gather(right))
        self.outcomes["accuracy"] = list(scores)
        return sum(scores) / len(scores)

    def _tell(self, step: int) -> None:
        for reply in self.replies:
            event = Sampled(
                step=step, prompt=reply.prompt, reply=reply.reply, reference=reply.reference
            )
            for listener in self.listeners:
                listener(event)


def shown(prompt: Prompt) -> str:
    """Return what the user asked, for people to read."""
    return str(prompt.messages[-1].get("content", ""))


def chosen(rows: Sequence[T], settings: EvaluationSettings) -> Sequence[T]:
    """Return the evaluation rows (or prompts) that the settings ask for."""
    start, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[settings.rows]
    return rows[start::step][: settings.limit]


def judged_rows(rows: Sequence[T], settings: EvaluationSettings) -> Sequence[T]:
    """Return those of the evaluation rows that are to be measured; none where there are none.

    Raises:
        DataError: there are some, and the settings leave all of them out.
    """
    found = chosen(rows, settings)
    if len(rows) and not len(found):
        raise DataError(
            f"evaluation.rows: {settings.rows} leaves none of {len(rows)} evaluation row to be "
            "measured; hold out more with data.holdout, at least 2 where even and odd rows are "
            "measured apart, as a comparison that searches learning rates does"
        )
    return found
