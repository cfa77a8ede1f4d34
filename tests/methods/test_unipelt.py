"""UniPELT: three methods behind gates that each token sets for itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import tunesmith
from families import FAMILIES
from tiny import tiny_llama
from tunesmith import (
    Adapter,
    DataSettings,
    EngineSettings,
    LoRA,
    ModelSettings,
    PrefixTuning,
    Run,
    Source,
    TrainSettings,
    UniPELT,
    attach,
    load_adapter,
)
from tunesmith.errors import MethodError
from tunesmith.methods.gate import Gate
from tunesmith.methods.prefix import LayerInput, Prefix
from tunesmith.methods.tuned import TunedModel
from tunesmith.models.attention import attention

Trained = Callable[[TunedModel], TunedModel]

METHOD = UniPELT(rank=4, prefix_length=3, bottleneck=4)


class Layer(nn.Module):
    """An attention layer as the attention function sees one."""

    is_causal = True

    def __init__(self, *prefixes: Prefix) -> None:
        super().__init__()
        self.num_key_value_groups = 2
        for index, prefix in enumerate(prefixes):
            self.add_module(f"prefix{index}", prefix)


def prefix_of(length: int, h: Tensor | None) -> Prefix:
    """A prefix for two key heads, gated from `h` where there is one."""
    prefix = Prefix(torch.randn(2, length, 8), torch.randn(2, length, 8))
    if h is not None:
        reader = LayerInput()
        reader.seen = h
        gate = Gate(h.shape[-1])
        nn.init.normal_(gate.w)
        prefix.gate_by(gate, reader)
    return prefix.double()


def by_hand(layer: Layer, h: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over [g_t P; k] with values [g_t V; v], token by token and head by head."""
    out = torch.zeros_like(q).transpose(1, 2)
    prefixes = [x for x in layer.children() if isinstance(x, Prefix)]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys, values = [k[row, head // 2, : t + 1]], [v[row, head // 2, : t + 1]]
                for prefix in prefixes:
                    g: Tensor | float = 1.0
                    if prefix.token_gate is not None:
                        gate = prefix.token_gate
                        g = torch.sigmoid(h[row, t] @ gate.w[0] + gate.c[0])
                    keys.append(g * prefix.K[head // 2])
                    values.append(g * prefix.V[head // 2])
                weights = torch.softmax(torch.cat(keys) @ q[row, head, t] / 8**0.5, dim=0)
                out[row, t, head] = weights @ torch.cat(values)
    return out


@pytest.mark.parametrize("gated", [[True], [True, False], [False, True, True]])
def test_each_token_sees_the_prefix_scaled_by_its_own_gate(gated: list[bool]) -> None:
    h = torch.randn(2, 5, 6, dtype=torch.float64)
    layer = Layer(*(prefix_of(3 + i, h if on else None) for i, on in enumerate(gated)))
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64)
    got, _ = attention(layer, q, k, v, None)
    expected = by_hand(layer, h, q, k, v)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(got)
    inputs = [q, *layer.parameters()]
    mine = torch.autograd.grad((got * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    torch.testing.assert_close(mine, theirs)


def gates_of(tuned: TunedModel) -> list[Gate]:
    return [module for module in tuned.model.modules() if isinstance(module, Gate)]


def copied(tuned: TunedModel, *methods: tunesmith.methods.contract.Method) -> TunedModel:
    """`methods` on the same base with the same values; gates are left out."""
    state = {n: p.clone() for n, p in tuned.state_dict().items() if ".token_gate." not in n}
    plain = attach(tuned.detach(), *methods)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_with_open_gates_it_is_its_three_methods(family: str, trained: Trained) -> None:
    own = FAMILIES[family]
    tuned = trained(attach(own.make(), METHOD))
    for gate in gates_of(tuned):
        gate.w.data.zero_()
        gate.c.data.fill_(50.0)
    inputs = own.inputs(torch.arange(3, 17).reshape(2, 7))
    with torch.no_grad():
        expected = tuned.model(**inputs).logits
        plain = copied(tuned, *METHOD.methods.values())
        torch.testing.assert_close(plain.model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_with_shut_gates_only_the_place_of_the_prefix_is_left(
    trained: Trained, input_ids: Tensor
) -> None:
    tuned = trained(attach(tiny_llama(), METHOD))
    for gate in gates_of(tuned):
        gate.w.data.zero_()
        gate.c.data.fill_(-200.0)
    expected = tuned.model(input_ids).logits
    plain = attach(tuned.detach(), PrefixTuning(length=3))
    for parameter in plain.trainable().values():
        parameter.data.zero_()
    torch.testing.assert_close(plain.model(input_ids).logits, expected)


def test_the_change_of_lora_and_adapter_is_the_gate_times_theirs(trained: Trained) -> None:
    tuned = trained(attach(tiny_llama(), METHOD))
    pair = tuned.model.get_submodule("model.layers.0.self_attn.q_proj.lora_default")
    adapter = tuned.model.get_submodule("model.layers.0.mlp.down_proj.adapter_default")
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for child in (pair.double(), adapter.double()):
        gate = child.token_gate
        got = child.act(child, (x,), x) - x
        child.token_gate = None
        whole = child.act(child, (x,), x) - x
        G = torch.sigmoid(x @ gate.w.T + gate.c)
        torch.testing.assert_close(got, G * whole)
        assert G.std() > 0


def test_no_token_sees_a_later_one_through_a_gate(trained: Trained, input_ids: Tensor) -> None:
    model = trained(attach(tiny_llama(), METHOD)).model
    other = torch.cat([input_ids[:, :4], input_ids[:, 4:].flip(1)], dim=1)
    one, two = model(input_ids).logits, model(other).logits
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])


def test_gates_start_half_open_and_are_reported_by_block_and_method(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained
) -> None:
    tuned = attach(model, METHOD)
    attachment = tuned.attachments[0]
    assert attachment.gates() == {}
    with attachment.observing(), torch.no_grad():
        model(input_ids)
    blocks = [block.path for block in tuned.sites.blocks]
    half = {"lora": 0.5, "prefix": 0.5, "adapter": 0.5}
    assert attachment.findings() == {"gates": dict.fromkeys(blocks, half)}
    trained(tuned)
    with attachment.observing(), torch.no_grad():
        model(input_ids)
    gates = attachment.findings()["gates"]
    assert list(gates) == blocks
    assert all(0 < g < 1 and g != 0.5 for block in gates.values() for g in block.values())


def test_a_reported_gate_is_the_mean_over_the_tokens(trained: Trained, input_ids: Tensor) -> None:
    tuned = trained(attach(tiny_llama(), METHOD))
    seen = []
    path = "model.layers.0.self_attn"
    layer = tuned.model.get_submodule(path)
    layer.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with tuned.attachments[0].observing(), torch.no_grad():
        tuned.model(input_ids[:1])
        tuned.model(input_ids[1:, :3])
    h = torch.cat([x.flatten(0, 1) for x in seen]).double()
    gates = tuned.attachments[0].findings()["gates"]["model.layers.0"]
    own = {"lora": [layer.q_proj.lora_default, layer.v_proj.lora_default]}
    own["prefix"] = [layer.prefix_tuning_default]
    for key, children in own.items():
        each = [c.token_gate for c in children]
        means = [torch.sigmoid(h @ g.w.double().T + g.c.double()).mean() for g in each]
        assert gates[key] == pytest.approx(float(sum(means)) / len(means), abs=1e-6)


def test_one_file_holds_all_of_it_and_loads_bitwise(
    model: PreTrainedModel, input_ids: Tensor, trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(model, METHOD))
    with torch.no_grad():
        expected = model(input_ids).logits
        tuned.save(tmp_path / "a")
        assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) == set(
            tuned.trainable()
        )
        loaded = load_adapter(tuned.detach(), tmp_path / "a")
        assert torch.equal(model(input_ids).logits, expected)
    assert [part.method for part in loaded.parts] == [METHOD]


def test_its_parameters_are_those_of_the_parts_and_a_gate_a_place() -> None:
    tuned = attach(tiny_llama(), METHOD)
    blocks, width, kv_width = 2, 32, 16
    lora = 4 * (width + width) + 4 * (width + kv_width)
    prefix = 2 * 3 * kv_width
    adapter = 2 * width * 4 + width + 4
    gates = 4 * (width + 1)
    assert tuned.parameter_counts().trainable == blocks * (lora + prefix + adapter + gates)


def test_each_part_learns_at_its_own_rate() -> None:
    tuned = attach(tiny_llama(), METHOD)
    rates = {n: s * UniPELT.default_learning_rate for n, s in tuned.learning_rate_scales().items()}
    kinds = {
        ".token_gate.": UniPELT,
        ".lora_": LoRA,
        ".prefix_": PrefixTuning,
        ".adapter_": Adapter,
    }
    for name, rate in rates.items():
        kind = next(method for mark, method in kinds.items() if mark in name)
        assert rate == pytest.approx(kind.default_learning_rate)


def test_nothing_is_left_where_a_part_cannot_attach(input_ids: Tensor) -> None:
    model = tiny_llama()
    before, keys = model(input_ids).logits, list(model.state_dict())
    with pytest.raises(MethodError, match="rank"):
        attach(model, UniPELT(rank=64))
    with pytest.raises(MethodError, match="leaves no room"):
        attach(model, UniPELT(prefix_length=256))
    tuned = attach(model, METHOD)
    with pytest.raises(MethodError, match="already attached"):
        attach(tuned, LoRA(rank=4, targets=["attention.q"]))
    tuned.detach()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(input_ids).logits, before)
    assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_a_run_says_which_method_each_layer_chose(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {n}", "completion": "yes" * n} for n in range(1, 13)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    run = Run(
        name="gates",
        output=str(tmp_path / "runs"),
        model=ModelSettings(name=str(tiny_model), dtype="float32"),
        method=METHOD,
        data=DataSettings(train=[Source(path=str(path))], holdout=4, max_length=128),
        train=TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup=0),
        engine=EngineSettings(device="cpu"),
    )
    result = tunesmith.train(run)
    gates = json.loads(result.directory.summary.read_text())["gates"]
    assert list(gates) == ["model.layers.0", "model.layers.1"]
    assert all(set(block) == {"lora", "prefix", "adapter"} for block in gates.values())
    assert all(0 < g < 1 and g != 0.5 for block in gates.values() for g in block.values())
