"""Comparing ways to fine-tune under equal conditions: search a rate, train seeds, measure, rank."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tunesmith.errors import SpecError
from tunesmith.jobs.comparison_budget import Cost, Plan, Trials, planned
from tunesmith.jobs.comparison_findings import Row, findings_of, standard_error
from tunesmith.jobs.comparison_runs import Trial, run_trials
from tunesmith.jobs.comparison_spec import Comparison, Variant
from tunesmith.jobs.evidence import remember
from tunesmith.jobs.run_directory import write_json, write_text
from tunesmith.models.skeleton import config_of, kind_of
from tunesmith.objectives import Classification
from tunesmith.objectives.sampling import FromReplies
from tunesmith.report.comparison import write_comparison_report
from tunesmith.report.findings import Findings
from tunesmith.report.words import duration
from tunesmith.spec import Run
from tunesmith.types import LOWER_IS_BETTER

Say = Callable[[str], None]
Changes = dict[str, Any]
"""Settings of a section to change."""

SEARCH_SHARE: Final = 1 / 3
"""Of the steps, in a trial of a learning rate."""
RATE_FACTOR: Final = 3.0
"""Between two neighbouring learning rates."""
MOST_EXTENSIONS: Final = 2
"""Further rates beyond the grid, while the best is at its edge."""
PROBE_STEPS: Final = 6
SPEED_STEPS: Final = 20


@dataclass
class _Contest:
    """One row on its way through the comparison."""

    variant: Variant
    run: Run
    """As it would be alone, with the steps it may take."""
    rates: dict[float, float] = field(default_factory=dict)
    """Learning rates tried, and the metric each reached."""
    errors: dict[float, float] = field(default_factory=dict)
    """Standard errors of those, from the evaluation rows alone."""
    rate: float | None = None
    """The one that goes on; None takes the default of each of several methods."""
    failed: str | None = None
    trials: list[Trial] = field(default_factory=list)
    """The finished runs of all seeds."""
    speed: Trial | None = None


def compare(comparison: Comparison, source: Path, say: Say) -> Findings:
    """Run what is not finished yet of a comparison, and return and write what it found.

    Writes comparison.json, comparison.csv and report.html into its directory. Stopped at any
    moment it goes on where it was when called again.

    Args:
        comparison: what to compare.
        source: the file it came from, beside which its run file is looked for.
        say: told in a line what was done.

    Raises:
        SpecError: a row says something that no run can mean, or the budget is too small.
    """
    contests = [_Contest(v, prepared(comparison, v, source)) for v in comparison.rows()]
    metric = comparison.metric or default_metric(contests[0].run)
    comparison.directory.mkdir(parents=True, exist_ok=True)
    write_text(comparison.directory / "comparison.yaml", comparison.to_yaml())
    stage = _Stage(comparison, metric, say)
    training = [contest for contest in contests if contest.variant.trains]
    if comparison.budget is not None and training:
        seeds = _allot(stage, training, comparison.budget)
        comparison = stage.comparison = comparison.model_copy(update={"seeds": seeds})
    _search(stage, training)
    for number in range(comparison.seeds):
        if number > 0:
            _written(stage, contests)  # the seeds so far already show something
        _train_seed(stage, contests, number)
    if comparison.jobs > 1 and comparison.measure_speed:
        _measure_speed(stage, training)
    findings = _written(stage, contests)
    remember(findings)
    return findings


def _written(stage: _Stage, contests: Sequence[_Contest]) -> Findings:
    """Return what was found so far, written into the comparison's directory."""
    comparison = stage.comparison
    findings = findings_of(
        comparison.name, stage.metric, [_row_of(c, alone=comparison.jobs == 1) for c in contests]
    )
    write(findings, comparison.directory)
    return findings


