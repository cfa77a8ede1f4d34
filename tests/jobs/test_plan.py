"""Plans: counts are those of the real attached model, sharing divides, remedies help."""

from pathlib import Path

import pytest
import torch
import yaml

from families import FAMILIES
from tiny import tiny_llama
from tunesmith import Classification, DataSettings, ModelSettings, Run, Source, TrainSettings
from tunesmith.cli.plan_tables import plan_table
from tunesmith.engine.settings import EngineSettings
from tunesmith.errors import SpecError
from tunesmith.jobs.plan import plan
from tunesmith.jobs.probe import ready
from tunesmith.jobs.remedies import remedies
from tunesmith.measure.memory_plan import STRATEGIES, MemoryPlan, bytes_of, counts_of, shared_out
from tunesmith.methods import Compacter, Full, LoRA, PrefixTuning, VeRA
from tunesmith.methods.contract import Method
from tunesmith.objectives import SFT, Preference, Reward
from tunesmith.spec import validate

GIB = 2**30
EXAMPLES = Path(__file__).parents[2] / "examples"


def run_of(model: Path, method: Method, **engine: object) -> Run:
    return Run(
        model=ModelSettings(name=str(model), dtype="float32"),
        method=method,
        data=DataSettings(train=[Source(path="nowhere.jsonl")], max_length=64),
        train=TrainSettings(batch_size=8),
        engine=EngineSettings(**engine),
    )


def test_the_parts_of_a_plan_are_what_training_holds(tiny_model: Path) -> None:
    planned = plan(run_of(tiny_model, LoRA()), device="cuda")
    trainable = planned.counts.trainable
    assert planned.alone.trained == 4 * trainable
    assert planned.alone.gradients == 4 * trainable
    assert planned.alone.optimizer == 8 * trainable
    assert planned.alone.frozen == pytest.approx(4 * planned.counts.base, rel=0.1)
    assert planned.alone.activations > 0
    assert planned.alone.process == 0


def test_on_the_cpu_the_process_itself_counts(tiny_model: Path) -> None:
    planned = plan(run_of(tiny_model, LoRA()), device="cpu")
    assert planned.alone.process > 100 * 2**20
    assert planned.alone.peak > planned.alone.process


def test_checkpointing_and_shorter_rows_need_less(tiny_model: Path) -> None:
    run = run_of(tiny_model, LoRA())
    plain = plan(run, device="cuda")
    recomputed = plan(run_of(tiny_model, LoRA(), checkpointing="full"), device="cuda")
    shorter = plan(run, device="cuda", length=32)
    assert recomputed.alone.activations < plain.alone.activations
    assert shorter.alone.activations < 0.6 * plain.alone.activations


def test_remedies_are_enough_and_none_is_given_where_it_fits(tiny_model: Path) -> None:
    planned = plan(run_of(tiny_model, LoRA()), device="cuda")
    assert remedies(planned, planned.alone.peak) == []
    limit = int(0.6 * planned.alone.peak)
    found = remedies(planned, limit)
    assert found[-1].peak <= limit
    assert all(r.peak > limit for r in found[:-1])
    assert all(r.price for r in found)
    assert remedies(planned, 1000) == []


@pytest.mark.parametrize("size", [5, 6])
def test_smaller_micro_batches_leave_the_effective_batch_as_it_is(
    tiny_model: Path, size: int
) -> None:
    run = run_of(tiny_model, LoRA(), checkpointing="full")
    one_row = run.train.model_copy(update={"batch_size": 1, "accumulation_steps": size})
    limit = plan(run.model_copy(update={"train": one_row}), device="cuda").alone.peak
    whole = run.train.model_copy(update={"batch_size": size, "optimizer": "adamw_8bit"})
    planned = plan(run.model_copy(update={"train": whole}), device="cuda")
    changed = remedies(planned, limit)[-1].planned.run.train
    assert changed.batch_size < size
    assert changed.batch_size * changed.accumulation_steps == size


def test_no_remedy_is_given_that_is_not_needed(tiny_model: Path) -> None:
    run = run_of(tiny_model, LoRA())
    planned = plan(run, device="cuda")
    alone = plan(run_of(tiny_model, LoRA(), checkpointing="attention"), device="cuda").alone.peak
    # Selective recomputation is cheaper and tried first, and does not suffice: this replaces it.
    assert [r.change for r in remedies(planned, alone)] == ["engine.checkpointing=attention"]


