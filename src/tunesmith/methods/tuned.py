"""A model with methods attached: train it, switch it, merge it, save it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import AdapterError, MethodError
from tunesmith.methods.adapter_files import (
    AdapterFiles,
    Record,
    base_of,
    read_adapters,
    write_adapters,
)
from tunesmith.methods.atomic import whole_directory
from tunesmith.methods.child import (
    base_parameters,
    base_state_dict,
    require_plain,
    require_uncompiled,
)
from tunesmith.methods.combine import Combination, combine, recipe
from tunesmith.methods.counts import ParameterCounts, count_parameters
from tunesmith.methods.fights import require_one_value, require_peace, shared_values
from tunesmith.methods.head import (
    HeadAttachment,
    acting_head,
    head_of,
    saved_parts,
    with_heads,
)
from tunesmith.methods.parts import Part, Parts
from tunesmith.methods.saved import require_base
from tunesmith.methods.tensors import whole
from tunesmith.models.quantize import dequantise, keep_trainable
from tunesmith.models.quiet import without_progress_bars
from tunesmith.models.sites import find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunesmith.methods.contract import Attachment, Method


class TunedModel(Parts):
    """A model and the methods attached to it; made by `attach` or `load_adapter`."""

    def __init__(self, model: PreTrainedModel) -> None:
        require_plain(model)
        keep_trainable(model)
        super().__init__(model, find_sites(model))
        self._merged: list[Attachment] = []
        self._undo_merge = ExitStack()
        self._required_grad = {n: p.requires_grad for n, p in base_parameters(model).items()}

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

    @property
    def keeps_base(self) -> bool:
        """Whether every method can be switched off, so that the untuned model can be had."""
        return all(attachment.keeps_base for attachment in self.attachments)

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
            self._detach(self.parts[before:])
            raise

    def beside(
        self, attaching: Iterator[tuple[Method, Attachment]]
    ) -> Iterator[tuple[Method, Attachment]]:
        """Yield what `attaching` attaches, each while what hangs beside the base already is off.

        A method may run the model to find its places and to start from: it is meant to see the
        base, and not what others put before its input. A head stays off where another is attached
        in its place, for a parameter has one value at a time.
        """
        while True:
            off = [a for a in self.attachments if a.enabled and not a.trains_base]
            for attachment in off:
                attachment.enable(False)
            attached = None
            try:
                attached = next(attaching, None)
            finally:
                new = frozenset() if attached is None else attached[1].trains_itself()
                for attachment in off:
                    is_head = isinstance(attachment, HeadAttachment)
                    if not (is_head and attachment.trains_itself() & new):
                        attachment.enable(True)
            if attached is None:
                return
            yield attached

    def put(self, part: Part) -> None:
        """Take in what a method has just attached, and let it train.

        Raises:
            MethodError: it fights with another of the same name over a base parameter, or stands
                on the values that another one that acts has given it.
        """
        self.parts.append(part)
        require_peace([other for other in self.parts if other.name == part.name], self.sites)
        require_one_value([p for p in self.parts if p is part or p.attachment.enabled])
        for parameter in part.attachment.trainable().values():
            parameter.requires_grad_(True)

    def load_adapter(
        self,
        name: str | None,
        directory: str | Path,
        *,
        check_base: bool = True,
        trainable: bool = True,
    ) -> None:
        """Load an adapter that Tunesmith or PEFT saved, beside those that are there.

        Args:
            name: name to give it; None keeps the one it was saved under ("default" for PEFT's).
            directory: where it was saved.
            check_base: refuse an adapter that was made on a base of another name. Sizes are checked
                in any case.
            trainable: whether it goes on training; False freezes it. A classification head that it
                brings takes the place of the one that acts, until that is used again.

        Raises:
            AdapterError: a file is damaged, or the adapter does not fit this base model; the model
                is then as it was before.
            MethodError: an adapter of this name is attached already, or the name cannot name one.
        """
        saved = read_adapters(Path(directory))
        base = base_of(self.model, self.sites)
        names = [name or (x.record.name if x.record else "default") for x in saved]
        for adapter, own in zip(saved, names, strict=True):
            require_base(adapter, base, check_name=check_base)
            self._require_free_name(own)
        with self.attaching():
            for adapter, own in zip(saved, names, strict=True):
                for part in self.beside(saved_parts(adapter, self.model, self.sites, name=own)):
                    self.put(Part(own, *part))
                if not trainable:  # at once: two heads cannot both train
                    self.freeze(own)

    def combine(
        self,
        weights: Mapping[str, float],
        *,
        name: str,
        method: Combination = "linear",
        density: float | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> float:
        """Combine LoRA adapters into a new one, which is off and frozen until asked for.

        Args:
            weights: of the adapters, by name; a negative one takes the adapter away.
            name: of the combination.
            method: linear (or cat) is the exact weighted sum of the deltas, of the summed rank; svd
                cuts that to `rank`; ties, dare_linear and dare_ties merge sparse deltas and cut.
            density: share of each delta's elements that ties and dare keep, 0.2 by default.
            rank: of the result where it is cut; the largest among the adapters by default.
            seed: of dare's random choice.

        Returns:
            The share of the combined deltas' squared norm that the rank keeps; 1 for linear.

        Raises:
            MethodError: a name is unknown or taken, an adapter is no plain LoRA, or a setting has
                no effect or is out of range.
        """
        self._require_known(tuple(weights))
        self._require_free_name(name)
        chosen = recipe(method, density=density, rank=rank, seed=seed)
        weighted = [(p, weight) for n, weight in weights.items() for p in self._named((n,))]
        with self.attaching():
            combined = combine(weighted, self.model, self.sites, chosen, name=name)
            self.put(Part(name, combined.method, combined.attachment))
        combined.attachment.enable(False)
        self.freeze(name)
        return combined.kept

    def _require_free_name(self, name: str) -> None:
        """Check that a new adapter can be called `name`.

        Raises:
            MethodError: it cannot, or one is called so already.
        """
        require_name(name)
        if name in self.adapters:
            raise MethodError(
                f"an adapter named {name!r} is already attached; give this one another name or "
                f"remove({name!r}) first"
            )

    def remove(self, name: str) -> None:
        """Detach one adapter, its parameters and hooks; the others stay as they are.

        Raises:
            MethodError: there is no adapter of that name, or the methods are merged.
        """
        if self._merged:
            raise MethodError("the methods are merged into the base; unmerge() before removing one")
        self._detach(self._named((name,)))

    def parameter_counts(self) -> ParameterCounts:
        """Return how many parameters train, of which kind, and how many the base has."""
        return count_parameters(self.trainable(), base_parameters(self.model))

    def merge(self) -> None:
        """Fold all methods that are switched on into the base weights; `unmerge` undoes it.

        A quantised base is dequantised first, all of it, since codes cannot hold what the methods
        add: until `unmerge` the model takes the memory of a plain one, and is one.

        Raises:
            MethodError: a method cannot merge, is merged, or fights with another that is on; then
                nothing is changed.
        """
        if self._merged:
            raise MethodError("the methods are merged already; unmerge() first")
        require_peace([part for part in self.parts if part.attachment.enabled], self.sites)
        acting = sorted((a for a in self.attachments if a.enabled), key=lambda a: a.turn)
        with ExitStack() as undo:
            undo.callback(dequantise(self.model))
            for attachment in acting:
                attachment.merge()
                undo.callback(attachment.unmerge)
            self._undo_merge = undo.pop_all()
        self._merged = acting

    def unmerge(self) -> None:
        """Undo `merge`: the base weights, or their codes, are again exactly what they were.

        Raises:
            MethodError: nothing is merged.
        """
        if not self._merged:
            raise MethodError("nothing is merged, so there is nothing to unmerge")
        self._undo_merge.close()
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
        self._detach(self.parts)
        return self.model

    def _detach(self, parts: Sequence[Part]) -> None:
        """Detach `parts`, the last first."""
        if self._merged:
            self.unmerge()
        gone = [part.attachment for part in parts]
        for attachment in reversed(gone):
            for parameter in attachment.trainable().values():
                parameter.requires_grad_(False)
                parameter.grad = None
            attachment.detach()
        self.parts = [part for part in self.parts if part.attachment not in gone]
        self._frozen = [attachment for attachment in self._frozen if attachment not in gone]
        self._put_heads_back()
        if not self.parts:
            for name, required in self._required_grad.items():
                self.model.get_parameter(name).requires_grad_(required)

    def _put_heads_back(self) -> None:
        """Switch on the head of an adapter that acts, where it had given way to one now gone."""
        acting = {part.name for part in self.parts if part.attachment.enabled}
        for part in self.parts:
            head = part.attachment
            if not isinstance(head, HeadAttachment) or part.name not in acting:
                continue
            if not any(shared_values(head, a) for a in self.attachments if a.enabled):
                head.enable(True)

    def files(self, *names: str) -> list[AdapterFiles]:
        """Return what `save` writes, one entry a method.

        Where parameters are sharded this gathers them: every process calls it, and one then writes
        with `write_adapters`.
        """
        base = base_of(self.model, self.sites)
        parts = self._named(names)
        files = [
            _files(part, Record(name=part.name, method=part.method, base=base))
            for part in parts
            if not isinstance(part.attachment, HeadAttachment)
        ]
        return with_heads(files, parts, self.model)

    def save(self, directory: str | Path, *names: str) -> None:
        """Save only what was trained, in PEFT's layout where PEFT knows the method.

        Several methods are saved into one folder each. The directory appears whole or not at all.

        Args:
            directory: where to.
            names: the adapters to save; all of them where none is named.

        Raises:
            MethodError: there is no adapter of that name.
            AdapterError: the directory holds other files.
            CheckpointError: it cannot be written; what was there is untouched.
        """
        write_adapters(Path(directory), self.files(*names))

    def export_peft(self, directory: str | Path) -> None:
        """Write an adapter that PEFT loads, and nothing besides.

        Raises:
            MethodError: PEFT has no format for a method.
            AdapterError: the directory holds other files.
            CheckpointError: it cannot be written; what was there is untouched.
        """
        files = self.files()
        if len(files) != 1:
            raise MethodError(
                f"a PEFT directory holds one adapter and this model has {len(files)}; "
                "use save(), which writes one such directory a method"
            )
        if files[0].config is None:
            self.attachments[0].export_peft()  # says why there is none
        write_adapters(Path(directory), [replace(files[0], record=None)])

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
    head = acting_head(tuned.attachments)
    with tuned.attaching():
        attaching = (
            (method, method.attach(tuned.model, tuned.sites, name=name))
            for method in chain(methods, head_of(tuned.model, tuned.sites))
        )
        for part in tuned.beside(attaching):
            if isinstance(part[1], HeadAttachment):
                part[1].start_from(head)
            tuned.put(Part(name, *part))
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
