"""engine/data/loader.py: the order of the samples, and which of them a rank has."""

import torch

from engine.data.loader import batch_order
from engine.ranks import Ranks


def test_batch_order_is_pure_and_takes_each_sample_once_an_epoch():
    order = batch_order(10, 4, 7, seed=5)
    assert [len(batch) for batch in order] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(sum(order[:3], [])) == sorted(sum(order[3:6], [])) == list(range(10))
    assert order[:3] != order[3:6]
    assert order[:5] == batch_order(10, 4, 5, seed=5)
    assert order != batch_order(10, 4, 7, seed=6)


def test_a_rank_without_a_part_weighs_nothing():
    share = Ranks(2, 4, torch.device("cpu")).share
    assert share([7, 8, 9, 10, 11, 12, 13]) == ([9, 13], [1.0, 1.0])
    assert share([7, 8]) == ([7], [0.0])
