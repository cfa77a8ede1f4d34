"""Two reward functions for problems with a number as their answer (column `answer`).

tunesmith reward test examples/rewards/arithmetic.py --function closeness --data rows.jsonl
"""

import re


def last_number(text: str) -> int | None:
    """Return the last whole number of a text, or None."""
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def reward(prompts: list, replies: list, answer: list, **columns: list) -> list[float]:
    """Return 1 for the right number, 0.1 for any number, else 0."""
    return [
        0.0 if said is None else 1.0 if said == right else 0.1
        for said, right in zip(map(last_number, replies), map(int, answer), strict=True)
    ]


def closeness(prompts: list, replies: list, answer: list, **columns: list) -> list[float]:
    """Return from 1 (the right number) down to 0, the further the reply is from it."""
    return [
        0.0 if said is None else 1 / (1 + abs(said - right) / (1 + abs(right)))
        for said, right in zip(map(last_number, replies), map(int, answer), strict=True)
    ]
