"""AdaLoRA: PEFT's forward, penalty and rank allocator as the reference; resuming; real ranks."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.methods import AdaLoRA
from tunesmith.methods.rank_allocation import Schedule, keep_best
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")

METHOD = AdaLoRA(
    rank=4, target_rank=2, alpha=6, interval=2, warmup_share=0.1, final_share=0.25, beta2=0.7
)
TOTAL = 20


def theirs(reference: PeftModel, name: str) -> nn.Parameter:
    """Return PEFT's parameter for ours of this name."""
    path, _, leaf = name.partition(".adalora_default.")
    kind = {"P": "lora_B", "L": "lora_E", "Q": "lora_A"}[leaf]
    return reference.get_parameter(f"base_model.model.{path}.{kind}.default")


def peft_twin(base: PreTrainedModel, tuned: TunedModel) -> PeftModel:
    """Return PEFT's AdaLoRA over `base` with the values of `tuned`."""
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=6,
        deltaT=2,
        tinit=2,
        tfinal=5,
        total_step=TOTAL,
        beta2=0.7,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    reference = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            twin = theirs(reference, name)
            twin.copy_(parameter.reshape(twin.shape))
    return reference.eval()


def steps(tuned: TunedModel, first: int, last: int) -> None:
    """Train with fixed random gradients from step `first` to `last`."""
    trainable = tuned.trainable()
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in trainable.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.sub_(0.05 * parameter.grad)
        tuned.on_step(step, TOTAL)


def test_the_triplets_get_pefts_logits_penalty_and_gradients(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor
) -> None:
    base = deepcopy(model)
    tuned = trained(attach(model, METHOD))
    reference = peft_twin(base, tuned)
    loss = model(input_ids, labels=input_ids).loss + tuned.penalty()
    expected = reference(input_ids, labels=input_ids)  # PEFT adds the penalty itself
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(model(input_ids).logits, expected.logits, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    for name, parameter in tuned.trainable().items():
        gradient = theirs(reference, name).grad
        torch.testing.assert_close(
            parameter.grad, gradient.reshape(parameter.shape), atol=1e-5, rtol=1e-4
        )


def test_the_allocator_decides_as_pefts_on_the_same_gradients(model: PreTrainedModel) -> None:
    base = deepcopy(model)
    tuned = attach(model, METHOD)
    reference = peft_twin(base, tuned)
    trainable = tuned.trainable()
    chosen = []
    for step in range(1, TOTAL + 1):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for name, parameter in trainable.items():
                gradient = torch.randn(parameter.shape, generator=generator)
                twin = theirs(reference, name)
                parameter.grad, twin.grad = gradient, gradient.reshape(twin.shape).clone()
                parameter.sub_(0.05 * parameter.grad)
                twin.sub_(0.05 * twin.grad)
        tuned.on_step(step, TOTAL)
        reference.base_model.update_and_allocate(step)
        for name, parameter in trainable.items():
            assert torch.equal(parameter, theirs(reference, name).reshape(parameter.shape)), step
        chosen.append([bool(v) for n, p in trainable.items() if n.endswith(".L") for v in p])
    modules = len(tuned.attachments[0].triplets)
    assert sum(chosen[-1]) == 2 * modules
    assert chosen[14:] == [chosen[-1]] * 6  # frozen from step 15 = 20 - 5 on
    assert sum(chosen[0]) == 4 * modules


def test_resuming_anywhere_is_bitwise(model: PreTrainedModel) -> None:
    start = deepcopy(model)
    tuned = attach(model, METHOD)
    initial = {name: t.clone() for name, t in tuned.state_dict().items()}
    steps(tuned, 1, TOTAL)
    for stop in (1, 7, 14, 15, 17):
        first = attach(deepcopy(start), METHOD)
        first.load_state_dict(initial)
        steps(first, 1, stop)
        state = json.loads(json.dumps(first.extra_state()))
        again = attach(deepcopy(start), METHOD)
        again.load_state_dict(first.state_dict())
        again.load_extra_state(state)
        steps(again, stop + 1, TOTAL)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, tuned.state_dict()[name]), (stop, name)


def test_the_state_is_small_once_the_choice_is_made() -> None:
    tuned = attach(tiny_llama(), METHOD)
    steps(tuned, 1, TOTAL)
    state = tuned.extra_state()["0"]
    assert state["sensitivity"] == state["uncertainty"] == {}


