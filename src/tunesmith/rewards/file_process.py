"""The process that calls a user's reward function; started by path, imports nothing of ours.

One line of JSON asks ({"prompts", "replies", "columns"}), one answers ({"scores"} or {"error"}).
"""

import importlib.util
import inspect
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

WATCH_SECONDS = 1.0
SIGNATURE = "(prompts, replies, **columns) -> a list of one float a row"


def load(path: str, name: str) -> Callable[..., Any]:
    """Return the function `name` of the file.

    Raises:
        ValueError: the file cannot be loaded, or its function takes other arguments.
    """
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location("tunesmith_reward_file", path)
    if spec is None or spec.loader is None:
        raise ValueError("is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # noqa: BLE001 - whatever a user's file raises
        raise ValueError(f"cannot be loaded: {explain(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"has no function {name!r}; it has {', '.join(known) or 'none'}")
    parameters = inspect.signature(function).parameters
    if {"prompts", "replies"} - set(parameters):
        given = f"({', '.join(parameters)})"
        raise ValueError(f"{name}{given} must have the signature {SIGNATURE}")
    return function


def explain(error: BaseException, path: str) -> str:
    """Return an exception in one line, with the line of the user's file that it comes from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def accepted(function: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Return those columns that the function takes.

    Raises:
        ValueError: it asks for one that the rows do not have.
    """
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind in {
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        }
        if needed and name not in {"prompts", "replies", *columns}:
            known = ", ".join(columns) or "none"
            raise ValueError(f"asks for the column {name!r}; the rows' further columns: {known}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {k: v for k, v in columns.items() if k not in {"prompts", "replies"}}
    return {name: value for name, value in columns.items() if name in parameters}


def answer(function: Callable[..., Any], task: dict[str, Any], path: str) -> dict[str, Any]:
    """Call the function for one task; what is wrong with one score stands in its place as text."""
    try:
        columns = accepted(function, task["columns"])
        scores = list(function(prompts=task["prompts"], replies=task["replies"], **columns))
    except ValueError as error:
        own = str(error) if not error.__traceback__ or is_ours(error, path) else None
        return {"error": own or f"raised {explain(error, path)}"}
    except BaseException as error:  # noqa: BLE001 - whatever a user's function raises
        return {"error": f"raised {explain(error, path)}"}
    if len(scores) != len(task["replies"]):
        return {"error": f"returned {len(scores)} scores for {len(task['replies'])} replies"}
    return {"scores": [number(score) for score in scores]}


def is_ours(error: BaseException, path: str) -> bool:
    """Whether the exception was raised outside of the user's file."""
    return all(f.filename != path for f in traceback.extract_tb(error.__traceback__))


def number(score: object) -> float | str:
    """Return the score as a float, or what is wrong with it."""
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return f"the score is {score!r}, which is no number"


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone, also while the function hangs."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def main() -> None:
    """Load the function, then answer line by line until the parent goes."""
    path, name = sys.argv[1:]
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # The function may print; what it prints must not get among the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        function = load(path, name)
    except ValueError as error:
        say({"error": str(error)})
        return
    say({"ready": True})
    for line in sys.stdin:
        say(answer(function, json.loads(line), path))


if __name__ == "__main__":
    main()
