"""Iterated DPO: sample, score, form pairs, train, and again from what came out.

Each round is a run like any other, on pairs that the policy of the round before it wrote (Xiong et
al. 2023, arXiv:2312.11456; Guo et al. 2024, arXiv:2402.04792). Its reference is the policy that it
starts from, so KL is bounded to the last round and not to the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith.data.settings import Source
from tunesmith.errors import DataError, TrainingError
from tunesmith.jobs.align_stages import Step, asked_before, in_a_process, run_step
from tunesmith.jobs.run_directory import write_text

if TYPE_CHECKING:
    from tunesmith.jobs.align_replies import JudgedPrompt
    from tunesmith.jobs.align_spec import OnlineSettings
    from tunesmith.rewards.contract import Reward
    from tunesmith.spec import Run
    from tunesmith.types import JSON

Say = Callable[[str], None]
Pair = dict[str, Any]


def run_rounds(run: Run, online: OnlineSettings, needs: tuple[Path, ...], say: Say) -> None:
    """Run all rounds that are not finished yet; the last one's directory holds the result.

    Args:
        run: the stage's run; its training data are the prompts.
        online: how many rounds, and how pairs are made.
        needs: files that the stage builds on.
        say: told in a line what was done.

    Raises:
        TrainingError: a round failed; its own message was printed.
    """
    from tunesmith.jobs.align import merge_once

    folder = run.directory
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, online.rounds + 1):
        pairs = folder / f"pairs-{number}.jsonl"
        this = round_of(run, number, pairs)
        # What pairs depend on is the model that wrote them, which `needs` and the run tell.
        asked = Step("", run, needs).to_text() + yaml.safe_dump(
            {"online": online.model_dump(mode="json")}, allow_unicode=True
        )
        mark = pairs.with_suffix(".asked")
        if not (pairs.is_file() and asked_before(mark, asked)):
            say(f"{run.name}, round {number}: writing and scoring replies")
            mark.unlink(missing_ok=True)
            if in_a_process(write_pairs, run, this, (online, number), pairs) != 0:
                raise TrainingError(f"{run.name}, round {number}: no pairs; the message is above")
            write_text(mark, asked)
        step = Step(f"{run.name}, round {number}", this, (*needs, pairs))
        run_step(step, say)
        needs = (*needs, pairs, step.directory.summary)
        if number < online.rounds:
            merge_once(this.directory, say)


def round_of(run: Run, number: int, pairs: Path) -> Run:
    """Return the run of one round: its pairs, on what the round before it left."""
    model = run.model
    if number > 1:
        before = run.directory / f"round-{number - 1}" / "merged"
        model = model.model_copy(update={"name": str(before), "adapter": None})
    # A part held out of pairs that are new in each round would judge no two rounds alike.
    data = run.data.model_copy(update={"train": [Source(path=str(pairs))], "holdout": 0})
    return run.model_copy(
        update={
            "name": f"round-{number}",
            "output": str(run.directory),
            "model": model,
            "data": data,
        }
    )


def write_pairs(run: Run, this: Run, settings: tuple[OnlineSettings, int], pairs: Path) -> None:
    """Write the pairs that the model which `this` starts from makes of the round's prompts.

    Raises:
        DataError: the rewards of all replies to each prompt are equal, so that no pair is left.
    """
    from tunesmith.jobs.align_replies import Asking, Writing, held_out_prompts, said_text, seeds_of
    from tunesmith.jobs.reward_runs import open_reward_run
    from tunesmith.rewards.build import build_reward

    online, number = settings
    reward = build_reward(online.rewards, open_reward_run)
    asking = Asking.of(this)
    prompts = held_out_prompts(run.data.train, asking.tokenizer, None, setting="data.train")
    first = (number - 1) * online.prompts
    asked = [prompts[at % len(prompts)] for at in range(first, first + online.prompts)]
    repeated = [one for one in asked for _ in range(online.samples)]
    how = Writing(online.temperature, online.max_new_tokens, online.batch_size, run.seed)
    seeds = seeds_of(run.seed, len(repeated), first=first * online.samples)
    replies = asking.write([one.input_ids for one in repeated], how, seeds)
    texts = [said_text(asking.tokenizer, reply.tokens) for reply in replies]
    found = best_and_worst(asked, texts, [reply.ended for reply in replies], reward)
    if not found:
        raise DataError(
            f"{run.name}, round {number}: all replies to each of {len(asked)} prompts have equal "
            "rewards, so none is better; raise online.temperature or use a finer reward"
        )
    write_text(pairs, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found))


def best_and_worst(
    asked: Sequence[JudgedPrompt], texts: Sequence[str], ended: Sequence[bool], reward: Reward
) -> list[Pair]:
    """Return a pair for each prompt whose replies differ in reward: the best and the worst.

    Args:
        asked: the prompts.
        texts: their replies, equally many a prompt, in the order of the prompts.
        ended: whether each ended by itself; where one was full, a pair teaches no end of it.
        reward: scores them.
    """
    samples = len(texts) // len(asked)
    owners = [one for one in asked for _ in range(samples)]
    rows = [one.scored(text) for one, text in zip(owners, texts, strict=True)]
    scores = reward(rows)
    pairs = []
    for number, one in enumerate(asked):
        own = range(number * samples, (number + 1) * samples)
        best, worst = max(own, key=scores.__getitem__), min(own, key=scores.__getitem__)
        if scores[best] > scores[worst]:
            pairs.append(
                {
                    "messages": list(one.messages),
                    **({"tools": list(one.tools)} if one.tools else {}),
                    "chosen": _said(texts[best], ended=ended[best]),
                    "rejected": _said(texts[worst], ended=ended[worst]),
                }
            )
    return pairs


def _said(text: str, *, ended: bool) -> JSON:
    """Return a reply as a row of pairs has it."""
    return text if ended else {"role": "assistant", "content": text, "unfinished": True}