def test_checkpointing_keeps_less_the_more_it_computes_again(tiny_model: Path) -> None:
    # Full: beside a frozen map of so few columns, LoRA's products are more than what they read.
    kept = [
        plan(run_of(tiny_model, Full(), checkpointing=mode), device="cuda").alone.activations
        for mode in ("none", "selective", "attention", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


@pytest.mark.parametrize("codes", ["fp8", "nf4", "int8"])
def test_codes_take_the_place_of_the_weights_of_the_blocks(tmp_path: Path, codes: str) -> None:
    layers, hidden, inner = 2, 256, 512
    tiny_llama(hidden_size=hidden, intermediate_size=inner).config.save_pretrained(tmp_path)
    run = run_of(tmp_path, LoRA())
    plain = plan(run, device="cuda")
    model = run.model.model_copy(update={"quantize": codes, "double_quantize": False})
    coded = plan(run.model_copy(update={"model": model}), device="cuda")
    attention = 2 * hidden * hidden + 2 * hidden * hidden // 2
    weights = layers * (attention + 3 * hidden * inner)
    rows = layers * (2 * hidden + 2 * hidden // 2 + 2 * inner + hidden)
    left = weights // 2 + 4 * weights // 64 if codes == "nf4" else weights + 4 * rows
    # To the rounding of each tensor.
    assert plain.alone.frozen - coded.alone.frozen == pytest.approx(4 * weights - left, abs=2**14)
    assert coded.counts == plain.counts


MEMORY = MemoryPlan(
    frozen=8 * GIB,
    trained=GIB,
    gradients=GIB,
    optimizer=2 * GIB,
    activations=4 * GIB,
    transient=GIB,
)


def test_sharing_divides_what_each_stage_of_zero_shares() -> None:
    assert shared_out(MEMORY, 4, "ddp", block=0) == MEMORY
    one, two, three = (
        shared_out(MEMORY, 4, stage, block=GIB // 4) for stage in ("zero1", "zero2", "zero3")
    )
    assert one.optimizer == two.optimizer == three.optimizer == GIB // 2
    assert (one.gradients, two.gradients, three.gradients) == (GIB, GIB // 4, GIB // 4)
    assert (one.frozen, two.frozen, three.frozen) == (8 * GIB, 8 * GIB, 2 * GIB)
    assert three.transient == GIB + GIB // 2  # two blocks are gathered
    assert shared_out(MEMORY, 4, "zero3+offload", block=0).optimizer == 0
    assert shared_out(MEMORY, 1, "zero3", block=GIB) == MEMORY


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_shares_add_up_to_the_whole(devices: int) -> None:
    shared = {stage: shared_out(MEMORY, devices, stage, block=0) for stage in STRATEGIES}
    for part in ("frozen", "trained", "gradients", "optimizer"):
        assert devices * getattr(shared["zero3"], part) == getattr(MEMORY, part)
        assert getattr(shared["fsdp"], part) == getattr(shared["zero3"], part)
        assert getattr(shared["ddp"], part) == getattr(MEMORY, part)
    weights = [memory.frozen + memory.trained for memory in shared.values()]
    assert weights == [9 * GIB, 9 * GIB // devices, 9 * GIB, 9 * GIB] + 2 * [9 * GIB // devices]
    assert shared["zero3+offload"].gradients == shared["zero3+offload"].optimizer == 0
    # Every row is of the same batch on each device: what is computed there is not shared.
    assert {memory.activations for memory in shared.values()} == {MEMORY.activations}


def test_the_rows_of_a_plan_are_there_for_every_strategy(tiny_model: Path) -> None:
    planned = plan(run_of(tiny_model, Full(keep_base=False)), device="cuda")
    table = plan_table(planned, [1, 2, 8], None)
    names = list(table.columns[0].cells)
    assert names == ["1", *(f"{n}, {s}" for n in (2, 8) for s in STRATEGIES)]
    assert planned.on(8, "zero3").trained == -(-planned.alone.trained // 8)
    assert planned.on(8, "ddp") == planned.alone


def test_the_peak_is_in_backward_or_in_the_optimisers_step() -> None:
    assert MEMORY.peak == (8 + 1 + 2 + 4 + 1) * GIB
    large = MemoryPlan(
        frozen=0,
        trained=8 * GIB,
        gradients=8 * GIB,
        optimizer=16 * GIB,
        activations=GIB,
        transient=0,
    )
    assert large.peak == 32 * GIB


def test_full_tuning_trains_every_parameter(tiny_model: Path) -> None:
    planned = plan(run_of(tiny_model, Full()), device="cuda")
    assert planned.counts.trainable == planned.counts.base


def test_sizes_and_numbers_are_read() -> None:
    assert bytes_of("24GiB") == 24 * GIB
    assert bytes_of("500 MB") == 500_000_000
    assert counts_of("1,2,8") == [1, 2, 8]
    with pytest.raises(SpecError, match="is no size"):
        bytes_of("1.2.3GiB")
    with pytest.raises(SpecError, match="is no size"):
        bytes_of("much")
    with pytest.raises(SpecError, match="no list of numbers"):
        counts_of("0")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_step_of_every_architecture_can_be_simulated(
    family: str, checkpointing: str, tmp_path: Path
) -> None:
    architecture = FAMILIES[family]
    architecture.make().config.save_pretrained(tmp_path)
    encoder = architecture.kind == "encoder"
    run = run_of(tmp_path, LoRA(), checkpointing=checkpointing).model_copy(
        update={"objective": Classification(labels=["a", "b"]) if encoder else SFT()}
    )
    planned = plan(run, device="cuda")
    assert planned.alone.frozen + planned.alone.trained > 4 * planned.counts.base
    assert planned.alone.activations > 0


def test_a_mixture_of_experts_in_float32_is_planned(tmp_path: Path) -> None:
    FAMILIES["mixtral"].make().config.save_pretrained(tmp_path)
    for method in (Full(), PrefixTuning(length=4)):
        assert plan(run_of(tmp_path, method), device="cuda").alone.peak > 0


def test_a_device_that_nothing_is_planned_for_is_refused(tiny_model: Path) -> None:
    with pytest.raises(SpecError, match="use cuda or cpu"):
        plan(run_of(tiny_model, LoRA()), device="tpu")


@pytest.mark.parametrize("method", [VeRA(rank=8), Compacter()])
def test_what_all_blocks_share_is_no_constant_of_a_compiled_block(
    method: Method, tmp_path: Path
) -> None:
    tiny_llama(num_hidden_layers=3).config.save_pretrained(tmp_path)
    compiled, plain = (
        plan(run_of(tmp_path, method, speed=speed, checkpointing="none"), device="cuda").alone
        for speed in ("compiled", "safe")
    )
    assert (compiled.frozen, compiled.trained) == (plain.frozen, plain.trained)
    # As it is written each block keeps what pointwise operations between its products make.
    assert compiled.activations < plain.activations


def example(name: str, model: Path) -> Run:
    """The objective of an example on a tiny model."""
    objective = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text("utf-8"))["objective"]
    settings = {
        "model": {"name": str(model), "dtype": "float32"},
        "method": {"name": "lora"},
        "objective": objective,
        "data": {"train": [{"path": "nowhere.jsonl"}], "max_length": 64},
        "train": {"batch_size": 4},
    }
    return validate(settings, source=name, lines={})


@pytest.mark.parametrize(
    "name",
    [
        "dpo-polite",
        "grpo-arithmetic",
        "kto-polite",
        "movie-classifier",
        "reward-harmless",
        "simpo-polite",
    ],
)
def test_the_objectives_of_the_examples_are_planned(name: str, tiny_model: Path) -> None:
    run = example(name, tiny_model)
    planned = plan(run, device="cuda").alone
    rows = run.train.model_copy(update={"batch_size": 8})
    twice = plan(run.model_copy(update={"train": rows}), device="cuda").alone
    assert planned.activations > 0
    assert twice.activations == pytest.approx(2 * planned.activations, rel=0.05)


@pytest.mark.parametrize(
    "objective",
    [Preference(), Preference(loss="kto"), *(Reward(kind=k) for k in ("pairs", "scores", "steps"))],
    ids=["dpo", "kto", "pairs", "scores", "steps"],
)
def test_judged_replies_leave_what_a_real_step_leaves(
    objective: Preference | Reward, tmp_path: Path
) -> None:
    tiny_llama(hidden_size=64, intermediate_size=128).config.save_pretrained(tmp_path)
    run = run_of(tmp_path, LoRA(), device="cpu").model_copy(update={"objective": objective})
    with ready(run, torch.device("cpu"), real_weights=False) as stage:
        left, _ = stage.measured(8, 64)
    # As with SFT, where attention goes over segments on the CPU: one more state a block is kept.
    assert plan(run, device="cpu").alone.activations == pytest.approx(left, rel=0.07)


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_classifiers_of_every_kind_are_planned(kind: str, tiny_model: Path) -> None:
    run = run_of(tiny_model, LoRA()).model_copy(update={"objective": Classification(kind=kind)})
    assert plan(run, device="cuda").alone.activations > 0
