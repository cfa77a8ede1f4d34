"""The policy of a run as vLLM serves it: what it needs, and one engine a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary, finalize

from transformers import AutoConfig

from tunesmith.engine.random_state import preserved
from tunesmith.errors import SpecError
from tunesmith.jobs.planned_writing import writing_of
from tunesmith.jobs.roles import POLICY
from tunesmith.methods import LoRA
from tunesmith.models.context import context_length
from tunesmith.models.loading import locate
from tunesmith.rollout.served import Served

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.engine.distribution import Peers
    from tunesmith.jobs.assemble import Assembled
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.objectives.sampling import Sampling
    from tunesmith.rollout.draw import Drawing
    from tunesmith.rollout.sample import Reply, Stops
    from tunesmith.spec import Run

DECODING: Final = "decoding: vllm"
_ENGINES: WeakKeyDictionary[TunedModel, Served] = WeakKeyDictionary()
"""Of the runs in this process: starting one takes half a minute, and a second would not fit."""


def served_replies(  # noqa: PLR0917 - who writes, what to, and how
    assembled: Assembled,
    peers: Peers,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: Sampling,
    drawing: Drawing,
    stops: Stops,
) -> list[Reply]:
    """Return the replies of the run's policy, as it is now, written by vLLM.

    Raises:
        SpecError: the run's policy is none that vLLM can write for.
        SetupError: vLLM is not installed.
        ModelError: vLLM does not run this model.
    """
    with preserved(peers.device):
        tuned = assembled.tuned
        engine = _ENGINES.get(tuned)
        if engine is None:
            engine = _ENGINES[tuned] = _started(assembled, peers)
            finalize(tuned, engine.close)
        with _policy(tuned) as policy:
            return engine.write(
                policy,
                prompts,
                seeds,
                max_new_tokens=settings.max_new_tokens,
                stops=stops,
                drawing=drawing,
            )


def require_served(run: Run, peers: Peers) -> None:
    """Check that what `run` trains can be handed to vLLM.

    Raises:
        SpecError: it cannot, and what would be right.
    """
    why = None
    method = run.methods[0]
    if peers.size > 1:
        why = "is for one process; use one GPU"
    elif run.model.quantize != "none":
        why = f"reads the base as it is on disk, and model.quantize is {run.model.quantize}"
    elif run.model.adapter is not None:
        why = "has room for one adapter; merge model.adapter into the base first (tunesmith merge)"
    elif len(run.methods) > 1 or not isinstance(method, LoRA):
        names = ", ".join(method.name for method in run.methods)
        why = f"takes over lora alone, and the run has {names}"
    elif method.dora or method.bias != "none" or method.keeps_start:
        why = "takes over plain lora, without dora and bias, whose init is kaiming or gaussian"
    if why is not None:
        raise SpecError(f"{DECODING} {why}; or use decoding: auto")


def _started(assembled: Assembled, peers: Peers) -> Served:
    run, tuned = assembled.run, assembled.tuned
    require_served(run, peers)
    directory = locate(run.model.name, run.model)
    _require_same_vocabulary(directory, assembled)
    method = run.methods[0]
    assert isinstance(method, LoRA)  # noqa: S101 - required just now
    limit = context_length(tuned.model)
    writing = writing_of(run, run.data.max_length, limit or run.data.max_length)
    assert writing is not None  # noqa: S101 - nobody else asks for replies
    return Served(
        directory,
        tuned.model.config,
        dtype=assembled.autocast_dtype or tuned.model.dtype,
        rank=method.rank,
        context=writing.prompt + writing.reply,
        rows=writing.at_once,
        trusts=run.model.trust_remote_code,
    )


def _require_same_vocabulary(directory: Path, assembled: Assembled) -> None:
    """Raise SpecError where `directory` is no model's, or its model has other tokens."""
    name = assembled.run.model.name
    if not directory.is_dir():
        raise SpecError(f"{DECODING} reads a model's directory, and '{name}' is a file")
    trusts = assembled.run.model.trust_remote_code
    there = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusts)
    stored, here = there.get_text_config().vocab_size, assembled.tuned.model.config.vocab_size
    if stored != here:
        raise SpecError(
            f"{DECODING} reads the base as it is on disk, with {stored} tokens, and the run gave "
            f"it {here}; save the grown model first, or use decoding: auto"
        )


@contextmanager
def _policy(tuned: TunedModel) -> Iterator[Path | None]:
    """Give the directory of the run's adapter inside a `with` block, or None where it is off."""
    (part,) = (part for part in tuned.parts if part.name == POLICY)
    if not part.attachment.enabled:
        yield None
        return
    with TemporaryDirectory(prefix="tunesmith-policy-") as folder:
        directory = Path(folder) / POLICY
        tuned.save(directory, POLICY)
        yield directory
