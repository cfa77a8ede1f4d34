"""Where the memory of a run goes, on one device or shared out over several."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

from tunesmith.errors import SpecError

Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3+offload"]
STRATEGIES: Final[tuple[Strategy, ...]] = (
    "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3+offload",
)  # fmt: skip
WHOLE_WEIGHTS: Final[tuple[Strategy, ...]] = ("ddp", "zero1", "zero2")
"""Those that leave all weights on every device."""
Phase = Literal["training step", "roll-out", "scoring"]
"""Of a run that samples; other runs have steps alone."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by what they are."""

    frozen: int
    """Weights that do not train, in the dtype (or the codes) they are held in."""
    trained: int
    """Weights that train."""
    gradients: int
    """Of what trains, in its dtype."""
    optimizer: int
    """The optimiser's state."""
    activations: int
    """What the forward pass leaves for the backward pass."""
    transient: int
    """What one moment needs besides: a chunk of logits, the gradients inside a block, a weight
    that is dequantised or gathered for its product."""
    process: int = 0
    """What the process holds before anything is loaded; counted where the device is the CPU."""
    holes: int = 0
    """What was freed, stays resident and fits nothing that comes later, on the CPU."""
    beside: int = 0
    """What stands beside the model throughout and is whole on each device: a teacher, classifiers
    that reward, and on the CPU the replies at hand."""
    cache: int = 0
    """Keys and values of a roll-out."""
    rollout: int = 0
    """What a roll-out needs besides: activations of the prompts, logits, a layer's cache anew."""
    rollout_holes: int = 0
    """As `holes`, while replies are written and scored."""
    scoring: int = 0
    """What the forward passes between roll-out and training need."""
    scoring_holes: int = 0
    """As `holes`, in those."""

    @property
    def phases(self) -> dict[Phase, int]:
        """Return the most at any moment of each phase; one never begins before another ends.

        Gradients take the place of activations as backward goes, so they count where they
        outweigh them: in the optimiser's step.
        """
        held = self.frozen + self.trained + self.optimizer + self.process + self.beside
        step = self.holes + max(self.activations + self.transient, self.gradients)
        found: dict[Phase, int] = {"training step": held + step}
        if self.rollout:
            found["roll-out"] = held + self.rollout_holes + self.cache + self.rollout
        if self.scoring:
            found["scoring"] = held + self.scoring_holes + self.scoring
        return found

    @property
    def peak(self) -> int:
        """Return the most at any moment."""
        return max(self.phases.values())

    @property
    def peaks_in(self) -> Phase:
        """Return the phase with that moment."""
        phases = self.phases
        return max(phases, key=lambda phase: phases[phase])


def shared_out(plan: MemoryPlan, devices: int, strategy: Strategy, *, block: int) -> MemoryPlan:
    """Return the memory of each of `devices` that share one model.

    DDP (Li et al. 2020, arXiv:2006.15704) holds everything on each; its buckets are the gradients
    themselves, where ZeRO has them besides. ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)
    shares the optimiser's state (1), the gradients too (2), and the weights too (3), as FSDP does;
    weights are then gathered for two blocks, the one that computes and the one that comes next.

    Args:
        plan: of one device alone.
        devices: how many.
        strategy: how they share.
        block: bytes of the largest block's weights.
    """
    if devices == 1:
        return plan
    if strategy == "ddp":
        return plan
    buckets = plan.transient + plan.gradients
    parts = {"optimizer": -(-plan.optimizer // devices)}
    if strategy == "zero1":
        return replace(plan, transient=buckets, **parts)
    parts["gradients"] = -(-plan.gradients // devices)
    if strategy == "zero2":
        return replace(plan, transient=buckets, **parts)
    parts["frozen"] = -(-plan.frozen // devices)
    parts["trained"] = -(-plan.trained // devices)
    parts["transient"] = plan.transient + 2 * block
    if strategy == "zero3+offload":
        parts |= {"optimizer": 0, "gradients": 0}
    return replace(plan, **parts)


_UNITS: Final = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "gb": 10**9, "mb": 10**6}


def bytes_of(text: str) -> int:
    """Return a size such as `24GiB` or `500 MB` in bytes.

    Raises:
        SpecError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS:
        raise SpecError(f"--memory: {text!r} is no size; write 24GiB or 500MB")
    return round(float(found[1]) * _UNITS[found[2]])


def counts_of(text: str) -> list[int]:
    """Return numbers of devices such as `1,2,8`.

    Raises:
        SpecError: it is none.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise SpecError(f"--devices: {text!r} is no list of numbers; write 1,2,8")
    return [int(part) for part in text.split(",")]
