"""The main job: from a spec to a tuned model, its record and its proofs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console as Terminal

from tunesmith.engine.checkpoint import find_resumable, load_trainable, step_of
from tunesmith.engine.distribution import Peers, connect
from tunesmith.engine.events import Evaluated, Event, Listener, Sampled, Warned
from tunesmith.engine.listeners import Console, JsonlWriter
from tunesmith.engine.loop import Outcome, fit
from tunesmith.engine.snapshot import find_best
from tunesmith.engine.task import Task, nothing_to_do
from tunesmith.engine.trackers import Trackers
from tunesmith.errors import SpecError
from tunesmith.jobs.assemble import Assembled, assemble
from tunesmith.jobs.environment import environment
from tunesmith.jobs.examine import Examiner, Reply
from tunesmith.jobs.examine_labels import LabelExaminer, examiner_of
from tunesmith.jobs.examine_replies import ReplyExaminer
from tunesmith.jobs.examine_rewards import RewardExaminer
from tunesmith.jobs.experience import Experience
from tunesmith.jobs.findings import findings
from tunesmith.jobs.labelled import head_learning_rate
from tunesmith.jobs.least_recomputation import start_of
from tunesmith.jobs.own_replies import OwnReplies
from tunesmith.jobs.proofs import prove_saved, prove_start, told
from tunesmith.jobs.reference import with_reference
from tunesmith.jobs.roles import without_roles
from tunesmith.jobs.run_directory import RunDirectory, check_free, clear, write_json
from tunesmith.jobs.side_effects import general_loss_of_base, side_effects
from tunesmith.jobs.summary import summarise
from tunesmith.measure.process_heap import give_back
from tunesmith.methods.adapter_files import write_adapters
from tunesmith.methods.child import base_parameters, computed_parameters
from tunesmith.methods.head import HeadAttachment
from tunesmith.objectives import Distillation
from tunesmith.objectives.sampling import FromReplies
from tunesmith.report.page import write_report

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from tunesmith.engine.blocks import Start
    from tunesmith.methods.tuned import TunedModel
    from tunesmith.spec import Run
    from tunesmith.types import JSON, Batch, Proof

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a run leaves: the tuned model in memory, and its directory."""

    tuned: TunedModel
    tokenizer: PreTrainedTokenizerFast
    directory: RunDirectory
    outcome: Outcome
    summary: dict[str, JSON]
    """The evidence; empty where the run was interrupted."""


def train(
    run: Run, *, resume: bool = False, overwrite: bool = False, listeners: Sequence[Listener] = ()
) -> Result:
    """Train a run and return what came of it; every process of a distributed run calls this alike.

    The result is the model after the last step; where `train.early_stopping` stopped the run, the
    best one whose checkpoint is whole.

    Args:
        run: what to do.
        resume: go on from the newest whole checkpoint, where there is one.
        overwrite: delete what an earlier run of this name left.
        listeners: told of every event, besides the console and the record.

    Raises:
        TunesmithError: its kind says what is wrong; what is found before the first step leaves
            nothing behind.
    """
    started = time.perf_counter()
    run = run.resolved()
    peers = connect(run.engine)
    directory = check_free(run, resume=resume, overwrite=overwrite)
    say = _teller(peers)
    assembled = with_reference(assemble(run, peers, say), peers, say)
    give_back()
    for line in assembled.data.learned_from():
        say(line)
    proofs = prove_start(assembled, peers)
    _tell_proofs(proofs, say)
    general = general_loss_of_base(assembled, peers)
    # Before the directory is written: a reward that cannot be used leaves nothing behind.
    samples = isinstance(assembled.run.objective, FromReplies)
    examiner = ReplyExaminer(assembled, peers) if samples else examiner_of(assembled, peers)
    _check_measured(assembled.run, examiner.has_rows)
    heard = [*_listeners(run, directory), *listeners]
    resume_from = _begin(directory, assembled.run, peers, heard, resume=resume)
    recorder = Recorder(examiner, directory, heard)
    outcome = _fit(assembled, peers, recorder, resume_from)
    if outcome.stopped_because == "interrupted":
        say(f"interrupted; go on with: tunesmith train {directory.spec} --resume")
        return Result(assembled.tuned, assembled.tokenizer, directory, outcome, {})
    ending = Ending(proofs, general, say, started)
    return _finish(assembled, peers, recorder, outcome, ending=ending)


class Ending(NamedTuple):
    """What is known before training and told after it."""

    proofs: list[Proof]
    general: float | None
    """The base's loss on general text."""
    say: Say
    started: float


