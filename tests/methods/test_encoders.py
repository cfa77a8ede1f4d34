"""What is different about methods on encoders: BERT and its like."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    PreTrainedModel,
)

from families import FAMILIES
from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods import (
    IA3,
    AdaLoRA,
    Adapter,
    BitFit,
    LastLayer,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    VeRA,
)
from tunesmith.methods.contract import Method
from tunesmith.methods.storage import load_adapter
from tunesmith.methods.tuned import TunedModel, attach

Trained = Callable[[TunedModel], TunedModel]
ENCODERS: Final = {name: arch.make for name, arch in FAMILIES.items() if arch.kind == "encoder"}
every_encoder = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS.keys())
LENGTHS: Final = (7, 3)
IDS: Final = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
MASK: Final = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
BATCH: Final = {"input_ids": IDS.where(MASK == 1, 2), "attention_mask": MASK}


def real(logits: Tensor) -> Tensor:
    """The rows of the tokens that are no padding."""
    return logits[MASK == 1]


def classifier(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A classifier of the encoder's architecture, two labels, no dropout."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(make().config).eval()


def tiny_bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return ENCODERS["bert"]()


@every_encoder
@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4),
        LoRA(rank=2, targets=["attention.q", "attention.v"]),
        AdaLoRA(rank=4, target_rank=2),
        IA3(),
    ],
    ids=["lora", "lora on q and v", "adalora", "ia3"],
)
def test_peft_loads_what_is_saved_here_with_equal_outputs(
    make: Callable[[], PreTrainedModel], method: Method, trained: Trained, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    tuned = trained(attach(model, method))
    expected = model(**BATCH).logits
    tuned.save(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(**BATCH).logits, expected, atol=1e-5, rtol=0)


@every_encoder
@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "SEQ_CLS"])
def test_a_lora_that_peft_made_gives_pefts_outputs(
    make: Callable[[], PreTrainedModel], task: str, tmp_path: Path
) -> None:
    base = classifier(make) if task == "SEQ_CLS" else AutoModel.from_config(make().config).eval()
    modules = dict(base.base_model.named_modules())
    names = {name.rpartition(".")[2] for name, x in modules.items() if isinstance(x, nn.Linear)}
    config = peft.LoraConfig(
        task_type=task, r=4, target_modules=sorted(names - {"classifier", "dense"})
    )
    model = peft.get_peft_model(deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model.eval()(**BATCH)[0]
    model.save_pretrained(tmp_path / "a")
    load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(base(**BATCH)[0], expected, atol=1e-5, rtol=0)


@every_encoder
def test_vera_gives_pefts_outputs(
    make: Callable[[], PreTrainedModel], trained: Trained, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    tuned = trained(attach(model, VeRA(rank=8, targets=["mlp.down"])))
    expected = model(**BATCH).logits
    tuned.save(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tuned.detach(), tmp_path / "a").eval()
    torch.testing.assert_close(loaded(**BATCH).logits, expected, atol=1e-5, rtol=0)


@every_encoder
def test_a_prompt_gives_the_logits_of_pefts_prompt(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """PEFT leaves its rows in the output; they are cut away here."""
    torch.manual_seed(0)
    base = make()
    tuned = attach(base, PromptTuning(tokens=5, init="random"))
    got = base(**BATCH).logits
    tuned.save(tmp_path / "a")
    tuned.detach()
    rows = tuned_rows(tmp_path / "a")
    embeds = torch.cat([rows.expand(2, -1, -1), base.get_input_embeddings()(IDS)], dim=1)
    padded = torch.cat([MASK.new_ones(2, 5), MASK], dim=1)
    expected = base(inputs_embeds=embeds, attention_mask=padded).logits[:, 5:]
    torch.testing.assert_close(real(got), real(expected), atol=1e-5, rtol=1e-5)
    # PEFT has no name for a model that fills in masked tokens, so its logits are of its own prompt.
    config = peft.PromptTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=5,
        token_dim=32,
        num_layers=2,
        num_attention_heads=4,
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(rows)
    torch.testing.assert_close(real(theirs(**BATCH).logits[:, 5:]), real(got), atol=1e-5, rtol=1e-5)


def tuned_rows(directory: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")["prompt_embeddings"]


def test_a_classifier_reads_the_first_token_and_not_the_first_row() -> None:
    model = classifier(tiny_bert)
    assert isinstance(model, BertForSequenceClassification)
    tuned = attach(model, PromptTuning(tokens=3, init="random"))
    got = model(**BATCH).logits
    rows = next(iter(tuned.trainable().values())).detach()
    with tuned.disabled(), torch.no_grad():
        embeds = torch.cat([rows.expand(2, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
        padded = torch.cat([MASK.new_ones(2, 3), MASK], dim=1)
        hidden = model.bert(inputs_embeds=embeds, attention_mask=padded).last_hidden_state
        expected = model.classifier(model.bert.pooler(hidden[:, 3:]))
    torch.testing.assert_close(got, expected)


@every_encoder
def test_a_prompt_takes_the_first_positions_and_the_text_goes_on(
    make: Callable[[], PreTrainedModel],
) -> None:
    """A prompt of tokens' embeddings is those tokens."""
    torch.manual_seed(0)
    model = make()
    front = torch.randint(3, 64, (1, 4))
    longer = torch.cat([front.expand(2, -1), IDS], dim=1)
    padded = torch.cat([MASK.new_ones(2, 4), MASK], dim=1)
    expected = model(input_ids=longer, attention_mask=padded).logits[:, 4:]
    tuned = attach(model, PromptTuning(tokens=4, init="random"))
    with torch.no_grad():
        P = next(iter(tuned.trainable().values()))
        P.copy_(model.get_input_embeddings()(front)[0])
    torch.testing.assert_close(real(model(**BATCH).logits), real(expected), atol=1e-5, rtol=1e-5)


