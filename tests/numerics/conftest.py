"""Each cell's result carries what it is the result of, for `table.py`."""

import pytest


@pytest.fixture(autouse=True)
def recorded(request: pytest.FixtureRequest) -> None:
    mark = request.node.get_closest_marker("cell")
    if mark is not None:
        values = request.node.callspec.params
        request.node.user_properties += [
            ("cell", mark.args[0]),
            ("method", values["method"]),
            ("family", values["family"]),
        ]
