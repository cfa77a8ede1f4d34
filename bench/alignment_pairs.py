"""What makes DPO tell more of the held-out pairs apart: smoothed labels, more pairs, and others."""

from alignment_words import MISSING, Found, command, counted, minutes, number, side_by_side, table


def more_pairs(found: Found) -> str:
    """Return the runs of `polite-preferences-more`: their names are what, rows and epochs."""
    if "polite-preferences-more" not in found:
        return MISSING
    one = found["polite-preferences-more"]
    runs = variants(found)
    rows = [
        [
            name,
            f"{run['steps']}",
            counted(run["after"]["reward_accuracy"], run["held_out_pairs"]),
            number(run["after"]["reward_margin"]),
            number(run["after"]["chosen_log_prob"], ".1f"),
            number(run["after"]["rejected_log_prob"], ".1f"),
            minutes(run["seconds"]),
        ]
        for name, run in runs.items()
    ]
    head = (
        *("what-rows-epochs", "steps of 16 pairs", "prefers the better reply (95 % interval)"),
        *("margin", "chosen, log-probability", "rejected, log-probability", "training"),
    )
    first = next(iter(runs.values()))
    missing = "".join(f" Not run: {name}." for name in one["not_run"])
    return (
        f"{table(head, rows)}\n\n{command(one, first)} On the {first['held_out_pairs']} pairs that "
        "no stage learned from, at the end of each run: its best evaluation on the way would be "
        f"chosen by these very pairs.{missing}{side_by_side(found, list(runs.values()))}"
    )


def variants(found: Found) -> dict[str, Found]:
    """Return the variants of DPO by their names."""
    stages = found.get("polite-preferences-more", {}).get("stages", {})
    return {name: run for name, run in stages.items() if run["objective"] == "dpo"}


def best_of_pairs(found: Found) -> list[str]:
    """Return a line about the variant that ranks most of the pairs right."""
    runs = variants(found)
    if not runs:
        return []
    name = max(runs, key=lambda one: runs[one]["after"]["reward_accuracy"])
    run = runs[name]
    of = run["held_out_pairs"]
    return [
        f"- the best of {len(runs)} variants of DPO (`{name}` in docs/alignment.md): prefers "
        f"{counted(run['after']['reward_accuracy'], of)} of {of} held-out better replies"
    ]
