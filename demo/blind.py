"""What the rewards do not see: perfect answers, edited, on the real annotations (no model).

Labels are compared with those of the whole image (Eqs. 14-18), boxes are matched without labels
(Eqs. 19-22), and Eq. 16 divides by the verbs that were predicted: nothing asks who does what with
which. Each edit below costs mAP; the table says what it costs in reward.
"""

from collections.abc import Callable
from dataclasses import replace

import evaluate
import hicodet
import rewards
from engine.data import annotations
from engine.scoring.predictions import predicted_instances
from hicodet import HOI, Sample

LABEL_REWARDS = ("printed", "matched")


def handed_on(hois: tuple[HOI, ...], *names: str) -> tuple[HOI, ...]:
    """The instances, each with these fields of the one before it; the first has the last's."""
    before = [{name: getattr(hoi, name) for name in names} for hoi in hois[-1:] + hois[:-1]]
    return tuple(replace(hoi, **fields) for hoi, fields in zip(hois, before))


EDITS: dict[str, Callable[[tuple[HOI, ...]], tuple[HOI, ...]]] = {
    "none": lambda hois: hois,
    "first verb of each instance only": lambda hois: tuple(
        replace(hoi, verbs=hoi.verbs[:1]) for hoi in hois
    ),
    "labels handed on to the next instance": lambda hois: handed_on(hois, "object_class", "verbs"),
    "verbs handed on": lambda hois: handed_on(hois, "verbs"),
    "human boxes handed on": lambda hois: handed_on(hois, "human"),
    "every second instance dropped": lambda hois: hois[::2],
}


def blind_row(samples: list[Sample], counts, edit: Callable) -> list[float]:
    """Default mAP in percent (Full, Rare, Non-Rare), then the mean reward by LABEL_REWARDS.

    counts: of the training half, (600,). Boxes in text are in the original image's frame. Images
    without ground truth count for the mAP alone.
    """
    lines, totals = [], []
    for sample in samples:
        size = (sample.width, sample.height)
        text = hicodet.format_completion(edit(sample.hois), "Someone is there.")
        answer = hicodet.parse_completion(text)
        instances = predicted_instances(answer, size, size)
        lines.append({"file_name": sample.file_name, "instances": instances})
        if sample.hois:
            rules = [{"label_reward": rule} for rule in LABEL_REWARDS]
            totals.append([rewards.total_reward(answer, sample.hois, **r)["total"] for r in rules])
    scores = evaluate.evaluate(lines, samples, counts)["default"]
    maps = [100 * (scores[name] or 0.0) for name in ("full", "rare", "non_rare")]
    return maps + [sum(column) / len(column) for column in zip(*totals)]


def blind_table(data: str) -> str:
    """A row an edit, in Markdown. data: folder of hico_20160224_det; its test half is taken."""
    samples, counts = annotations.load_split(data, "test"), annotations.training_counts(data)
    lines = [
        "| edit | mAP: Full | Rare | Non-Rare | reward as printed | labels on matched pairs |",
        "|---|---|---|---|---|---|",
    ]
    for name, edit in EDITS.items():
        *maps, printed, matched = blind_row(samples, counts, edit)
        cells = [f"{value:.2f}" for value in maps] + [f"{printed:.3f}", f"{matched:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
