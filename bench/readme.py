"""Put measured numbers into README.md, between its markers: `python bench/readme.py`.

Every number comes out of a file in bench/results that another program here wrote.
"""

import json
import re
from pathlib import Path
from typing import Any

from tunesmith.jobs.evidence import findings_from

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, content in (("demo", demo()), ("measured", measured())):
        text = filled(text, name, content)
    README.write_text(text, encoding="utf-8")


def filled(text: str, name: str, content: str) -> str:
    """Return `text` with `content` between the markers called `name`."""
    pattern = rf"<!-- {name} -->\n(.*?)<!-- end {name} -->\n"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"README.md has no markers <!-- {name} --> and <!-- end {name} -->")
    block = f"<!-- {name} -->\n{content}\n<!-- end {name} -->\n"
    return re.sub(pattern, lambda _: block, text, flags=re.DOTALL)


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
    rows.append(compared(result("compare-sentiment")))
    lines = ["| what | result | written by |", "|---|---|---|"]
    lines += [f"| {what} | {found} | {program} |" for what, found, program in rows]
    where = (
        f"Measured on {machine(e2e['summary'])} where nothing else is said; "
        "the files are in `bench/results`."
    )
    return "\n".join([*lines, "", where])


def compared(content: dict[str, Any]) -> tuple[str, str, str]:
    """Return a row of the table for a comparison."""
    findings = findings_from(content)
    untuned = next(row for row in findings.rows if row.baseline)
    best, *equal = findings.as_good_as_best()
    device = findings.facts["hardware"]["cuda_devices"][0]
    others = ", ".join(f"`{row.name}`" for row in equal)
    return (
        f"`examples/{findings.name}.yaml`: {len(findings.trained)} methods on "
        f"{findings.facts['model']}, {len(best.values)} seeds of {best.steps} steps on an {device}",
        f"{findings.metric} {untuned.quality:.1%} untuned, `{best.name}` {best.quality:.1%} "
        f"(95 % interval {best.low:.1%} to {best.high:.1%}); not told from it: {others}",
        "`tunesmith compare`",
    )


def machine(summary: dict[str, Any]) -> str:
    """Return the machine in a few words."""
    hardware = summary["hardware"]
    memory = hardware["memory_bytes"] / 2**30
    return (
        f"{hardware['cores']} cores of an {hardware['processor']} with {memory:.0f} GiB and no GPU"
    )


def result(name: str) -> dict[str, Any]:
    """Return a result file."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
    return found


if __name__ == "__main__":
    main()
