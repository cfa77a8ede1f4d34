"""`tunesmith inspect`: what a trained adapter is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tiny import tiny_llama
from tunesmith import DataSettings, EngineSettings, ModelSettings, Run, Source, TrainSettings
from tunesmith.cli import main
from tunesmith.methods import (
    AdaLoRA,
    DiffPruning,
    LastLayer,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    VeRA,
)
from tunesmith.methods.adalora import AdaLoraAttachment
from tunesmith.methods.contract import Method
from tunesmith.methods.diff_pruning import DiffPruningAttachment
from tunesmith.methods.tuned import TunedModel, attach
from tunesmith.models.loading import load_model

Save = Callable[..., tuple[TunedModel, str]]


@pytest.fixture
def save(tiny_model: Path, tmp_path: Path) -> Save:
    """Attach methods to the saved tiny model, change them as training would, and save them."""

    def make(
        *methods: Method, change: Callable[[TunedModel], Any] | None = None
    ) -> tuple[TunedModel, str]:
        model = load_model(str(tiny_model), dtype=torch.float32).model
        tuned = attach(model, *methods, name="mine")
        with torch.no_grad():
            for parameter in tuned.trainable().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if change is not None:
            change(tuned)
        tuned.save(tmp_path / "adapter")
        return tuned, str(tmp_path / "adapter")

    return make


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def inspected(capsys: pytest.CaptureFixture[str], path: str) -> dict[str, Any]:
    """The only adapter that the command finds."""
    (adapter,) = json.loads(said(capsys, "inspect", "--json", path))["adapters"]
    return adapter


def test_the_files_are_described(
    capsys: pytest.CaptureFixture[str], save: Save, tiny_model: Path
) -> None:
    _, path = save(LoRA(rank=4, targets=["attention.q"]))
    found = inspected(capsys, path)
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    assert found["name"] == "mine"
    assert found["method"]["name"] == "lora"
    assert found["base"] == str(tiny_model)
    assert found["parameters"] == sum(t.numel() for t in tensors.values()) == 2 * 4 * (32 + 32)
    assert found["bytes_on_disk"] == sum(f.stat().st_size for f in Path(path).iterdir())
    (A, B) = found["tensors"]
    assert A["pattern"] == "base_model.model.model.layers.*.self_attn.q_proj.lora_A.weight"
    assert (A["shape"], A["dtype"], A["count"]) == ([4, 32], "float32", 2)
    assert B["shape"] == [32, 4]


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=4), LoRA(rank=2, init="pissa"), VeRA(rank=8), AdaLoRA(rank=4, target_rank=2)],
)
def test_norms_are_those_of_what_merging_adds(
    method: Method, capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    tuned, path = save(method)
    norms = inspected(capsys, path)["inside"]["delta_norms"]
    before = {n: p.detach().double().clone() for n, p in tuned.model.named_parameters()}
    with tuned.merged() as model:
        assert len(norms) == 14
        for module, norm in norms.items():
            name = f"{module}.weight"
            expected = (model.get_parameter(name).double() - before[name]).norm()
            # the merged weight is rounded to float32, and the difference is small beside it
            assert norm == pytest.approx(float(expected.detach()), rel=1e-3)


def test_an_adapter_with_weights_that_are_not_finite_is_told_in_json(
    capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    def spoil(tuned: TunedModel) -> None:
        with torch.no_grad():
            for name, parameter in tuned.trainable().items():
                parameter.fill_(torch.nan if "layers.1" in name else 1.0)

    _, path = save(LoRA(rank=2, targets=["attention.q"]), change=spoil)
    found = json.loads(said(capsys, "inspect", "--json", path), parse_constant=pytest.fail)
    norms = found["adapters"][0]["inside"]["delta_norms"]
    assert norms["model.layers.0.self_attn.q_proj"] > 0
    assert norms["model.layers.1.self_attn.q_proj"] is None


def test_ranks_that_adalora_kept_are_shown(capsys: pytest.CaptureFixture[str], save: Save) -> None:
    def drop(tuned: TunedModel) -> None:
        attachment = tuned.attachments[0]
        assert isinstance(attachment, AdaLoraAttachment)
        kept: dict[str, Any] = {path: [True] * 4 for path in attachment.triplets}
        kept["model.layers.1.self_attn.v_proj"] = [False, True, False, False]
        attachment.load_extra_state(attachment.extra_state() | {"kept": kept})
        attachment._drop()

    _, path = save(AdaLoRA(rank=4, target_rank=2), change=drop)
    ranks = inspected(capsys, path)["inside"]["ranks"]
    assert ranks.pop("model.layers.1.self_attn.v_proj") == 1
    assert set(ranks.values()) == {4}
    assert "ranks kept" in said(capsys, "inspect", path)


def test_the_share_that_diff_pruning_changed_is_shown(
    capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    def project(tuned: TunedModel) -> None:
        attachment = tuned.attachments[0]
        assert isinstance(attachment, DiffPruningAttachment)
        attachment.project()

    _, path = save(DiffPruning(sparsity=0.02), change=project)
    share = inspected(capsys, path)["inside"]["changed_share"]
    assert share == pytest.approx(0.02, rel=1e-2)
    assert f"changed     {share:.3%} of the elements" in said(capsys, "inspect", path)


@pytest.mark.parametrize("method", [PromptTuning(tokens=3), PTuning(tokens=3)])
def test_the_nearest_tokens_of_a_prompt_are_shown_as_text(
    method: Method, capsys: pytest.CaptureFixture[str], save: Save, tiny_model: Path
) -> None:
    tuned, path = save(method)
    model, tokenizer = load_model(str(tiny_model))
    embedding = model.get_input_embeddings().weight.detach().double()
    rows = tuned.attachments[0].prompt.final().double()  # type: ignore[attr-defined]
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], embedding[None], dim=-1)
    near = inspected(capsys, path)["inside"]["nearest_tokens"]
    assert [len(row) for row in near] == [3, 3, 3]
    for row, expected in zip(near, cosine, strict=True):
        assert row[0]["id"] == int(expected.argmax())
        assert row[0]["text"] == tokenizer.decode([row[0]["id"]])
        assert [token["cosine"] for token in row] == pytest.approx(
            expected.topk(3).values.tolist(), abs=1e-5
        )
    shown = said(capsys, "inspect", "--tokens", "1", path)
    assert f"{near[0][0]['text']!r} {near[0][0]['cosine']:.2f}" in shown


@pytest.mark.parametrize("method", [PrefixTuning(length=3), PTuningV2(length=3)])
def test_lengths_of_a_prefix_are_shown(
    method: Method, capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    tuned, path = save(method)
    norms = inspected(capsys, path)["inside"]["prefix_norms"]
    assert len(norms) == 2
    state = {n: t for n, t in tuned.state_dict().items() if "layers.1" in n}
    (keys,) = [t for n, t in state.items() if n.endswith(".K")]
    (values,) = [t for n, t in state.items() if n.endswith(".V")]
    expected = [float(x.norm(dim=-1).mean()) for x in (keys, values)]
    assert norms["model.layers.1.self_attn"] == pytest.approx(expected, rel=1e-5)
    assert "mean length in a prefix" in said(capsys, "inspect", path)


def test_several_methods_are_inspected_one_by_one(
    capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    _, path = save(LoRA(rank=2, targets=["attention.q"]), PTuningV2(length=2))
    found = json.loads(said(capsys, "inspect", "--json", path))["adapters"]
    by_method = {adapter["method"]["name"]: adapter["inside"] for adapter in found}
    assert by_method["lora"]["delta_norms"]
    assert not by_method["lora"]["prefix_norms"]
    assert by_method["p_tuning_v2"]["prefix_norms"]
    assert not by_method["p_tuning_v2"]["delta_norms"]


def test_what_has_no_inside_of_its_own_is_described_by_its_files(
    capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    _, path = save(LastLayer())
    shown = said(capsys, "inspect", path)
    assert "adapter 'mine', last_layer" in shown
    assert "model.norm.weight (32) float32" in shown


def test_the_table_has_a_line_a_block(capsys: pytest.CaptureFixture[str], save: Save) -> None:
    _, path = save(LoRA(rank=2, targets=["attention.q"]))
    norms = inspected(capsys, path)["inside"]["delta_norms"]
    lines = [
        " ".join(line.replace("│", " ").split())
        for line in said(capsys, "inspect", path).splitlines()
    ]
    for layer in (0, 1):
        norm = norms[f"model.layers.{layer}.self_attn.q_proj"]
        assert f"model.layers.{layer} {norm:.3g}" in lines


def test_without_its_base_only_the_files_are_described(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tiny_llama()
    model.name_or_path = "./gone"
    attach(model, LoRA(rank=2)).save(tmp_path / "a")
    shown = said(capsys, "inspect", str(tmp_path / "a"))
    assert shown.startswith("only the files are described, not what is in them: model.name: ")
    assert "adapter 'default', lora" in shown
    found = json.loads(said(capsys, "inspect", "--json", str(tmp_path / "a")))
    assert found["adapters"][0]["inside"] is None
    assert "gone" in found["missing_base"]


def test_another_place_of_the_base_can_be_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    model = tiny_llama()
    model.name_or_path = "./gone"
    attach(model, LoRA(rank=2)).save(tmp_path / "a")
    shown = said(capsys, "inspect", str(tmp_path / "a"), "--base", str(tiny_model))
    assert "norm of the change of each weight" in shown


def chained(folder: Path, model: Path, method: Method) -> tuple[Path, Path]:
    """Train a LoRA, and `method` on the base with it merged in; return both run directories."""
    rows = folder / "rows.jsonl"
    texts = ({"prompt": f"Say {n}", "completion": "yes" * n} for n in range(1, 9))
    rows.write_text("\n".join(map(json.dumps, texts)))
    found: list[Path] = []
    for name, trained in (("first", LoRA(rank=2)), ("second", method)):
        adapter = str(found[0]) if found else None
        run = Run(
            name=name,
            output=str(folder / "runs"),
            model=ModelSettings(name=str(model), dtype="float32", adapter=adapter),
            method=trained,
            data=DataSettings(train=[Source(path=str(rows))], max_length=96),
            train=TrainSettings(max_steps=1, batch_size=4, learning_rate=1e-2),
            engine=EngineSettings(device="cpu"),
        )
        found.append(tunesmith.train(run).directory.path)
    return found[0], found[1]


def test_a_run_that_starts_from_another_is_inspected_on_its_own_base(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    first, second = chained(tmp_path, tiny_model, LoRA(rank=4, targets=["attention.q"]))
    capsys.readouterr()
    own = tunesmith.load_run(second).tuned
    for path in (second, second / "adapter"):
        found = json.loads(said(capsys, "inspect", "--json", str(path)))
        (adapter,) = found["adapters"]
        assert (found["starts_from"], found["missing_base"]) == (str(first), None)
        assert adapter["parameters"] == sum(t.numel() for t in own.trainable().values())
        norms = adapter["inside"]["delta_norms"]
        assert list(norms) == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
        assert all(norm > 0 for norm in norms.values())
    shown = said(capsys, "inspect", str(second))
    assert f"starts from {first}, whose adapter was merged into the base" in shown
    assert "only the files" not in shown


def test_a_prompt_on_another_runs_result_is_shown_in_the_tokens_of_the_base(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    _, second = chained(tmp_path, tiny_model, PromptTuning(tokens=3))
    capsys.readouterr()
    near = inspected(capsys, str(second))["inside"]["nearest_tokens"]
    assert [len(row) for row in near] == [3, 3, 3]


def test_a_chain_that_was_moved_is_inspected_where_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    old, new = tmp_path / "server", tmp_path / "laptop"
    old.mkdir()
    chained(old, tiny_model, LoRA(rank=2))
    capsys.readouterr()
    old.rename(new)
    found = json.loads(said(capsys, "inspect", "--json", str(new / "runs" / "second")))
    assert found["starts_from"] == str(new / "runs" / "first")
    assert found["adapters"][0]["inside"]["delta_norms"]


def test_where_the_run_it_starts_from_changed_or_is_gone_only_the_files_are_described(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    first, second = chained(tmp_path, tiny_model, LoRA(rank=2))
    capsys.readouterr()
    weights = first / "adapter" / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights)
    shown = said(capsys, "inspect", str(second))
    assert f"model.adapter: {first} is not what the run started from" in shown
    assert "adapter 'default', lora" in shown
    shutil.rmtree(first)
    shown = said(capsys, "inspect", str(second))
    assert f"model.adapter: {first} holds no adapter" in shown
    assert f"starts from {first}" in shown
    assert "adapter 'default', lora" in shown


def test_a_run_directory_tells_what_its_run_found(
    capsys: pytest.CaptureFixture[str], save: Save, tmp_path: Path, tiny_model: Path
) -> None:
    save(LoRA(rank=2))
    run = {"name": "x", "model": {"name": str(tiny_model)}, "data": {"train": [{"path": "rows"}]}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    gates = {"model.layers.0": {"lora": 0.75, "adapter": 0.25}}
    (tmp_path / "summary.json").write_text(json.dumps({"gates": gates, "steps": 3}))
    found = json.loads(said(capsys, "inspect", "--json", str(tmp_path)))
    assert found["findings"] == {"gates": gates}
    assert found["adapters"][0]["inside"]["delta_norms"]
    assert '"lora": 0.75' in said(capsys, "inspect", str(tmp_path))


def test_what_holds_no_adapter_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for prepare, words in (
        (lambda: None, "holds no adapter"),
        (lambda: (tmp_path / "run.yaml").write_text("name: x\n"), "it is not finished"),
    ):
        prepare()
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", str(tmp_path)])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
