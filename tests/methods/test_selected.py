"""Full and last-layer tuning: what trains, in which dtype, and the way back to the base."""

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith.errors import MethodError
from tunesmith.methods import Full, LastLayer
from tunesmith.methods.contract import Method
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
Loss = Callable[[nn.Module, Tensor], Tensor]

both = pytest.mark.parametrize("method", [Full(), LastLayer()], ids=["full", "last_layer"])


def test_full_trains_every_parameter_once(model: PreTrainedModel) -> None:
    tuned = attach(model, Full())
    assert list(tuned.trainable()) == [name for name, _ in model.named_parameters()]
    assert tuned.parameter_counts().trainable == model.num_parameters()


def test_full_trains_a_tied_parameter_once() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    tuned = attach(model, Full())
    assert "lm_head.weight" not in tuned.trainable()
    assert tuned.parameter_counts().trainable == sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LastLayer(), ("model.layers.1.", "model.norm.")),
        (LastLayer(blocks=2, norm=False), ("model.layers.0.", "model.layers.1.")),
        (LastLayer(blocks=0, norm=False, head=True), ("lm_head.",)),
        (LastLayer(blocks=0), ("model.norm.",)),
    ],
)
def test_last_layer_trains_what_it_says(method: LastLayer, expected: tuple[str, ...]) -> None:
    model = tiny_llama()
    tuned = attach(model, method)
    names = [name for name, _ in model.named_parameters() if name.startswith(expected)]
    assert list(tuned.trainable()) == names
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names


@both
def test_only_what_is_selected_gets_gradients(
    method: Method, model: PreTrainedModel, input_ids: Tensor, loss: Loss
) -> None:
    tuned = attach(model, method)
    loss(model, input_ids).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in tuned.trainable())


@both
def test_the_model_is_the_base_bitwise_at_the_start(
    method: Method, model: PreTrainedModel, input_ids: Tensor
) -> None:
    before = model(input_ids).logits
    attach(model, method)
    assert torch.equal(model(input_ids).logits, before)


@both
def test_a_bfloat16_base_trains_in_float32_and_is_itself_again_when_disabled(
    method: Method, model: PreTrainedModel, input_ids: Tensor, loss: Loss
) -> None:
    model.bfloat16()
    before, names = model(input_ids).logits, list(model.state_dict())
    tuned = attach(model, method)
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, input_ids).backward()
    optimizer.step()
    after = tuned.state_dict()
    with tuned.disabled():
        assert model.dtype == torch.bfloat16
        assert torch.equal(model(input_ids).logits, before)
        assert all(torch.equal(t, after[n]) for n, t in tuned.state_dict().items())
    assert all(p.dtype == torch.float32 for p in tuned.trainable().values())
    assert all(torch.equal(p, after[n]) for n, p in tuned.trainable().items())
    assert list(model.state_dict()) == names


@both
def test_what_is_switched_under_autocast_is_cast_anew(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    """Autocast keeps its casts of weights that train until its outermost block ends."""
    tuned = trained(attach(model, method))

    def logits() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids).logits

    on = logits()
    with tuned.disabled():
        off = logits()
    assert not torch.equal(on, off)
    for base_first in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if not base_first:
                assert torch.equal(logits(), on)
            with torch.no_grad(), tuned.disabled():
                assert torch.equal(logits(), off)
            assert torch.equal(logits(), on)


@both
def test_training_goes_on_after_looking_at_the_base(
    method: Method, input_ids: Tensor, loss: Loss
) -> None:
    def train(*, look: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = tiny_llama()
        tuned = attach(model, method)
        optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, input_ids).backward()
            optimizer.step()
            with tuned.disabled() if look else torch.no_grad():
                loss(model, input_ids)
        return tuned.state_dict()

    looked, plain = train(look=True), train(look=False)
    assert all(torch.equal(looked[name], plain[name]) for name in plain)


@both
def test_merging_brings_the_values_to_the_bases_dtype_and_back(
    method: Method, input_ids: Tensor, trained: Trained
) -> None:
    model = tiny_llama().bfloat16()
    tuned = trained(attach(model, method))
    values = tuned.state_dict()
    tuned.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(model.get_parameter(n), v.bfloat16()) for n, v in values.items())
    model(input_ids)
    with pytest.raises(MethodError, match="unmerge"), tuned.disabled():
        pass
    tuned.unmerge()
    assert all(torch.equal(p, values[n]) for n, p in tuned.trainable().items())


