"""P-tuning: the encoder is the papers', it is folded away when saved, and PEFT agrees."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tiny import tiny_gpt2, tiny_llama
from tunesmith import PromptTuning, PTuning, attach, load_adapter
from tunesmith.errors import MethodError
from tunesmith.methods.tuned import TunedModel

Trained = Callable[[TunedModel], TunedModel]

LSTM, MLP = PTuning(tokens=4), PTuning(tokens=4, encoder="mlp")
encoders = pytest.mark.parametrize("method", [LSTM, MLP], ids=["lstm", "mlp"])


def weights_of(tuned: TunedModel) -> dict[str, Tensor]:
    """The encoder's parameters in float64, by their names inside it."""
    own = tuned.trainable().items()
    return {n.partition(".encoder.")[2]: p.detach().double().requires_grad_() for n, p in own}


def lstm_direction(x: Tensor, w: dict[str, Tensor], suffix: str) -> Tensor:
    """One direction of an LSTM layer over x (tokens, in): (tokens, hidden)."""
    rows = range(len(x)) if "reverse" not in suffix else reversed(range(len(x)))
    hidden = w[f"lstm.weight_hh_{suffix}"].shape[1]
    h = c = x.new_zeros(hidden)
    out: dict[int, Tensor] = {}
    for t in rows:
        gates = w[f"lstm.weight_ih_{suffix}"] @ x[t] + w[f"lstm.bias_ih_{suffix}"]
        gates = gates + w[f"lstm.weight_hh_{suffix}"] @ h + w[f"lstm.bias_hh_{suffix}"]
        i, f, g, o = gates.reshape(4, hidden)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out[t] = h
    return torch.stack([out[t] for t in range(len(x))])


def reference(w: dict[str, Tensor]) -> Tensor:
    """The rows by equations 2 and 3, or by the linear maps alone."""
    x = w["P"]
    for layer in ("l0", "l1") if "lstm.weight_ih_l0" in w else ():
        both = [lstm_direction(x, w, layer), lstm_direction(x, w, f"{layer}_reverse")]
        x = torch.cat(both, dim=1)
    places = sorted({int(n.split(".")[1]) for n in w if n.startswith("mlp.")})
    for place in places:
        x = x if place == 0 else x.relu()
        x = x @ w[f"mlp.{place}.weight"].T + w[f"mlp.{place}.bias"]
    return x


@encoders
def test_rows_and_gradients_are_the_papers_equations(method: PTuning, trained: Trained) -> None:
    tuned = trained(attach(tiny_llama(), method))
    rows = tuned.attachments[0].prompt.rows()
    weights = weights_of(tuned)
    expected = reference(weights)
    torch.testing.assert_close(rows.double(), expected, atol=1e-6, rtol=1e-5)
    direction = torch.randn(rows.shape, dtype=torch.float64)
    (rows.double() * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in tuned.trainable().items():
        other = weights[name.partition(".encoder.")[2]].grad
        torch.testing.assert_close(parameter.grad.double(), other, atol=1e-5, rtol=1e-4)


@encoders
def test_the_file_holds_the_rows_only_and_loads_as_plain_rows(
    method: PTuning, model: PreTrainedModel, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    tuned = trained(attach(model, method))
    with torch.no_grad():
        logits = model(input_ids).logits
        tuned.save(tmp_path / "a")
        stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert {name: t.shape for name, t in stored.items()} == {"prompt_embeddings": (4, 32)}
        loaded = load_adapter(tuned.detach(), tmp_path / "a")
        assert torch.equal(model(input_ids).logits, logits)
    assert loaded.parts[0].method == method
    assert [p.shape for p in loaded.trainable().values()] == [(4, 32)]
    loaded.save(tmp_path / "b")
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert torch.equal(again["prompt_embeddings"], stored["prompt_embeddings"])


@encoders
def test_training_goes_on_with_the_encoder(
    method: PTuning, trained: Trained, input_ids: Tensor
) -> None:
    tuned = trained(attach(tiny_llama(), method))
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    assert any(".encoder." in name for name in state)
    expected = tuned.model(input_ids).logits
    again = attach(tuned.detach(), method)
    again.load_state_dict(state)
    assert torch.equal(again.model(input_ids).logits, expected)


@pytest.mark.parametrize("kind", ["LSTM", "MLP"])
def test_peft_computes_the_same_rows_logits_and_gradients(kind: str, input_ids: Tensor) -> None:
    base = tiny_gpt2()
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=16,
    )
    theirs = get_peft_model(base, config).eval()
    made = theirs.prompt_encoder["default"]
    ours = attach(tiny_gpt2(), PTuning(tokens=4, encoder=kind.lower(), hidden=16))
    names = {"embedding.weight": "P", "mlp_head": "mlp", "lstm_head": "lstm"}
    state = {}
    for name, parameter in made.named_parameters():
        for old, new in names.items():
            name = name.replace(old, new)  # noqa: PLW2901 - the name as we have it
        state[f"transformer.p_tuning_default.encoder.{name}"] = parameter.detach().clone()
    ours.model.load_state_dict(base.state_dict(), strict=False)
    ours.load_state_dict(state)
    expected, got = theirs(input_ids).logits[:, 4:], ours.model(input_ids).logits
    torch.testing.assert_close(got, expected)
    # Not their loss: it has the last row of the prompt predict the first token.
    direction = torch.randn(got.shape)
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    mine = dict(ours.attachments[0].prompt.encoder.named_parameters())
    for name, parameter in made.named_parameters():
        for old, new in names.items():
            name = name.replace(old, new)  # noqa: PLW2901 - the name as we have it
        torch.testing.assert_close(mine[name].grad, parameter.grad)


@encoders
def test_peft_reads_what_we_write_and_the_other_way_round(
    method: PTuning, trained: Trained, input_ids: Tensor, tmp_path: Path
) -> None:
    tuned = trained(attach(tiny_gpt2(), method))
    base = tiny_gpt2()
    base.load_state_dict(tuned.model.state_dict(), strict=False)
    tuned.export_peft(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours")
    expected = tuned.model(input_ids).logits
    torch.testing.assert_close(theirs(input_ids).logits[:, 4:], expected)
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_adapter(tuned.detach(), tmp_path / "theirs", check_base=False)
    assert read.parts[0].method == PTuning(tokens=4)
    torch.testing.assert_close(read.model(input_ids).logits, expected)


def test_it_acts_as_prompt_tuning_with_its_rows(trained: Trained, input_ids: Tensor) -> None:
    tuned = trained(attach(tiny_llama(), LSTM))
    expected = tuned.model(input_ids).logits
    rows = tuned.attachments[0].prompt.final()
    plain = attach(tuned.detach(), PromptTuning(tokens=4))
    next(iter(plain.trainable().values())).data.copy_(rows)
    torch.testing.assert_close(plain.model(input_ids).logits, expected)


def test_a_prompt_as_long_as_the_context_is_refused() -> None:
    with pytest.raises(MethodError, match=r"method\.tokens: 256 rows leave no room"):
        attach(tiny_llama(), PTuning(tokens=256))


def test_merging_is_refused_in_its_own_name() -> None:
    with pytest.raises(MethodError, match="p_tuning adds input"):
        attach(tiny_llama(), LSTM).merge()
