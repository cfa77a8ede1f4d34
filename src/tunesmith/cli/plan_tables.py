"""A plan as tables and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tunesmith.measure.memory_plan import STRATEGIES, WHOLE_WEIGHTS, MemoryPlan, Strategy
from tunesmith.report.words import count, size

if TYPE_CHECKING:
    from tunesmith.jobs.plan import Plan
    from tunesmith.jobs.probe import Probe
    from tunesmith.jobs.remedies import Remedy
    from tunesmith.methods.counts import ParameterCounts


def parameters_table(counts: ParameterCounts) -> Table:
    """Return what trains, by kind."""
    share = counts.trainable / max(1, counts.base)
    table = Table(
        "trains",
        "parameters",
        title=f"{count(counts.trainable)} of {count(counts.base)} parameters train ({share:.3%})",
    )
    for name, number in sorted(counts.by_kind.items(), key=lambda item: -item[1]):
        table.add_row(name, count(number))
    return table


def plan_table(planned: Plan, devices: Sequence[int], limit: int | None) -> Table:
    """Return the memory of each device, by what it is for, and how the devices share."""
    rows, length = planned.tokens
    samples = planned.writing is not None
    columns = ["weights", "trained", "grads", "optim.", "activ.", "moment"]
    columns += ["cache", "peak"] if samples else ["peak"]
    title = f"memory of each {planned.device} device, {rows} rows of {length} tokens"
    if samples:
        title += f"; peak: {planned.alone.peaks_in}"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("devices", *columns, *(["fits"] if limit else [])):
        table.add_column(name, no_wrap=True, justify="left" if name == "devices" else "right")
    for number in devices:
        for strategy in _strategies(planned) if number > 1 else STRATEGIES[:1]:
            memory = planned.on(number, strategy)
            name = str(number) if number == 1 else f"{number}, {strategy}"
            fits = ["yes" if memory.peak <= limit else "no"] if limit else []
            parts = [*_parts(memory), *([memory.cache] if samples else []), memory.peak]
            table.add_row(name, *map(_short, parts), *fits)
    return table


def _strategies(planned: Plan) -> Sequence[Strategy]:
    """Return the ways to share: a device that writes replies needs all weights."""
    return STRATEGIES if planned.writing is None else WHOLE_WEIGHTS


def _short(number: int) -> str:
    return size(number).removesuffix("iB").replace(" ", "")


def _parts(memory: MemoryPlan) -> list[int]:
    return [
        memory.frozen + memory.process + memory.beside,
        memory.trained,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.transient + memory.holes,
    ]


def phases_lines(planned: Plan) -> list[str]:
    """Return in words what the table does not say: of phases, of other models, what was assumed."""
    memory, writing = planned.alone, planned.writing
    lines = []
    if planned.teacher_bytes:
        lines.append(f"The weights hold {size(planned.teacher_bytes)} of the teacher.")
    if writing is not None:
        phases = ", ".join(f"{name} {size(peak)}" for name, peak in memory.phases.items())
        lines.append(f"The most is that of the {memory.peaks_in}, on one device: {phases}.")
        written = (
            f"The roll-out writes {writing.rows()} replies of {writing.reply} tokens at once to "
            f"prompts of {writing.prompt}"
        )
        needed = (
            f": {size(memory.cache)} are their keys and values, and {size(memory.rollout)} what it "
            "needs besides."
        )
        lines.append(written + (needed if memory.rollout else "."))  # vLLM's are in the remarks
    return [*lines, *planned.remarks]


def remedies_lines(planned: Plan, remedies: Sequence[Remedy], limit: int) -> list[str]:
    """Return in words whether a run fits one device, and if not what makes it fit."""
    peak = planned.alone.peak
    if peak <= limit:
        return [f"It fits into {size(limit)}: {size(peak)} at the most."]
    if not remedies:
        fewer = ", fewer replies at once" if planned.writing is not None else ""
        return [
            f"It does not fit into {size(limit)}, and neither do smaller micro-batches{fewer}, "
            "checkpointing or a 4-bit base; take a smaller model, shorter rows or more devices."
        ]
    lines = [f"It does not fit into {size(limit)} ({size(peak)}). What makes it fit, in order:"]
    lines += [f"- {r.change}: {size(r.peak)} at the most; costs {r.price}" for r in remedies]
    return lines


def probe_table(probed: Probe) -> Table:
    """Return the steps that were taken beside what the plan says of each."""
    weights = "the model's weights" if probed.real_weights else "random weights"
    rows = probed.planned.tokens[0]
    table = Table(
        title=f"three steps of {rows} rows with {weights}, planned and measured",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("tokens", "activ.", "measured", "peak", "measured", "plan / measured"):
        table.add_column(name, no_wrap=True, justify="right")
    for step in probed.steps:
        planned = step.planned.alone
        sizes = (planned.activations, step.activations, planned.peak, step.peak)
        ratio = f"{planned.peak / step.peak:.2f}"
        table.add_row(str(step.length), *map(_short, sizes), ratio)
    return table


def probe_lines(probed: Probe) -> list[str]:
    """Return in words how activations grow, and what that makes of the whole step."""
    growth, length = probed.activations, probed.planned.tokens[1]
    grows = f"{size(max(0, round(growth.linear)))} for each token of a row's length"
    if growth.quadratic:
        grows = (
            f"{growth.linear / 2**10:.3g} KiB n + {growth.quadratic / 2**10:.3g} KiB n^2 for rows "
            "of n tokens"
        )
    return [
        f"Activations grow by {grows}.",
        f"At {length} tokens: {size(probed.peak)} by these steps, "
        f"{size(probed.planned.alone.peak)} by the plan.",
    ]