def test_it_is_saved_at_its_real_ranks_and_read_by_both(
    model: PreTrainedModel, input_ids: Tensor, tmp_path: Path
) -> None:
    tuned = attach(model, METHOD)
    steps(tuned, 1, TOTAL)
    ranks, logits = tuned.attachments[0].ranks(), model(input_ids).logits
    assert len(set(ranks.values())) > 1
    tuned.save(tmp_path / "a")
    base = deepcopy(tuned.detach())
    again = load_adapter(model, tmp_path / "a")
    held = {path: triplets.L.numel() for path, triplets in again.attachments[0].triplets.items()}
    assert held == ranks
    # zeros are left out of the sums, which may change their order
    torch.testing.assert_close(model(input_ids).logits, logits, atol=1e-6, rtol=1e-6)
    loaded = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    torch.testing.assert_close(loaded(input_ids).logits, logits, atol=1e-5, rtol=1e-5)
    # and a second round trip is exact
    logits = model(input_ids).logits
    again.save(tmp_path / "b")
    load_adapter(again.detach(), tmp_path / "b")
    assert torch.equal(model(input_ids).logits, logits)


def test_a_directory_that_peft_saved_gives_pefts_logits(
    model: PreTrainedModel, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    other = trained(attach(deepcopy(model), METHOD))
    reference = peft_twin(deepcopy(model), other)
    for step in range(1, TOTAL + 1):
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(step)
                )
        reference.base_model.update_and_allocate(step)
    reference.save_pretrained(tmp_path / "a")
    load_adapter(model, tmp_path / "a")
    expected = reference(input_ids).logits
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_shrunken_adapter_trains_on_without_being_cut_again(tmp_path: Path) -> None:
    tuned = attach(tiny_llama(), METHOD)
    steps(tuned, 1, TOTAL)
    tuned.save(tmp_path / "a")
    again = load_adapter(tuned.detach(), tmp_path / "a")
    ranks = again.attachments[0].ranks()
    steps(again, 1, TOTAL)
    assert again.attachments[0].ranks() == ranks


def test_the_budget_falls_with_the_cube_of_what_is_left() -> None:
    """b(t) = 40 + 60 (1 - (t - 10) / 70)^3 between t_i = 10 and T - t_f = 80 (eq. 12)."""
    schedule = Schedule(warmup=10, final=20, interval=5, start=100, target=40)
    budgets = {step: schedule.budget(step, 100) for step in range(1, 101)}
    assert {s: b for s, b in budgets.items() if b is not None} == {
        **{step: int(40 + 60 * (1 - (step - 10) / 70) ** 3) for step in range(15, 80, 5)},
        80: 40,
    }


def test_the_highest_scores_are_kept_over_all_modules() -> None:
    scores = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([2.0, 4.0, 3.0])}
    kept = keep_best(scores, 2)
    assert kept["a"].tolist() == [True, False]
    assert kept["b"].tolist() == [False, True, False]
    assert all(bool(mask.all()) for mask in keep_best(scores, 5).values())


@pytest.mark.parametrize("total", range(1, 8))
def test_every_length_of_run_ends_at_the_target(total: int) -> None:
    tuned = attach(tiny_gpt2(), METHOD)
    for step in range(1, total + 1):
        for parameter in tuned.trainable().values():
            parameter.grad = torch.randn(parameter.shape)
            parameter.data.sub_(0.05 * parameter.grad)
        tuned.on_step(step, total)
    ranks = tuned.attachments[0].ranks()
    assert sum(ranks.values()) == 2 * len(ranks)


def test_the_penalty_is_zero_for_orthonormal_matrices_and_absent_when_off() -> None:
    tuned = attach(tiny_llama(), AdaLoRA(rank=4, target_rank=2, targets=["attention.q"]))
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if name.endswith((".P", ".Q")):
                nn.init.orthogonal_(parameter)
    torch.testing.assert_close(tuned.penalty(), torch.tensor(0.0), atol=1e-5, rtol=0)
    with tuned.disabled():
        assert tuned.penalty() is None


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rank": 4, "target_rank": 5}, {"warmup_share": 0.5, "final_share": 0.5}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AdaLoRA.model_validate(wrong)


def test_a_layer_trains_rank_times_its_sides_and_one() -> None:
    tuned = attach(tiny_llama(), AdaLoRA(rank=4, target_rank=2, targets=["mlp.up"]))
    assert tuned.parameter_counts().trainable == 2 * 4 * (32 + 48 + 1)