@dataclass
class Recorder:
    """Examines the model when the loop asks, and keeps its sample replies."""

    examiner: Examiner | LabelExaminer | RewardExaminer | ReplyExaminer
    directory: RunDirectory
    listeners: Sequence[Listener]
    examined: bool = field(default=False, init=False)
    """Whether this process has measured, and so knows what each row scored."""

    def examine(self) -> dict[str, float]:
        """Return all metrics of the model as it is now; every process calls this alike."""
        self.examined = True
        return self.examiner.examine()

    def __call__(self, event: Event) -> None:
        """After an evaluation, pass the sample replies on; the first ones go to samples.json."""
        if not isinstance(event, Evaluated):
            return
        for reply in self.examiner.replies:
            sampled = Sampled(step=event.step, **asdict(reply))
            for listener in self.listeners:
                listener(sampled)
        if event.step == 0:
            self.write([{**_asked(r), "before": r.reply} for r in self.examiner.replies])

    def write_after(self) -> None:
        """Put the replies of now beside those from before training."""
        before = {str(r["prompt"]): r for r in self._written()}
        self.write(
            [
                {**_asked(r), "before": before.get(r.prompt, {}).get("before"), "after": r.reply}
                for r in self.examiner.replies
            ]
        )

    def write(self, samples: list[dict[str, JSON]]) -> None:
        """Write samples.json."""
        if samples:
            write_json(self.directory.samples, samples)

    def _written(self) -> list[dict[str, JSON]]:
        path = self.directory.samples
        return self.directory.read_json(path) if path.exists() else []


def _asked(reply: Reply) -> dict[str, JSON]:
    return {"prompt": reply.prompt, "reference": reply.reference}


def _teller(peers: Peers) -> Say:
    terminal = Terminal(stderr=True)

    def say(line: str) -> None:
        if peers.is_main:
            terminal.print(line, markup=False, highlight=False, soft_wrap=True)

    return say


def _check_measured(run: Run, has_rows: bool, /) -> None:
    """Refuse to stop by evaluations that have no rows.

    Raises:
        SpecError: the run is to stop early, and there is nothing to measure on.
    """
    if run.train.early_stopping is not None and not has_rows:
        raise SpecError(
            "train.early_stopping: there are no evaluation rows that could tell when; set "
            "data.holdout or data.evaluation, or leave early_stopping out"
        )


def _tell_proofs(proofs: Sequence[Proof], say: Say) -> None:
    for proof in proofs:
        say(told(proof))


def _listeners(run: Run, directory: RunDirectory) -> list[Listener]:
    listeners: list[Listener] = [JsonlWriter(directory.metrics), Console()]
    if run.tracking.trackers:
        settings = run.model_dump(mode="json")
        listeners.append(Trackers(run.tracking, directory.path, settings))
    return listeners


def _begin(
    directory: RunDirectory,
    run: Run,
    peers: Peers,
    heard: Sequence[Listener],
    *,
    resume: bool,
) -> Path | None:
    """Make the run's directory ready and return the checkpoint to go on from, if there is one.

    The main process looks, tells `heard` of those that are damaged, and decides for all.
    """
    found, warnings = None, list[Event]()
    if peers.is_main:
        if resume:
            found = find_resumable(directory.path, listeners=[warnings.append])
        _open(directory, run, fresh=found is None)
        # Only now: a record that was begun before would have been cleared away.
        for warning in warnings:
            for listener in heard:
                listener(warning)
    return peers.gather(found)[0]  # nobody goes on before the directory is there


def _open(directory: RunDirectory, run: Run, *, fresh: bool) -> None:
    if fresh:
        clear(directory)
    directory.begin(run)
    write_json(directory.environment, environment(run.seed))


def task_of(assembled: Assembled) -> Task[Any]:
    """Return an assembled run as the loop sees it, without an evaluation."""
    run, tuned = assembled.run, assembled.tuned

    def collate(rows: list[Any]) -> Batch:
        return run.objective.prepared(assembled.collate(rows))

    return Task(
        module=assembled.program,
        model=tuned.model,
        trainable=tuned.trainable(),
        rows=assembled.data.train,
        collate=collate,
        count=run.objective.count,
        common=run.objective.common(),
        default_learning_rate=run.methods[0].default_learning_rate,
        learning_rate_scales=learning_rate_scales(run, tuned),
        undecayed=tuned.undecayed(),
        block_modules=[tuned.model.get_submodule(block.path) for block in tuned.sites.blocks],
        penalty=tuned.penalty,
        on_step=tuned.on_step if tuned.acts_on_step else nothing_to_do,
        extra_state=tuned.extra_state,
        load_extra_state=tuned.load_extra_state,
        autocast_dtype=assembled.autocast_dtype,
    )


def _fit(
    assembled: Assembled, peers: Peers, recorder: Recorder, resume_from: Path | None
) -> Outcome:
    run = assembled.run
    listeners: list[Listener] = [*recorder.listeners, recorder]
    task = task_of(assembled)
    if isinstance(recorder.examiner, ReplyExaminer):
        task.rows = Experience(assembled, peers, recorder.examiner.reward, listeners)
    elif isinstance(run.objective, Distillation) and run.objective.on_policy > 0:
        task.rows = OwnReplies(assembled, run.objective, peers)
    task.evaluate = recorder.examine if recorder.examiner.has_rows else None
    try:
        return fit_run(
            run,
            task,
            run_dir=recorder.directory.path,
            listeners=listeners,
            peers=peers,
            resume_from=resume_from,
            start=start_of(assembled, peers),
        )
    finally:
        _close(listeners)


