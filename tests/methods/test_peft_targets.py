"""What PEFT's target_modules name, against PEFT's own matching."""

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from tiny import tiny_llama
from tunesmith.methods.peft_lora import PeftLora
from tunesmith.methods.peft_targets import by_pattern, short_names, targeted

LINEAR = [n for n, m in tiny_llama(num_hidden_layers=12).named_modules() if n.endswith("_proj")]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "up_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*(q|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    ],
    ids=str,
)
def test_the_modules_are_those_peft_would_adapt(settings: dict[str, object]) -> None:
    config = LoraConfig(**settings)
    expected = {path for path in LINEAR if bool(check_target_module_exists(config, path))}
    expected -= {path for path in LINEAR if settings.get("exclude_modules") and ".1." in path}
    assert targeted(PeftLora(peft_type="LORA", **settings), LINEAR, None) == expected


def test_the_first_pattern_that_matches_the_end_of_a_path_counts() -> None:
    patterns = {"q_proj": 2, r"layers\.1\..*": 3}
    assert by_pattern(patterns, "layers.1.q_proj", 9) == 2
    assert by_pattern(patterns, "layers.1.k_proj", 9) == 3
    assert by_pattern(patterns, "layers.11.k_proj", 9) == 9


def test_a_module_that_nothing_shorter_names_goes_by_its_whole_path() -> None:
    assert short_names({"a.0.q"}, ["a.0.q", "a.1.q", "b.a.0.q"]) == ["a.0.q"]
    assert short_names({"a.0.q", "a.1.q"}, ["a.0.q", "a.1.q", "a.0.k"]) == ["q"]
