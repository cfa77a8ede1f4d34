"""The demo: a small model learns to judge sentences of movie reviews, on real data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from tunesmith.data.settings import DataSettings, Source
from tunesmith.engine.settings import EvaluationSettings, TrainSettings
from tunesmith.jobs.train import Result, train
from tunesmith.measure.intervals import wilson_interval
from tunesmith.methods import LoRA
from tunesmith.models.settings import ModelSettings
from tunesmith.spec import Run

if TYPE_CHECKING:
    from tunesmith.types import JSON

HELD_OUT: Final = 400


def demo_run(output: str = "runs") -> Run:
    """Return the demo as a run; examples/movie-sentiment.yaml is the same as a file."""
    training = Source(
        path="sentiment-4-domains/movie-polarity",
        system="You judge movie reviews.",
        prompt="{text}\nPositive or negative?",
        completion="{label}",
    )
    return Run(
        name="demo",
        output=output,
        model=ModelSettings(name="smollm2-135m-instruct"),
        method=LoRA(rank=16),
        data=DataSettings(
            train=[training],
            evaluation=[training.model_copy(update={"split": "test"})],
            max_length=256,
        ),
        train=TrainSettings(max_steps=48, batch_size=16, learning_rate=1e-3, warmup=5),
        evaluation=EvaluationSettings(
            metrics=["accuracy"],
            choices=["positive", "negative"],
            batch_size=16,
            samples=5,
            max_new_tokens=4,
        ),
    )


def demo(output: str = "runs") -> Result:
    """Run the demo, show what was learned, and return the result."""
    Console().print(
        "SmolLM2-135M-Instruct learns with LoRA to judge sentences of movie reviews, measured on "
        f"{HELD_OUT}\nheld-out ones before and after. This takes a few minutes on two cores.",
        highlight=False,
    )
    result = train(demo_run(output), overwrite=True)
    if result.summary:
        show(result)
    return result


def show(result: Result) -> None:
    """Print accuracy and five sentences before and after."""
    console = Console()
    table = Table("sentence", "people say", "before", "after", title="held-out sentences")
    for sample in result.directory.read_json(result.directory.samples):
        sentence = str(sample["prompt"]).splitlines()[0]
        table.add_row(sentence, sample["reference"], sample["before"], sample["after"])
    console.print(table)
    for when in ("before", "after"):
        console.print(_accuracy(when, result.summary[when]))
    console.print(f"talk to it: tunesmith chat {result.directory.path}")


def _accuracy(when: str, metrics: JSON) -> str:
    assert isinstance(metrics, dict)  # noqa: S101
    accuracy = float(str(metrics["accuracy"]))
    low, high = wilson_interval(round(accuracy * HELD_OUT), HELD_OUT)
    return (
        f"{when:>6}: {accuracy:.1%} of {HELD_OUT} held-out sentences right "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )
