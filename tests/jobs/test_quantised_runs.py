"""Whole runs on quantised bases: trained, recorded, loaded, evaluated, merged, and refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pairs
import tunesmith
from tiny import tiny_llama, tiny_tokenizer
from tunesmith import (
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    Full,
    LoRA,
    ModelSettings,
    Preference,
    Run,
    Source,
    TrainSettings,
)
from tunesmith.engine.distribution import Peers
from tunesmith.errors import SpecError
from tunesmith.jobs.assemble import assemble
from tunesmith.jobs.evaluate import evaluate
from tunesmith.jobs.merge import merge
from tunesmith.jobs.proofs_pairs import starts_at_reference
from tunesmith.jobs.reference import with_reference
from tunesmith.jobs.result import load_run
from tunesmith.models.quantize import is_quantised

pytest.importorskip("bitsandbytes")
kinds = pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model wide enough for the layout that bitsandbytes repacks into for inference."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_of(folder: Path, directory: Path, **model: object) -> Run:
    rows = folder / "rows.jsonl"
    content = [{"prompt": f"Count to {n}", "completion": "one two"[: 3 + n % 4]} for n in range(16)]
    rows.write_text("\n".join(json.dumps(row) for row in content))
    return Run(
        name="job",
        output=str(folder / "runs"),
        model=ModelSettings.model_validate({"name": str(directory)} | model),
        method=LoRA(rank=4),
        data=DataSettings(train=[Source(path=str(rows))], holdout=4, max_length=96),
        train=TrainSettings(max_steps=4, batch_size=4, learning_rate=1e-2),
        evaluation=EvaluationSettings(samples=1, max_new_tokens=4),
        engine=EngineSettings(device="cpu"),
    )


@dtypes
@kinds
def test_a_run_trains_and_its_result_is_evaluated_and_merged(
    tmp_path: Path, directory: Path, kind: str, dtype: str
) -> None:
    run = run_of(tmp_path, directory, quantize=kind, dtype=dtype)
    result = tunesmith.train(run)
    path = result.directory.path
    summary = json.loads(result.directory.summary.read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert all(proof["passed"] for proof in summary["proofs"])
    plain = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(directory).parameters())
    assert summary["base_bytes"] < (plain if dtype == "float32" else plain / 2)

    loaded = load_run(path)
    assert any(is_quantised(module) for module in loaded.tuned.model.modules())
    assert evaluate(path)["tuned"]["loss"] == pytest.approx(summary["after"]["loss"])

    proofs = {proof.name: proof for proof in merge(path, tmp_path / "merged")}
    assert f"{kind} codes" in proofs["base written unquantised"].detail
    assert "largest difference of logits" in proofs["merged equals unmerged"].detail
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {str(p.dtype) for p in written.parameters()} == {f"torch.{dtype}"}


def test_a_reference_of_int8_is_the_start_though_other_batches_round_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which columns it multiplies unrounded, all rows of a batch decide."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    tiny_llama(initializer_range=0.15, **sizes).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    model = {"name": str(tmp_path / "wide"), "dtype": "float32", "quantize": "int8"}
    run = pairs.run_of(
        tmp_path,
        tmp_path / "wide",
        Preference(),
        model=ModelSettings.model_validate(model),
        engine=EngineSettings(device="cpu", padding="right"),
    )
    peers = Peers(torch.device("cpu"))
    assembled = with_reference(assemble(run.resolved(), peers, lambda line: None), peers)
    proofs = starts_at_reference(assembled, assembled.data.train.peek(8), peers)
    assert [proof.detail for proof in proofs if not proof.passed] == []


def test_full_tuning_of_codes_is_refused_before_anything_is_read(
    tmp_path: Path, directory: Path
) -> None:
    run = run_of(tmp_path, directory, quantize="nf4").model_copy(update={"method": Full()})
    with pytest.raises(SpecError, match=r"full trains the weights .*model\.quantize: none"):
        tunesmith.train(run)


def test_codes_are_not_sharded(tmp_path: Path, directory: Path) -> None:
    run = run_of(tmp_path, directory, quantize="int8")
    run = run.model_copy(update={"engine": EngineSettings(device="cpu", distribution="fsdp")})
    with pytest.raises(SpecError, match=r"fsdp would cut the codes .*use ddp"):
        assemble(run, Peers(torch.device("cpu"), size=2), print)


def test_products_and_other_weights_share_a_dtype(tmp_path: Path, directory: Path) -> None:
    run = run_of(tmp_path, directory, quantize="nf4", dtype="float32")
    run = run.model_copy(update={"engine": EngineSettings(device="cpu", precision="bfloat16")})
    with pytest.raises(SpecError, match=r"engine\.precision: bfloat16 differs .*auto"):
        tunesmith.train(run)
