"""The doctor sees what works and what does not."""

from pathlib import Path

from tunesmith.jobs.doctor import diagnose


def test_a_working_machine_passes_and_a_model_takes_a_step(tiny_model: Path) -> None:
    checks = {check.name: check for check in diagnose(str(tiny_model))}
    assert checks["one step on a tiny model"].passed
    assert checks[f"one step on {tiny_model}"].passed
    assert "torch" in checks["versions"].detail


def test_a_model_that_is_not_there_is_a_failed_check() -> None:
    (last,) = [c for c in diagnose("/no/such/model") if c.name == "one step on /no/such/model"]
    assert not last.passed
    assert "/no/such/model" in last.detail


def test_every_kind_of_block_is_tried_as_one_graph(tiny_model: Path) -> None:
    (check,) = [c for c in diagnose(str(tiny_model)) if c.name.startswith("one graph")]
    assert check.passed
    assert check.name == "one graph: 2 x LlamaDecoderLayer with lora"


def test_an_unknown_method_is_a_failed_check(tiny_model: Path) -> None:
    checks = diagnose(str(tiny_model), "loro")
    (check,) = [c for c in checks if c.name.startswith("one graph")]
    assert not check.passed
    assert "--method: 'loro'" in check.detail
