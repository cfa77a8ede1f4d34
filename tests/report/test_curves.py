"""Drawings of the page, and as files of their own."""

from xml.etree import ElementTree

from tunesmith.report.curves import draw, standalone


def test_a_drawing_alone_needs_no_page() -> None:
    svg = draw("Loss", [(1, 2.0), (2, 1.0)]).svg
    assert "var(--" in svg
    alone = standalone(svg)
    assert "var(--" not in alone
    root = ElementTree.fromstring(alone)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "white" in root.attrib["style"]
