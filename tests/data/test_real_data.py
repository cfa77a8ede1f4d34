"""Files that people really have, whole; and a real tokenizer."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_files import exchanges, jsonl
from tiny import tiny_tokenizer
from tunesmith.data.formats import layout_of
from tunesmith.data.hub import fingerprint, read_hub
from tunesmith.data.prepare import PreparedData, prepare
from tunesmith.data.render import Renderer
from tunesmith.data.rows import RawRow
from tunesmith.data.settings import DataSettings, Source
from tunesmith.data.sources import locate, read
from tunesmith.errors import DataError
from tunesmith.models.loading import load_tokenizer
from tunesmith.models.settings import ModelSettings

E2E = {"prompt": "{mr}", "completion": "{ref}"}
ARITHMETIC = {"columns": {"prompt": "context", "completion": "continuation"}}


def prepared(cache: Path, source: Source, **settings: object) -> PreparedData:
    chosen = DataSettings(train=[source], **settings)
    return prepare(chosen, tiny_tokenizer(), seed=0, cache=cache)


@pytest.mark.parametrize(
    ("path", "settings", "form", "rows"),
    [
        ("llamafactory_demos/identity.json", {}, "alpaca", 91),
        ("llamafactory_demos/kto_en_demo.json", {}, "messages", 300),
        ("alpaca_zh/train.jsonl", {"limit": 500}, "alpaca", 500),
        ("e2e_nlg/devset.csv", E2E | {"limit": 500}, "template", 500),
        ("llms_from_scratch/instruction-data.json", {"limit": 300}, "alpaca", 300),
        ("text_c4_wiki_demo/wiki_demo.txt", {}, "text", 30),
        ("arithmetic", ARITHMETIC, "prompt_completion", 2000),
        ("rotten_tomatoes", {"split": "validation"}, "text_label", 1066),
        ("glue_rte", {"split": "dev", "columns": {"text": "sentence1"}}, "text_label", 277),
        ("chnsenticorp_hotel", {"columns": {"text": "review"}, "limit": 300}, "text_label", 300),
    ],
)
def test_files_of_every_format_are_read_whole(
    shared_data: Path, tmp_path: Path, path: str, settings: dict, form: str, rows: int
) -> None:
    source = Source(path=str(shared_data / path), **settings)
    report = prepared(tmp_path, source, max_length=4096).train_report
    assert report.sources[0].format == form
    assert (report.rows, report.bad) == (rows, 0)
    assert report.supervised_tokens > 0


def test_the_e2e_test_set_groups_its_references(shared_data: Path, tmp_path: Path) -> None:
    train, test = (
        Source(path=str(shared_data / "e2e_nlg" / name), **E2E)
        for name in ("devset.csv", "testset_w_refs.csv")
    )
    found = prepared(tmp_path, train.model_copy(update={"limit": 50}), evaluation=[test])
    assert len(found.evaluation) == 4693
    assert len(found.prompts) == 630
    assert sum(len(prompt.reference) for prompt in found.prompts) == 4693
    assert found.prompts[0].reference[0] == (
        "A coffee shop in the city centre area called Blue Spice."
    )


def test_reviews_with_replacement_characters_are_text_like_any(
    shared_data: Path, tmp_path: Path
) -> None:
    path = shared_data / "amazon_multidomain" / "books.train.jsonl"
    assert "\ufffd" in path.read_text(encoding="utf-8")
    report = prepared(tmp_path, Source(path=str(path)), max_length=4096).train_report
    assert report.bad == 0


def test_files_in_no_known_layout_show_their_keys(shared_data: Path) -> None:
    located = locate(Source(path=str(shared_data / "self_instruct" / "seed_tasks.jsonl")))
    with pytest.raises(DataError, match="no known format has the keys id, name, instruction, inst"):
        layout_of(located)


def test_a_file_without_a_header_is_refused(shared_data: Path) -> None:
    located = locate(Source(path=str(shared_data / "glue_cola" / "dev.tsv")))
    with pytest.raises(DataError, match="the first line has to name the columns"):
        next(read(located))


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("llamafactory_demos/glaive_toolcall_en_demo.json", {"limit": 60}),
        ("llamafactory_demos/kto_en_demo.json", {"limit": 30}),
        ("alpaca_zh/train.jsonl", {"limit": 60}),
        ("e2e_nlg/devset.csv", E2E | {"limit": 60}),
    ],
)
def test_with_a_real_tokenizer_marked_and_unmarked_templates_give_one_mask(
    shared_data: Path, path: str, settings: dict
) -> None:
    marked = load_tokenizer(ModelSettings())
    unmarked = load_tokenizer(ModelSettings())
    unmarked.chat_template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", marked.chat_template)
    located = locate(Source(path=str(shared_data / path), **settings))
    layout = layout_of(located)
    one, two = Renderer(marked), Renderer(unmarked)
    for raw in read(located):
        assert isinstance(raw, RawRow)
        sample = layout.convert(raw.values)
        first, second = one.row(sample), two.row(sample)
        assert np.array_equal(first.input_ids, second.input_ids), raw.place
        assert np.array_equal(first.supervised, second.supervised), raw.place
        ends = np.flatnonzero(first.supervised & ~np.append(first.supervised[1:], False))
        assert (first.input_ids[ends] == marked.eos_token_id).all()
        assert len(ends) == sum(m["role"] == "assistant" for m in sample.messages)
        own = marked.apply_chat_template(
            list(sample.messages), tools=list(sample.tools or ()) or None, return_dict=True
        )
        assert first.input_ids.tolist() == own["input_ids"]


@pytest.mark.zoo
def test_the_zoo_s_sentences_become_questions_with_labels(tmp_path: Path) -> None:
    source = Source(
        path="sentiment-4-domains/movie-polarity", prompt="Review: {text}", completion="{label}"
    )
    found = prepared(tmp_path, source, evaluation=[source.model_copy(update={"split": "test"})])
    assert len(found.examples) == 400
    assert {example.reference[0] for example in found.examples} == {"positive", "negative"}
    assert found.evaluation_report.also_in_training == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_a_data_set_come_by_their_names(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    kinds, tags = (
        datasets.ClassLabel(names=["neg", "pos"]),
        datasets.ClassLabel(names=["O", "B-LOC"]),
    )
    features = {
        "text": datasets.Value("string"),
        "label": kinds,
        "tags": datasets.Sequence(tags),
        "votes": datasets.Value("int64"),
    }
    columns = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    rows = datasets.Dataset.from_dict(
        columns | {"votes": [1, 0, 1]}, features=datasets.Features(features)
    )
    made = rows.to_iterable_dataset() if streaming else rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    found = [row.value for row in read_hub(Source(path="some/set"), streaming=streaming)]
    assert found[0] == {"text": "a", "label": "pos", "tags": ["O", "B-LOC"], "votes": 1}
    assert found[1] == {"text": "b", "label": "neg", "tags": [], "votes": 0}
    assert found[2].get("label") is None


def test_a_data_set_of_the_datasets_library_is_read_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", exchanges(5))
    source = Source(path=str(tmp_path / "set"))
    for streaming in (False, True):
        rows = list(read_hub(source, 2, streaming=streaming))
        assert [row.row for row in rows] == [3, 4, 5]
        assert [row.value for row in rows] == exchanges(5)[2:]
    assert fingerprint(source) == fingerprint(source)
    with pytest.raises(DataError, match=r"split 'nosuch': .*nosuch"):
        list(read_hub(Source(path=str(tmp_path / "set"), split="nosuch")))