@dataclass
class _Stage:
    """Runs trials of all rows, counts them, and says how far it is."""

    comparison: Comparison
    metric: str
    say: Say

    def run(self, title: str, trials: Sequence[Trial]) -> list[Trial]:
        """Run trials and return the finished ones."""
        started, fresh, ended = time.perf_counter(), 0, 0

        def done(trial: Trial) -> None:
            nonlocal ended, fresh
            ended += 1
            fresh += time.perf_counter() - started > 1
            left = ""
            if fresh and ended < len(trials):
                rest = (len(trials) - ended) * (time.perf_counter() - started) / fresh
                left = f"; about {duration(rest)} left"
            result = trial.why_failed() or self._value(trial)
            self.say(f"{title} {ended}/{len(trials)}: {trial.row} {trial.run.name}: {result}{left}")

        return run_trials(trials, at_once=self.comparison.jobs, done=done)

    def value(self, trial: Trial) -> float | None:
        """Return the metric that decides, after training; NaN where it was not finite.

        Raises:
            SpecError: no run will ever measure it, so the first one ends the comparison.
        """
        after = trial.summary()["after"]
        if self.metric not in after and trial.features is None:
            known = ", ".join(after)
            raise SpecError(f"metric: {self.metric!r} is not measured; use one of {known}")
        if self.metric not in after:
            return None
        found = after[self.metric]
        return math.nan if found is None else float(found)

    def _value(self, trial: Trial) -> str:
        value = self.value(trial)
        if value is None:
            return "not measured"
        return f"{self.metric} {value:.4g}" if math.isfinite(value) else f"{self.metric} not finite"


def prepared(comparison: Comparison, variant: Variant, source: Path) -> Run:
    """Return a row's run, in the comparison's directory.

    What a language model forgets of general text is measured unless the run says otherwise.

    Raises:
        SpecError: it says something that no run can mean, or keeps no rows to judge by.
    """
    run = comparison.run_of(variant, source)
    if not (run.data.evaluation or run.data.holdout):
        raise SpecError(
            f"{source}: {variant.title}: data.holdout: no rows are kept to judge by, which a "
            "comparison needs; set data.holdout: 0.2, or name other rows with data.evaluation"
        )
    evaluation = run.evaluation
    if "general" not in evaluation.model_fields_set and _continues_text(run):
        evaluation = evaluation.model_copy(update={"general": "bundled"})
    return run.model_copy(
        update={"output": str(comparison.directory / variant.title), "evaluation": evaluation}
    )


def _continues_text(run: Run) -> bool:
    """Return whether the run's model is one for which the loss on plain text means something."""
    return run.objective.head == "causal_lm" and kind_of(config_of(run.model)) == "decoder"


def default_metric(run: Run) -> str:
    """Return what the run is judged by, where nothing is said."""
    if run.evaluation.metrics:
        return run.evaluation.metrics[0]
    if isinstance(run.objective, FromReplies):
        return "reward"  # where no reply is known there is no loss of one
    one_label = isinstance(run.objective, Classification) and run.objective.kind == "single"
    return "accuracy" if one_label else "loss"


def _changed(run: Run, name: str, train: Changes, evaluation: Changes) -> Run:
    """Return `run` under another name, with some settings changed."""
    return run.model_copy(
        update={
            "name": name,
            "train": run.train.model_copy(update=train),
            "evaluation": run.evaluation.model_copy(update=evaluation),
        }
    )


def _shortened(run: Run, share: float) -> dict[str, Any]:
    """Return the train settings of a shorter run."""
    if run.train.max_steps is not None:
        return {"max_steps": max(1, round(share * run.train.max_steps))}
    return {"epochs": share * run.train.epochs}


