"""Steps of decoding that are counted without being simulated, against steps that are."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.measure.simulated_decoding import repeated
from tunesmith.measure.simulated_memory import Live, PhaseMemory, simulation
from tunesmith.rollout.decode import GrowingDecoder, Padded
from tunesmith.rollout.draw import Drawing

ROWS, PROMPT, LAYERS, WIDTH = 3, 5, 2, 32
CPU = torch.device("cpu")


def rolled_out(steps: int, *, all_of_them: bool) -> tuple[PhaseMemory, PhaseMemory]:
    """Return the memory of a roll-out, and of nothing after it."""
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        model = LlamaForCausalLM(config).eval()

    def write(live: Live) -> Iterable[Tensor]:
        prompts = Padded([[1] * PROMPT] * ROWS, range(ROWS), pad_token_id=0, device=CPU)
        decoder = GrowingDecoder(model, Drawing(), prompts)
        if all_of_them:
            for _ in range(steps):
                decoder.advance()
        else:
            repeated(live, decoder.advance, steps)
        return decoder.keys_and_values()

    with simulation([model], device="cuda") as simulated:
        return simulated.phase(write, padded=True), simulated.phase(lambda live: [])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20])
def test_steps_that_are_counted_are_those_that_would_be_taken(steps: int) -> None:
    counted, afterwards = rolled_out(steps, all_of_them=False)
    taken, _ = rolled_out(steps, all_of_them=True)
    assert counted == taken
    assert afterwards == PhaseMemory(peak=0, kept=0)  # nothing is left over


def test_the_cache_at_the_end_has_every_token_but_the_last() -> None:
    counted, _ = rolled_out(20, all_of_them=False)
    layer = ROWS * (PROMPT + 20) * WIDTH * 4
    rounded = -(-layer // 512) * 512
    assert counted.kept == 2 * LAYERS * rounded
    assert counted.peak > counted.kept
