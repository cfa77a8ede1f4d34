"""Keep what a comparison found: python bench/comparison.py RUN_DIR NAME [REMARK].

Writes bench/results/compare-sentiment.json, the same beside the code for `tunesmith advise`, the
page docs/comparison/sentiment.html, and its first picture as sentiment.svg there, for the README.
A remark, what a reader has to know besides, goes into both.
"""

import json
import sys
from pathlib import Path

from tunesmith.jobs.evidence import findings_from
from tunesmith.report.comparison import charts, write_comparison_report
from tunesmith.report.curves import standalone

HERE = Path(__file__).resolve().parent
KEPT = (HERE / "results", HERE.parent / "src" / "tunesmith" / "jobs" / "measured")
PAGES = HERE.parent / "docs" / "comparison"


def main() -> None:
    directory, name = Path(sys.argv[1]), sys.argv[2]
    content = json.loads((directory / "comparison.json").read_text(encoding="utf-8"))
    hardware = content["facts"].get("hardware", {})
    if "system" in hardware:  # the kernel's build is nobody's business
        hardware["system"] = hardware["system"].split()[0]
    if len(sys.argv) > 3:
        content["facts"]["remark"] = sys.argv[3]
    findings = findings_from(content)
    write_comparison_report(findings, PAGES / f"{name}.html")
    (PAGES / f"{name}.svg").write_text(standalone(charts(findings)[0].svg), encoding="utf-8")
    content["rows"] = [row | {"curve": []} for row in content["rows"]]
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    for folder in KEPT:
        (folder / f"{findings.name}.json").write_text(text, encoding="utf-8")
    print(f"kept {findings.name}: {len(findings.rows)} rows")


if __name__ == "__main__":
    main()
