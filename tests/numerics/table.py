"""The matrix as a table: `python -m numerics.table RESULTS.xml PAGE.md`.

RESULTS.xml is what `pytest tests/numerics --junitxml RESULTS.xml` wrote; the table goes between the
markers in PAGE.md.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from families import FAMILIES
from numerics.matrix import CELLS, COMPILED, METHODS, reason
from numerics.reasons import ANY, REASONS

BEGIN: Final = "<!-- matrix: written by `make matrix` -->"
END: Final = "<!-- end of matrix -->"
Pair = tuple[str, str]
"""Method and family."""
Results = Mapping[Pair, Mapping[str, bool]]
"""Whether each cell passed."""


def read_results(file: Path) -> Results:
    """Return what pytest's report says; a cell of which a test was skipped did not pass."""
    results: defaultdict[Pair, dict[str, bool]] = defaultdict(dict)
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        said = {p.get("name"): p.get("value") for p in case.iter("property")}
        if "cell" in said:
            bad = any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped"))
            cells = results[said["method"], said["family"]]
            cells[said["cell"]] = cells.get(said["cell"], True) and not bad
    return results


def expected(method: str, family: str) -> Iterator[str]:
    """Yield the cells that this pair has to pass."""
    for cell in CELLS:
        here = cell != "compiled" or family in COMPILED
        attaches = cell == "attach" or reason(method, "attach", family) is None
        if here and attaches and reason(method, cell, family) is None:
            yield cell


def all_passed() -> Results:
    """Return the results of a run in which every cell that there is passed."""
    pairs = [(method, family) for method in METHODS for family in FAMILIES]
    return {pair: dict.fromkeys(expected(*pair), True) for pair in pairs}


def render(results: Results) -> str:
    """Return the table and its notes."""
    notes = _Notes()
    lines = [
        "| | " + " | ".join(_head(family, notes) for family in FAMILIES) + " |",
        "|---|" + ":-:|" * len(FAMILIES),
    ]
    for method in METHODS:
        found = [_entry(method, family, results, notes) for family in FAMILIES]
        first = f"`{method}`{notes.marks(_reasons(method, ANY))}"
        lines.append(f"| {first} | " + " | ".join(found) + " |")
    return "\n".join([*lines, "", *notes.lines()])


class _Notes:
    """Numbers for the notes, in the order in which they are first needed."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}

    def marks(self, said: Iterable[tuple[str, str]]) -> str:
        numbers = sorted(self._numbers.setdefault(x, len(self._numbers) + 1) for x in said)
        return f" <sup>{' '.join(map(str, numbers))}</sup>" if numbers else ""

    def lines(self) -> list[str]:
        return [f"{n}. {_WITHOUT[cell]}: {why}." for (cell, why), n in self._numbers.items()]


_WITHOUT: Final = dict.fromkeys(CELLS, "is not so") | {
    "attach": "does not attach",
    "start": "does not start as the base",
    "size": "the file holds more than what was trained",
    "merge": "does not merge",
    "checkpointing": "no gradient checkpointing",
    "padding": "no padding",
    "packing": "no packing",
    "generation": "no generation",
    "compiled": "no single graph",
    "bfloat16": "no bfloat16 base",
    "nf4": "no nf4 base",
    "int8": "no int8 base",
}
"""What a reason against a cell means."""


def _reasons(method: str, *families: str) -> list[tuple[str, str]]:
    return [(c, why) for (m, c, f), why in REASONS.items() if m == method and f in families]


def _head(family: str, notes: _Notes) -> str:
    """Return the column's name, with the notes that hold for every method there."""
    return family + notes.marks(_reasons(ANY, family, FAMILIES[family].kind, ANY))


def _entry(method: str, family: str, results: Results, notes: _Notes) -> str:
    """Return a tick with this pair's own notes, or what did not pass."""
    own = notes.marks(_reasons(method, family, FAMILIES[family].kind))
    found = results.get((method, family), {})
    failed = [cell for cell in expected(method, family) if not found.get(cell)]
    failed += [cell for cell, passed in found.items() if not passed and cell not in failed]
    if failed:
        return f"✗ {', '.join(failed)}{own}"
    return ("✓" if reason(method, "attach", family) is None else "-") + own


def main(results: str, page: str) -> None:
    file = Path(page)
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    table = render(read_results(Path(results)))
    file.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    if "✗" in table:
        raise SystemExit("not every cell passed; see the crosses in the table")


if __name__ == "__main__":
    main(*sys.argv[1:])
