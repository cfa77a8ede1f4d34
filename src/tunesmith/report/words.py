"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tunesmith.types import LOWER_IS_BETTER

SHARES: Final = {
    "accuracy", "token_accuracy", "exact_match", "macro_f1", "micro_f1", "best_micro_f1",
    "entity_f1", "entity_precision", "entity_recall",
}  # fmt: skip
"""Metrics from 0 to 1 that are read as a percentage."""
NEITHER_IS_BETTER: Final = {
    "threshold", "kl", "length", "ended", "chosen_reward", "rejected_reward", "chosen_log_prob",
    "rejected_log_prob", "mean_reward", "reward_mean", "reward_std", "length_correlation",
    "length_only_accuracy",
}  # fmt: skip
_NAMES: Final = {
    "bleu": "BLEU", "rouge_l": "ROUGE-L", "mcc": "MCC", "mse": "Mean squared error",
    "entity_f1": "Entity F1", "macro_f1": "Macro-F1", "micro_f1": "Micro-F1",
    "best_micro_f1": "Micro-F1 at the best threshold",
    "threshold": "Best threshold",
    "kl": "KL to the reference (nats per reply)", "length": "Tokens per reply",
    "ended": "Share of replies that end by themselves",
}  # fmt: skip


def metric_name(name: str) -> str:
    """Return a metric's name as a heading: `Token accuracy`."""
    return _NAMES.get(name) or spaced(name).capitalize()


def spaced(key: str) -> str:
    """Return a key with spaces for underscores."""
    return key.replace("_", " ")


def metric(name: str, value: float | None) -> str:
    """Return a metric's value: `71.3 %`, `1.0421`, or a dash where there is none."""
    if value is None:
        return "\u2013"
    if name in SHARES:
        return f"{100 * value:.1f}\u202f%"
    return f"{value:,.{_digits(name, value)}f}"


def change(name: str, before: float | None, after: float | None) -> str:
    """Return how far a metric moved, with its sign: `+12.3 points`, `-0.4210`."""
    if before is None or after is None:
        return "\u2013"
    if name in SHARES:
        return f"{100 * (after - before):+.1f} points"
    return f"{after - before:+,.{_digits(name, before)}f}"


def _digits(name: str, value: float) -> int:
    return 2 if name == "bleu" or abs(value) >= 10 else 4


def improved(name: str, before: float | None, after: float | None) -> bool | None:
    """Return whether a metric got better; None where it cannot be said."""
    if before is None or after is None or before == after or name in NEITHER_IS_BETTER:
        return None
    return (after < before) == (name in LOWER_IS_BETTER)


def count(value: float) -> str:
    """Return a number with thousands separated."""
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Return bytes in the unit that fits: `1.4 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def duration(seconds: float) -> str:
    """Return seconds as `42 s`, `3 min 7 s` or `2 h 3 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as rows (place, text), without what is empty."""
    rows = []
    for key, value in content.items():
        place = f"{prefix}{spaced(str(key))}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{place} / ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows += flat({f"{key} {n}": item for n, item in enumerate(value, 1)}, prefix)
        elif value not in (None, [], ""):
            rows.append((place, _text(str(key), value)))
    return rows


def _text(key: str, value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key.endswith("bytes"):
        return size(value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)
