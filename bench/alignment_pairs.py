"""More of the pairs, or more often: what each teaches the losses of the table of pairs."""

from alignment_words import MISSING, Found, command, counted, minutes, number, side_by_side, table

HELD_OUT = 150
"""Pairs at the end of the file that no run learned from."""


def more_pairs(found: Found) -> str:
    """Return the runs of `polite-preferences-more`: their names are loss, rows and epochs."""
    if "polite-preferences-more" not in found:
        return MISSING
    one = found["polite-preferences-more"]
    runs = {name: run for name, run in one["stages"].items() if run["objective"] == "dpo"}
    rows = [
        [
            name,
            f"{run['steps']}",
            counted(run["after"]["reward_accuracy"], HELD_OUT),
            number(run["after"]["reward_margin"]),
            number(run["after"]["chosen_log_prob"], ".1f"),
            number(run["after"]["rejected_log_prob"], ".1f"),
            minutes(run["seconds"]),
        ]
        for name, run in runs.items()
    ]
    head = (
        *("loss-rows-epochs", "steps of 16 pairs", "prefers the better reply (95 % interval)"),
        *("margin", "chosen, log-probability", "rejected, log-probability", "training"),
    )
    missing = "".join(f" Not run: {name}." for name in one["not_run"])
    return (
        f"{table(head, rows)}\n\n{command(one, next(iter(runs.values())))} On the last {HELD_OUT} "
        "pairs, at the end of each run: its best evaluation on the way would be chosen by these "
        f"very pairs.{missing}{side_by_side(found, list(runs.values()))}"
    )
