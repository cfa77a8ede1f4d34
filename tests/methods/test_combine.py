"""Combinations of LoRA adapters against plain formulas of their deltas, and against PEFT."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError
from tunesmith.methods import IA3, LoRA, PromptTuning
from tunesmith.methods.combine import drop
from tunesmith.methods.lora import LoraAttachment
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
A = LoRA(rank=4)
B = LoRA(rank=2, alpha=3, rslora=True, targets=["attention.q", "attention.v", "mlp.down"])
C = LoRA(rank=3, targets=["attention.k", "mlp.down"])


@pytest.fixture
def tuned(model: PreTrainedModel, trained: Trained) -> TunedModel:
    """A model with three adapters of unlike ranks, scales and sites."""
    tuned = TunedModel(model)
    for name, method in (("a", A), ("b", B), ("c", C)):
        attach(tuned, method, name=name)
    return trained(tuned)


def deltas(tuned: TunedModel, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight (out, in), in float64, from its A and B."""
    (attachment,) = [part.attachment for part in tuned.parts if part.name == name]
    assert isinstance(attachment, LoraAttachment)
    found = {}
    for path, pair in attachment.pairs.items():
        delta = pair.scale * pair.B.detach().double() @ pair.A.detach().double()
        whole = torch.zeros(pair.place.out_features, delta.shape[1], dtype=torch.float64)
        rows = torch.arange(len(whole)) if pair.columns is None else pair.columns
        found[path] = whole.index_copy(0, rows, delta)
    return found


def nearest(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(delta)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def weighted(tuned: TunedModel, weights: dict[str, float]) -> dict[str, list[tuple[Tensor, float]]]:
    """The deltas and weights of each module."""
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for name, weight in weights.items():
        for path, delta in deltas(tuned, name).items():
            found.setdefault(path, []).append((delta, weight))
    return found


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1, "b": -0.5, "c": 2}])
@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_is_the_weighted_sum_of_the_deltas(
    method: str, weights: dict[str, float], tuned: TunedModel
) -> None:
    assert tuned.combine(weights, name="ab", method=method) == 1.0
    found = deltas(tuned, "ab")
    for path, parts in weighted(tuned, weights).items():
        expected = sum(weight * delta for delta, weight in parts)
        torch.testing.assert_close(found.pop(path), expected, atol=1e-6, rtol=1e-5)
    assert found == {}


@pytest.mark.parametrize("rank", [None, 1, 5])
def test_svd_is_the_nearest_of_its_rank(rank: int | None, tuned: TunedModel) -> None:
    weights = {"a": 0.7, "b": -0.3}
    kept = tuned.combine(weights, name="ab", method="svd", rank=rank)
    found, before, after = deltas(tuned, "ab"), 0.0, 0.0
    for path, parts in weighted(tuned, weights).items():
        total = sum(weight * delta for delta, weight in parts)
        # without a rank, the largest of the adapters in that module: a reaches them all
        expected = nearest(total, rank or 4)
        torch.testing.assert_close(found[path], expected, atol=1e-5, rtol=1e-4)
        before, after = before + total.norm() ** 2, after + expected.norm() ** 2
    assert kept == pytest.approx(float(after / before), rel=1e-5)


def ties(parts: list[tuple[Tensor, float]], density: float) -> Tensor:
    """Yadav et al. 2023, algorithm 1, element by element."""
    trimmed = []
    for delta, _ in parts:
        count = int(density * delta.numel())
        smallest = delta.abs().flatten().sort(descending=True).values[count - 1]
        trimmed.append(torch.where(delta.abs() >= smallest, delta, 0.0))
    result = torch.zeros_like(trimmed[0])
    for place in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        values = [float(delta[tuple(place)]) for delta in trimmed]
        positive = sum(v for v in values if v > 0)
        negative = -sum(v for v in values if v < 0)
        sign = 1 if positive >= negative else -1
        agree = [weight * v for v, (_, weight) in zip(values, parts, strict=True) if v * sign > 0]
        result[tuple(place)] = sum(agree) / len(agree) if agree else 0.0
    return result


