"""Zero-shot and few-shot prompting: an untrained decoder on the evaluation rows of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from tunesmith.data.prepare import Evaluation
from tunesmith.data.render import Renderer
from tunesmith.data.shots import choose_examples, with_examples
from tunesmith.engine.distribution import connect
from tunesmith.errors import DataError, SpecError
from tunesmith.jobs.assemble import Assembled, assemble
from tunesmith.jobs.environment import environment
from tunesmith.jobs.examine import Examiner
from tunesmith.jobs.run_directory import RunDirectory, check_free, clear, write_json, write_text
from tunesmith.jobs.side_effects import general_loss
from tunesmith.jobs.summary import without_steps
from tunesmith.models.context import context_length
from tunesmith.models.skeleton import config_of, kind_of
from tunesmith.objectives import SFT
from tunesmith.report.page import write_report

if TYPE_CHECKING:
    from tunesmith.data.rows import Prompt
    from tunesmith.jobs.prompting_spec import PromptingRun
    from tunesmith.spec import Run
    from tunesmith.types import JSON

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prompted:
    """A model with the rows it is asked, examples included."""

    assembled: Assembled
    added: float
    """Tokens that the examples add to a prompt, mean over the prompts."""


def ask(job: PromptingRun, say: Say, *, overwrite: bool = False) -> dict[str, JSON]:
    """Measure the untrained model, write its run directory and return the summary.

    Args:
        job: what to do.
        say: told in a line what is done.
        overwrite: delete what an earlier run of this name left.

    Raises:
        TunesmithError: its kind says what is wrong; nothing is written then but the cache.
    """
    started = time.perf_counter()
    run = job.run.model_copy(update={"method": []}).resolved()
    _check(run, job.prompting.shots)
    peers = connect(run.engine)
    if peers.size > 1:
        raise SpecError("prompting works in one process; start it without torchrun")
    directory = check_free(run, resume=False, overwrite=overwrite)
    asked = put_examples(assemble(run, peers, say), job.prompting.shots)
    require_room(asked.assembled, job.prompting.shots)
    examiner = Examiner(asked.assembled, peers)
    begun = time.perf_counter()
    metrics = examiner.examine()
    seconds = time.perf_counter() - begun
    general = general_loss(asked.assembled, peers)
    summary = _summary(asked, metrics, shots=job.prompting.shots, seconds=seconds)
    if general is not None:
        summary["general_loss"] = {"before": general, "after": general}  # nothing was trained
    summary["wall_seconds"] = round(time.perf_counter() - started, 2)
    _write(job, examiner, summary, directory)
    say(f"result: {directory.path}")
    return summary


def _check(run: Run, shots: int) -> None:
    """Refuse what cannot be asked.

    Raises:
        SpecError: the model is no decoder with a language model's head, or there is no prompt.
    """
    kind = kind_of(config_of(run.model))
    if not isinstance(run.objective, SFT) or kind != "decoder":
        raise SpecError(
            f"prompting: asks a decoder for replies, and this is the objective "
            f"{run.objective.name} on the {kind} {run.model.name}; leave the row out"
        )
    if shots and run.data.supervise == "all":
        raise SpecError(
            "prompting.shots: with data.supervise: all the prompt is judged too, which examples "
            "change; use assistant, or shots: 0"
        )


def put_examples(assembled: Assembled, shots: int) -> Prompted:
    """Return the assembled run with `shots` training examples in front of every prompt.

    Raises:
        DataError: there are not so many, or the evaluation asks nothing.
    """
    run, data = assembled.run, assembled.data
    prompts = [prompt for prompt in data.examples if prompt is not None]
    if not prompts:
        raise DataError("prompting: no evaluation row asks for a reply; name rows that do")
    if not shots:
        return Prompted(assembled, 0.0)
    examples = choose_examples(run.data, data.examples, count=shots, seed=run.seed)
    renderer = Renderer(assembled.tokenizer)
    pairs = [with_examples(prompt, examples, renderer) for prompt in prompts]
    longer = [prompt for _, prompt in pairs]
    held_back = data.held_back
    assert held_back is not None  # noqa: S101 - it has prompts
    evaluation = Evaluation([row for row, _ in pairs], tuple(longer), held_back.report)
    asked = replace(assembled, data=replace(data, held_back=evaluation))
    return Prompted(asked, _mean_length(longer) - _mean_length(prompts))


def _mean_length(prompts: Sequence[Prompt]) -> float:
    return sum(len(prompt.input_ids) for prompt in prompts) / len(prompts)


def require_room(assembled: Assembled, shots: int) -> None:
    """Check that every prompt and its reply fit into the model's context.

    Raises:
        DataError: one does not.
    """
    limit = context_length(assembled.tuned.model)
    prompts = [p for p in assembled.data.examples if p is not None]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    settings = assembled.run.evaluation
    generated = settings.samples or any(name != "accuracy" for name in settings.metrics)
    reply = settings.max_new_tokens if generated else 1
    whole = max(longest + reply, *(len(row.input_ids) for row in assembled.data.evaluation), 0)
    if limit is not None and whole > limit:
        raise DataError(
            f"prompting.shots: {shots}: the longest prompt has {longest} tokens with its examples, "
            f"{whole} with its reply, and the context of {assembled.run.model.name} holds {limit}; "
            "use fewer shots or a smaller evaluation.max_new_tokens"
        )


def _summary(
    asked: Prompted, metrics: dict[str, float], *, shots: int, seconds: float
) -> dict[str, JSON]:
    """Return summary.json: training's keys, as far as they mean something without steps."""
    assembled = asked.assembled
    run, model = assembled.run, assembled.tuned.model
    return {
        **without_steps(run, assembled.data, model.device),
        "method": "prompting",
        "kind": kind_of(model.config),
        "prompting": {"shots": shots, "tokens_added": round(asked.added, 1)},
        "after": dict(metrics),
        "seconds": round(seconds, 2),
        "tokens_per_second": None,
        "trainable_parameters": 0,
        "total_parameters": assembled.tuned.parameter_counts().base,
        "result_bytes": 0,
    }


def _write(
    job: PromptingRun, examiner: Examiner, summary: dict[str, JSON], directory: RunDirectory
) -> None:
    clear(directory)
    directory.begin(job.run)
    write_text(directory.spec, job.to_yaml())
    write_json(directory.environment, environment(job.run.seed))
    if examiner.replies:
        replies = [asdict(reply) for reply in examiner.replies]
        write_json(directory.samples, [r | {"after": r.pop("reply")} for r in replies])
    write_json(directory.outcomes, examiner.outcomes)
    write_json(directory.summary, summary)  # before the report, which shows it
    write_report(directory.path)
