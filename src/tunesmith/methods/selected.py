"""Training parameters of the base itself: what full and last-layer tuning share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.errors import MethodError
from tunesmith.methods.bridge import bridges
from tunesmith.methods.child import base_parameters
from tunesmith.methods.contract import Attachment
from tunesmith.methods.tensors import check_against, copy_into

KEEP_BASE: Final = (
    "method.keep_base: false leaves no copy of the base, so it cannot be switched back to; "
    "set keep_base: true"
)


class SelectedParameters(Attachment):
    """Base parameters that train, in float32 or in the base's dtype.

    They keep their place, name and identity (so ties stay ties); only their values are exchanged
    when the method is switched off or merged.

    Args:
        model: the model, not yet sharded.
        names: parameters to train; a tied parameter goes by its first name.
        keep_base: keep the values from before on the CPU: one copy of the selected parameters in
            the base's dtype, which `disabled` and `detach` need.
        in_float32: train them in float32; otherwise they stay in the base's dtype.

    Raises:
        MethodError: a parameter is quantised, or another method trains it.
    """

    trains_base: ClassVar[bool] = True
    puts_out_float32: ClassVar[bool] = False
    """Whether only float32 modules follow, so that outputs need not come down to the base's."""

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        *,
        keep_base: bool,
        in_float32: bool = True,
    ) -> None:
        parameters = {n: p for n, p in base_parameters(model).items() if n in names}
        for name, parameter in parameters.items():
            _require_trainable(name, parameter)
        self._model = model
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        kept = parameters if keep_base else {}
        self._base = {name: _kept(p) for name, p in kept.items()}
        self._aside: dict[str, Tensor] = {}
        """The trained values while others are in their place: switched off, or merged."""
        self._merged = False
        if in_float32:
            for parameter in parameters.values():
                parameter.data = parameter.data.float()
        # Where all of the base trains, all of it is float32 and nothing needs a bridge.
        partly = in_float32 and len(parameters) < len(base_parameters(model))
        down = not self.puts_out_float32
        self._bridges = bridges(model, self._dtypes, down=down) if partly else []

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its full name, as it is now (sharding swaps parameters)."""
        return {name: self._model.get_parameter(name) for name in self._dtypes}

    def trains_itself(self) -> frozenset[str]:
        """Return what it trains."""
        return frozenset(self._dtypes)

    @property
    def keeps_base(self) -> bool:
        """Whether the base's values were kept."""
        return self._base.keys() == self._dtypes.keys()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained values, also while the base's are in their place."""
        return dict(self._aside) or super().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved values; names and shapes must agree.

        Raises:
            AdapterError: names or shapes differ from what is selected here.
            MethodError: the method is switched off or merged.
        """
        if self._aside:
            raise MethodError("switch the method on and unmerge it before loading into it")
        parameters = self.trainable()
        check_against({name: p.shape for name, p in parameters.items()}, state)
        for name, parameter in parameters.items():
            copy_into(parameter, state[name])

    @property
    def enabled(self) -> bool:
        """Whether the trained values are in place."""
        return not self._aside

    def enable(self, on: bool, /) -> None:
        """Put the trained values in place, or the base's, bit for bit and in its dtype.

        Raises:
            MethodError: the base's values were not kept, are sharded, or are merged over.
        """
        if self._merged:
            raise MethodError("the trained weights are merged into the base; unmerge() first")
        if on == self.enabled:
            return
        if on:
            self._put_back()
        elif not self._base:
            raise MethodError(KEEP_BASE)
        else:
            self._exchange(self._base)

    @property
    def merges(self) -> bool:
        """Yes."""
        return True

    def merge(self) -> None:
        """Bring the trained values to the base's dtype: the model is then a plain one.

        The trained values stay beside them until `unmerge`.

        Raises:
            MethodError: merged already.
        """
        self.enable(True)
        values = {name: p.detach().to(self._dtypes[name]) for name, p in self.trainable().items()}
        self._exchange(values)
        self._merged = True

    def unmerge(self) -> None:
        """Put the trained values back.

        Raises:
            MethodError: nothing is merged.
        """
        if not self._merged:
            raise MethodError("nothing is merged, so there is nothing to unmerge")
        self._merged = False
        self._put_back()

    def detach(self) -> None:
        """Put the base's values back for good; without keep_base the trained ones stay."""
        if self._merged:
            self.unmerge()
        if self._base:
            self.enable(False)
        else:
            self.merge()
        self._aside.clear()
        self._dtypes.clear()
        for handle in self._bridges:
            handle.remove()
        self._bridges.clear()

    def _exchange(self, values: Mapping[str, Tensor]) -> None:
        """Put `values` in place and the present ones aside."""
        parameters = self.trainable()
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                raise MethodError(f"{name} is sharded, so its value cannot be exchanged")
        self._aside = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.device, copy=True)
        _forget_casts()

    def _put_back(self) -> None:
        """Put in place what was put aside."""
        for name, parameter in self.trainable().items():
            parameter.data = self._aside[name]
        self._aside = {}
        _forget_casts()


def _forget_casts() -> None:
    """Have autocast, which keeps its casts of weights that train, cast their values of now."""
    torch.clear_autocast_cache()


def _kept(parameter: Tensor) -> Tensor:
    """Return a copy on the CPU; of a parameter without data, such as for a plan, its shape."""
    return parameter.detach().to("meta" if parameter.is_meta else "cpu", copy=True)


def _require_trainable(name: str, parameter: Tensor) -> None:
    """Raise MethodError where a parameter cannot train."""
    if not parameter.is_floating_point():
        raise MethodError(
            f"{name} is quantised ({parameter.dtype}) and its codes have no gradient, so it cannot "
            "train; use model.quantize: none, or train beside it with a method such as lora"
        )
    if parameter.requires_grad:
        raise MethodError(
            f"{name} is trained by another method already; select it once, or freeze the adapter "
            "that trains it (trainable=False) where two take turns"
        )
