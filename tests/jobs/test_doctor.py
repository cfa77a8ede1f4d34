"""The doctor sees what works and what does not."""

from pathlib import Path

from tunesmith.jobs.doctor import diagnose


def test_a_working_machine_passes_and_a_model_takes_a_step(tiny_model: Path) -> None:
    checks = {check.name: check for check in diagnose(str(tiny_model))}
    assert checks["one step on a tiny model"].passed
    assert checks[f"one step on {tiny_model}"].passed
    assert "torch" in checks["versions"].detail


def test_a_model_that_is_not_there_is_a_failed_check() -> None:
    (last,) = [check for check in diagnose("/no/such/model") if check.name.endswith("model")][-1:]
    assert not last.passed
    assert "/no/such/model" in last.detail
