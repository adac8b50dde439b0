"""What the rewards do not see, shown by edited perfect answers."""

import numpy as np
import pytest

from demo import blind
from hicodet import HOI, HOI_CLASSES, Pair, Sample

HOLD = HOI((0, 0, 10, 10), (20, 0, 30, 10), "umbrella", ("hold", "open"))
RIDE = HOI((40, 0, 50, 10), (60, 0, 70, 10), "horse", ("ride",))


def test_printed_rewards_do_not_see_exchanged_labels():
    """Two pairs with each other's labels: all of the image's labels, and no right triplet."""
    pairs = tuple(Pair(hoi.human, hoi.object, HOI_CLASSES.index((verb, hoi.object_class)))
                  for hoi in (HOLD, RIDE) for verb in hoi.verbs)
    known = frozenset({"umbrella", "horse"})
    sample, counts = Sample("x.jpg", None, 100, 100, (HOLD, RIDE), pairs, known), np.full(600, 20)
    full, _, _, printed, matched = blind.edit_scores([sample], counts, blind.EDITS["none"])
    assert full == pytest.approx(0.5)  # three classes of 600
    edit = blind.EDITS["labels of the previous instance"]
    edited, _, _, same, less = blind.edit_scores([sample], counts, edit)
    assert edited == 0 and same == printed == matched
    assert less == pytest.approx(matched - 2)  # Eqs. 14-18 by hand: objects 1, verbs 1