def test_a_prompt_for_electra_is_as_wide_as_its_embeddings() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = ElectraConfig(vocab_size=64, embedding_size=16, num_attention_heads=4, **sizes)
    tuned = attach(AutoModel.from_config(config), PromptTuning(tokens=4))
    assert [p.shape for p in tuned.trainable().values()] == [(4, 16)]
    assert tuned.model(input_ids=IDS).last_hidden_state.shape == (2, 7, 32)


@every_encoder
@pytest.mark.parametrize("method", [PrefixTuning(length=3), PTuningV2(length=3)], ids=["pt", "v2"])
def test_a_prefix_takes_no_position_from_the_text(
    make: Callable[[], PreTrainedModel], method: Method
) -> None:
    model = make()
    seen: list[Any] = []
    attach(model, method)
    model.base_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    model(**BATCH)
    assert seen == [None]


def test_a_prefix_is_no_cache_so_pefts_layout_is_refused_both_ways(tmp_path: Path) -> None:
    tuned = attach(tiny_bert(), PrefixTuning(length=3))
    with pytest.raises(MethodError, match="PEFT's prefix of an encoder is a cache"):
        tuned.export_peft(tmp_path / "a")
    base = tiny_bert()
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    peft.get_peft_model(deepcopy(base), config).save_pretrained(tmp_path / "b")
    with pytest.raises(AdapterError, match="PEFT's prefix of an encoder is a cache"):
        load_adapter(base, tmp_path / "b")