def _allot(stage: _Stage, contests: Sequence[_Contest], budget: float) -> int:
    """Give every row as many steps as fit into its equal share, and return the number of seeds.

    Raises:
        SpecError: too little fits for some row; says what would be needed.
    """
    comparison = stage.comparison
    rates = comparison.learning_rates + MOST_EXTENSIONS if comparison.learning_rates > 1 else 0
    asked = Trials(rates, SEARCH_SHARE, comparison.seeds)
    probes = [_trial(c, "probe", train={"max_steps": PROBE_STEPS}) for c in contests]

    def plan(finished: Sequence[Trial], rows: int) -> Plan:
        spent = sum(trial.summary()["wall_seconds"] for trial in finished) / comparison.jobs
        costs = [_cost(trial) for trial in finished]
        return planned(budget, costs, asked, spent=spent, rows=rows, jobs=comparison.jobs)

    if first := stage.run("probe", probes[:1]):
        plan(first, len(probes))  # what does not fit one row is said before the others are tried
    finished = stage.run("probe", probes)
    for contest, probe in zip(contests, probes, strict=True):
        if probe not in finished:
            contest.failed = probe.why_failed()
    if not finished:
        return comparison.seeds
    found = plan(finished, len(finished))
    steps = {trial.row: count for trial, count in zip(finished, found.steps, strict=True)}
    for contest in contests:
        if contest.failed is None:
            allotted = {"max_steps": steps[contest.variant.title]}
            contest.run = _changed(contest.run, contest.run.name, allotted, {})
    few, most = min(found.steps), max(found.steps)
    stage.say(
        f"budget: {duration(budget)} leave each row {found.seeds} seed{'s' * (found.seeds != 1)} "
        f"of {f'{few} to ' * (few < most)}{most} steps"
    )
    return found.seeds


def _cost(probe: Trial) -> Cost:
    summary = probe.summary()
    overhead = summary["wall_seconds"] - summary["seconds"]
    return Cost(probe.row, overhead, summary["seconds"] / summary["steps"])


def _trial(
    contest: _Contest, name: str, *, train: Changes, evaluation: Changes | None = None
) -> Trial:
    run = _changed(contest.run, name, train, evaluation or {})
    return Trial(contest.variant.title, run, keep=False)


