"""What a run does with its models, simulated: a roll-out, its scoring, and a training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from tunesmith.engine.blocks import training_blocks
from tunesmith.jobs.assemble import Program
from tunesmith.jobs.full_batch import full_batch, side_by_side
from tunesmith.jobs.planned_writing import sampling_of
from tunesmith.measure.simulated_decoding import repeated
from tunesmith.measure.simulated_graph import Graphs, SimulatedGraph
from tunesmith.measure.simulated_memory import PhaseMemory, StepMemory, simulation
from tunesmith.methods.roles import SCORED_AT_ONCE, acting
from tunesmith.models.modes import evaluating, prepared
from tunesmith.models.output_head import output_head
from tunesmith.objectives import GRPO, PPO, Distillation
from tunesmith.objectives.replies import policy_of
from tunesmith.objectives.sampling import FromReplies
from tunesmith.rollout.decode import GrowingDecoder, Padded
from tunesmith.rollout.draw import Drawing
from tunesmith.rollout.fixed import FixedDecoder
from tunesmith.rollout.sample import is_fixed

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.jobs.planned_models import Judge, Models
    from tunesmith.jobs.planned_writing import Writing
    from tunesmith.measure.simulated_memory import Live, Simulation
    from tunesmith.spec import Run
    from tunesmith.types import Batch

_NOWHERE: Final = torch.device("cpu")
"""Where tensors without data are, whatever device is planned for."""
_ROUNDS: Final = {"cuda": 1, "cpu": 2}
"""On the CPU a roll-out finds the holes that the steps before left in the heap."""


@dataclass(frozen=True)
class Work:
    """What is simulated."""

    run: Run
    models: Models
    """On the meta device; no longer usable afterwards."""
    shape: tuple[int, int]
    """Rows of the micro-batch, and tokens of each."""
    device: str
    """`cuda` or `cpu`."""
    writing: Writing | None
    """Of a run that samples."""
    processes: int = 1
    """That share the texts of a step."""

    @property
    def chosen(self) -> dict[int, int]:
        """Return how many of a batch's tokens are learned from, by how many there are."""
        (rows, length), objective = self.shape, self.run.objective
        if isinstance(objective, FromReplies) and self.writing is not None:
            return {rows * length: rows * self.writing.reply}
        if isinstance(objective, Distillation) and objective.logits == "cached":
            return {rows * length: rows * (length - 1)}  # as many as a teacher's word is on
        return {}

    def batch(self) -> Batch:
        """Return a full batch in the layout of training."""
        batch = full_batch(self.run, self.models.tuned.model, self.shape, processes=self.processes)
        return side_by_side(batch) if self.models.side_by_side else batch


@dataclass(frozen=True)
class Phases:
    """The memory of a run's work."""

    step: StepMemory
    rollout: PhaseMemory | None = None
    scoring: PhaseMemory | None = None


def phases_of(work: Work) -> Phases:
    """Return the memory of what a run does, in the order in which a process does it."""
    models, scored = work.models, None
    modules = [models.tuned.model, *models.beside]
    with simulation(modules, device=work.device, chosen=work.chosen) as simulated:
        if work.writing is None:
            return Phases(_step(simulated, work))
        for _ in range(_ROUNDS[work.device]):
            rollout = _Rollout(work, work.writing)
            written = simulated.phase(rollout, autocast=models.autocast, padded=True)
            if isinstance(work.run.objective, FromReplies):
                scored = simulated.phase(_Scoring(work), autocast=models.autocast)
            step = _step(simulated, work)
        return Phases(step, written, scored)


def _step(simulated: Simulation, work: Work) -> StepMemory:
    models, teacher = work.models, work.models.teacher

    def complete(batch: Batch) -> Batch:
        return batch | ({"teacher": teacher.states(batch)} if teacher else {})

    program = Program(models.tuned.model, work.run.objective, complete)

    def loss() -> Tensor:
        total: Tensor = program(work.batch()).total
        return total

    with _blocks(work):
        return simulated.step(loss, autocast=models.autocast)