@every_encoder
@pytest.mark.parametrize(
    "methods",
    [
        (PromptTuning(tokens=3), PromptTuning(tokens=5)),
        # DeBERTa's table of positions goes through its maps for queries and keys once for all rows.
        (PrefixTuning(length=3), LoRA(rank=2, targets=["attention.v", "mlp.down"])),
    ],
    ids=["prompts", "prefix and lora"],
)
def test_each_row_with_its_own_adapter_is_the_row_alone(
    make: Callable[[], PreTrainedModel], methods: tuple[Method, Method], trained: Trained
) -> None:
    tuned = attach(make(), methods[0], name="a")
    tuned = trained(attach(tuned, methods[1], name="b"))
    names, lengths = ["a", "b", None], torch.tensor([7, 3, 5])
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids = torch.randint(3, 64, (3, 7)).where(mask == 1, 2)
    tuned.use(["a", "b"])
    with tuned.rows(names):
        together = tuned.model(input_ids=ids, attention_mask=mask).logits
    for row, name, length, logits in zip(ids, names, lengths, together, strict=True):
        tuned.use(name)
        alone = tuned.model(input_ids=row[None, :length]).logits[0]
        torch.testing.assert_close(logits[:length], alone, atol=1e-5, rtol=1e-5)


def test_the_papers_small_bitfit_trains_query_and_first_feed_forward_biases() -> None:
    """Ben Zaken et al. 2022, section 4: b_q and b_m2, on BERT-base 12 (768 + 3072) numbers."""
    with torch.device("meta"):
        model = AutoModel.from_config(BertConfig())
    tuned = attach(model, BitFit(targets=["attention.q", "mlp.up"]))
    assert sum(p.numel() for p in tuned.trainable().values()) == 12 * (768 + 3072)
    places = {name.split(".bias_")[0] for name in tuned.trainable()}
    assert places == {
        f"encoder.layer.{i}.{leaf}"
        for i in range(12)
        for leaf in ("attention.self.query", "intermediate.dense")
    }


def test_bitfit_trains_every_bias_of_bert_but_the_heads() -> None:
    model = tiny_bert()
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    tuned = attach(model, BitFit())
    trained = {name.split(".bias_")[0] + ".bias" for name in tuned.trainable()}
    assert trained == {name for name in biases if name.startswith("bert.")}


def test_last_layer_leaves_the_norm_out_where_there_is_none() -> None:
    tuned = attach(tiny_bert(), LastLayer())
    assert {name[: len("bert.encoder.layer.1.")] for name in tuned.trainable()} == {
        "bert.encoder.layer.1."
    }
    modern = attach(ENCODERS["modernbert"](), LastLayer(blocks=0))
    assert list(modern.trainable()) == ["model.final_norm.weight"]


@pytest.mark.parametrize("method", [LastLayer(norm=True), LastLayer(blocks=0)], ids=["norm", "all"])
def test_last_layer_refuses_a_norm_that_is_not_there(method: LastLayer) -> None:
    with pytest.raises(MethodError, match=r"method\.norm: a bert has no norm after its last"):
        attach(tiny_bert(), method)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_an_adapter_changes_the_branch_before_it_is_added_and_normalised(
    placement: Any, trained: Trained
) -> None:
    """BERT's block written out: LN(x + branch), with each placement's adapter in its paper's
    place."""
    model = tiny_bert().double()
    trained(attach(model, Adapter(placement=placement, bottleneck=4)))
    layer = model.bert.encoder.layer[0]
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    model(input_ids=IDS)
    x, out = seen[0]

    def linear(module: nn.Module, h: Tensor) -> Tensor:
        return F.linear(h, module.weight.double(), module.bias.double())

    def adapted(place: nn.Module, h: Tensor) -> Tensor:
        """W_up f(W_down h), with the paper's f."""
        f = F.gelu if placement == "houlsby" else F.relu
        return linear(place.adapter_default.up, f(linear(place.adapter_default.down, h)))

    branch = linear(layer.attention.output.dense, layer.attention.self(x)[0])
    if placement == "houlsby":
        branch = branch + adapted(layer.attention.output.dense, branch)
    middle = layer.attention.output.LayerNorm(x + branch)
    feed_forward = linear(layer.output.dense, F.gelu(linear(layer.intermediate.dense, middle)))
    change = adapted(layer.output.dense, middle if placement == "parallel" else feed_forward)
    feed_forward = feed_forward + (4.0 if placement == "parallel" else 1.0) * change
    expected = layer.output.LayerNorm(middle + feed_forward)
    torch.testing.assert_close(out, expected)
