"""The preference and reward objectives over batches of a tiny model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny import tiny_llama
from tunesmith.data.pairs import PairRow
from tunesmith.data.pairs_collate import JudgedCollator
from tunesmith.models.attention import enable_segments
from tunesmith.objectives.log_probs import reply_log_probs
from tunesmith.objectives.preference import Preference
from tunesmith.objectives.reward import Reward
from tunesmith.types import Batch

PAD = 2


def row(number: int, *sizes: tuple[int, int], good: bool | None = None) -> PairRow:
    """Replies given as (prompt tokens, reply tokens), each better than those after it."""
    drawn = np.random.default_rng(number)
    lengths = [prompt + reply for prompt, reply in sizes]
    ids = drawn.integers(3, 250, sum(lengths)).astype(np.int32)
    supervised = np.concatenate([np.arange(p + r) >= p for p, r in sizes])
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes))]
    if good is not None:
        pairs = []
    return PairRow(
        ids,
        supervised,
        tuple(lengths),
        tuple(i for i, _ in pairs),
        tuple(j for _, j in pairs),
        tuple(float(j - i) for i, j in pairs),
        good,
        None,
        (),
        f"row {number}",
    )


PAIRS = [row(0, (3, 4), (3, 2)), row(1, (5, 1), (5, 7)), row(2, (2, 3), (2, 3), (2, 5))]
LABELS = [row(4, (3, 4), (3, 2), good=True), row(5, (4, 2), (4, 6), good=False)]


def padded(rows: list[PairRow]) -> Batch:
    return JudgedCollator(PAD, "right")(rows)


def plain_log_probs(model: torch.nn.Module, rows: list[PairRow]) -> Tensor:
    """log p of each reply in float64, one at a time, out of the whole logits."""
    found = []
    for one in rows:
        start = 0
        for size in one.segments:
            ids = torch.from_numpy(one.input_ids[start : start + size].astype("int64"))[None]
            wanted = torch.from_numpy(one.supervised[start : start + size])
            logits = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
            picked = logits.gather(-1, ids[0, 1:, None])[:, 0]
            found.append(picked[wanted[1:]].sum())
            start += size
    return torch.stack(found)


@pytest.mark.parametrize("padding", ["free", "right"])
def test_log_probs_of_replies_are_those_of_the_whole_logits(padding: str) -> None:
    model = tiny_llama()
    expected = plain_log_probs(model, PAIRS).detach()
    if padding == "free":
        assert enable_segments(model)
    found = reply_log_probs(model, JudgedCollator(PAD, padding)(PAIRS))
    torch.testing.assert_close(found.sums.double(), expected, atol=1e-4, rtol=1e-5)
    assert found.lengths.tolist() == [4, 2, 1, 7, 3, 3, 5]


def test_dpo_is_its_formula_in_float64_and_a_ranking_counts_as_one_prompt() -> None:
    model = tiny_llama()
    batch = padded(PAIRS)
    log_p = plain_log_probs(model, PAIRS).detach()
    reference = log_p + torch.linspace(-1, 1, len(log_p)).double()
    terms = Preference(beta=0.5).loss(model, batch | {"reference": reference.float()})
    ratio = (log_p - reference).tolist()

    def loss(w: int, l: int) -> float:  # noqa: E741
        return math.log1p(math.exp(-0.5 * (ratio[w] - ratio[l])))

    expected = loss(0, 1) + loss(2, 3) + (loss(4, 5) + loss(4, 6) + loss(5, 6)) / 3
    assert terms.count == 3
    assert terms.total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo", "hinge"])
def test_where_policy_is_reference_the_loss_is_known_and_the_margin_zero(loss: str) -> None:
    model, objective = tiny_llama(), Preference(loss=loss)
    batch = padded(PAIRS)
    batch["reference"] = objective.log_probs(model, batch).detach()
    terms = objective.loss(model, batch)
    known = {"sigmoid": math.log(2), "robust": math.log(2), "ipo": 25.0, "hinge": 1.0}[loss]
    assert terms.total.item() / terms.count == pytest.approx(known, rel=1e-6)
    assert objective.loss_at_reference == pytest.approx(known, rel=1e-6)
    assert terms.metrics["reward_margin"].item() == 0.0


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "orpo", "simpo", "cpo", "hinge", "robust"])
def test_accumulation_changes_neither_loss_nor_gradient(loss: str) -> None:
    model, objective = tiny_llama(), Preference(loss=loss, chosen_weight=0.3, weighting="wpo")
    reference = torch.linspace(-9, -40, 7)

    def gradient(batches: list[list[PairRow]]) -> tuple[float, Tensor]:
        model.zero_grad()
        total, count, start = 0.0, 0.0, 0
        for rows in batches:
            batch = padded(rows)
            if objective.needs_reference:
                stop = start + len(batch["input_ids"])
                batch["reference"], start = reference[start:stop], stop
            terms = objective.loss(model, batch)
            terms.total.backward()
            total, count = total + terms.total.item(), count + terms.count
        return total / count, model.model.layers[0].mlp.up_proj.weight.grad / count

    whole, split = gradient([PAIRS]), gradient([PAIRS[:1], PAIRS[1:]])
    assert whole[0] == pytest.approx(split[0], rel=1e-5)
    torch.testing.assert_close(whole[1], split[1], atol=1e-6, rtol=1e-4)
    assert whole[1].abs().max() > 0


def test_kto_is_the_same_however_a_batch_is_split_once_its_parts_share_z0() -> None:
    model, objective = tiny_llama(), Preference(loss="kto", beta=0.5)
    shift = torch.tensor([0.5, -3.0, -0.5, 1.0])
    batches = [padded(LABELS), padded(LABELS[:1]), padded(LABELS[1:])]
    for batch, moved in zip(batches, (shift, shift[:2], shift[2:]), strict=True):
        batch["reference"] = objective.log_probs(model, batch).detach() + moved
    whole, *parts = batches
    apart = sum(objective.loss(model, part).total for part in parts)
    expected = objective.loss(model, whole)
    assert not torch.isclose(apart, expected.total, atol=1e-3)

    tell = objective.common()
    assert tell is not None
    seen = [objective.loss(model, part).metrics["mismatched_log_ratio"].item() for part in parts]
    common = tell({"mismatched_log_ratio": sum(seen) / len(LABELS)})
    assert common["z0"].item() == pytest.approx(1.0, abs=1e-5)
    told = [objective.loss(model, part | common) for part in parts]
    torch.testing.assert_close(sum(terms.total for terms in told), expected.total)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(sum(terms.metrics[name] for terms in told), value)


def test_losses_of_pairs_need_to_know_of_no_other_batch() -> None:
    assert Preference().common() is None


@pytest.mark.parametrize("good", [True, False])
def test_kto_trains_on_only_good_or_only_bad_rows(good: bool) -> None:
    model, objective = tiny_llama(), Preference(loss="kto", desirable_weight=2.0)
    rows = [replace(one, good=good) for one in LABELS]
    batch = padded(rows)
    batch["reference"] = objective.log_probs(model, batch).detach()
    terms = objective.loss(model, batch)
    assert terms.count == 2
    assert terms.total.item() == pytest.approx(2 * (1.0 if good else 0.5))
    terms.total.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_a_mismatched_reply_moves_the_reference_point_but_gets_no_gradient() -> None:
    model, objective = tiny_llama(), Preference(loss="kto", beta=0.5)
    batch = padded(LABELS)
    log_p = objective.log_probs(model, batch).detach()
    shift = torch.tensor([0.0, -3.0, 0.0, -1.0])  # so that z0 is (3 + 1) / 2
    terms = objective.loss(model, batch | {"reference": log_p + shift})
    expected = (1 - 1 / (1 + math.exp(1.0))) + (1 - 1 / (1 + math.exp(-1.0)))
    assert terms.total.item() == pytest.approx(expected, rel=1e-5)
    assert terms.metrics["kl"].item() / terms.count == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": "simpo", "length_normalised": False}, "length_normalised"),
        ({"loss": "kto", "weighting": "wpo"}, "kto"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preference(**settings)


def test_the_run_file_says_loss_and_is_read_back() -> None:
    said = Preference(loss="simpo").model_dump(mode="json")
    assert said["loss"] == "simpo"
    assert Preference.model_validate(said) == Preference(loss="simpo")


def test_bradley_terry_with_margin_centring_and_rankings_is_its_formula() -> None:
    rewards = torch.tensor([0.5, -0.2, 1.0, 1.5, 0.3, 0.1, -2.0], requires_grad=True)
    batch = padded(PAIRS)
    terms = Reward(margin=0.5, centering=0.01).loss_of(rewards, batch)
    r = rewards.tolist()

    def loss(w: int, l: int, m: float) -> float:  # noqa: E741
        return math.log1p(math.exp(-(r[w] - r[l] - 0.5 * m))) + 0.01 * (r[w] + r[l]) ** 2

    ranking = (loss(4, 5, 1) + loss(4, 6, 2) + loss(5, 6, 1)) / 3
    assert terms.total.item() == pytest.approx(loss(0, 1, 1) + loss(2, 3, 1) + ranking, rel=1e-6)
    assert terms.metrics["accuracy"].item() == pytest.approx(2.0)
    terms.total.backward()
    assert rewards.grad[0] < 0 < rewards.grad[1]
