"""What comparisons found, here and in ours: the evidence that advice rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs

from tunesmith.jobs.run_directory import write_json
from tunesmith.json_text import parse_json
from tunesmith.report.findings import Findings, FoundRow


@dataclass(frozen=True)
class Evidence:
    """One comparison that was run to its end."""

    findings: Findings
    here: bool
    """Whether it was run on this machine, rather than by us."""

    @property
    def task(self) -> str:
        """The objective that was compared on."""
        return str(self.findings.facts.get("objective"))

    @property
    def kind(self) -> str:
        """Encoder, decoder or encoder-decoder."""
        return str(self.findings.facts.get("kind"))

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return max((row.total_parameters or 0 for row in self.findings.trained), default=0)


def store() -> Path:
    """Return the folder where this user's comparisons are remembered."""
    return platformdirs.user_data_path("tunesmith") / "comparisons"


def remember(findings: Findings) -> None:
    """Keep what a comparison found for advice; a later one of the same name replaces it."""
    folder = store()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) | {"curve": []} for row in findings.rows]
    write_json(folder / f"{findings.name}.json", asdict(findings) | {"rows": rows})


def known_evidence() -> list[Evidence]:
    """Return every comparison that is known, this user's first."""
    own = sorted(store().glob("*.json")) if store().is_dir() else []
    bundled = resources.files("tunesmith.jobs") / "measured"
    ours = sorted(
        (entry for entry in bundled.iterdir() if entry.name.endswith(".json")),
        key=lambda entry: entry.name,
    )
    return [
        *_read((path.read_text(encoding="utf-8") for path in own), here=True),
        *_read((entry.read_text(encoding="utf-8") for entry in ours), here=False),
    ]


def _read(texts: Iterator[str], *, here: bool) -> Iterator[Evidence]:
    for text in texts:
        yield Evidence(findings_from(parse_json(text)), here)


def findings_from(content: dict[str, Any]) -> Findings:
    """Return findings as comparison.json holds them; keys of later versions are left out."""
    names = {field.name for field in fields(FoundRow)}
    rows = [
        FoundRow(**{key: value for key, value in row.items() if key in names})
        for row in content["rows"]
    ]
    return Findings(
        content["name"], content["metric"], content["higher_is_better"], rows, content["facts"]
    )