@contextmanager
def _blocks(work: Work) -> Iterator[None]:
    """Let blocks run as training would, inside a `with` block."""
    tuned, settings = work.models.tuned, work.run.engine
    blocks = [tuned.model.get_submodule(block.path) for block in tuned.sites.blocks]
    # `auto` keeps everything, as it does at first. What offloading sends away is taken off
    # afterwards: here all memory is one.
    away = settings.checkpointing == "offload"
    engine = settings.model_copy(update={"checkpointing": "full"} if away else {})
    graphs: Graphs = {}
    with training_blocks(
        tuned.model,
        blocks,
        engine,
        device=torch.device(work.device),
        stand_in=lambda block: SimulatedGraph(block, graphs),
    ):
        yield


class _Rollout:
    """Replies of full length to prompts of full length, as many as are written at once."""

    def __init__(self, work: Work, writing: Writing) -> None:
        self._work, self._writing = work, writing

    def __call__(self, live: Live) -> Iterable[Tensor]:
        """Return the keys and values of all layers at the end."""
        model, settings = self._work.models.tuned.model, sampling_of(self._work.run.objective)
        assert settings is not None  # noqa: S101 - nobody else writes
        if settings.decoding == "vllm":
            return ()  # what vLLM needs is there all the time
        drawing = Drawing(settings.temperature, settings.top_p, settings.top_k)
        with evaluating(model), prepared(model):
            if is_fixed(model, settings.decoding, self._work.device):
                fixed = FixedDecoder(
                    model, drawing, self._prompts(), room=self._writing.reply, graphs=False
                )
                fixed.advance()  # nothing grows, so all steps are alike
                return fixed.keys_and_values()
            growing = GrowingDecoder(model, drawing, self._prompts())
            repeated(live, growing.advance, self._writing.reply - 1)
            return growing.keys_and_values()

    def _prompts(self) -> Padded:
        """Return prompts of zeros, of which as many are different as in a roll-out."""
        rows, samples = self._writing.rows(), self._writing.samples
        prompts = [[row // samples] * self._writing.prompt for row in range(rows)]
        return Padded(prompts, range(rows), pad_token_id=0, device=_NOWHERE)


class _Scoring:
    """What policy, value function, reference and rewards say of replies of full length."""

    def __init__(self, work: Work) -> None:
        self._work, self._models = work, work.models

    def __call__(self, live: Live) -> Iterable[Tensor]:
        """Return nothing: what is said is numbers, which travel to the CPU."""
        self._rewarded()
        for judge in self._models.judges:
            self._judged(judge)
        self._seen(live)
        return []

    def _seen(self, live: Live) -> None:
        model, objective = self._models.tuned.model, self._work.run.objective
        assert isinstance(objective, PPO | GRPO)  # noqa: S101 - what is scored is theirs
        with evaluating(model):
            batch = self._work.batch()
            policy = policy_of(model, batch)
            if isinstance(objective, PPO):
                objective.values(model, batch, policy.hidden)
            if objective.kl:
                with self._as_reference(live):
                    policy_of(model, batch)

    @contextmanager
    def _as_reference(self, live: Live) -> Iterator[None]:
        """Let the model be the one before training, inside a `with` block."""
        tuned = self._models.tuned
        if not tuned.trains_base:
            with tuned.disabled():
                yield
            return
        # The values of before come from the host and stand beside the trained ones.
        number = live.take(sum(p.nbytes for p in tuned.trainable().values()))
        yield
        live.drop(number)

    def _rewarded(self) -> None:
        tuned = self._models.tuned
        backbone = output_head(tuned.model).backbone
        for name in self._models.rewards:
            with evaluating(tuned.model), acting(tuned, name):
                backbone(**_padded(SCORED_AT_ONCE, self._work.shape[1]), use_cache=False)

    def _judged(self, judge: Judge) -> None:
        length = min(judge.length, self._work.shape[1])
        with torch.autocast("cpu", judge.autocast, enabled=judge.autocast is not None):
            inputs = _padded(judge.rows, length, positions=False)
            judge.model.base_model(**inputs)


def _padded(rows: int, length: int, *, positions: bool = True) -> dict[str, Any]:
    ids = torch.zeros((rows, length), dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    places = torch.arange(length)[None].expand(rows, length)
    return inputs | ({"position_ids": places} if positions else {})
