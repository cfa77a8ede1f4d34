"""The code on docs/adapters.md runs as it stands, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch

import tunesmith
from tunesmith.methods.tuned import TunedModel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


def test_the_code_on_the_page_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    code = "\n".join(blocks)
    assert code.count("smollm2-135m-instruct") == 1
    names: dict[str, object] = {}
    exec(code.replace("smollm2-135m-instruct", str(tiny_model)), names)
    tuned = names["tuned"]
    assert isinstance(tuned, TunedModel)
    assert tuned.adapters == ["formal", "brief", "both", "less_brief", "ties"]
    assert [part.attachment.enabled for part in tuned.parts] == [False, False, True, False, False]
    assert names["replies"].shape == (3, names["logits"].shape[1] + 8)  # type: ignore[attr-defined]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "brief",
        "formal",
        "new",
        "polite",
    ]


def test_what_the_page_promises_of_rows_holds(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = tunesmith.load_model(str(tiny_model), dtype=torch.float32)
    tuned = tunesmith.attach(model, tunesmith.LoRA(rank=4), name="formal")
    tunesmith.attach(tuned, tunesmith.PrefixTuning(length=8), name="polite")
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer.padding_side = "left"
    texts = ["Good morning", "Where is the station?", "Hi"]
    names = ["formal", None, ["formal", "polite"]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with tuned.rows(names):
        together = model(**batch).logits
    for text, name, row in zip(texts, names, together, strict=True):
        tuned.use(name)
        alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(row[-len(alone) :], alone, atol=1e-5, rtol=1e-5)
