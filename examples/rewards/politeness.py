"""A reward function: 1 for a reply with a polite word and no rude one, by a list of words.

Try it on rows of your own:  tunesmith reward test examples/rewards/politeness.py --data rows.jsonl
"""

import re

POLITE = {"please", "thank", "thanks", "kindly", "happy", "glad", "sorry", "welcome", "appreciate"}
RUDE = {"stupid", "idiot", "dumb", "shut", "nonsense", "obviously", "duh", "whatever", "lazy"}


def reward(prompts: list, replies: list, **columns: list) -> list[float]:
    """Return one score from -1 (rude words only) to 1 (polite words only) a reply."""
    scores = []
    for reply in replies:
        words = re.findall(r"[a-z]+", reply.lower())
        polite = sum(word in POLITE for word in words)
        rude = sum(word in RUDE for word in words)
        scores.append((polite - rude) / max(1, polite + rude))
    return scores
