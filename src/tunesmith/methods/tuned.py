"""A model with methods attached: train it, switch it, merge it, save it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods.adapter_files import (
    AdapterFiles,
    Record,
    base_of,
    write_adapters,
)
from tunesmith.methods.atomic import whole_directory
from tunesmith.methods.child import (
    base_parameters,
    base_state_dict,
    require_plain,
    require_uncompiled,
)
from tunesmith.methods.counts import ParameterCounts, count_parameters
from tunesmith.methods.tensors import check_against, whole
from tunesmith.models.quiet import without_progress_bars
from tunesmith.models.sites import find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunesmith.methods.contract import Attachment, Method
    from tunesmith.types import JSON


class Part(NamedTuple):
    """One method on the model."""

    name: str
    """Name of the adapter; parts attached together share it."""
    method: Method
    attachment: Attachment


class TunedModel:
    """A model and the methods attached to it; made by `attach` or `load_adapter`."""

    def __init__(self, model: PreTrainedModel) -> None:
        require_plain(model)
        self.model = model
        self.sites = find_sites(model)
        self.parts: list[Part] = []
        self._merged: list[Attachment] = []
        self._required_grad = {n: p.requires_grad for n, p in base_parameters(model).items()}

    @property
    def attachments(self) -> list[Attachment]:
        """What the methods put on the model, in the order of attaching."""
        return [part.attachment for part in self.parts]

    @property
    def trains_base(self) -> bool:
        """Whether base parameters train in float32.

        Beside a base in another dtype, forward passes then need autocast, or `merge` before.
        """
        return any(attachment.trains_base for attachment in self.attachments)

    @property
    def identity_at_start(self) -> bool:
        """Whether every method leaves the base's logits alone until the first step."""
        return all(attachment.identity_at_start for attachment in self.attachments)

    @contextmanager
    def attaching(self) -> Iterator[None]:
        """Freeze the base, and detach, should the block fail, what it attached.

        Raises:
            MethodError: the model is compiled, or its methods are merged.
        """
        if self._merged:
            raise MethodError("the methods are merged into the base; unmerge() before attaching")
        require_uncompiled(self.model)
        before = len(self.parts)
        if not self.parts:
            self.model.requires_grad_(False)
        try:
            yield
        except BaseException:
            self._detach_from(before)
            raise

    def put(self, part: Part) -> None:
        """Take in what a method has just attached, and let it train."""
        self.parts.append(part)
        for parameter in part.attachment.trainable().values():
            parameter.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return all that trains, by its full name in the model."""
        return {n: p for a in self.attachments for n, p in a.trainable().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that trains by name, whole and on the CPU.

        As with PyTorch's own, parameters on the CPU share their memory with it. Where parameters
        are sharded this gathers them, so every process calls it.
        """
        return {n: whole(t) for a in self.attachments for n, t in a.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved `state_dict`.

        Raises:
            AdapterError: names or shapes differ from what trains here; nothing is changed.
        """
        check_against({name: p.shape for name, p in self.trainable().items()}, state)
        for attachment in self.attachments:
            attachment.load_state_dict({name: state[name] for name in attachment.trainable()})

    def learning_rate_scales(self) -> dict[str, float]:
        """Return what the learning rate of each trainable is multiplied by, by its full name."""
        return {n: a.learning_rate_scale(n) for a in self.attachments for n in a.trainable()}

    def parameter_counts(self) -> ParameterCounts:
        """Return how many parameters train, of which kind, and how many the base has."""
        return count_parameters(self.trainable(), base_parameters(self.model))

    def enable(self, on: bool, /, *names: str) -> None:
        """Switch the adapters called `names` on or off, all of them where none is named.

        Raises:
            MethodError: there is no adapter of that name, or it cannot be switched.
        """
        for part in self._named(names):
            part.attachment.enable(on)

    @contextmanager
    def disabled(self, *names: str) -> Iterator[None]:
        """Switch adapters off inside a `with` block; with all off, the model is the base model.

        Raises:
            MethodError: there is no adapter of that name, or it cannot be switched.
        """
        with ExitStack() as stack:
            for part in self._named(names):
                stack.enter_context(part.attachment.disabled())
            yield

    def merge(self) -> None:
        """Fold all methods that are switched on into the base weights; `unmerge` undoes it.

        Raises:
            MethodError: a method cannot merge, or is merged; then nothing is changed.
        """
        if self._merged:
            raise MethodError("the methods are merged already; unmerge() first")
        acting = [attachment for attachment in self.attachments if attachment.enabled]
        with ExitStack() as undo:
            for attachment in acting:
                attachment.merge()
                undo.callback(attachment.unmerge)
            undo.pop_all()
        self._merged = acting

    def unmerge(self) -> None:
        """Undo `merge`: the base weights are again exactly what they were.

        Raises:
            MethodError: nothing is merged.
        """
        if not self._merged:
            raise MethodError("nothing is merged, so there is nothing to unmerge")
        for attachment in reversed(self._merged):
            attachment.unmerge()
        self._merged = []

    @contextmanager
    def merged(self) -> Iterator[PreTrainedModel]:
        """Give the model with all methods merged, inside a `with` block."""
        if self._merged:
            yield self.model
            return
        self.merge()
        try:
            yield self.model
        finally:
            self.unmerge()

    def detach(self) -> PreTrainedModel:
        """Remove all methods and return the model, which is the plain base again."""
        self._detach_from(0)
        return self.model

    def _detach_from(self, first: int) -> None:
        """Detach all parts from the one numbered `first` on."""
        for part in reversed(self.parts[first:]):
            for parameter in part.attachment.trainable().values():
                parameter.requires_grad_(False)
                parameter.grad = None
            part.attachment.detach()
        del self.parts[first:]
        self._merged.clear()
        if not self.parts:
            for name, required in self._required_grad.items():
                self.model.get_parameter(name).requires_grad_(required)

    def penalty(self) -> Tensor | None:
        """Return the sum () of the methods' penalties, or None where none has one."""
        terms = [t for a in self.attachments if (t := a.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def on_step(self, step: int, total: int) -> None:
        """Let every method act after optimiser step `step` of `total`."""
        for attachment in self.attachments:
            attachment.on_step(step, total)

    def extra_state(self) -> dict[str, JSON]:
        """Return what besides the trainables decides the steps to come."""
        return {str(i): a.extra_state() for i, a in enumerate(self.attachments)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over a saved `extra_state`."""
        for index, attachment in enumerate(self.attachments):
            attachment.load_extra_state(state[str(index)])

    def files(self) -> list[AdapterFiles]:
        """Return what `save` writes, one entry a method.

        Where parameters are sharded this gathers them: every process calls it, and one then writes
        with `write_adapters`.
        """
        base = base_of(self.model, self.sites)
        return [
            _files(part, Record(name=part.name, method=part.method, base=base))
            for part in self.parts
        ]

    def save(self, directory: str | Path) -> None:
        """Save only what was trained, in PEFT's layout where PEFT knows the method.

        Several methods are saved into one folder each. The directory appears whole or not at all.

        Raises:
            AdapterError: the directory holds other files.
            CheckpointError: it cannot be written; what was there is untouched.
        """
        write_adapters(Path(directory), self.files())

    def export_peft(self, directory: str | Path) -> None:
        """Write an adapter that PEFT loads, and nothing besides.

        Raises:
            MethodError: PEFT has no format for a method.
            AdapterError: the directory holds other files.
            CheckpointError: it cannot be written; what was there is untouched.
        """
        if len(self.parts) != 1:
            raise MethodError(
                f"a PEFT directory holds one adapter and this model has {len(self.parts)}; "
                "use save(), which writes one such directory a method"
            )
        files = self.attachments[0].export_peft()
        write_adapters(Path(directory), [AdapterFiles(files.tensors, files.config, None)])

    def export_model(
        self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Write a plain transformers directory with everything merged; the model stays as it is.

        Raises:
            MethodError: a method cannot merge.
            AdapterError: the directory is not empty.
            CheckpointError: it cannot be written.
        """
        target = Path(directory)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise AdapterError(f"{target} exists and is not empty; choose another directory")
        with self.merged() as model, without_progress_bars(), whole_directory(target) as partial:
            model.save_pretrained(partial, state_dict=base_state_dict(model))
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)

    def _named(self, names: tuple[str, ...]) -> list[Part]:
        """Return the parts called `names`, or all."""
        known = {part.name for part in self.parts}
        for name in names:
            if name not in known:
                raise MethodError(f"no adapter is named {name!r}; there are {sorted(known)}")
        return [part for part in self.parts if not names or part.name in names]


def attach(
    model: PreTrainedModel | TunedModel, *methods: Method, name: str = "default"
) -> TunedModel:
    """Put `methods` on a model, side by side, and freeze all that they do not train.

    Args:
        model: a plain model, or a tuned one, which then has these methods besides.
        methods: what to train.
        name: tells several adapters on one model apart.

    Raises:
        MethodError: a method cannot work on this model; the model is then as it was before.
    """
    if not methods:
        raise MethodError("attach needs a method, such as LoRA()")
    require_name(name)
    tuned = model if isinstance(model, TunedModel) else TunedModel(model)
    with tuned.attaching():
        for method in methods:
            attachment = method.attach(tuned.model, tuned.sites, name=name)
            tuned.put(Part(name, method, attachment))
    return tuned


def require_name(name: str) -> None:
    """Check that `name` can name an adapter, and so a module.

    Raises:
        MethodError: it cannot.
    """
    if not name.isidentifier():
        raise MethodError(f"{name!r} cannot name an adapter; use letters, digits and _")


def _files(part: Part, record: Record) -> AdapterFiles:
    """Return the files of one part: in PEFT's layout, or by the names of its state_dict."""
    try:
        files = part.attachment.export_peft()
    except MethodError:
        state = {name: whole(t) for name, t in part.attachment.saved_tensors().items()}
        return AdapterFiles(state, None, record)
    return AdapterFiles(files.tensors, files.config, record)