def test_ties_trims_elects_and_averages(trained: Trained) -> None:
    weights = {"a": 0.7, "b": 0.6, "c": 1.2}
    tuned = TunedModel(tiny_llama())
    for name, method in (("a", A), ("b", B), ("c", C)):
        attach(tuned, method, name=name)
    trained(tuned)
    tuned.combine(weights, name="t", method="ties", density=0.3, rank=32)  # nothing is cut
    found = deltas(tuned, "t")
    parts = weighted(tuned, weights)
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        expected = ties(parts[path], 0.3)
        torch.testing.assert_close(found[path], expected, atol=1e-5, rtol=1e-4)


def test_a_negative_weight_in_ties_is_the_negated_adapter(tuned: TunedModel) -> None:
    tuned.combine({"a": -1.0}, name="n", method="linear")
    tuned.combine({"n": 0.5, "b": 1.0}, name="x", method="ties", density=0.4)
    tuned.combine({"a": -0.5, "b": 1.0}, name="y", method="ties", density=0.4)
    for path, delta in deltas(tuned, "x").items():
        torch.testing.assert_close(deltas(tuned, "y")[path], delta, atol=1e-5, rtol=1e-4)


def test_dare_drops_at_random_and_rescales_the_rest() -> None:
    delta = torch.randn(300, 200, dtype=torch.float64)
    dropped = drop(delta, 0.25, torch.Generator().manual_seed(1))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], delta[kept] / 0.25)
    # 60,000 draws: within five standard deviations of the share
    assert abs(kept.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 60_000) ** 0.5
    again = drop(delta, 0.25, torch.Generator().manual_seed(1))
    assert torch.equal(again, dropped)
    assert not torch.equal(drop(delta, 0.25, torch.Generator().manual_seed(2)), dropped)


def test_dare_that_keeps_all_is_svd_and_ties(tuned: TunedModel) -> None:
    weights = {"a": 0.7, "b": 0.3}
    for dare, plain, more in (("dare_linear", "svd", {}), ("dare_ties", "ties", {"density": 1.0})):
        tuned.combine(weights, name=f"{dare}_", method=dare, density=1.0, rank=6)
        tuned.combine(weights, name=f"{plain}_", method=plain, rank=6, **more)
        expected = deltas(tuned, f"{plain}_")
        for path, delta in deltas(tuned, f"{dare}_").items():
            torch.testing.assert_close(delta, expected[path], atol=1e-5, rtol=1e-4)


def test_the_seed_decides_dare(tuned: TunedModel) -> None:
    for name, seed in (("x", 3), ("y", 3), ("z", 4)):
        tuned.combine({"a": 1, "b": 1}, name=name, method="dare_ties", density=0.5, seed=seed)
    x, y, z = (deltas(tuned, name) for name in ("x", "y", "z"))
    assert all(torch.equal(delta, y[path]) for path, delta in x.items())
    assert not any(torch.equal(delta, z[path]) for path, delta in x.items())


def test_dare_of_each_adapter_is_its_own_draw(trained: Trained) -> None:
    tuned = trained(attach(tiny_llama(), LoRA(rank=2), name="a"))
    attach(tuned, LoRA(rank=2), name="b")
    tuned.load_state_dict(
        {n: tuned.state_dict()[n.replace("lora_b", "lora_a")] for n in tuned.state_dict()}
    )
    # a - b = 0 unless each drops elements of its own
    tuned.combine({"a": 1, "b": -1}, name="d", method="dare_linear", density=0.5)
    assert all(delta.any() for delta in deltas(tuned, "d").values())


