"""Run directories that were moved: paths in run.yaml that moved along with the directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tunesmith.jobs.data_marks import MARK, same_data
from tunesmith.spec import Run, validate
from tunesmith.yaml_text import Place


class Move(NamedTuple):
    """From where to where, as far up as the two places differ."""

    old: Path
    new: Path

    @classmethod
    def between(cls, before: Path, now: Path) -> Move:
        """Return the move that took the directory `before` to `now`, both absolute.

        `/a/runs/chain` to `/b/runs/chain` moved `/a` to `/b`: all that the run names in `/a` may
        have moved along, what it stands on in the chain as well as its data.
        """
        while before.name == now.name and before.name:
            before, now = before.parent, now.parent
        return cls(before, now)

    def of(self, value: object) -> object:
        """Return where a path in the old place is now; anything else as it is."""
        if isinstance(value, str) and Path(value).is_relative_to(self.old):
            return str(self.new / Path(value).relative_to(self.old))
        return value


def where_it_is(run: Run, directory: Path) -> Run:
    """Return the run that was found in `directory`, with paths that are gone where they are now.

    Only paths that are not there any more, and are there in the new place, are changed.

    Raises:
        SpecError: the run says something that no run can mean.
    """
    now = directory.absolute()
    move = Move.between(Path(run.output).absolute(), now.parent)
    if move.old == move.new:
        return run

    def there(value: object) -> object:
        moved = move.of(value)
        gone = moved != value and not Path(str(value)).exists()
        return moved if gone and Path(str(moved)).exists() else value

    values = _mapped(run.model_dump(mode="json"), there) | {"output": str(now.parent)}
    return validate(values, source=str(directory / "run.yaml"), lines={})


def same_but_moved(before: str, now: str) -> bool:
    """Return whether two YAML texts with an `output` differ at most by where the outputs lie.

    What their data held is compared where both say it; files that did not move along are not there.
    """
    if before == now:
        return True
    comments = [
        [line for line in text.splitlines() if line[:1] == "#" and not line.startswith(MARK)]
        for text in (before, now)
    ]
    try:
        values = [yaml.safe_load(text) for text in (before, now)]
    except yaml.YAMLError:  # it was cut off
        return False
    if not all(isinstance(value, Mapping) and "output" in value for value in values):
        return False
    alike = comments[0] == comments[1] and same_data(before, now)
    return alike and not any(differences(*values))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Place]:
    """Yield the places at which two run files differ, but for paths that moved with `output`."""
    move = Move.between(Path(before["output"]).absolute(), Path(now["output"]).absolute())
    return _differences(before, now, move)


def _differences(one: object, other: object, move: Move, place: Place = ()) -> Iterator[Place]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), move, (*place, key))
    elif other not in (one, _mapped(one, move.of)):
        yield place


def _mapped(value: Any, change: Any) -> Any:
    """Return nested settings with `change` made to every leaf."""
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    return change(value)
