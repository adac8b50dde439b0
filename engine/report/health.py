"""Is a run healthy? Verdicts from the rows of metrics.jsonl, for the terminal and the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from engine.report.records import RunRecord

RECENT = 10  # steps
FEWEST = 20  # steps of a run that can be judged


def recent_mean(values: Sequence[float]) -> float:
    """The mean of the last steps."""
    return fmean(values[-RECENT:])


def rise(values: Sequence[float]) -> float:
    """The mean of the last steps minus that of the first, in standard errors of the difference."""
    first, last = values[:RECENT], values[-RECENT:]
    error = math.sqrt((variance(first) + variance(last)) / RECENT)
    return (fmean(last) - fmean(first)) / max(error, 1e-9)


def share_of_first(values: Sequence[float]) -> float:
    """The mean of the last steps divided by that of the first."""
    return recent_mean(values) / max(fmean(values[:RECENT]), 1e-9)


@dataclass(frozen=True)
class Check:
    """The limits of a field in a sound run."""

    field: str
    name: str
    figure: str  # format of the number that `of` returns
    high: float
    advice: str  # for a number beyond the limits
    low: float = -math.inf
    of: Callable[[Sequence[float]], float] = recent_mean  # takes the values of all steps


CHECKS = (
    Check("reward_total", "Reward", "{:+.1f} standard errors above the first steps", math.inf,
          "It is flat, as is normal near the largest reward and at a learning rate near 0. "
          "Otherwise raise --learning-rate, or look in rollouts.jsonl for a part that is never "
          "earned.", low=1, of=rise),
    Check("entropy", "Entropy", "{:.0%} of the first steps' entropy", 2,
          "Below, the policy collapses: raise --temperature or --kl-coef. Above, it falls apart: "
          "lower --learning-rate.", low=0.33, of=share_of_first),
    Check("zero_variance_groups", "Groups without variance", "{:.1%} of groups have equal rewards",
          0.5, "Equal rewards teach nothing: raise --temperature or --group-size."),
    Check("truncated", "Truncated", "{:.1%} of completions reach the length limit", 0.05,
          "Raise --max-new-tokens, or see whether completions repeat themselves."),
    Check("logprob_gap", "Log-prob gap", "{:.2g} nats between sampler and trainer", 0.1,
          "They disagree on a token: check the dtype first, then look for a bug."),
    Check("kl", "KL", "{:.3g} nats per token from the policy that RL started from", 0.5,
          "The policy runs away: lower --learning-rate or raise --kl-coef."),
    Check("share_waiting", "Waiting", "{:.1%} of a step is spent waiting for images", 0.2,
          "Raise --workers, or put the images on a faster disk."),
    Check("skipped", "Skipped steps", "{:.1%}, as loss or gradient was not finite", 0,
          "Lower --learning-rate; ten such steps in a row stop the run."),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    name: str
    status: str  # "good", "look" (beyond the limits) or "early" (too few steps)
    text: str
    advice: str = ""


def judge(run: RunRecord) -> list[Verdict]:
    """The verdicts on a training, or on the summary of a prediction."""
    return verdicts([run.summary], fewest=1) if run.summary else verdicts(run.metrics)


def verdicts(metrics: Sequence[dict], fewest: int = FEWEST) -> list[Verdict]:
    """A verdict on each field that was logged.

    metrics: one dict per step; a value may be missing or None.
    """
    found = [(check, series(metrics, check.field)) for check in CHECKS]
    return [_verdict(check, values, fewest) for check, values in found if values]


def _verdict(check: Check, values: Sequence[float], fewest: int) -> Verdict:
    if len(values) < fewest:
        return Verdict(check.name, "early", f"too early: {len(values)} of {fewest} steps")
    value, form = check.of(values), "{:.0%}" if "%" in check.figure else "{:g}"
    limits = " and ".join(form.format(x) for x in (check.low, check.high) if math.isfinite(x))
    text = f"{check.figure.format(value)} (limit {limits})"
    if check.low <= value <= check.high:
        return Verdict(check.name, "good", text)
    return Verdict(check.name, "look", text, check.advice)


def as_text(found: Sequence[Verdict]) -> str:
    """The verdicts for the terminal, one per line."""
    lines = [f"  {v.status:5s}  {v.name}: {v.text}. {v.advice}".rstrip() for v in found]
    return "\n".join([f"Is this run healthy? {summary(found)}", *lines])


def summary(found: Sequence[Verdict]) -> str:
    """The number of good checks, and of those that come too early."""
    statuses = [verdict.status for verdict in found]
    early = statuses.count("early")
    later = f", {early} too early" if early else ""
    return f"{statuses.count('good')} of {len(found)} checks are good{later}"


def series(metrics: Sequence[dict], field: str) -> list[float]:
    """The numbers that were logged under a name, in the order of the steps."""
    return [row[field] for row in metrics if row.get(field) is not None]
