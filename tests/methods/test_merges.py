"""Whether a method says that it merges, and whether it does."""

import pytest

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError
from tunesmith.jobs.comparison_spec import METHODS
from tunesmith.methods.tuned import attach
from tunesmith.spec import validate


@pytest.mark.parametrize("name", [*METHODS, "bitfit with added biases"])
def test_a_method_merges_where_it_says_so(name: str) -> None:
    added = name == "bitfit with added biases"
    settings = {"name": "bitfit", "add_missing": True} if added else {"name": name}
    values = {"data": {"train": [{"path": "x"}]}, "method": settings}
    method = validate(values, source="test", lines={}).methods[0]
    model = tiny_gpt2() if name == "bitfit" else tiny_llama()
    tuned = attach(model, method)
    said = all(attachment.merges for attachment in tuned.attachments)
    try:
        tuned.merge()
    except MethodError:
        merged = False
    else:
        merged = True
    assert said == merged
