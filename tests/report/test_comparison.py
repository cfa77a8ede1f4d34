"""What a comparison says about its rows, and the page it is shown on."""

from dataclasses import replace
from itertools import pairwise

from tunesmith.report.comparison import cells, columns, render
from tunesmith.report.findings import Findings, FoundRow, front
from tunesmith.report.recommendation import recommendation
from tunesmith.report.scatter import spread

BEST = FoundRow(
    "full", quality=0.9, low=0.88, high=0.92, values=[0.9], trainable_parameters=1000,
    total_parameters=1000, stored_bytes=4000, process_bytes=9000, seconds_per_step=0.5,
    seconds=50.0, general_before=3.0, general_after=3.5, steps=100, curve=[(0, 2.0), (1, 1.0)],
)  # fmt: skip
EQUAL = replace(
    BEST, name="lora", quality=0.89, p_value=0.4, trainable_parameters=10, stored_bytes=40,
    general_after=3.1, seconds_per_step=0.4,
)  # fmt: skip
WORSE = replace(BEST, name="ia3", quality=0.7, p_value=0.001, stored_bytes=4)
FAILED = FoundRow("bitfit", failed="this model has no biases")
UNTUNED = FoundRow("untuned", baseline=True, quality=0.5, values=[0.5])
FINDINGS = Findings("three", "accuracy", True, [UNTUNED, BEST, EQUAL, WORSE, FAILED], {})


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (4.0, 0.7), (2.0, 0.6)]
    assert front(points, higher_is_better=True) == [0, 1]
    assert front(points, higher_is_better=False) == [0]


def test_the_words_follow_from_the_numbers() -> None:
    said = recommendation(FINDINGS)
    assert "full came out best: Accuracy 90.0" in said[0]
    assert "from 50.0" in said[0]
    assert "1 of the other 2 cannot be told from it" in said[1]
    assert "lora" in said[1]
    assert any("lora stores the least a task: 40 B, against 3.9 KiB of full" in s for s in said)
    assert any("lora is the fastest" in s for s in said)
    assert any("full moves the loss by +0.500 nats; lora forgets least" in s for s in said)
    assert said[-1] == "bitfit has no result: this model has no biases"


def test_a_worse_row_is_never_recommended_for_its_price() -> None:
    assert not any("ia3 stores" in sentence for sentence in recommendation(FINDINGS))


def test_where_nothing_says_how_far_chance_goes_no_other_row_is_as_good_as_the_best() -> None:
    rows = [replace(row, low=None, high=None, p_value=None) for row in (BEST, EQUAL, WORSE)]
    findings = replace(FINDINGS, rows=rows)
    assert [row.name for row in findings.as_good_as_best()] == ["full"]
    said = recommendation(findings)
    assert any("Intervals could not be computed" in sentence for sentence in said)
    assert not any(row.name in sentence for row in (EQUAL, WORSE) for sentence in said)


def test_a_comparison_of_failures_recommends_nothing() -> None:
    findings = replace(FINDINGS, rows=[FAILED])
    assert recommendation(findings) == [
        "Nothing was trained to its end, so there is nothing to recommend."
    ]
    assert "this model has no biases" in render(findings)


def test_a_row_alone_is_said_to_be_better_than_no_other() -> None:
    said = recommendation(replace(FINDINGS, rows=[UNTUNED, BEST, FAILED]))
    assert "No other row has a result to compare it with." in said
    assert not any("worse beyond chance" in sentence for sentence in said)


def test_every_row_of_the_table_has_every_column() -> None:
    for row in FINDINGS.rows:
        assert len(cells(FINDINGS, row)) == len(columns(FINDINGS)) - 1


def test_a_column_of_nothing_is_left_out() -> None:
    assert "s/step" in columns(FINDINGS)
    untimed = [replace(row, seconds_per_step=None) for row in FINDINGS.rows]
    assert "s/step" not in columns(replace(FINDINGS, rows=untimed))
    assert "tokens/s" not in columns(FINDINGS)


def test_of_one_seed_the_page_says_what_the_intervals_leave_out() -> None:
    assert "paired bootstrap over evaluation rows." in render(FINDINGS)
    assert any(said.startswith("Every row is of one seed") for said in recommendation(FINDINGS))
    twice = [replace(row, values=[*row.values, 0.8]) for row in FINDINGS.rows]
    findings = replace(FINDINGS, rows=twice)
    assert "paired bootstrap over evaluation rows and seeds." in render(findings)
    assert not any("one seed" in said for said in recommendation(findings))


def test_a_row_that_forgets_nothing_has_its_place_in_the_picture() -> None:
    still = replace(BEST, name="kept", general_after=3.0)
    page = render(replace(FINDINGS, rows=[BEST, EQUAL, still]))
    assert "On the front, by rising cost: kept." in page


def test_the_page_shows_all_rows_and_draws_them_without_the_network() -> None:
    page = render(FINDINGS)
    for row in FINDINGS.rows:
        assert row.name in page
    assert page.count("<svg") == 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_names_in_a_picture_keep_apart_and_in_order() -> None:
    crowded = spread([0.1, 0.5, 0.51, 0.52, 0.99, 1.0])
    assert crowded[0] == 0.1
    assert crowded[-1] == 1.0
    assert all(b - a > 0.0499 for a, b in pairwise(crowded))
    many = spread([0.5] * 41)
    assert all(b - a > 0.0249 for a, b in pairwise(many))
    assert min(many) > -0.001


def test_ranks_say_nothing_where_nothing_was_learned() -> None:
    assert FINDINGS.learned()
    assert not any("Nothing beat" in said for said in recommendation(FINDINGS))
    unlearned = replace(FINDINGS, rows=[replace(UNTUNED, quality=0.95), BEST])
    assert not unlearned.learned()
    assert recommendation(unlearned)[1].startswith("Nothing beat the untuned model")
    assert not replace(FINDINGS, higher_is_better=False).learned()
    assert not replace(FINDINGS, rows=[FAILED]).learned()
