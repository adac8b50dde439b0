"""Metrics of a step's completions for metrics.jsonl: means over all ranks."""

from collections.abc import Sequence

import numpy as np

from engine.sampling.sampler import Rollout
from hicodet import HOI


def advantage_shares(parts: dict[str, np.ndarray], eps: float = 1e-4) -> dict[str, float]:
    """Each reward part's share in the advantages (Eq. 5).

    parts: (P, G) each; their sum is the reward. An advantage A is then a sum of terms a_part: the
    part minus its group mean, over the group's std of the reward plus eps. A part's share is the
    sum of a_part A over all outputs, divided by the sum of A squared. Shares sum to 1. A
    negative share means that the other parts outvote this one. All are 0 if no rewards differ.
    """
    spread = sum(parts.values()).std(1, ddof=1, keepdims=True) + eps
    terms = {name: (part - part.mean(1, keepdims=True)) / spread for name, part in parts.items()}
    advantages = sum(terms.values())
    whole = (advantages**2).sum()
    if whole < 1e-9:  # equal up to rounding
        return dict.fromkeys(parts, 0.0)
    return {name: float((term * advantages).sum() / whole) for name, term in terms.items()}


def group_row(
    hois: Sequence[HOI], rollout: Rollout, rewards: list[dict], predicted: list[Sequence]
) -> dict:
    """What `rollout_metrics` needs from the G completions of an image.

    hois: the ground truth. rewards, predicted: the rewards and the instances of each completion.
    """
    return {
        "ids": [tuple(ids.tolist()) for ids in rollout.completion_ids],
        "finished": rollout.finished.tolist(),
        "entropies": [float(row.sum()) for row in rollout.entropies],
        "rewards": rewards,
        "written": [[len(one.verbs) for one in instances] for instances in predicted],
        "true": [len(hoi.verbs) for hoi in hois],
    }


def rollout_metrics(groups: list[dict], seconds: dict[str, float]) -> dict[str, float]:
    """Means over the completions of all ranks. groups: of `group_row`."""
    logged = {f"seconds_{name}": value for name, value in seconds.items()}
    rewards = {
        name: np.array([[one[name] for one in group["rewards"]] for group in groups])
        for name in groups[0]["rewards"][0]
    }
    for name, values in rewards.items():
        within = values.std(1, ddof=1)  # within groups, as only these differences train
        logged[f"reward_{name}"], logged[f"reward_{name}_std"] = values.mean(), within.mean()
        if name == "total":
            logged["zero_variance_groups"] = np.mean(within < 1e-3)
    rewards.pop("total")
    logged |= {f"advantage_{name}": v for name, v in advantage_shares(rewards).items()}
    # a nearly greedy sampler is seen here first
    distinct = [len(set(group["ids"])) for group in groups]
    logged["distinct_completions"] = np.mean(distinct) / len(groups[0]["ids"])
    lengths = [len(ids) for group in groups for ids in group["ids"]]
    logged["completion_length"] = np.mean(lengths)
    logged["entropy"] = sum(sum(group["entropies"]) for group in groups) / sum(lengths)
    written = [one for group in groups for one in group["written"]]
    for suffix, rows in (("", written), ("_true", [group["true"] for group in groups])):
        instances, verbs = sum(map(len, rows)), sum(map(sum, rows))
        logged[f"instances{suffix}"] = instances / len(rows)
        logged[f"verbs_per_instance{suffix}"] = verbs / max(instances, 1)
    logged["truncated"] = np.mean([not done for group in groups for done in group["finished"]])
    for name in ("sample", "update"):
        logged[f"{name}_tokens_per_second"] = sum(lengths) / seconds[name]
    return {name: float(value) for name, value in logged.items()}
