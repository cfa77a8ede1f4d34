"""The page of methods shows the matrix as it is."""

from pathlib import Path

from families import FAMILIES
from numerics.matrix import METHODS
from numerics.table import BEGIN, END, all_passed, read_results, render

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_has_the_table_of_all_methods_and_architectures() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == render(all_passed()), "docs/methods.md is old: run `make matrix`"


def test_a_cell_that_failed_or_did_not_run_is_crossed() -> None:
    method, family = next(iter(METHODS)), next(iter(FAMILIES))
    passed = {cell: cell != "start" for cell in all_passed()[method, family]}
    assert "✗ start" in render({**all_passed(), (method, family): passed})
    del passed["start"]
    assert "✗ start" in render({**all_passed(), (method, family): passed})


def test_results_are_read_from_pytests_report(tmp_path: Path) -> None:
    properties = "".join(
        f'<property name="{key}" value="{value}"/>'
        for key, value in {"cell": "start", "method": "lora", "family": "llama"}.items()
    )
    case = f"<testcase><properties>{properties}</properties>%s</testcase>"
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites>{case % ''}</testsuites>")
    assert read_results(report) == {("lora", "llama"): {"start": True}}
    report.write_text(f"<testsuites>{case % '<failure/>'}{case % ''}</testsuites>")
    assert read_results(report) == {("lora", "llama"): {"start": False}}
