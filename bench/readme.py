"""Put measured numbers into README.md and docs/, between their markers: `python bench/readme.py`.

Every number comes out of a file in bench/results that another program here wrote.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from alignment_tables import in_readme
from tunesmith.jobs.evidence import findings_from
from tunesmith.report import words
from tunesmith.report.findings import Findings, FoundRow

COMPARISONS = ("compare-sentiment", "compare-e2e")
"""Files of results that `tunesmith compare` wrote as comparison.json."""
LADDERS = ("ladder", "ladder-rotten-tomatoes")
"""Those that climb from features to full fine-tuning."""
ON_GPUS = ("# Supervised fine-tuning on one ", "# Where a step's time goes ", "# Roll-outs on one ")
"""How the pages of bench/results begin that docs/performance.md shows."""
HERE = Path(__file__).parent
README = HERE.parent / "README.md"
PERFORMANCE = HERE.parent / "docs" / "performance.md"
ALIGNMENT = PERFORMANCE.with_name("alignment.md")
CLASSIFICATION = PERFORMANCE.with_name("classification.md")
QUANTISED = PERFORMANCE.with_name("quantised.md")


def main() -> None:
    text = README.read_text(encoding="utf-8")
    slots = {
        "demo": demo(),
        "methods": methods(),
        "measured": measured(),
        "gpu": beside_peers(),
        "alignment": alignment(),
    }
    for name, content in slots.items():
        text = filled(text, name, content)
    README.write_text(text, encoding="utf-8")
    page = PERFORMANCE.read_text(encoding="utf-8")
    PERFORMANCE.write_text(filled(page, "gpu", measured_on_gpus()), encoding="utf-8")
    page = ALIGNMENT.read_text(encoding="utf-8")
    ALIGNMENT.write_text(filled(page, "roles", roles(result("roles"))), encoding="utf-8")
    page = CLASSIFICATION.read_text(encoding="utf-8")
    CLASSIFICATION.write_text(filled(page, "ladder", ladders()), encoding="utf-8")
    page = QUANTISED.read_text(encoding="utf-8")
    found = result("quantize_quality")
    QUANTISED.write_text(filled(page, "quality", bases(found)), encoding="utf-8")


def filled(text: str, name: str, content: str) -> str:
    """Return `text` with `content` between the markers called `name`."""
    pattern = rf"<!-- {name} -->\n(.*?)<!-- end {name} -->\n"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"the page has no markers <!-- {name} --> and <!-- end {name} -->")
    block = f"<!-- {name} -->\n{content}\n<!-- end {name} -->\n"
    return re.sub(pattern, lambda _: block, text, flags=re.DOTALL)


def alignment() -> str:
    """Return what the demonstrations of alignment came to."""
    return in_readme(result("alignment"))


def measured_on_gpus() -> str:
    """Return the tables that GPUs were measured by, and the pictures of roofline.py."""
    lines = []
    for path in sorted((HERE / "results").glob("*.md")):
        heading, _, rest = path.read_text(encoding="utf-8").partition("\n")
        if not heading.startswith(ON_GPUS):
            continue
        lines += [f"##{heading}", rest.rstrip(), ""]
        picture = PERFORMANCE.with_name(f"roofline-{path.stem}.svg")
        if picture.exists():
            lines += [f"![rates against the ceilings of the device]({picture.name})", ""]
    return "\n".join(lines).rstrip() or "Nothing was measured yet."


def beside_peers() -> str:
    """Return the jobs of gpu_sft.py's tables: the fastest peer, and the fastest of ours."""
    lines = []
    for path in sorted((HERE / "results").glob("*.md")):
        page = path.read_text(encoding="utf-8").splitlines()
        if not page[0].startswith("# Supervised fine-tuning on one "):
            continue
        jobs: dict[str, dict[str, Rate]] = {}
        for line in page:
            job, program, base, _, rate, memory, *_ = [*line.strip("| ").split(" | "), *[""] * 6]
            # A time is no rate, and which of two is better is the other way round.
            if rate.replace(",", "").isdigit() and not job.startswith("seconds "):
                # A job's rows of one program are in the order of their rates.
                kind = "ours" if program == "tunesmith" else "theirs"
                found = Rate(rate, memory, base if kind == "ours" else "")
                jobs.setdefault(job, {}).setdefault(kind, found)
        lines += [
            f"{page[0].removeprefix('# ')} (Llama 3.1 8B shape with random weights, rank 16, "
            "4 x 2,048 tokens, unless the row says otherwise):",
            "",
            "| job | TRL + Liger | Tunesmith | |",
            "|---|---|---|---|",
            *(side_by_side(job, **found) for job, found in jobs.items() if "ours" in found),
            "",
            "All rows, what was aimed at and missed, and the versions: "
            f"[bench/results/{path.name}](bench/results/{path.name}).",
        ]
    return "\n".join(lines)


