"""A chain of alignment: SFT, reward model, policy, each a run, and the judgement at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import TrainingError
from tunesmith.jobs.align_spec import MERGED, Alignment, Stage
from tunesmith.jobs.align_stages import Step, in_a_process, run_step
from tunesmith.jobs.processes import alone
from tunesmith.jobs.run_directory import write_json, write_text
from tunesmith.json_text import parse_json
from tunesmith.report.alignment import write_alignment_report

if TYPE_CHECKING:
    from tunesmith.jobs.align_judge import Judging

Say = Callable[[str], None]


def align(alignment: Alignment, source: str, say: Say) -> dict[str, Any]:
    """Run what is not finished yet of a chain, judge its policies and write what was found.

    Writes alignment.json and report.html into its directory. Stopped or killed at any moment, it
    goes on where it was when called again: finished stages are left, the one that was running goes
    on from its newest checkpoint, and replies that were judged stay.

    Args:
        alignment: what to do.
        source: the file it came from, for messages.
        say: told in a line what was done.

    Raises:
        SpecError: a stage says something that no run can mean.
        TrainingError: a stage failed; its own message was printed.
    """
    _open(alignment)
    _run_all(alignment, source, say)
    found: dict[str, Any] = {
        "name": alignment.name,
        "model": alignment.run_of(alignment.stages[0], source).model.name,
        "stages": [_evidence(alignment, stage) for stage in alignment.stages],
        "prompts": 0,
        "verdicts": [],
        "samples": [],
    }
    if alignment.judged is not None:
        found |= _judged(alignment, say)
    write_json(alignment.directory / "alignment.json", found)
    report = write_alignment_report(found, alignment.directory / "report.html")
    say(f"report: {report}")
    return found


def _open(alignment: Alignment) -> None:
    """Write align.yaml; what was found of a chain with other settings is no word on this one."""
    file, text = alignment.directory / "align.yaml", alignment.to_yaml()
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        for name in ("alignment.json", "report.html"):
            (alignment.directory / name).unlink(missing_ok=True)
    alignment.directory.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def _run_all(alignment: Alignment, source: str, say: Say) -> None:
    """Run the stages in their order, each as soon as those that it needs are done.

    A worker takes stages in their order too, so what one waits for has always been begun.
    """
    begun: dict[str, Future[None]] = {}

    def run(stage: Stage, earlier: Mapping[str, Future[None]]) -> None:
        needed = alignment.needs(stage)
        for name, other in earlier.items():
            if name in needed or other.done():
                other.result()  # where one failed, nothing more is begun
        _run(alignment, stage, source, say)

    with ThreadPoolExecutor(alignment.at_once) as pool:
        for stage in alignment.stages:
            begun[stage.name] = pool.submit(run, stage, dict(begun))
        try:
            for future in begun.values():
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(alignment: Alignment, stage: Stage, source: str, say: Say) -> None:
    needs = tuple(alignment.run_directory(n) / "summary.json" for n in alignment.needs(stage))
    run = alignment.run_of(stage, source)
    if stage.online is not None:
        from tunesmith.jobs.align_online import run_rounds

        online = stage.online.model_copy(
            update={"rewards": alignment.with_paths(stage.online.rewards)}
        )
        run_rounds(run, online, needs, say)
    else:
        run_step(Step(stage.name, run, needs), say)
    if alignment.merges(stage.name):
        merge_once(alignment.run_directory(stage.name), say)


def merge_once(run: Path, say: Say) -> Path:
    """Return the run's result as a whole model, written where it is not there yet.

    Raises:
        TrainingError: the method cannot be merged, or merging failed; its own message was printed.
    """
    target = run / MERGED
    if not target.is_dir():
        say(f"merging the result of {run} for the stage after it")
        if in_a_process(_merge, run, target) != 0:
            raise TrainingError(f"{run}: its result could not be merged; its message is above")
    return target


def _merge(run: Path, target: Path) -> None:
    from tunesmith.jobs.merge import merge

    unfinished = target.with_name(f".{target.name}.unfinished")
    with alone(run):
        shutil.rmtree(unfinished, ignore_errors=True)
        merge(run, unfinished)
        os.replace(unfinished, target)


def _evidence(alignment: Alignment, stage: Stage) -> dict[str, Any]:
    """Return what a stage's summary says, as the report shows it."""
    directory = alignment.run_directory(stage.name)
    summary = parse_json((directory / "summary.json").read_text(encoding="utf-8"))
    kept = ("objective", "method", "steps", "seconds", "before", "after", "peak_memory_bytes")
    return {
        "name": stage.name,
        "start": stage.start,
        "report": os.path.relpath(directory / "report.html", alignment.directory),
        **{key: summary[key] for key in kept},
    }


def _judged(alignment: Alignment, say: Say) -> dict[str, Any]:
    from tunesmith.jobs.align_judge import as_json, judge, side_by_side, verdicts

    judging = judging_of(alignment)
    say(f"judging {', '.join(policy.name for policy in judging.policies)}")
    if in_a_process(judge, judging) != 0:
        raise TrainingError("judging the policies failed; its message is above")
    found = verdicts(judging)
    samples = side_by_side(judging, judging.settings.samples)
    first = parse_json((judging.folder / f"{judging.policies[0].name}.json").read_text("utf-8"))
    return {
        "prompts": len(first["prompts"]),
        "verdicts": as_json(found),
        "samples": samples,
        "judge": [reward.model_dump(mode="json") for reward in judging.judge],
    }


def judging_of(alignment: Alignment) -> Judging:
    """Return the policies from the base to the final ones, with some of the last's checkpoints."""
    from tunesmith.engine.checkpoint import checkpoints, step_of
    from tunesmith.jobs.align_judge import BASE, Judging, Policy

    assert alignment.judged is not None  # noqa: S101 - see _judged
    finals = alignment.judged.policies or [alignment.stages[-1].name]
    origins = {name: origin for final in finals for name, origin in _origins(alignment, final)}
    last = alignment.run_directory(finals[-1])
    steps = [step_of(path) for path in checkpoints(last)][:-1]  # the last one is the result
    points = alignment.judged.points
    every = max(1, -(-len(steps) // points)) if points else len(steps) + 1
    chosen = steps[every - 1 :: every] if points else []
    return Judging(
        policies=(
            Policy(BASE, alignment.run_directory(next(iter(origins))), tuned=False),
            *(
                Policy(name, alignment.run_directory(name), before=(BASE, *before))
                for name, before in origins.items()
            ),
            *(Policy(f"{finals[-1]}-step-{step}", last, step=step) for step in chosen),
        ),
        judge=tuple(alignment.with_paths(alignment.judge or [])),
        settings=alignment.judged,
        folder=alignment.directory / "judged",
    )


def _origins(alignment: Alignment, final: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the stages that lead to `final`, itself last, each with the ones before it."""
    names = [final]
    while (before := alignment.stage(names[0]).start) is not None:
        names.insert(0, before)
    return [(name, tuple(names[:number])) for number, name in enumerate(names)]
