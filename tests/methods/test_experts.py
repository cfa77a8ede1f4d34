"""LoRA and IA3 in fused experts: the formulas, PEFT both ways, every implementation, refusals."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES, VOCAB
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import IA3, VeRA
from tunesmith.methods.adalora import AdaLoRA
from tunesmith.methods.bitfit import BitFit
from tunesmith.methods.contract import Method
from tunesmith.methods.diff_pruning import DiffPruning
from tunesmith.methods.experts import ExpertInputScale, ExpertPair, ExpertPlace, InExperts
from tunesmith.methods.lora import LoRA, LoraAttachment
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
EXPERTS = ["mlp.gate", "mlp.up", "mlp.down"]
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def model(family: str = "mixtral", implementation: str = "grouped_mm") -> PreTrainedModel:
    torch.manual_seed(0)
    made = FAMILIES[family].make()
    made.set_experts_implementation(implementation)
    return made


@torch.no_grad()
def logits(made: PreTrainedModel) -> Tensor:
    return made(input_ids=IDS).logits


def experts_of(tuned: TunedModel) -> tuple[nn.Module, InExperts]:
    """Return the experts of the last block, and what hangs there."""
    attachment = tuned.attachments[0]
    assert isinstance(attachment, LoraAttachment)
    path, child = list(attachment.experts.items())[-1]
    return tuned.model.get_submodule(path.rpartition(".")[0]), child


def routes(tokens: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Two of four experts for each token, and their shares; the last expert gets none."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    return index, torch.rand(tokens, 2, generator=generator, dtype=torch.float64)


def mixture(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """sum_e g_e D_e (silu(G_e x) * (U_e x)), token by token."""
    out = []
    for token, chosen, share in zip(x, index, shares, strict=True):
        total = torch.zeros_like(token)
        for e, g in zip(chosen.tolist(), share, strict=True):
            gate, up = (gate_up[e] @ token).chunk(2)
            total = total + g * (down[e] @ (F.silu(gate) * up))
        out.append(total)
    return torch.stack(out)


def dtype_of(implementation: str) -> torch.dtype:
    """float64, which PyTorch's product of groups does not take."""
    return torch.float32 if implementation == "grouped_mm" else torch.float64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_expert_gets_its_own_pair(implementation: str, trained: Trained) -> None:
    dtype = dtype_of(implementation)
    tuned = trained(attach(model(implementation=implementation).to(dtype), LoRA(rank=3)))
    experts, child = experts_of(tuned)
    index, shares = routes(7)
    x = torch.randn(7, 32, dtype=dtype, requires_grad=True)
    got = experts(x, index, shares.to(dtype))
    got.square().sum().backward()
    found = {n: p.grad.clone() for n, p in child.named_parameters()} | {"x": x.grad.clone()}
    tuned.model.zero_grad()
    x.grad = None

    changed = {
        # s = alpha / r = 2
        name: weight.detach().double() + 2.0 * part.B.double() @ part.A.double()
        for name, part in child.parts.items()
        for weight in (experts.get_parameter(name),)
    }
    expected = mixture(x.double(), changed["gate_up_proj"], changed["down_proj"], index, shares)
    expected.square().sum().backward()
    wanted = {n: p.grad for n, p in child.named_parameters()} | {"x": x.grad}
    torch.testing.assert_close(got, expected.to(dtype))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # A and B are float32
    assert not found["down_proj.B"][3].any()  # no token went there
    assert all(found["down_proj.B"][e].any() for e in range(3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", MIXTURES)
def test_the_base_runs_as_it_is_where_nothing_acts(
    family: str, implementation: str, trained: Trained
) -> None:
    own = model(family, implementation)
    tuned = attach(deepcopy(own), LoRA(rank=4))
    assert torch.equal(logits(tuned.model), logits(own))
    trained(tuned)
    on = logits(tuned.model)
    assert not torch.equal(on, logits(own))
    with tuned.disabled():
        assert torch.equal(logits(tuned.model), logits(own))
    tuned.merge()
    torch.testing.assert_close(logits(tuned.model), on, atol=5e-6, rtol=1e-5)  # of sums up to 5
    tuned.unmerge()
    assert torch.equal(logits(tuned.model), on)
    tuned.detach()
    assert torch.equal(logits(tuned.model), logits(own))
    assert tuned.model.config._experts_implementation == implementation


def test_a_second_adapter_keeps_acting_when_the_first_is_gone(trained: Trained) -> None:
    one, two = model(), model()
    torch.manual_seed(1)
    alone = logits(trained(attach(two, LoRA(rank=2), name="two")).model)
    tuned = trained(attach(one, LoRA(rank=4), name="one"))
    torch.manual_seed(1)
    attach(tuned, LoRA(rank=2), name="two")
    tuned.remove("one")
    trained(tuned)
    assert tuned.model.config._experts_implementation == "tunesmith_grouped_mm"
    torch.testing.assert_close(logits(tuned.model), alone)


def test_dropout_acts_on_the_update_alone() -> None:
    tuned = attach(model(), LoRA(rank=4, dropout=0.5, targets=EXPERTS))
    base = logits(tuned.model)
    tuned.model.train()
    assert torch.equal(logits(tuned.model), base)  # B is zero
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if name.endswith(".B"):
                parameter.fill_(0.1)
    assert not torch.equal(logits(tuned.model), logits(tuned.model))
    tuned.model.eval()
    assert torch.equal(logits(tuned.model), logits(tuned.model))


def test_a_pair_has_r_times_in_plus_out_weights_an_expert() -> None:
    tuned = attach(model(), LoRA(rank=4, targets=EXPERTS))
    # two layers, four experts; gate and up share one weight, 32 -> 96, and down is 48 -> 32
    assert tuned.parameter_counts().trainable == 2 * 4 * (4 * (32 + 96) + 4 * (48 + 32))


def test_one_site_of_the_fused_weight_leaves_the_other_alone(trained: Trained) -> None:
    tuned = trained(attach(model(), LoRA(rank=4, targets=["mlp.up"])))
    _, child = experts_of(tuned)
    part = child.parts["gate_up_proj"]
    assert isinstance(part, ExpertPair)
    assert part.B.shape == (4, 48, 4)
    delta = part.delta()
    assert not delta[:, :48].any()
    torch.testing.assert_close(delta[:, 48:], 2.0 * part.B @ part.A)


def test_a_float32_pair_works_on_a_bfloat16_base(trained: Trained) -> None:
    tuned = trained(attach(model().bfloat16(), LoRA(rank=4, targets=EXPERTS)))
    out = tuned.model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in tuned.trainable().values()} == {torch.float32}


def test_gaussian_and_frozen_a_are_taken_over() -> None:
    torch.manual_seed(0)
    place = ExpertPlace("x", 400, 8, 5, 5.0, None, "down_proj", 6)
    pair = ExpertPair(place, rslora=True, dropout=0.0, gaussian=True, freeze_a=True)
    assert [name for name, _ in pair.named_parameters()] == ["B"]
    assert pair.scale == pytest.approx(5**0.5)
    assert pair.A.std().item() == pytest.approx(1 / 5, rel=0.05)
    uniform = ExpertPair(place, rslora=False, dropout=0.0, gaussian=False, freeze_a=False)
    assert uniform.A.abs().max().item() == pytest.approx(1 / 20, rel=0.01)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4),
        LoRA(rank=4, targets=["mlp.down"], rslora=True),
        LoRA(rank=4, targets=["attention.q", "mlp.gate", "mlp.up"]),
        LoRA(rank=4, targets=["mlp.up", "mlp.down"], dropout=0.1),
    ],
    ids=["all", "down", "gate and up", "columns"],
)
@pytest.mark.parametrize("family", MIXTURES)
def test_peft_reads_it_and_what_peft_writes_is_read(
    family: str, method: LoRA, trained: Trained, tmp_path: Path
) -> None:
    tuned = trained(attach(model(family), method))
    tuned.export_peft(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(model(family), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(tuned.model), atol=5e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(model(family), tmp_path / "theirs")
    assert torch.equal(logits(again.model), logits(tuned.model))


def test_gradients_are_those_of_peft() -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(model(), config)
    files = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in files.values():
            parameter.mul_(0.1)
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    ours = attach(model(), LoRA(rank=4, targets=["attention.q", *EXPERTS]))
    last = "model.layers.1.mlp.experts"
    owner = {"gate_up_proj": f"{last}.base_layer", "down_proj": last}
    values = ours.trainable()
    with torch.no_grad():
        for layer in range(2):
            for side in "AB":
                prefix = f"base_model.model.model.layers.{layer}"
                q = files[f"{prefix}.self_attn.q_proj.lora_{side}.default.weight"]
                values[f"model.layers.{layer}.self_attn.q_proj.lora_default.{side}"].copy_(q)
                for name, path in owner.items():
                    flat = files[f"{prefix}{path[14:]}.lora_{side}.default.weight"]
                    own = values[f"model.layers.{layer}.mlp.experts.lora_default.{name}.{side}"]
                    own.copy_(per_expert(flat, side))
    ours.model(input_ids=IDS, labels=IDS).loss.backward()
    for name, path in owner.items():
        for side in "AB":
            flat = files[f"base_model.model.{path}.lora_{side}.default.weight"].grad
            own = values[f"{last}.lora_default.{name}.{side}"].grad
            torch.testing.assert_close(own, per_expert(flat, side))


def per_expert(flat: Tensor, side: str) -> Tensor:
    """PEFT's A (experts * rank, in) or B (out, rank * experts), for four experts and rank 4."""
    return flat.reshape(4, 4, -1) if side == "A" else flat.reshape(-1, 4, 4).permute(2, 0, 1)


def test_a_dropout_is_not_written_for_peft_and_not_lost(tmp_path: Path) -> None:
    method = LoRA(rank=4, targets=EXPERTS, dropout=0.1)
    tuned = attach(model(), method)
    tuned.save(tmp_path / "saved")
    config = LoraConfig.from_pretrained(tmp_path / "saved")
    assert config.lora_dropout == 0.0
    assert load_adapter(model(), tmp_path / "saved").parts[0].method == method


def test_a_target_parameter_that_is_no_expert_is_refused(trained: Trained, tmp_path: Path) -> None:
    trained(attach(model(), LoRA(rank=4, targets=EXPERTS))).export_peft(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"target_parameters 'down_proj'.*another model"):
        load_adapter(FAMILIES["llama"].make(), tmp_path / "a", check_base=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ia3_rescales_every_experts_own_activation(implementation: str) -> None:
    dtype = dtype_of(implementation)
    tuned = attach(model(implementation=implementation).to(dtype), IA3(targets=["mlp.down"]))
    experts = tuned.model.get_submodule("model.layers.0.mlp.experts")
    (factors,) = [p for n, p in tuned.trainable().items() if n.startswith("model.layers.0")]
    assert factors.shape == (4, 48)
    with torch.no_grad():
        factors.add_(torch.randn(factors.shape))
    x, (index, shares) = torch.randn(7, 32, dtype=dtype), routes(7)
    gate_up, down = (experts.get_parameter(n).double() for n in ("gate_up_proj", "down_proj"))
    expected = mixture(x.double(), gate_up, down * factors.double()[:, None], index, shares)
    got = experts(x, index, shares.to(dtype))
    # l - 1 is rounded to float32 once
    torch.testing.assert_close(got, expected.to(dtype), atol=2e-6, rtol=2e-6)


def test_weight_decay_does_not_shut_the_experts_of_ia3() -> None:
    tuned = attach(FAMILIES["mixtral"].make(), IA3())
    assert any(factors.ndim > 1 for factors in tuned.trainable().values())
    assert tuned.undecayed() == set(tuned.trainable())


def test_ia3_reaches_the_shared_expert_and_the_dense_block() -> None:
    tuned = attach(model("qwen2_moe"), IA3())
    shapes = {n: tuple(p.shape) for n, p in tuned.trainable().items() if "self_attn" not in n}
    assert shapes == {
        "model.layers.0.mlp.down_proj.ia3_default.l": (48,),
        "model.layers.1.mlp.shared_expert.down_proj.ia3_default.l": (40,),
        "model.layers.1.mlp.experts.ia3_default.down_proj.l": (4, 24),
    }


@pytest.mark.parametrize("first", ["lora", "ia3"])
def test_lora_and_ia3_on_the_same_experts_merge_as_they_act(first: str, trained: Trained) -> None:
    both = (LoRA(rank=4, targets=EXPERTS), IA3())
    tuned = trained(attach(model(), *(both if first == "lora" else both[::-1])))
    on = logits(tuned.model)
    tuned.merge()
    torch.testing.assert_close(logits(tuned.model), on, atol=5e-6, rtol=1e-5)
    tuned.detach()
    assert torch.equal(logits(tuned.model), logits(model()))


def test_ia3_in_experts_is_saved_but_not_for_peft(trained: Trained, tmp_path: Path) -> None:
    tuned = trained(attach(model(), IA3()))
    with pytest.raises(MethodError, match=r"PEFT's IA3 reaches linear maps only"):
        tuned.export_peft(tmp_path / "peft")
    tuned.save(tmp_path / "own")
    assert torch.equal(logits(load_adapter(model(), tmp_path / "own").model), logits(tuned.model))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=4, dora=True), r"method\.dora works on whole weights"),
        (LoRA(rank=4, init="pissa"), r"method\.init: pissa works on whole weights"),
        (LoRA(rank=33, targets=["mlp.down"]), r"method\.rank: 33 is larger"),
        (VeRA(targets=["mlp.up"]), r"mlp\.up of this mixtral is a weight of 4 fused experts"),
        (AdaLoRA(targets=["mlp.down"]), r"mlp\.down of this mixtral is a weight of 4 fused"),
        (BitFit(targets=["mlp.up"], add_missing=True), r"lora acts there"),
        (DiffPruning(targets=["mlp.up"]), r"lora acts there"),
        (IA3(targets=["mlp.up"]), r"ia3 on the input of mlp\.down"),
        (IA3(targets=["mlp.up"], inputs=["mlp.up"]), r"computes several sites from one input"),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_what_cannot_act_in_experts_says_so(method: Method, message: str) -> None:
    made = model()
    with pytest.raises(MethodError, match=message):
        attach(made, method)
    assert torch.equal(logits(made), logits(model()))
    assert made.config._experts_implementation == "grouped_mm"


def test_another_implementation_is_refused_at_attaching_and_after() -> None:
    made = model()
    made.config._experts_implementation_internal = "deepgemm"
    with pytest.raises(MethodError, match=r"by 'deepgemm', where nothing can be added"):
        attach(made, LoRA(rank=4))
    made = model()
    tuned = attach(made, LoRA(rank=4))
    made.set_experts_implementation("eager")
    with pytest.raises(MethodError, match=r"changed to 'eager' after a method was attached"):
        logits(made)
    with tuned.disabled():
        torch.testing.assert_close(logits(made), logits(model()))


def test_experts_with_an_adapter_compile_as_one_graph(trained: Trained) -> None:
    tuned = trained(attach(model(), LoRA(rank=4, targets=EXPERTS)))
    experts, _ = experts_of(tuned)
    index, shares = routes(7)
    x, shares = torch.randn(7, 32), shares.float()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, shares), experts(x, index, shares))


def test_an_input_scale_starts_as_nothing() -> None:
    weight = torch.randn(4, 5, 6)
    assert torch.equal(ExpertInputScale(4, 6).merged(weight), weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [3, 8, 16])
def test_any_rank_runs_in_products_of_groups_on_the_gpu(rank: int, trained: Trained) -> None:
    made = model().to("cuda", torch.bfloat16)
    tuned = trained(attach(made, LoRA(rank=rank, targets=EXPERTS)))
    ids = IDS.to("cuda")
    together = made(input_ids=ids, labels=ids)
    together.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in tuned.trainable().values())
    made.set_experts_implementation("tunesmith_eager")
    alone = made(input_ids=ids).logits
    torch.testing.assert_close(together.logits, alone, atol=0.1, rtol=0.05)  # bfloat16, two layers