class Rate(NamedTuple):
    """What a program came to, as it is written in a table."""

    tokens: str
    """A second."""
    memory: str
    """GiB."""
    base: str
    """What the weights are, where they are not what the dtype of the model says."""

    def __str__(self) -> str:
        """Return it in words."""
        base = self.base.removeprefix("none").removeprefix(", ")
        return ", ".join(filter(None, (f"{self.tokens} tokens/s", f"{self.memory} GiB", base)))


def side_by_side(job: str, ours: Rate, theirs: Rate | None = None) -> str:
    """Return a line of the table."""
    times = ""
    if theirs is not None:
        rates = [float(found.tokens.replace(",", "")) for found in (ours, theirs)]
        times = f"{rates[0] / rates[1]:.2f} x"
    return f"| {job} | {theirs or '-'} | {ours} | {times} |"


def roles(found: dict[str, Any]) -> str:
    """Return the table of roles_memory.py."""
    head = (
        *("device, dtype", "the model alone", "policy alone", "all four roles"),
        *("over the model and the adapters", "over four models"),
    )
    rows = [
        (
            f"{device}, {dtype}",
            *(words.size(one["cases"][case]["held_bytes"]) for case in ("reference", "policy")),
            words.size(one["cases"]["roles"]["held_bytes"]),
            f"{one['ratios']['to_one_model_and_its_adapters']:.2f} x",
            f"{one['ratios']['to_four_models']:.2f} x",
        )
        for device, by_dtype in found["devices"].items()
        for dtype, one in by_dtype["dtypes"].items()
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    where = (
        "`python bench/roles_memory.py`, SmolLM2-135M's shape, LoRA of rank "
        f"{found['method']['rank']}, `value: adapter`: what a process holds of a PPO run before "
        "its first step, without activations and the optimiser's state of the adapters."
    )
    return "\n".join([*lines, "", where])


def bases(found: dict[str, Any]) -> str:
    """Return the table of quantize_quality.py."""
    runs = found["runs"]
    head = (
        *("base", "loss before", f"after {found['steps']} steps", "over bf16 before"),
        *("over bf16 after, mean of seeds", "smallest and largest of a seed"),
    )
    plain = next(run["before"] for run in runs if run["base"] == "bf16")
    rows = []
    for base, own in found["differences"].items():
        before = next(run["before"] for run in runs if run["base"] == base)
        after = [f"{own[key]:+.2%}" for key in ("relative", "smallest", "largest")]
        rows.append(
            (
                *(f"`{base}`", f"{before:.3f}", f"{own['loss']:.3f}"),
                *(f"{before / plain - 1:+.2%}", after[0], " to ".join(after[1:])),
            )
        )
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    seeds = len({run["seed"] for run in runs})
    device = found["hardware"]["cuda_devices"][0]
    where = (
        f"`python bench/quantize_quality.py` on one {device}: SmolLM2-135M-Instruct, LoRA of rank "
        f"16 on all linear maps, English dialogues, held-out loss of {seeds} seeds; differences "
        "are those to the same seed's run on the bf16 base. The curves are in "
        "`bench/results/quantize_quality.json`."
    )
    return "\n".join([*lines, "", where])


def demo() -> str:
    """Return what the demo came to."""
    evidence = result("demo")
    summary = evidence["summary"]
    before, after = summary["before"]["accuracy"], summary["after"]["accuracy"]
    minutes = summary["wall_seconds"] / 60
    return (
        f"On {machine(summary)} the demo took\n"
        f"{minutes:.1f} minutes after the downloads and raised the accuracy on 400 held-out\n"
        f"sentences from {before:.1%} (the untuned model) to {after:.1%}."
    )


def measured() -> str:
    """Return the table of measurements."""
    e2e, bench, stream = result("e2e-lora"), result("cpu_sft"), result("stream_jsonl")
    before, after = e2e["summary"]["before"], e2e["summary"]["after"]
    ratio = bench["ratios"]
    rows = [
        (
            "`examples/e2e-lora.yaml`: restaurant attributes to a sentence, "
            f"{e2e['summary']['steps']} steps of 16 rows",
            f"BLEU {before['bleu']:.1f} untuned, {after['bleu']:.1f} tuned; ROUGE-L "
            f"{before['rouge_l']:.2f} and {after['rouge_l']:.2f}, on the first 100 test prompts",
            "`bench/evidence.py`",
        ),
        (
            "the same LoRA job (SmolLM2-135M, bfloat16, 4 conversations of at most 256 tokens a "
            "step) by TRL + PEFT and by Tunesmith",
            f"{ratio['tokens_per_second']:.2f} x the tokens per second, "
            f"{ratio['peak_bytes']:.2f} x the peak memory",
            "`bench/cpu_sft.py`",
        ),
        (
            f"streaming a JSONL file of {stream['rows']:,} rows ({stream['file_MiB']:.0f} MiB)",
            f"peak memory {stream['peak_MiB']:.0f} MiB, the same at every sample from "
            f"{stream['memory'][0]['rows']:,} rows on",
            "`bench/stream_jsonl.py`",
        ),
    ]
    rows += [compared(result(name)) for name in COMPARISONS if there_is(name)]
    lines = ["| what | result | written by |", "|---|---|---|"]
    lines += [f"| {what} | {found} | {program} |" for what, found, program in rows]
    where = (
        f"Measured on {machine(e2e['summary'])} where nothing else is said; "
        "the files are in `bench/results`."
    )
    return "\n".join([*lines, "", where])


def methods() -> str:
    """Return what each method came to in the comparison on a small encoder, best first."""
    return table_of("compare-sentiment", "compare-sentiment.yaml")


def ladders() -> str:
    """Return what the rungs from features to full fine-tuning came to, on each data set."""
    own = "name=ladder-rotten-tomatoes run.data=..."
    files = dict(zip(LADDERS, ("ladder.yaml", f"ladder.yaml {own}"), strict=True))
    return "\n\n".join(table_of(name, file) for name, file in files.items() if there_is(name))


def table_of(name: str, file: str) -> str:
    """Return the rows of a comparison that trained something, best first, and where it ran."""
    findings = findings_from(result(name))
    head = (
        *("method", "accuracy", "95 % interval", "trains", "stored", "peak memory", "s/step"),
        "inference",
    )
    table = [head, ["---"] * len(head), *(method(findings, row) for row in findings.trained)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    steps = next(row for row in findings.trained if row.steps)
    where = (
        f"`tunesmith compare examples/{file}` on {device_of(findings)}: "
        f"{findings.facts['model']}, {seeds(steps)} of {steps.steps} steps; the file is "
        f"`bench/results/{name}.json`."
    )
    return "\n".join([*lines, "", " ".join(filter(None, [where, findings.facts.get("remark")]))])


def method(findings: Findings, row: FoundRow) -> list[str]:
    """Return the cells of a method."""
    return [
        f"`{row.name}`",
        quality(findings, row.quality),
        " to ".join(quality(findings, end) for end in (row.low, row.high)),
        shown(row.trainable_parameters, words.count),
        shown(row.stored_bytes, words.size),
        shown(row.peak_bytes, words.size),
        shown(row.seconds_per_step, "{:.3f}".format),
        shown(row.slowdown, "{:.2f} x".format),
    ]


def shown(value: float | None, show: Callable[[float], str]) -> str:
    """Return a number in words, or a dash where it was not measured."""
    return "-" if value is None else show(value)


def quality(findings: Findings, value: float | None) -> str:
    """Return a value of the comparison's metric, with an ordinary space."""
    return words.metric(findings.metric, value).replace("\u202f", " ")


def device_of(findings: Findings) -> str:
    """Return what a comparison ran on, in a few words."""
    devices = findings.facts["hardware"]["cuda_devices"]
    return f"an {devices[0]}" if devices else machine(findings.facts)


def compared(content: dict[str, Any]) -> tuple[str, str, str]:
    """Return a row of the table for a comparison."""
    findings = findings_from(content)
    untuned = next((row for row in findings.rows if row.baseline), None)
    before = f"{quality(findings, untuned.quality)} untuned, " if untuned else ""
    best, *equal = findings.as_good_as_best()
    others = ", ".join(f"`{row.name}`" for row in equal) or "none"
    low, high = (quality(findings, end) for end in (best.low, best.high))
    return (
        f"`examples/{findings.name}.yaml`: {len(findings.trained)} rows on "
        f"{findings.facts['model']}, {seeds(best)} of {best.steps} steps on "
        f"{device_of(findings)}",
        f"{words.metric_name(findings.metric)} {before}`{best.name}` "
        f"{quality(findings, best.quality)} (95 % interval {low} to {high}); not told from it: "
        f"{others}",
        "`tunesmith compare`",
    )


def seeds(row: FoundRow) -> str:
    """Return how many seeds a row is the mean of."""
    return f"{len(row.values)} seed{'s' * (len(row.values) != 1)}"


def machine(summary: dict[str, Any]) -> str:
    """Return the machine in a few words."""
    hardware = summary["hardware"]
    memory = hardware["memory_bytes"] / 2**30
    return (
        f"{hardware['cores']} cores of an {hardware['processor']} with {memory:.0f} GiB and no GPU"
    )


def there_is(name: str) -> bool:
    """Return whether a result file lies there."""
    return (HERE / "results" / f"{name}.json").is_file()


def result(name: str) -> dict[str, Any]:
    """Return a result file."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
    return found


if __name__ == "__main__":
    main()
