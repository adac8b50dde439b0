"""Is a run healthy? Verdicts from the rows of metrics.jsonl, for the terminal and the page.

Each verdict looks at the last RECENT steps that logged its field (rewards: at twice as many,
skipped steps: at all) and is one line: what was found, the limit, and what to do beyond it.
A field that was not logged has no verdict, so SFT has fewer of them than GRPO.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RECENT = 10  # steps
MAX_ZERO_VARIANCE = 0.5  # share of groups that teach nothing
MAX_TRUNCATED = 0.05  # share of completions
MAX_LOGPROB_GAP = 0.1  # nats, of any one token
MAX_KL = 0.5  # nats a token: by then pi_theta has little to do with pi_ref
ENTROPY_RANGE = (1 / 3, 2.0)  # of what the first steps had
MAX_WAITING = 0.2  # share of a step's time


@dataclass(frozen=True)
class Verdict:
    """One line about a run."""

    name: str
    status: str  # "good", "look" (beyond the limit) or "early" (too few steps to tell)
    figure: str  # what was found
    limit: str
    advice: str  # what to do beyond the limit

    def __str__(self) -> str:
        line = f"{self.status:5s}  {self.name}: {self.figure} ({self.limit})"
        return f"{line}. {self.advice}" if self.status == "look" else line


def verdicts(metrics: Sequence[dict], most: float = 3.8) -> list[Verdict]:
    """All that can be said of a run. metrics: a dict a step; a value may be missing or None.

    most: the largest reward that the run can earn.
    """
    checks = (_zero_variance, _truncated, _logprob_gap, _kl, _entropy, _waiting, _skipped)
    found = [_rewards(metrics, most), *(check(metrics) for check in checks)]
    return [verdict for verdict in found if verdict]


def summary(found: Sequence[Verdict]) -> str:
    """The answer in a few words."""
    look = sum(verdict.status == "look" for verdict in found)
    if not found:
        return "Nothing to judge yet."
    if look:
        return f"{look} of {len(found)} checks {'needs' if look == 1 else 'need'} a look."
    early = sum(verdict.status == "early" for verdict in found)
    later = f", too early for {early}" if early else ""
    return f"{len(found) - early} of {len(found)} checks passed{later}."


def as_text(found: Sequence[Verdict]) -> str:
    """The verdicts for the end of a terminal's log, a line each."""
    return "\n".join([f"Is this run healthy? {summary(found)}", *(f"  {v}" for v in found)])


def series(metrics: Sequence[dict], name: str) -> list[float]:
    """The finite numbers that were logged under a name, in the order of the steps."""
    values = (number(row.get(name)) for row in metrics)
    return [value for value in values if math.isfinite(value)]


def number(value: object) -> float:
    """A JSON value as a float; NaN for anything that is no finite number."""
    try:
        known = type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer of a thousand digits
        return math.nan
    return float(value) if known else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _limited(
    metrics, field: str, name: str, figure: str, limit: float, advice: str, *, of=_mean
) -> Verdict | None:
    """Good as long as the mean (or `of`) of the recent steps is not above the limit."""
    recent = series(metrics, field)[-RECENT:]
    if not recent:
        return None
    value = of(recent)
    unit, scale = (" %", 100) if "%" in figure else ("", 1)
    status, bound = "look" if value > limit else "good", f"limit {scale * limit:g}{unit}"
    return Verdict(name, status, figure.format(scale * value), bound, advice)


def _rewards(metrics, most: float) -> Verdict | None:
    """Flat if the last RECENT steps are not above the RECENT before by more than the noise.

    The noise is the standard error of the difference of the two means.
    """
    values = series(metrics, "reward_total")
    if not values:
        return None
    if len(values) < 2 * RECENT:
        return Verdict("Reward", "early", f"{len(values)} steps so far", f"needs {2 * RECENT}", "")
    before, last = values[-2 * RECENT : -RECENT], values[-RECENT:]
    means = _mean(before), _mean(last)
    squares = sum((v - m) ** 2 for half, m in zip((before, last), means) for v in half)
    noise = math.sqrt(squares / (RECENT - 1) / RECENT)
    rise = means[1] - means[0]
    return Verdict(
        "Reward",
        "good" if rise > noise else "look",
        f"{rise:+.3f} in {2 * RECENT} steps, to {means[1]:.3f}",
        f"limit: above the noise, {noise:.3f}",
        f"Flat. Expected near {most:g} and where the learning rate has come down to 0; otherwise "
        "raise --learning-rate, or look in rollouts.jsonl for a part that is never earned.",
    )


def _zero_variance(metrics) -> Verdict | None:
    name, figure = "Groups without variance", "{:.1f} % have equal rewards"
    advice = "Equal rewards teach nothing: raise --temperature or --group-size."
    return _limited(metrics, "zero_variance_groups", name, figure, MAX_ZERO_VARIANCE, advice)


def _truncated(metrics) -> Verdict | None:
    figure = "{:.1f} % of completions are cut at their longest"
    advice = "Raise --max-new-tokens, or see whether completions repeat themselves."
    return _limited(metrics, "truncated", "Truncated", figure, MAX_TRUNCATED, advice)


def _logprob_gap(metrics) -> Verdict | None:
    figure = "at most {:.2g} nats between a token as sampled and as trained"
    advice = "Sampler and trainer disagree: look at the dtype first, then for a bug."
    name = "Log-prob gap"
    return _limited(metrics, "logprob_gap", name, figure, MAX_LOGPROB_GAP, advice, of=max)


def _kl(metrics) -> Verdict | None:
    figure = "{:.3g} nats a token from the policy that RL started from"
    advice = "The policy runs away: lower --learning-rate or raise --kl-coef."
    return _limited(metrics, "kl", "KL", figure, MAX_KL, advice)


def _entropy(metrics) -> Verdict | None:
    """Of the recent steps against the first ones: a collapse and an explosion both show."""
    values, (low, high) = series(metrics, "entropy"), ENTROPY_RANGE
    if not values:
        return None
    if len(values) < 2 * RECENT:
        return Verdict("Entropy", "early", f"{len(values)} steps so far", f"needs {2 * RECENT}", "")
    first, last = _mean(values[:RECENT]), _mean(values[-RECENT:])
    collapsed, exploded = last < low * first, last > high * first
    advice = "raise --temperature or --kl-coef." if collapsed else "lower --learning-rate."
    figure = f"{last:.3g} nats a token, {first:.3g} in the first {RECENT} steps"
    limit = f"limits {low * first:.3g} and {high * first:.3g}"
    status = "look" if collapsed or exploded else "good"
    why = "The policy collapses: " if collapsed else "The policy comes apart: "
    return Verdict("Entropy", status, figure, limit, why + advice)


def _waiting(metrics) -> Verdict | None:
    figure = "{:.1f} % of a step is spent waiting for images"
    advice = "Raise --workers, or put the images on a faster disk."
    return _limited(metrics, "share_waiting", "Waiting", figure, MAX_WAITING, advice)


def _skipped(metrics) -> Verdict | None:
    known = [row["skipped"] for row in metrics if isinstance(row.get("skipped"), bool)]
    if not known:
        return None
    figure = f"{sum(known)} of {len(known)} steps had a loss or gradient that is not finite"
    advice = "Lower --learning-rate; ten such steps in a row stop the run."
    return Verdict("Skipped steps", "look" if any(known) else "good", figure, "limit 0", advice)