@both
def test_detaching_leaves_the_plain_base(
    method: Method, model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    model.bfloat16()
    before = model(input_ids).logits
    tuned = trained(attach(model, method))
    tuned.merge()
    base = tuned.detach()
    assert torch.equal(base(input_ids).logits, before)
    assert all(p.requires_grad for p in base.parameters())


def test_without_keep_base_there_is_no_way_back(trained: Trained, input_ids: Tensor) -> None:
    model = tiny_llama().bfloat16()
    tuned = trained(attach(model, Full(keep_base=False)))
    with pytest.raises(MethodError, match=r"method\.keep_base"), tuned.disabled():
        pass
    expected = {name: p.bfloat16() for name, p in tuned.trainable().items()}
    tuned.detach()
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    assert model(input_ids).logits.dtype == torch.bfloat16


def test_a_tied_head_is_refused_unless_allowed(input_ids: Tensor, loss: Loss) -> None:
    model = tiny_gpt2()
    with pytest.raises(MethodError, match=r"lm_head is tied to .* transformer\.wte.*allow_tied"):
        attach(model, LastLayer(blocks=0, norm=False, head=True))
    tuned = attach(model, LastLayer(blocks=0, norm=False, head=True, allow_tied=True))
    assert list(tuned.trainable()) == ["transformer.wte.weight"]
    loss(model, input_ids).backward()
    assert model.lm_head.weight.grad is model.transformer.wte.weight.grad is not None


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(MethodError, match=r"method\.blocks: 3 is more than the 2 blocks"):
        attach(tiny_llama(), LastLayer(blocks=3))


def test_training_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="trains nothing"):
        LastLayer(blocks=0, norm=False)


@pytest.mark.parametrize("part", ["norm", "head"])
def test_a_part_that_the_model_lacks_is_refused(part: str) -> None:
    backbone = tiny_llama().model
    del backbone.norm
    backbone.norm = None
    with pytest.raises(MethodError, match=rf"method\.{part}: "):
        attach(backbone, LastLayer(blocks=0, norm=part == "norm", head=part == "head"))


def test_a_quantised_weight_is_refused_and_named() -> None:
    model = tiny_llama()
    weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj.weight = weight
    with pytest.raises(MethodError, match=r"layers\.1\.self_attn\.q_proj\.weight is quantised"):
        attach(model, Full())


def test_a_parameter_cannot_train_twice() -> None:
    tuned = attach(tiny_llama(), LastLayer())
    with pytest.raises(MethodError, match=r"trained by another method"):
        attach(tuned, Full())
    assert len(tuned.parts) == 1


def test_two_selections_of_the_same_weights_take_turns(trained: Trained, input_ids: Tensor) -> None:
    tuned = trained(attach(tiny_llama(), LastLayer(), name="one"))
    expected = {"one": tuned.model(input_ids).logits}
    tuned.use(None)
    tuned.freeze("one")
    expected["two"] = trained(attach(tuned, LastLayer(), name="two")).model(input_ids).logits
    for name in ("one", "two", "one"):
        tuned.use(name)
        assert torch.equal(tuned.model(input_ids).logits, expected[name])


def test_a_selection_over_one_that_acts_is_refused(input_ids: Tensor, trained: Trained) -> None:
    tuned = trained(attach(tiny_llama(), LastLayer(), name="one"))
    before = tuned.model(input_ids).logits
    tuned.freeze("one")
    with pytest.raises(MethodError, match=r"'one' and 'two' both have values of their own"):
        attach(tuned, LastLayer(), name="two")
    assert torch.equal(tuned.model(input_ids).logits, before)


def test_loading_into_switched_off_weights_is_refused() -> None:
    tuned = attach(tiny_llama(), Full())
    state = tuned.state_dict()
    with tuned.disabled(), pytest.raises(MethodError, match="switch the method on"):
        tuned.load_state_dict(state)


def test_unmerging_what_is_not_merged_is_refused() -> None:
    with pytest.raises(MethodError, match="nothing is merged"):
        attach(tiny_llama(), Full()).attachments[0].unmerge()


def test_a_partly_float32_model_generates_without_autocast() -> None:
    model = tiny_llama().to(torch.bfloat16)
    ids = torch.arange(3, 12)[None]
    base = model(ids).logits
    tuned = attach(model, LastLayer(blocks=1, head=True))
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 12)
    assert model(ids).logits.dtype == torch.bfloat16
    # The last block now computes in float32, so only rounding differs.
    torch.testing.assert_close(model(ids).logits, base, atol=2e-2, rtol=0)
    with tuned.disabled():
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(tuned.detach()(ids).logits, base)


def test_full_keeps_no_moments_in_float16() -> None:
    with pytest.raises(MethodError, match="weights: float32"):
        attach(tiny_llama().half(), Full(weights="model"))
    attach(tiny_llama().half(), Full())


def test_full_can_train_weights_in_the_dtype_of_the_model() -> None:
    model = tiny_llama().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = attach(model, Full(weights="model"))
    assert {p.dtype for p in tuned.trainable().values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(1)
    with tuned.disabled():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name] + 1) for name, p in model.named_parameters())
