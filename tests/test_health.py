"""Each verdict on both sides of its limit; numbers by hand."""

import math

import pytest

from engine.report import health


def rows(**columns):
    """Metrics of as many steps as the columns have values."""
    return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]


def only(metrics):
    (verdict,) = health.verdicts(metrics)
    return verdict


def test_reward_rises_by_more_than_the_noise():
    # each half varies by 1 around its mean: 10 squares of 1, twice, so the variance of a mean is
    # 10 / 9 / 10 and the noise of the difference sqrt(2 / 9) = 0.471
    before = [0.0, 2.0] * 5
    risen = only(rows(reward_total=before + [0.48, 2.48] * 5))
    assert (risen.status, risen.figure) == ("good", "+0.480 in 20 steps, to 1.480")
    assert risen.limit == "limit: above the noise, 0.471"
    flat = only(rows(reward_total=before + [0.46, 2.46] * 5))
    assert flat.status == "look" and "--learning-rate" in flat.advice


def test_constant_reward_is_flat():
    assert only(rows(reward_total=[1.0] * 20)).status == "look"


def test_reward_is_not_judged_before_twenty_steps():
    assert only(rows(reward_total=[1.0] * 19)).status == "early"


@pytest.mark.parametrize(
    "field, good, bad, figure, limit",
    [
        ("zero_variance_groups", 0.5, 0.51, "51.0 % have", "limit 50 %"),
        ("truncated", 0.05, 0.051, "5.1 % of completions", "limit 5 %"),
        ("kl", 0.5, 0.501, "0.501 nats", "limit 0.5"),
        ("share_waiting", 0.2, 0.21, "21.0 % of a step", "limit 20 %"),
    ],
)
def test_mean_of_recent_steps_against_its_limit(field, good, bad, figure, limit):
    assert only(rows(**{field: [9.0] + [good] * 10})).status == "good"  # older steps do not count
    verdict = only(rows(**{field: [0.0] + [bad] * 10}))
    assert verdict.status == "look" and verdict.limit == limit and verdict.advice
    assert verdict.figure.startswith(figure)


def test_logprob_gap_is_judged_by_the_worst_recent_step():
    assert only(rows(logprob_gap=[0.11] + [0.1] * 10)).status == "good"
    assert only(rows(logprob_gap=[0.11] + [0.0] * 9)).status == "look"


@pytest.mark.parametrize(
    "last, status, why",
    [(1.0, "good", ""), (0.99, "look", "collapses"), (6.0, "good", ""), (6.01, "look", "apart")],
)
def test_entropy_is_judged_against_the_first_steps(last, status, why):
    verdict = only(rows(entropy=[3.0] * 10 + [last] * 10))  # limits 3 / 3 and 2 * 3
    assert verdict.status == status and verdict.limit == "limits 1 and 6"
    assert why in verdict.advice


def test_entropy_is_not_judged_before_twenty_steps():
    assert only(rows(entropy=[3.0] * 10 + [0.0] * 9)).status == "early"


def test_one_skipped_step_is_worth_a_look():
    assert only(rows(skipped=[False] * 30)).status == "good"
    verdict = only(rows(skipped=[True] + [False] * 29))
    assert verdict.status == "look" and verdict.figure.startswith("1 of 30 steps")


def test_what_was_not_logged_has_no_verdict():
    assert health.verdicts([]) == []
    assert health.verdicts(rows(loss=[1.0, 2.0])) == []
    assert health.verdicts(rows(kl=[None, None], truncated=[math.nan, "x"])) == []


def test_null_is_left_out_of_a_mean():
    assert only(rows(kl=[0.4, None])).figure.startswith("0.4 nats")


def test_text_has_one_line_a_verdict():
    found = health.verdicts(rows(kl=[0.6], truncated=[0.0], entropy=[1.0]))
    first, *lines = health.as_text(found).splitlines()
    assert first == "Is this run healthy? 1 of 3 checks needs a look."
    assert len(lines) == 3 and lines[1].startswith("  look   KL: 0.6 nats a token")
    assert lines[1].endswith("raise --kl-coef.")


def test_summary_counts_what_passed_and_what_is_early():
    assert health.summary([]) == "Nothing to judge yet."
    found = health.verdicts(rows(kl=[0.1], entropy=[1.0]))
    assert health.summary(found) == "1 of 2 checks passed, too early for 1."
