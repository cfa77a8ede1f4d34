"""What is done with runs that started from an earlier run's result (`model.adapter`)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tunesmith
from tunesmith import DataSettings, EngineSettings, ModelSettings, Run, Source, TrainSettings
from tunesmith.errors import AdapterError, SpecError
from tunesmith.jobs.base import load_base
from tunesmith.jobs.combine import combine_adapters, weighted
from tunesmith.jobs.evaluate import evaluate
from tunesmith.jobs.merge import merge
from tunesmith.jobs.probe import ready
from tunesmith.methods import LoRA
from tunesmith.methods.storage import load_adapter
from tunesmith.models.loading import load_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 24).reshape(3, 7)


def run_of(folder: Path, model: Path, name: str, start: Path | None = None) -> Run:
    """Return one step of LoRA, which does another thing under another name."""
    rows = folder / "rows.jsonl"
    texts = ({"prompt": f"Say {n}", "completion": "yes" * n} for n in range(1, 9))
    rows.write_text("\n".join(map(json.dumps, texts)))
    adapter = None if start is None else str(start)
    return Run(
        name=name,
        output=str(folder / "runs"),
        seed=sum(map(ord, name)),
        model=ModelSettings(name=str(model), dtype="float32", adapter=adapter),
        method=LoRA(rank=2),
        data=DataSettings(train=[Source(path=str(rows))], max_length=96, holdout=0.25),
        train=TrainSettings(max_steps=1, batch_size=4, learning_rate=0.1),
        engine=EngineSettings(device="cpu"),
    )


def trained(folder: Path, model: Path, name: str, start: Path | None = None) -> Path:
    """Return the directory of a finished run."""
    return tunesmith.train(run_of(folder, model, name, start)).directory.path


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits


def test_runs_of_one_start_are_combined_on_it(tmp_path: Path, tiny_model: Path) -> None:
    first = trained(tmp_path, tiny_model, "first")
    one, two = (trained(tmp_path, tiny_model, name, first) for name in ("one", "two"))
    combine_adapters(weighted([f"{one}=0.7", f"{two}=-0.3"]), tmp_path / "both")

    loaded = tunesmith.load_run(one)
    together = loaded.tuned
    together.load_adapter("two", two / "adapter")
    together.combine({"default": 0.7, "two": -0.3}, name="both")
    together.use("both")
    base = load_base(loaded.run.model, device=CPU, dtype=torch.float32)
    start = logits(base)
    combined = load_adapter(base, tmp_path / "both")  # which says that this is its base
    torch.testing.assert_close(logits(combined.model), logits(together.model))
    assert not torch.allclose(logits(combined.model), start)


@pytest.mark.parametrize("start", ["other", None])
def test_runs_of_different_starts_are_not_combined(
    start: str | None, tmp_path: Path, tiny_model: Path
) -> None:
    first = trained(tmp_path, tiny_model, "first")
    one = trained(tmp_path, tiny_model, "one", first)
    other = trained(tmp_path, tiny_model, start) if start else None
    two = trained(tmp_path, tiny_model, "two", other)
    for base in (None, str(tiny_model)):
        with pytest.raises(AdapterError) as refused:
            combine_adapters(weighted([str(one), str(two)]), tmp_path / "both", base=base)
        said = str(refused.value)
        assert f"{one / 'adapter'} was trained on" in said
        assert f"(model.adapter: {first})" in said
        assert f"{two / 'adapter'} was trained on" in said
        assert f"(model.adapter: {other or 'none'})" in said
    assert not (tmp_path / "both").exists()


def test_runs_whose_start_is_gone_want_a_base(tmp_path: Path, tiny_model: Path) -> None:
    first = trained(tmp_path, tiny_model, "first")
    one, two = (trained(tmp_path, tiny_model, name, first) for name in ("one", "two"))
    merge(first, tmp_path / "merged")
    shutil.rmtree(first)
    both = weighted([str(one), str(two)])
    with pytest.raises(SpecError, match=f"model.adapter: {first} holds no adapter"):
        combine_adapters(both, tmp_path / "both")
    combine_adapters(both, tmp_path / "both", base=str(tmp_path / "merged"))
    load_adapter(load_model(str(tmp_path / "merged")).model, tmp_path / "both")


def test_runs_that_were_moved_are_combined(tmp_path: Path, tiny_model: Path) -> None:
    old, new = tmp_path / "server", tmp_path / "laptop"
    old.mkdir()
    model = Path(shutil.copytree(tiny_model, old / "model"))
    first = trained(old, model, "first")
    for name in ("one", "two"):
        trained(old, model, name, first)
    old.rename(new)
    runs = [str(new / "runs" / name) for name in ("one", "two")]
    combine_adapters(weighted(runs), tmp_path / "both")
    base = load_base(tunesmith.load_run(runs[0]).run.model, device=CPU, dtype=torch.float32)
    load_adapter(base, tmp_path / "both")


def test_the_untuned_model_of_a_run_is_what_it_started_from(
    tmp_path: Path, tiny_model: Path
) -> None:
    first = trained(tmp_path, tiny_model, "first")
    one = trained(tmp_path, tiny_model, "one", first)
    before, after = tunesmith.load_run(first), tunesmith.load_run(one)
    with after.tuned.disabled():
        torch.testing.assert_close(logits(after.tuned.model), logits(before.tuned.model))
    assert evaluate(one)["base"] == pytest.approx(evaluate(first)["tuned"], rel=1e-5)
    merge(one, tmp_path / "merged")
    written = load_model(str(tmp_path / "merged"), dtype=torch.float32).model
    torch.testing.assert_close(logits(written), logits(after.tuned.model))


def test_a_probe_takes_its_steps_on_what_the_run_starts_from(
    tmp_path: Path, tiny_model: Path
) -> None:
    first = trained(tmp_path, tiny_model, "first")
    run = run_of(tmp_path, tiny_model, "one", first)
    with ready(run, CPU, real_weights=True) as stage:
        stage.tuned.model.eval()
        expected = logits(tunesmith.load_run(first).tuned.model)
        torch.testing.assert_close(logits(stage.tuned.model), expected)
