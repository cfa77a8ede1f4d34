"""AdamW over named parameters, and its state by those names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from tunesmith.errors import CheckpointError, SetupError, SpecError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor, nn

    from tunesmith.engine.settings import TrainSettings

FUSED_DEVICES = ("cpu", "cuda", "xpu")


def build_optimizer(
    trainable: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    *,
    learning_rate: float,
    scales: Mapping[str, float] | None = None,
    undecayed: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over `trainable`.

    Vectors (norms, biases, scales) do not decay: pulling them to 0 does not regularise.

    Args:
        trainable: parameters by name.
        settings: which optimiser, and its settings.
        learning_rate: of the parameters whose scale is 1.
        scales: by which the learning rate of a parameter is multiplied; 1 where not given.
        undecayed: names of matrices that do not decay either.

    Raises:
        SpecError: 8-bit state was asked for, and the parameters are sharded.
        SetupError: bitsandbytes is not installed.
    """
    groups = [
        group | {"lr": learning_rate * group["scale"]}
        for group in _groups(trainable, settings.weight_decay, scales or {}, undecayed)
    ]
    if settings.optimizer == "adamw_8bit":
        if any(isinstance(parameter, DTensor) for parameter in trainable.values()):
            raise SpecError(
                "train.optimizer: 'adamw_8bit' cannot hold its state in shards; use adamw, or "
                "engine.distribution: ddp"
            )
        return _adamw_8bit(groups, settings, learning_rate)
    fused = all(
        parameter.device.type in FUSED_DEVICES and parameter.is_floating_point()
        for parameter in trainable.values()
    )
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=settings.betas, eps=settings.eps, fused=fused
    )


def _groups(
    trainable: Mapping[str, nn.Parameter],
    decay: float,
    scales: Mapping[str, float],
    undecayed: Collection[str],
) -> list[dict[str, Any]]:
    """Return the parameters by weight decay and learning rate scale: matrices, then vectors."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in sorted(trainable.items(), key=lambda item: item[1].ndim < 2):
        decays = parameter.ndim >= 2 and name not in undecayed
        key = (decay if decays else 0.0, scales.get(name, 1.0))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def _adamw_8bit(
    groups: list[dict[str, Any]], settings: TrainSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """Return AdamW with blockwise 8-bit state (Dettmers et al. 2022, arXiv:2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise SetupError(
            "train.optimizer: 'adamw_8bit' needs bitsandbytes, which is not installed; "
            "run pip install 'tunesmith[quantize]' or use adamw"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        groups, lr=learning_rate, betas=settings.betas, eps=settings.eps
    )
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Let the next step use `learning_rate`, times the scale of each group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]


def takes_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `step_unless` can be used: PyTorch's fused AdamW can."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])


def step_unless(
    optimizer: torch.optim.Optimizer, *, left_out: Tensor, scale: Tensor | None
) -> None:
    """Update the weights, unless the device finds that the step is to be left out.

    The host does not wait for the answer. The gradients are divided by `scale` as they are read,
    which spares a pass over them.

    Args:
        optimizer: one that `takes_scale`.
        left_out: () bool.
        scale: () float32; None leaves the gradients as they are.
    """
    # Where torch.amp.GradScaler puts what it tells a fused optimiser.
    its: Any = optimizer
    its.found_inf, its.grad_scale = left_out.float(), scale
    try:
        optimizer.step()
    finally:
        del its.found_inf, its.grad_scale


def state_by_name(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | int | float]:
    """Return the optimiser's state, tensors and numbers, by `<key>/<parameter name>`."""
    return {
        f"{key}/{name}": value
        for name, parameter in trainable.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_by_name(
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor | int | float],
) -> None:
    """Take over a saved `state_by_name`.

    Raises:
        CheckpointError: the state names a parameter that does not train here.
    """
    names = {parameter: name for name, parameter in trainable.items()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    by_name: dict[str, dict[str, Tensor | int | float]] = {}
    for path, value in state.items():
        key, name = path.split("/", maxsplit=1)
        by_name.setdefault(name, {})[key] = value
    if unknown := sorted(by_name.keys() - set(order)):
        raise CheckpointError(
            f"the checkpoint's optimiser state is of '{unknown[0]}', which does not train in this "
            "run; resume with the method it was saved with"
        )
    described = optimizer.state_dict()
    described["state"] = {
        index: by_name[name] for index, name in enumerate(order) if name in by_name
    }
    optimizer.load_state_dict(described)
