"""What the rewards do not see, shown without a model: edited perfect answers on real annotations.

    python -m demo.blind --data hico_20160224_det

The rewards compare labels with those of the whole image (Eqs. 14-18), match boxes without labels
(Eqs. 19-22), and divide by the predicted verbs (Eq. 16). None of them checks who does what. Each
edit costs mAP. The table shows its cost in reward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

import evaluate
import hicodet
from engine.data.annotations import load_split, training_counts
from engine.options import Config, parse_config, required
from engine.scoring.predictions import predicted_instances
from engine.signals import one_line
from hicodet import HOI, Sample
from rewards import total_reward

LABEL_REWARDS = ("printed", "matched")


def rotated(hois: tuple[HOI, ...], *names: str) -> tuple[HOI, ...]:
    """The instances, each with these fields of the one before it; the first gets the last's."""
    fields = [{name: getattr(hoi, name) for name in names} for hoi in hois[-1:] + hois[:-1]]
    return tuple(replace(hoi, **new) for hoi, new in zip(hois, fields))


EDITS: dict[str, Callable[[tuple[HOI, ...]], tuple[HOI, ...]]] = {
    "none": lambda hois: hois,
    "only the first verb of each instance": lambda hois: tuple(
        replace(hoi, verbs=hoi.verbs[:1]) for hoi in hois
    ),
    "labels of the previous instance": lambda hois: rotated(hois, "object_class", "verbs"),
    "verbs of the previous instance": lambda hois: rotated(hois, "verbs"),
    "human box of the previous instance": lambda hois: rotated(hois, "human"),
    "every second instance dropped": lambda hois: hois[::2],
}


def edit_scores(samples: list[Sample], counts: np.ndarray, edit: Callable) -> list[float]:
    """Default mAP in percent (Full, Rare, Non-Rare), then the mean reward for each LABEL_REWARDS.

    counts: (600,), of the training half. The answers have boxes in pixels of the original image.
    Images without ground truth count for the mAP only.
    """
    lines, totals = [], []
    for sample in samples:
        size = (sample.width, sample.height)
        text = hicodet.format_completion(edit(sample.hois), "Someone is there.")
        answer = hicodet.parse_completion(text)
        instances = predicted_instances(answer, size, size)
        lines.append({"file_name": sample.file_name, "instances": instances})
        if sample.hois:
            rewards = [total_reward(answer, sample.hois, label_reward=r) for r in LABEL_REWARDS]
            totals.append([reward["total"] for reward in rewards])
    scores = evaluate.evaluate(lines, samples, counts)["default"]
    maps = [100 * (scores[name] or 0.0) for name in ("full", "rare", "non_rare")]
    return maps + np.mean(totals, axis=0).tolist()


@dataclass(frozen=True, kw_only=True)
class BlindConfig(Config):
    """Options of the command."""

    data: str = required("folder of hico_20160224_det", metavar="DIR", group="input")


def main(argv: list[str] | None = None) -> None:
    """Print the table for the test half. This takes minutes. --help lists the options."""
    config = parse_config(BlindConfig, __doc__, argv, prog="python -m demo.blind")
    with one_line():
        samples, counts = load_split(config.data, "test"), training_counts(config.data)
        print("| edit | Full | Rare | Non-Rare | reward as printed | labels on matched pairs |")
        print("|---|---|---|---|---|---|")
        for name, edit in EDITS.items():
            *maps, printed, matched = edit_scores(samples, counts, edit)
            cells = [f"{number:.2f}" for number in maps] + [f"{printed:.3f}", f"{matched:.3f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
