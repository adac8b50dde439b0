"""How far the official mAP depends on the order of detections with equal scores.

The official code breaks ties by the order of images in the annotations, then of rows: an accident
that a model with few distinct scores can win or lose by. The bracket measures it; a tie is between
detections of the same class with exactly the same score, and every order of tied detections counts
as possible, across images too.

    official  ties in the official order
    mean      the mean over ORDERS random orders, seed SEED, and
    spread    their standard deviation (n - 1)
    best      the largest that any order gives, and
    worst     the smallest; both are exact

A detection's true pair does not depend on the order, only which of several detections of one true
pair comes first and is right. So in any order the same number of a tie's detections are right: one
for each true pair that the tie has detections of and no higher score took. AP grows the fewer wrong
detections stand before each right one, and then
- best: one detection for each of these pairs first, then all others.
- worst: those that are wrong in any order first. Then pair after pair, the one with the most
  detections first: its right one and, necessarily behind it, its duplicates.
"""

from collections.abc import Callable

import numpy as np

ORDERS = 20
SEED = 0
SUBSETS = ("full", "rare", "non_rare")
ROWS = {
    "mean": f"equal scores in random order, mean of {ORDERS}",
    "spread": "standard deviation of these",
    "best": "in the best order",
    "worst": "in the worst order",
}  # the bracket's rows in evaluate.py's table


def random_order(hoi_id: np.ndarray, score: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows by class and falling score, ties at random; hoi_id, score: (N,). Returns (N,) int."""
    return np.lexsort((rng.random(len(score)), -score, hoi_id))


def best_order(hoi_id: np.ndarray, score: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The same, with ties in the best order; right: (N,) bool, in any order of the ties."""
    return np.lexsort((~right, -score, hoi_id))


def worst_order(
    hoi_id: np.ndarray, score: np.ndarray, matched: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """The same, with ties in the worst order; matched: (N,) int, true pairs, or -1."""
    takes_at = np.full(matched.max(initial=-1) + 2, np.nan)  # the score at which a pair is taken
    takes_at[matched[right]] = score[right]
    takes_at[-1] = np.nan  # where matched is -1
    in_play = takes_at[matched] == score
    rivals = np.bincount(matched[in_play], minlength=len(takes_at))[matched]  # (N,)
    return np.lexsort((~right, matched, -rivals, in_play, -score, hoi_id))


def bracket(
    hoi_id: np.ndarray,
    score: np.ndarray,
    matched: np.ndarray,
    right: np.ndarray,
    measure: Callable[[np.ndarray], dict],
) -> dict:
    """The bracket described above; what --json writes.

    hoi_id, score, matched, right: (N,), sorted in the official order. measure: the result for an
    order of the rows, {setting: {subset: mAP or None}}. Returns {"official", "mean", "spread",
    "best", "worst": the same for each of SUBSETS, "orders": ORDERS, "seed": SEED, "tied": number of
    detections in ties}.
    """

    def only(order: np.ndarray) -> dict:
        return _over([measure(order)], np.mean)

    rng = np.random.default_rng(SEED)
    shuffled = [measure(random_order(hoi_id, score, rng)) for _ in range(ORDERS)]
    same = (hoi_id[1:] == hoi_id[:-1]) & (score[1:] == score[:-1])  # as the row before
    tied = np.append(same, False) | np.append(False, same)
    return {
        "official": only(np.arange(len(score))),
        "mean": _over(shuffled, np.mean),
        "spread": _over(shuffled, lambda values: np.std(values, ddof=1)),
        "best": only(best_order(hoi_id, score, right)),
        "worst": only(worst_order(hoi_id, score, matched, right)),
        "orders": ORDERS,
        "seed": SEED,
        "tied": int(tied[: len(score)].sum()),
    }


def _over(results: list[dict], function: Callable[[list[float]], float]) -> dict:
    """The function of each mean over all results, {setting: {subset: value}}; None stays None."""

    def value(setting: str, subset: str) -> float | None:
        values = [result[setting][subset] for result in results]
        return None if None in values else float(function(values))

    return {setting: {s: value(setting, s) for s in SUBSETS} for setting in results[0]}
