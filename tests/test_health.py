"""Each verdict on both sides of its limit; numbers by hand."""

import pytest

from engine.report import health
from engine.report.records import RunRecord


def rows(**columns):
    """Metrics of one step per value of the columns."""
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
    assert flat.status == "look" and flat.figure == "flat, +0.460 in 20 steps, to 1.460"
    assert "Otherwise raise --learning-rate, or" in flat.advice


def test_flat_reward_is_normal_where_the_learning_rate_has_come_down():
    rewards = [1.0] * 10 + [1.5] * 20
    ended = only(rows(reward_total=rewards, learning_rate=[1e-6] * 20 + [1e-7] * 10))
    assert ended.status == "good" and ended.figure.startswith("flat, +0.000")
    assert "learning rate has come down to 1e-07. The reward changed by +0.500" in ended.advice
    assert "--learning-rate" not in ended.advice
    rates = [1e-6] * 29 + [1.1e-7]
    assert only(rows(reward_total=rewards, learning_rate=rates)).status == "look"


@pytest.mark.parametrize(
    "field, good, bad, figure, limit",
    [
        ("zero_variance_groups", 0.5, 0.51, "51.0% of groups", "limit 50%"),
        ("truncated", 0.05, 0.051, "5.1% of completions", "limit 5%"),
        ("kl", 0.5, 0.501, "0.501 nats", "limit 0.5"),
        ("share_waiting", 0.2, 0.21, "21.0% of a step", "limit 20%"),
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


def test_skipped_steps_are_counted_over_the_whole_run():
    assert only(rows(skipped=[False] * 30)).status == "good"
    verdict = only(rows(skipped=[True] + [False] * 29))
    assert verdict.status == "look" and verdict.figure.startswith("1 skipped: ")


@pytest.mark.parametrize("steps, early", [(9, 8), (10, 2), (19, 2), (20, 0)])
def test_a_few_steps_are_too_early_to_tell(steps, early):
    """Reward and entropy need 20 steps, all others 10."""
    fields = ["reward_total", "entropy", *(check.field for check in health.CHECKS)]
    found = health.verdicts(rows(**{field: [9.0] * steps for field in fields}))
    assert [verdict.status for verdict in found].count("early") == early
    assert all("too early after" in v.figure for v in found if v.status == "early")


def test_prediction_is_judged_as_a_whole(tmp_path):
    run = RunRecord(tmp_path, {}, summary={"images": 3, "truncated": 0.06})
    (verdict,) = health.judge(run)
    assert verdict.status == "look" and verdict.figure.startswith("6.0% of completions")


def test_field_that_was_not_logged_has_no_verdict():
    assert health.verdicts([]) == []
    assert health.verdicts(rows(loss=[1.0, 2.0], kl=[None, None])) == []
    assert only(rows(kl=[0.4] * 10 + [None])).figure.startswith("0.4 nats")


def test_text_has_one_line_per_verdict():
    found = health.verdicts(rows(kl=[0.6] * 10, truncated=[0.0] * 10, entropy=[1.0] * 10))
    first, *lines = health.as_text(found).splitlines()
    assert first == "Is this run healthy? 1 of 3 checks needs a look."
    assert len(lines) == 3 and lines[2].startswith("  look   KL: 0.6 nats per token")
    assert lines[2].endswith("raise --kl-coef.")


def test_summary_counts_what_passed_and_what_is_early():
    assert health.summary([]) == "Too early to tell."
    assert health.summary(health.verdicts(rows(kl=[0.1]))) == "Too early to tell."
    found = health.verdicts(rows(kl=[0.1] * 10, entropy=[1.0] * 10))
    assert health.summary(found) == "1 of 2 checks passed, too early for 1."