def _search(stage: _Stage, contests: Sequence[_Contest]) -> None:
    """Find each row's learning rate on the even evaluation rows, at a third of the steps."""
    count = stage.comparison.learning_rates
    grid = [RATE_FACTOR ** (i - (count - 1) // 2) for i in range(count)]
    asked: dict[int, list[float]] = {}
    for contest in contests:
        contest.rate = contest.run.resolved().train.learning_rate
        if count > 1 and contest.rate is not None and not contest.failed:
            asked[id(contest)] = [factor * contest.rate for factor in grid]
    for _ in range(1 + MOST_EXTENSIONS):
        if not asked:
            break
        trials = [
            (contest, rate, _rate_trial(contest, rate))
            for contest in contests
            for rate in asked.get(id(contest), [])
        ]
        finished = stage.run("learning rates", [trial for _, _, trial in trials])
        for contest, rate, trial in trials:
            value = stage.value(trial) if trial in finished else None
            if value is not None and math.isfinite(value):
                contest.rates[rate] = value
                contest.errors[rate] = standard_error(trial.directory, stage.metric)
            elif not contest.rates:
                found = "was not measured" if value is None else "is not finite at any rate tried"
                contest.failed = trial.why_failed() or f"{stage.metric} {found}"
        asked = {id(c): edge for c in contests if (edge := _beyond(c, stage.metric))}
    for contest in contests:
        if contest.rates:
            contest.failed = None
            contest.rate = safe_rate(contest.rates, contest.errors, stage.metric)


def _rate_trial(contest: _Contest, rate: float) -> Trial:
    return _trial(
        contest,
        f"rate-{rate:.3g}",
        train=_shortened(contest.run, SEARCH_SHARE) | {"learning_rate": rate},
        evaluation={"rows": "even", "inference": False, "general": None},
    )


def _best_rate(rates: dict[float, float], metric: str) -> float:
    better = min if metric in LOWER_IS_BETTER else max
    return better(rates, key=lambda rate: rates[rate])


def safe_rate(rates: dict[float, float], errors: dict[float, float], metric: str) -> float:
    """Return the lowest rate that is within one standard error of the best.

    (Breiman et al. 1984, section 3.4.3.) A trial takes a third of the steps, so what luck alone put
    first there may be a rate at which the whole run fails.

    Args:
        rates: what `metric` came to at each rate.
        errors: its standard error at each.
        metric: its name, which says whether less of it is better.
    """
    best = _best_rate(rates, metric)
    return min(r for r, value in rates.items() if abs(value - rates[best]) <= errors[best])


def _beyond(contest: _Contest, metric: str) -> list[float]:
    """Return the next rate where the best one is at the edge of those tried."""
    if len(contest.rates) < 2:
        return []
    best, tried = _best_rate(contest.rates, metric), sorted(contest.rates)
    if best == tried[0]:
        return [best / RATE_FACTOR]
    return [best * RATE_FACTOR] if best == tried[-1] else []


def _train_seed(stage: _Stage, contests: Sequence[_Contest], number: int) -> None:
    """Train every row with its rate and one seed, judged by rows no rate was chosen on."""
    rows = "odd" if stage.comparison.learning_rates > 1 else "all"
    running = [
        contest
        for contest in contests
        if contest.failed is None and (number == 0 or contest.variant.depends_on_seed)
    ]
    timed = number == 0 and stage.comparison.jobs == 1  # else nothing says who is beside it
    trials = [_seed_trial(contest, number, rows, timed=timed) for contest in running]
    finished = stage.run(f"training, seed {number + 1} of {stage.comparison.seeds},", trials)
    for contest, trial in zip(running, trials, strict=True):
        if trial in finished:
            contest.trials.append(trial)
        else:
            # The mean over the seeds that went well would be that of the lucky ones.
            seed = f"{trial.run.name}: " if contest.trials else ""
            contest.failed = f"{seed}{trial.why_failed() or 'it was not finished'}"


def _seed_trial(contest: _Contest, number: int, rows: str, *, timed: bool) -> Trial:
    seed = contest.run.seed + number
    evaluation = {"rows": rows} | ({"inference": True} if timed else {})
    run = _changed(
        contest.run, f"seed-{seed}", {"learning_rate": contest.rate}, evaluation
    ).model_copy(update={"seed": seed})
    # What the first seed trained can be tried out; of the others the numbers are kept.
    variant = contest.variant
    return Trial(variant.title, run, number == 0, variant.features, variant.prompting)


def _measure_speed(stage: _Stage, contests: Sequence[_Contest]) -> None:
    """Run a few steps of every row with nothing beside it."""
    running = [contest for contest in contests if contest.trials and contest.failed is None]
    if not running:
        return
    # Judged by what every run measures; the metric of the comparison may need replies.
    metric = default_metric(_changed(running[0].run, "speed", {}, {"metrics": []}))
    alone = _Stage(stage.comparison.model_copy(update={"jobs": 1}), metric, stage.say)
    trials = [
        _trial(
            contest,
            "speed",
            train={"max_steps": SPEED_STEPS, "learning_rate": contest.rate},
            evaluation={
                "limit": 4 * contest.run.evaluation.batch_size,
                "metrics": [],
                "samples": 0,
                "general": None,
                "inference": True,
            },
        )
        for contest in running
    ]
    finished = alone.run("speed", trials)
    for contest, trial in zip(running, trials, strict=True):
        contest.speed = trial if trial in finished else None


def _row_of(contest: _Contest, *, alone: bool) -> Row:
    timed = contest.speed or (contest.trials[0] if alone and contest.trials else None)
    return Row(
        name=contest.variant.title,
        method=contest.run.model_dump(mode="json")["method"],
        learning_rate=contest.rate,
        rates=contest.rates,
        failed=contest.failed,
        runs=[trial.directory for trial in contest.trials],
        timed=timed.directory if timed else None,
    )


def write(findings: Findings, directory: Path) -> None:
    """Write comparison.json, comparison.csv and report.html."""
    write_json(directory / "comparison.json", asdict(findings))
    file = io.StringIO()
    table = [row.flat() for row in findings.rows]
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)))
    writer.writeheader()
    writer.writerows(table)
    write_text(directory / "comparison.csv", file.getvalue())
    write_comparison_report(findings, directory / "report.html")
