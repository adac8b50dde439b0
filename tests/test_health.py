"""Each verdict on both sides of its limit; numbers by hand."""

import pytest

from engine.report import health
from engine.report.records import RunRecord


def only(**columns):
    """The verdict on the only field, with one step per value."""
    ((name, values),) = columns.items()
    (verdict,) = health.verdicts([{name: value} for value in values])
    return verdict


def test_reward_rises_by_more_than_the_noise():
    # the first and the last ten vary by 1 around their means: 10 squares of 1, twice, so the
    # variance of a mean is 10 / 9 / 10 and the standard error of the difference sqrt(2 / 9) = 0.471
    first, between = [0.0, 2.0] * 5, [9.0] * 10
    risen = only(reward_total=first + between + [0.48, 2.48] * 5)
    assert risen.status == "good" and risen.text.startswith("+1.0 standard errors above")
    flat = only(reward_total=first + between + [0.46, 2.46] * 5)
    assert flat.status == "look" and "It is flat" in flat.advice and flat.text.endswith("(limit 1)")
    assert only(reward_total=[1.0] * 20).status == "look"  # without any noise


@pytest.mark.parametrize("field, good, bad, figure, limit", [
    ("zero_variance_groups", 0.5, 0.51, "51.0% of groups", "(limit 50%)"),
    ("truncated", 0.05, 0.051, "5.1% of completions", "(limit 5%)"),
    ("logprob_gap", 0.1, 0.11, "0.11 nats", "(limit 0.1)"),
    ("kl", 0.5, 0.501, "0.501 nats", "(limit 0.5)"),
    ("share_waiting", 0.2, 0.21, "21.0% of a step", "(limit 20%)"),
    ("skipped", False, True, "100.0%", "(limit 0%)"),
])  # fmt: skip
def test_mean_of_recent_steps_against_its_limit(field, good, bad, figure, limit):
    assert only(**{field: [9.0] * 10 + [good] * 10}).status == "good"  # older steps do not count
    verdict = only(**{field: [0.0] * 10 + [bad] * 10})
    assert verdict.status == "look" and verdict.advice
    assert verdict.text.startswith(figure) and verdict.text.endswith(limit)


@pytest.mark.parametrize("last, status", [(1, "good"), (0.98, "look"), (6, "good"), (6.1, "look")])
def test_entropy_is_compared_with_the_first_steps(last, status):
    verdict = only(entropy=[3.0] * 10 + [last] * 10)  # 33 % of 3, and twice 3
    assert verdict.status == status and verdict.text.endswith("(limit 33% and 200%)")


def test_prediction_is_judged_by_its_summary(tmp_path):
    run = RunRecord(tmp_path, {}, summary={"images": 3, "truncated": 0.06})
    (verdict,) = health.judge(run)
    assert verdict.status == "look" and verdict.text.startswith("6.0% of completions")


def test_field_that_was_not_logged_has_no_verdict():
    assert health.verdicts([]) == health.verdicts([{"loss": 1.0, "kl": None}]) == []
    assert only(kl=[0.4] * 20 + [None]).text.startswith("0.4 nats")


def test_text_has_one_line_per_verdict():
    steps = [{"kl": 0.6, "truncated": 0.0}] * 20 + [{"share_waiting": 0.1}] * 19
    first, *lines = health.as_text(health.verdicts(steps)).splitlines()
    assert first == "Is this run healthy? 1 of 3 checks are good, 1 too early"
    assert lines[1].startswith("  look   KL: 0.6 nats per token")
    assert lines[1].endswith("raise --kl-coef.")
    assert lines[2] == "  early  Waiting: too early: 19 of 20 steps."
