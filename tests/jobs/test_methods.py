"""Every method of the union in a whole run: trained, saved, loaded, evaluated."""

import json
import typing
from pathlib import Path

import pytest
import torch

import tunesmith
from tunesmith import (
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    ModelSettings,
    Run,
    Source,
    TrainSettings,
)
from tunesmith.errors import SpecError
from tunesmith.methods import DiffPruning, MethodUnion
from tunesmith.methods.contract import Method

SIZES = {
    "bitfit": {"add_missing": True},
    "compacter": {"bottleneck": 4},
    "adalora": {"rank": 4, "target_rank": 2},
}
"""Settings that fit a model of width 32, where the defaults do not."""
METHODS = {
    kind.model_fields["name"].default: kind(**SIZES.get(kind.model_fields["name"].default, {}))
    for kind in typing.get_args(typing.get_args(MethodUnion)[0])
}


def test_a_method_that_needs_its_last_phase_is_not_stopped_early(tmp_path: Path) -> None:
    run = Run(
        output=str(tmp_path),
        method=DiffPruning(),
        data=DataSettings(train=[Source(path="rows.jsonl")]),
        train=TrainSettings(early_stopping=1),
    )
    with pytest.raises(SpecError, match=r"train.early_stopping: diff_pruning becomes sparse"):
        tunesmith.train(run)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["free", "packed", "padded"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_whole_run_comes_back_as_it_was_trained(
    tmp_path: Path, tiny_model: Path, method: Method, layout: str
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {n}" * (1 + n % 3), "completion": "yes" * n} for n in range(1, 17)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    run = Run(
        name=method.name,
        output=str(tmp_path / "runs"),
        model=ModelSettings(name=str(tiny_model), dtype="float32"),
        method=method,
        data=DataSettings(
            train=[Source(path=str(path))], holdout=4, max_length=128, packing=layout == "packed"
        ),
        train=TrainSettings(max_steps=2, batch_size=4, learning_rate=1e-2, warmup=0),
        evaluation=EvaluationSettings(samples=1, max_new_tokens=3),
        engine=EngineSettings(device="cpu", padding="right" if layout == "padded" else "auto"),
    )
    result = tunesmith.train(run)
    loaded = tunesmith.load_run(result.directory.path)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        # AdaLoRA leaves dropped ranks out of its file, which changes the order of a sum.
        torch.testing.assert_close(
            loaded.tuned.model(ids).logits, result.tuned.model(ids).logits, atol=1e-6, rtol=1e-5
        )
    assert all(proof["passed"] for proof in result.summary["proofs"])
