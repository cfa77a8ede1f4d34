"""Which modules a PEFT configuration means, and the shortest names for a set of modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tunesmith.methods.peft_format import PeftTargets

T = TypeVar("T")


def targeted(config: PeftTargets, linear: Collection[str], head: str | None) -> set[str] | None:
    """Return which of the `linear` maps the configuration targets, or None where it does not say.

    Args:
        config: what adapter_config.json says.
        linear: paths of the model's linear maps.
        head: path of the language-model head, which `all-linear` leaves out.
    """
    targets = config.target_modules
    if targets is None:
        return None
    kept = [path for path in linear if not _named(config.exclude_modules, path)]
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return {path for path in kept if path != head}
        return {path for path in kept if re.fullmatch(targets, path)}
    return {
        path
        for path in kept
        if path in targets or (_named(targets, path) and _layer_is_meant(config, path))
    }


def _named(names: list[str] | str | None, path: str) -> bool:
    """Return whether `path` is one of `names`, or ends in one, or matches the expression."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _layer_is_meant(config: PeftTargets, path: str) -> bool:
    """Return whether layers_to_transform, where given, holds the layer that `path` is in."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            index = int(found.group(1))
            return index in ([layers] if isinstance(layers, int) else layers)
    return False


def by_pattern(patterns: dict[str, T], path: str, default: T) -> T:
    """Return the value of the first pattern that `path` ends in, as PEFT's rank_pattern does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def short_names(meant: Collection[str], all_modules: Iterable[str]) -> list[str]:
    """Return the shortest path endings that name exactly the modules `meant`, sorted.

    `q_proj` where every module so called is meant; `attn.c_proj` where only those are; a whole path
    where nothing shorter tells it apart.
    """
    others = [path for path in all_modules if path not in meant]
    return sorted({_shortest(path, others) for path in meant})


def _shortest(path: str, others: list[str]) -> str:
    """Return the shortest ending of `path`, in whole segments, that none of `others` has."""
    segments = path.split(".")
    for count in range(1, len(segments)):
        ending = ".".join(segments[-count:])
        if not any(other == ending or other.endswith(f".{ending}") for other in others):
            return ending
    return path
