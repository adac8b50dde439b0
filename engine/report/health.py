"""Is a run healthy? Verdicts from the rows of metrics.jsonl, for the terminal and the page.

Each verdict is one line: what was found, the limit, and advice where the limit is passed. A field
that was not logged has no verdict, so SFT has fewer than GRPO.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from engine.report.records import RunRecord

RECENT = 10  # steps
ENTROPY_RANGE = (1 / 3, 2.0)  # share of the first steps' entropy
ENDED = 0.1  # share of the largest learning rate: below it a schedule is near its end


@dataclass(frozen=True)
class Check:
    """A limit of a sound run: the mean (or `of`) of a field's last `window` values."""

    field: str
    name: str
    figure: str  # format of the value
    limit: float  # the largest good value
    advice: str  # what to do beyond the limit
    of: Callable[[Sequence[float]], float] = fmean
    window: int = RECENT  # steps; 0: all


CHECKS = (
    Check("zero_variance_groups", "Groups without variance", "{:.1%} of groups have equal rewards",
          0.5, "Equal rewards teach nothing: raise --temperature or --group-size."),
    Check("truncated", "Truncated", "{:.1%} of completions reach the length limit", 0.05,
          "Raise --max-new-tokens, or see whether completions repeat themselves."),
    Check("logprob_gap", "Log-prob gap", "at most {:.2g} nats between sampler and trainer", 0.1,
          "Sampler and trainer disagree on a token: check the dtype first, then look for a bug.",
          of=max),
    Check("kl", "KL", "{:.3g} nats per token from the policy that RL started from", 0.5,
          "The policy runs away: lower --learning-rate or raise --kl-coef."),
    Check("share_waiting", "Waiting", "{:.1%} of a step is spent waiting for images", 0.2,
          "Raise --workers, or put the images on a faster disk."),
    Check("skipped", "Skipped steps", "{:.0f} skipped: loss or gradient was not finite", 0,
          "Lower --learning-rate; ten such steps in a row stop the run.", of=sum, window=0),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """One line about a run."""

    name: str
    status: str  # "good", "look" (beyond the limit) or "early" (too few steps)
    figure: str  # what was found
    limit: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.status:5s}  {self.name}: {self.figure} ({self.limit})"
        return f"{line}. {self.advice}" if self.advice else line


def judge(run: RunRecord) -> list[Verdict]:
    """The verdicts on a training, or on a prediction as a whole."""
    return verdicts([run.summary], needed=1) if run.summary else verdicts(run.metrics)


def verdicts(metrics: Sequence[dict], needed: int = RECENT) -> list[Verdict]:
    """All verdicts on a run.

    metrics: one dict per step; a value may be missing or None. needed: fewest values of a field.
    """
    found = [_reward(metrics), _entropy(metrics)]
    found += [_limited(check, series(metrics, check.field), needed) for check in CHECKS]
    return [verdict for verdict in found if verdict]


def summary(found: Sequence[Verdict]) -> str:
    """The answer in a few words."""
    look = sum(verdict.status == "look" for verdict in found)
    early = sum(verdict.status == "early" for verdict in found)
    if early == len(found):
        return "Too early to tell."
    if look:
        return f"{look} of {len(found)} checks {'needs' if look == 1 else 'need'} a look."
    later = f", too early for {early}" if early else ""
    return f"{len(found) - early} of {len(found)} checks passed{later}."


def as_text(found: Sequence[Verdict]) -> str:
    """The verdicts for the terminal, one per line."""
    return "\n".join([f"Is this run healthy? {summary(found)}", *(f"  {v}" for v in found)])


def series(metrics: Sequence[dict], field: str) -> list[float]:
    """The numbers that were logged under a name, in the order of the steps."""
    return [row[field] for row in metrics if row.get(field) is not None]


def _limited(check: Check, values: Sequence[float], needed: int) -> Verdict | None:
    if len(values) < needed:
        return _too_early(check.name, values, needed)
    value = check.of(values[-check.window :])
    limit = f"limit {check.limit:.0%}" if "%" in check.figure else f"limit {check.limit:g}"
    figure = check.figure.format(value)
    if value > check.limit:
        return Verdict(check.name, "look", figure, limit, check.advice)
    return Verdict(check.name, "good", figure, limit)


def _too_early(name: str, values: Sequence[float], needed: int) -> Verdict | None:
    if not values:
        return None
    steps = "1 step" if len(values) == 1 else f"{len(values)} steps"
    return Verdict(name, "early", f"too early after {steps}", f"needs {needed}")


def _reward(metrics: Sequence[dict]) -> Verdict | None:
    """The reward rises if its last RECENT steps beat the RECENT before by more than the noise.

    The noise is the standard error of the difference of the two means.
    """
    values, rates = series(metrics, "reward_total"), series(metrics, "learning_rate")
    if len(values) < 2 * RECENT:
        return _too_early("Reward", values, 2 * RECENT)
    before, last = values[-2 * RECENT : -RECENT], values[-RECENT:]
    noise = math.sqrt((variance(before) + variance(last)) / RECENT)
    rise = fmean(last) - fmean(before)
    figure = f"{rise:+.3f} in {2 * RECENT} steps, to {fmean(last):.3f}"
    limit = f"limit: above the noise, {noise:.3f}"
    if rise > noise:
        return Verdict("Reward", "good", figure, limit)
    if rates and rates[-1] <= ENDED * max(rates):
        whole = fmean(last) - fmean(values[:RECENT])
        why = (
            f"That is normal at the end of a schedule: the learning rate has come down to "
            f"{rates[-1]:.2g}. The reward changed by {whole:+.3f} since the first {RECENT} steps."
        )
        return Verdict("Reward", "good", f"flat, {figure}", limit, why)
    advice = (
        "That is normal near the largest reward. Otherwise raise --learning-rate, or look in "
        "rollouts.jsonl for a part that is never earned."
    )
    return Verdict("Reward", "look", f"flat, {figure}", limit, advice)


def _entropy(metrics: Sequence[dict]) -> Verdict | None:
    """The entropy of the recent steps against the first ones shows a collapse or an explosion."""
    values = series(metrics, "entropy")
    if len(values) < 2 * RECENT:
        return _too_early("Entropy", values, 2 * RECENT)
    first, last = fmean(values[:RECENT]), fmean(values[-RECENT:])
    low, high = (share * first for share in ENTROPY_RANGE)
    figure = f"{last:.3g} nats per token, {first:.3g} in the first {RECENT} steps"
    advice = ""
    if last < low:
        advice = "The policy collapses: raise --temperature or --kl-coef."
    elif last > high:
        advice = "The policy falls apart: lower --learning-rate."
    status = "look" if advice else "good"
    return Verdict("Entropy", status, figure, f"limits {low:.3g} and {high:.3g}", advice)