@pytest.mark.parametrize("ours", ["cat", "svd", "ties"])
def test_the_same_as_peft(ours: str, trained: Trained, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    weights, extra = {"a": 0.7, "b": 0.4}, {"density": 0.5} if ours == "ties" else {}
    for name, method in (("a", A), ("b", LoRA(rank=2, alpha=3))):
        tuned = trained(attach(tiny_gpt2(), method))
        tuned.export_peft(tmp_path / name)
    torch.manual_seed(0)
    tuned = load_adapter(tiny_gpt2(), tmp_path / "a", name="a")
    tuned.load_adapter("b", tmp_path / "b")
    rank = {} if ours == "cat" else {"rank": 5}
    tuned.combine(weights, name="ab", method=ours, **rank, **extra)  # type: ignore[arg-type]

    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    kind = {"cat": "cat", "svd": "svd", "ties": "ties_svd"}[ours]
    theirs.add_weighted_adapter(
        ["a", "b"], list(weights.values()), "ab", combination_type=kind, svd_rank=5, **extra
    )
    found = deltas(tuned, "ab")
    for path, delta in found.items():
        layer = theirs.base_model.model.get_submodule(path)
        expected = layer.get_delta_weight("ab").T.double()  # a Conv1D stores (in, out)
        torch.testing.assert_close(delta, expected.detach(), atol=1e-5, rtol=1e-4)


def test_the_combination_is_off_and_frozen_until_asked_for(
    tuned: TunedModel, input_ids: Tensor
) -> None:
    before, trainable = tuned.model(input_ids).logits, tuned.trainable().keys()
    tuned.combine({"a": 1, "b": 1, "c": 1}, name="all")
    assert torch.equal(tuned.model(input_ids).logits, before)
    assert tuned.trainable().keys() == trainable
    tuned.use("all")
    # the deltas in one sum in place of three
    torch.testing.assert_close(tuned.model(input_ids).logits, before, atol=1e-5, rtol=1e-5)


def test_an_adapter_and_its_negation_are_the_base(tuned: TunedModel, input_ids: Tensor) -> None:
    tuned.use(None)
    base = tuned.model(input_ids).logits
    tuned.combine({"a": -1.0}, name="forgotten")
    tuned.use(["a", "forgotten"])
    torch.testing.assert_close(tuned.model(input_ids).logits, base, atol=1e-5, rtol=1e-5)
    tuned.combine({"a": 1.0, "forgotten": 1.0}, name="nothing")
    tuned.use("nothing")
    torch.testing.assert_close(tuned.model(input_ids).logits, base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_is_a_part_of_the_weight_counts_as_trained_change_only(
    init: str, model: PreTrainedModel, trained: Trained, input_ids: Tensor
) -> None:
    tuned = trained(attach(model, LoRA(rank=2, init=init), name="a"))  # type: ignore[arg-type]
    expected = model(input_ids).logits
    tuned.combine({"a": 1.0}, name="b")
    tuned.use("b")
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_combination_is_saved_merged_and_loaded_like_any_lora(
    method: str, tuned: TunedModel, input_ids: Tensor, tmp_path: Path
) -> None:
    model = tuned.model
    tuned.combine({"b": 0.7, "c": 0.3}, name="bc", method=method)  # type: ignore[arg-type]
    tuned.use("bc")
    expected = model(input_ids).logits
    with tuned.merged():
        torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
    tuned.save(tmp_path / "bc", "bc")
    load_adapter(tuned.detach(), tmp_path / "bc")
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (IA3(), "is ia3, whose effect is no sum of low-rank deltas"),
        (PromptTuning(tokens=2), "is prompt_tuning"),
        (LoRA(rank=2, dora=True), "is DoRA"),
        (LoRA(rank=2, bias="all"), "has biases"),
    ],
    ids=["ia3", "prompt", "dora", "bias"],
)
def test_what_is_no_plain_lora_is_refused(method: object, words: str) -> None:
    tuned = attach(attach(tiny_gpt2(), A, name="a"), method, name="b")  # type: ignore[arg-type]
    names = list(tuned.model.state_dict())
    with pytest.raises(MethodError, match=words):
        tuned.combine({"a": 1, "b": 1}, name="ab")
    assert list(tuned.model.state_dict()) == names


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "mean"}, "'mean' is no method; use linear, cat, svd"),
        ({"density": 0.5}, "density has no effect on linear"),
        ({"method": "ties", "density": 0.0}, "density 0.0 is no share"),
        ({"rank": 3}, "rank has no effect"),
        ({"method": "svd", "rank": 0}, "rank 0 is none"),
        ({"name": "b"}, "named 'b' is already attached"),
        ({"weights": {"x": 1}}, "no adapter is named 'x'"),
        ({"weights": {}}, "there are no adapters"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    settings: dict[str, object], words: str, tuned: TunedModel
) -> None:
    asked = {"weights": {"a": 1.0, "b": 1.0}, "name": "new"} | settings
    with pytest.raises(MethodError, match=words):
        tuned.combine(**asked)  # type: ignore[arg-type]
    assert tuned.adapters == ["a", "b", "c"]
