"""engine/runs/rollout_metrics.py: what metrics.jsonl says about completions, by hand."""

import numpy as np
import pytest
import torch

from engine.runs.rollout_metrics import advantage_shares, group_row, rollout_metrics
from engine.sampling.sampler import Rollout
from hicodet import HOI


def group(totals, ids, finished, entropies, written, true):
    names = {"format": 0.25, "object": 0, "verb": 0, "iou": 0.75, "total": 1}
    rewards = [{name: part * total for name, part in names.items()} for total in totals]
    row = {"rewards": rewards, "ids": ids, "finished": finished, "entropies": entropies}
    return row | {"written": written, "true": true}


def test_rollout_metrics_by_hand():
    verbs = [[], [1, 1, 1, 1, 2, 2]]  # of each instance of two answers
    groups = [  # one text with equal rewards; two texts with unequal rewards, one of them cut
        group([1.0, 1.0], [(5, 6)] * 2, [True, True], [1.0, 2.0], [[2], [2]], [3]),
        group([0.0, 2.0], [(7,), (8, 9, 9)], [True, False], [0.5, 4.5], verbs, [1] * 4),
    ]
    logged = rollout_metrics(groups, {"sample": 2.0, "update": 4.0})
    assert logged["reward_total"] == 1.0 and logged["reward_iou"] == 0.75
    assert logged["reward_total_std"] == pytest.approx(2**0.5 / 2)  # of 0 and sqrt((1 + 1) / 1)
    assert logged["zero_variance_groups"] == 0.5
    assert logged["distinct_completions"] == 0.75  # 1 of 2, 2 of 2
    assert (logged["completion_length"], logged["truncated"]) == (2.0, 0.25)
    assert logged["advantage_iou"] == pytest.approx(0.75) and logged["advantage_verb"] == 0
    assert logged["entropy"] == 1.0  # 8 nats, 8 tokens: not the mean of the four means
    assert (logged["instances"], logged["verbs_per_instance"]) == (2.0, 1.5)  # 8 / 4, 12 / 8
    assert (logged["instances_true"], logged["verbs_per_instance_true"]) == (2.5, 1.4)
    assert logged["sample_tokens_per_second"] == 4.0 and logged["seconds_update"] == 4.0


def test_row_holds_the_completions_of_its_image():
    ids, entropies = [torch.tensor([5, 6]), torch.tensor([7])], [torch.ones(2), torch.ones(1)]
    rollout = Rollout(ids, entropies, torch.tensor([True, False]), entropies)
    hoi = HOI((0, 0, 9, 9), (1, 1, 8, 8), "horse", ("ride", "hold"))
    rewards = [group([total], [], [], [], [], [])["rewards"][0] for total in (1.0, 0.0)]
    row = group_row([hoi], rollout, rewards, [[hoi, hoi], []])
    expected = group([1.0, 0.0], [(5, 6), (7,)], [True, False], [2, 1], [[2, 2], []], [2])
    assert row == expected


def test_advantage_shares_by_hand():
    parts = {"format": [0.0, 0.0], "object": [0.0, 2.0], "iou": [1.0, 0.0]}
    one = {name: np.array([values]) for name, values in parts.items()}
    # rewards 1 and 2, -+0.5 around their mean; object -+1, iou +-0.5: covariances 2 (1 * 0.5) and
    # -2 (0.5 * 0.5), over a variance of 2 (0.5 * 0.5)
    expected = {"format": 0.0, "object": 2.0, "iou": -1.0}
    assert advantage_shares(one, eps=0.0) == pytest.approx(expected)
    # a second group with ten times the spread, all from iou: both count equally, as in Eq. 5
    more = {"format": [0.0, 0.0], "object": [3.0, 3.0], "iou": [0.0, 10.0]}
    two = {name: np.array([parts[name], more[name]]) for name in parts}
    expected = {"format": 0.0, "object": 1.0, "iou": 0.0}
    assert advantage_shares(two, eps=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("object, iou", [
    ([0.1, 0.3], [0.3, 0.1]), ([0.1 + 0.2, 0.3], [0.2, 0.2]),  # equal but for rounding
])  # fmt: skip
def test_advantage_shares_of_equal_rewards_are_zero(object, iou):
    parts = {"object": np.array([object]), "iou": np.array([iou])}
    assert advantage_shares(parts) == {"object": 0.0, "iou": 0.0}
