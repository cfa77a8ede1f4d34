"""Advice: what fits, what was measured before what is said, a run file that works."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from tunesmith.errors import SpecError
from tunesmith.jobs.advise import HEADROOM, Advice, advise, goal_of, place_of, told
from tunesmith.jobs.default_run import default_run
from tunesmith.jobs.evidence import known_evidence, remember
from tunesmith.report.findings import Findings, FoundRow
from tunesmith.spec import load_run_file

GIB = 2**30
LOW_RANK = {"lora", "adalora", "vera"}
SHAPES = {
    # As many weights as the real ones have, in fewer and wider layers, which are planned faster.
    "7B": {
        "vocab_size": 32000, "hidden_size": 10240, "intermediate_size": 27648,
        "num_hidden_layers": 5, "num_attention_heads": 80, "max_position_embeddings": 1024,
    },
    "135M": {
        "vocab_size": 49152, "hidden_size": 1536, "intermediate_size": 4096,
        "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 4,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_evidence_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.jobs.evidence.store", lambda: tmp_path / "store")


def model_of(folder: Path, shape: str) -> str:
    LlamaConfig(**SHAPES[shape]).save_pretrained(folder / shape)
    return str(folder / shape)


def rows_of(folder: Path, count: int) -> str:
    rows = [{"prompt": f"Say {n}", "completion": f"{n}"} for n in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "rows.jsonl")


def test_a_7b_on_24_gib_gets_a_low_rank_method_that_fits(tmp_path: Path) -> None:
    memory = 24 * GIB
    advices = advise(model_of(tmp_path, "7B"), rows_of(tmp_path, 3000), memory=memory)
    assert advices[0].method in LOW_RANK
    assert "full" not in {advice.method for advice in advices}
    for advice in advices:
        assert advice.planned is not None
        assert advice.planned.alone.peak <= HEADROOM * memory


def test_a_small_model_with_ample_rows_and_memory_is_tuned_whole(tmp_path: Path) -> None:
    advices = advise(model_of(tmp_path, "135M"), rows_of(tmp_path, 3000), memory=24 * GIB)
    assert advices[0].method == "full"


def test_with_few_rows_full_tuning_is_advised_against(tmp_path: Path) -> None:
    advices = advise(model_of(tmp_path, "135M"), rows_of(tmp_path, 100), memory=24 * GIB)
    assert advices[0].method != "full"


def test_what_was_measured_outweighs_the_rules(tmp_path: Path) -> None:
    rows = [
        FoundRow(name, quality=quality, total_parameters=134_515_008, stored_bytes=1000)
        for name, quality in (("ia3", 0.9), ("lora", 0.6), ("full", 0.5))
    ]
    facts = {"objective": "sft", "kind": "decoder", "model": "some-model"}
    remember(Findings("mine", "accuracy", True, rows, facts))
    assert known_evidence()[0].here
    advices = advise(model_of(tmp_path, "135M"), rows_of(tmp_path, 3000), memory=24 * GIB)
    assert advices[0].method == "ia3"
    assert any("measured here (mine, some-model): place 1 of 3" in r for r in advices[0].reasons)


def test_a_model_that_fits_in_no_way_is_refused(tmp_path: Path) -> None:
    # Its weights alone need 3.3 GiB in 4 bits.
    with pytest.raises(SpecError, match="nothing that trains"):
        advise(model_of(tmp_path, "7B"), rows_of(tmp_path, 100), memory=2 * GIB)


def test_the_run_file_is_one(tmp_path: Path) -> None:
    advices = advise(model_of(tmp_path, "135M"), rows_of(tmp_path, 100), memory=24 * GIB)
    (tmp_path / "run.yaml").write_text(advices[0].to_yaml())
    run = load_run_file(tmp_path / "run.yaml")
    assert run.methods[0].name == advices[0].method  # type: ignore[attr-defined]
    assert yaml.safe_load(advices[0].to_yaml())["data"]["holdout"] == 0.2
    lines = told(advices)
    assert lines[0] == f"1. {advices[0].method}"
    assert any("at the most" in line for line in lines)


def test_an_encoder_needs_labels(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SpecError, match="is an encoder, which classifies texts"):
        default_run(str(tmp_path / "bert"), rows_of(tmp_path, 5))


def test_goals_and_memory_are_read() -> None:
    assert goal_of("many-tasks") == "many-tasks"
    assert place_of("24GiB") == ("cuda", 24 * GIB)
    with pytest.raises(SpecError, match="use one of quality, memory"):
        goal_of("fame")
    assert Advice("lora").points == 0


def measured(*rows: FoundRow, higher_is_better: bool = True) -> None:
    facts = {"objective": "sft", "kind": "decoder", "model": "some-model"}
    remember(Findings("mine", "accuracy", higher_is_better, list(rows), facts))


def row_of(name: str, quality: float, p_value: float | None = None) -> FoundRow:
    return FoundRow(
        name, quality=quality, low=quality - 0.1, high=quality + 0.1, p_value=p_value,
        total_parameters=134_515_008,
    )  # fmt: skip


def test_a_comparison_in_which_nothing_was_learned_counts_for_nothing(tmp_path: Path) -> None:
    untuned = FoundRow("untuned", baseline=True, quality=0.95)
    measured(untuned, row_of("ia3", 0.9), row_of("full", 0.5, 0.001))
    advices = advise(model_of(tmp_path, "135M"), rows_of(tmp_path, 3000), memory=24 * GIB)
    assert advices[0].method == "full"
    assert not any("measured here" in reason for advice in advices for reason in advice.reasons)


def test_among_rows_that_cannot_be_told_apart_the_rules_choose(tmp_path: Path) -> None:
    rows = (row_of("ia3", 0.9), row_of("full", 0.89, 0.4), row_of("lora", 0.5, 0.001))
    measured(*rows, FoundRow("untuned", baseline=True, quality=0.3))
    model, data = model_of(tmp_path, "135M"), rows_of(tmp_path, 3000)
    assert [a.method for a in advise(model, data, memory=24 * GIB)][:2] == ["full", "ia3"]
    assert advise(model, data, memory=24 * GIB, goal="memory")[0].method == "ia3"


def test_the_evidence_that_comes_along_is_what_was_recorded() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in (root / "src" / "tunesmith" / "jobs" / "measured").glob("*.json"):
        assert path.read_text() == (root / "bench" / "results" / path.name).read_text()
