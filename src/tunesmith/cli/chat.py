"""`tunesmith chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunesmith.jobs.result import LoadedRun

HELP = """/base    answer with the untuned model
/tuned   answer with the tuned model
/both    answer with both, one after the other
/clear   forget the conversation
/quit    leave (also Ctrl-D)"""
WHO = {"tuned": ("tuned",), "base": ("base",), "both": ("base", "tuned")}


def chat(
    run_directory: Annotated[str, typer.Argument(help="Run directory, as in runs/demo.")],
    *,
    system: Annotated[str | None, typer.Option(help="System turn.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 512,
    seed: Annotated[int, typer.Option(help="Decides what is sampled.")] = 0,
) -> None:
    """Talk to a run's result; /base and /both bring in the untuned model."""
    from tunesmith.errors import SpecError
    from tunesmith.jobs.result import load_run
    from tunesmith.jobs.run_directory import open_finished

    _, run = open_finished(run_directory)
    if run.objective.head != "causal_lm":
        raise SpecError(
            f"{run_directory}: its objective is {run.objective.name}, so it does not chat; use "
            f'`tunesmith predict {run_directory} --text "..."`'
        )
    loaded = load_run(run_directory)
    print(f"{run.name}: {run.method_name} on {run.model.name}. /help lists commands.")
    talk(loaded, system=system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


def talk(
    loaded: LoadedRun, *, system: str | None, temperature: float, max_new_tokens: int, seed: int
) -> None:
    """Read lines and answer them until /quit or the end of the input."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    mode = "tuned"
    while (line := _ask(mode)) is not None:
        if line.startswith("/"):
            command = line[1:]
            if command in WHO:
                mode = command
            elif command == "clear":
                messages = list(opening)
            elif command == "quit":
                return
            else:
                print(HELP)
            continue
        messages.append({"role": "user", "content": line})
        for who in WHO[mode]:
            reply = _answer(
                loaded,
                messages,
                who=who,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
        messages.append({"role": "assistant", "content": reply})


def _ask(mode: str) -> str | None:
    """Return the next line that says something, or None at the end."""
    while True:
        try:
            line = input(f"\n[{mode}] you: ").strip()
        except EOFError:
            print()
            return None
        if line:
            return line


def _answer(
    loaded: LoadedRun,
    messages: list[dict[str, str]],
    *,
    who: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> str:
    from contextlib import nullcontext

    from tunesmith.rollout.chat import stream_reply

    reply = ""
    print(f"{who}: ", end="", flush=True)
    with loaded.tuned.disabled() if who == "base" else nullcontext():
        for piece in stream_reply(
            loaded.tuned.model,
            loaded.tokenizer,
            messages,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
        ):
            print(piece, end="", flush=True)
            reply += piece
    print()
    return reply