def _close(listeners: Sequence[Listener]) -> None:
    for listener in listeners:
        if isinstance(listener, Console | JsonlWriter | Trackers):
            listener.close()


def fit_run(
    run: Run,
    task: Task[Any],
    *,
    run_dir: Path,
    listeners: Sequence[Listener],
    peers: Peers,
    resume_from: Path | None = None,
    start: Start | None = None,
) -> Outcome:
    """Train `task` by the settings of `run`; arguments and errors are those of `fit`."""
    return fit(
        task,
        train=run.train,
        checkpoint=run.checkpoint,
        evaluation=run.evaluation,
        engine=run.engine,
        tracking=run.tracking,
        run_dir=run_dir,
        seed=run.seed,
        listeners=listeners,
        resume_from=resume_from,
        peers=peers,
        start=start,
    )


def learning_rate_scales(run: Run, tuned: TunedModel) -> dict[str, float]:
    """Return what the run's learning rate is multiplied by for each trainable, by its full name.

    Where the run gives none, it is that of the first method, and each other method's own over it.
    """
    scales = tuned.learning_rate_scales()
    first, given = run.methods[0].default_learning_rate, run.train.learning_rate
    head_rate = head_learning_rate(run)
    for part in tuned.parts:
        if isinstance(part.attachment, HeadAttachment):
            own = (head_rate or given or first) / (given or first)
        else:
            own = 1.0 if given is not None else part.method.default_learning_rate / first
        # A reward model beside the policy is frozen, so it has no rate.
        for name in scales.keys() & part.attachment.trainable().keys():
            scales[name] *= own
    return scales


def _finish(
    assembled: Assembled, peers: Peers, recorder: Recorder, outcome: Outcome, *, ending: Ending
) -> Result:
    directory, say = recorder.directory, ending.say
    after = outcome.metrics
    metric = assembled.run.evaluation.best
    if (best := _best(outcome, recorder, peers, metric=metric)) is not None:
        say(f"taking the model of step {step_of(best)}")
        assembled.tuned.load_state_dict(load_trainable(best))
        after = recorder.examine()
    elif recorder.examiner.has_rows and not recorder.examined:
        # Resumed behind the last evaluation, whose rows the process before has taken along.
        after = recorder.examine()
    without_roles(assembled.tuned)
    effects = side_effects(assembled, peers, ending.general) | findings(assembled, peers)
    save_result(assembled.tuned, assembled.tokenizer, directory, peers)
    summary: dict[str, JSON] = {}
    if peers.is_main:
        saved = prove_saved(assembled, directory)
        _tell_proofs(saved, say)
        recorder.write_after()
        summary = summarise(
            assembled,
            outcome,
            after=after,
            proofs=[*ending.proofs, *saved],
            directory=directory,
            wall_seconds=time.perf_counter() - ending.started,
        )
        if recorder.examiner.outcomes:
            write_json(directory.outcomes, recorder.examiner.outcomes)
        if isinstance(recorder.examiner, LabelExaminer | RewardExaminer):
            summary |= recorder.examiner.evidence
        write_json(directory.summary, summary | effects)
        write_report(directory.path)
        say(f"report: {directory.report}")
    peers.any(False)  # nobody leaves while the main process still writes
    return Result(assembled.tuned, assembled.tokenizer, directory, outcome, summary)


def _best(outcome: Outcome, recorder: Recorder, peers: Peers, *, metric: str) -> Path | None:
    """Return the checkpoint that is the result; None for the model as it is after the last step.

    Args:
        outcome: of training.
        recorder: its listeners are told where the best one is not there.
        peers: the processes, each of which calls this.
        metric: what decides, `evaluation.best`.
    """
    if outcome.stopped_because != "early_stopping":
        return None
    listeners = recorder.listeners if peers.is_main else ()
    try:
        if outcome.best is None:
            warned = Warned(step=outcome.steps, message=_without_best(metric))
            for listener in listeners:
                listener(warned)
            return None
        return find_best(recorder.directory.path, outcome.best, listeners=listeners)
    finally:
        _close(listeners)


def _without_best(metric: str) -> str:
    return (
        f"evaluation.best: {metric} was no number in any evaluation after step 0, so none is the "
        "best; the result is the model after the last step"
    )


def everything_trains(tuned: TunedModel) -> bool:
    """Return whether the result is a whole model rather than something beside one."""
    own = base_parameters(tuned.model).keys() - computed_parameters(tuned.model)
    return own == set(tuned.trainable())


def save_result(
    tuned: TunedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: RunDirectory,
    peers: Peers,
) -> None:
    """Write what was trained and the tokenizer; every process calls this, the main one writes."""
    whole = everything_trains(tuned)
    files = [] if whole else tuned.files()
    if not peers.is_main:
        return
    target = directory.model if whole else directory.adapter
    shutil.rmtree(target, ignore_errors=True)  # an earlier result; the checkpoint has it all
    if whole:
        tuned.export_model(target, tokenizer)
    else:
        write_adapters(target, files)
        tokenizer.save_pretrained(target)
