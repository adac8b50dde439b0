"""What the rules of `predict --scores` are worth: answers like a model's, on the real annotations.

Every true pair is written with a probability, each side of its boxes with normal noise and its
verbs, sometimes, as another verb of the object: all of it worse for pairs that stand later in the
answer. So each answer has a likelihood that is known, that of a model whose tokens are drawn like
this: for a number the mass of its pixel, for the verbs the probability of the choice.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr

import evaluate
import hicodet
from engine.data import annotations
from engine.scoring.predictions import predicted_instances, rank_scores
from hicodet import HOI, HOI_CLASSES, Box, Sample

RULES = ("ones", "rank", "likelihood")


@dataclass(frozen=True)
class Answerer:
    """How well pairs are described; the k-th of an answer (from 0) worse than the one before."""

    found: float  # probability that the first pair is written
    fall: float  # by which it is multiplied with each further pair
    noise: float  # of a side, as a share of the box's width or height, for the first pair
    wrong: float  # probability of another verb, for the first pair

    def describe(self, hoi: HOI, k: int, rng: np.random.Generator) -> tuple[HOI, float] | None:
        """What is written of a true pair, and its likelihood; None if the pair is missed."""
        found, worse = self.found * self.fall**k, 1 + 0.5 * k
        if rng.random() > found:
            return None
        boxes, mass = zip(*(moved(b, self.noise * worse, rng) for b in (hoi.human, hoi.object)))
        choice = [verb for verb, name in HOI_CLASSES if name == hoi.object_class]
        wrong = min(self.wrong * worse, 1.0)
        verbs, likely = hoi.verbs, 1 - wrong
        if rng.random() < wrong:
            verbs, likely = (str(rng.choice(choice)),), wrong / len(choice)
        written = replace(hoi, human=boxes[0], object=boxes[1], verbs=verbs)
        return written, found * likely * math.prod(mass)


ANSWERERS = {
    "46 % found, box noise .15": Answerer(0.62, 0.85, 0.15, 0.3),
    "82 % found, box noise .12": Answerer(0.95, 0.95, 0.12, 0.25),
    "46 % found, box noise .10": Answerer(0.62, 0.85, 0.10, 0.3),
    "76 % found, box noise .07": Answerer(0.90, 0.95, 0.07, 0.25),
}


def moved(box: Box, noise: float, rng: np.random.Generator) -> tuple[Box, float]:
    """The box with whole numbers near its sides, and the probability of these numbers."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = np.maximum([noise * width, noise * height] * 2, 0.1)
    sides = np.rint(rng.normal(box, scale))
    upper, lower = ((sides + half - box) / scale for half in (0.5, -0.5))
    return tuple(map(int, sides)), float(np.prod(ndtr(upper) - ndtr(lower)))


def rule_rows(samples: list[Sample], counts, answerer: Answerer, seed: int) -> dict[str, dict]:
    """The Default mAPs of one set of answers under each rule. counts: (600,), training half."""
    rng, lines = np.random.default_rng(seed), {rule: [] for rule in RULES}
    for sample in samples:
        size = (sample.width, sample.height)
        said = [answerer.describe(hoi, k, rng) for k, hoi in enumerate(sample.hois)]
        said = [pair for pair in said if pair is not None]
        answer = hicodet.parse_completion(hicodet.format_answer([hoi for hoi, _ in said]))
        likely = [likelihood for _, likelihood in said]
        scores = {"ones": None, "rank": rank_scores(answer), "likelihood": likely}
        for rule in RULES:
            instances = predicted_instances(answer, size, size, scores[rule])
            lines[rule].append({"file_name": sample.file_name, "instances": instances})
    return {rule: evaluate.evaluate(lines[rule], samples, counts)["default"] for rule in RULES}


def rules_table(data: str, seed: int = 0) -> str:
    """A row a set of answers, in Markdown. data: folder of hico_20160224_det; its test half."""
    samples, counts = annotations.load_split(data, "test"), annotations.training_counts(data)
    lines = ["| answers | " + " | ".join(f"`--scores {rule}`" for rule in RULES) + " |"]
    lines.append("|---|---|---|---|")
    for name, answerer in ANSWERERS.items():
        rows = rule_rows(samples, counts, answerer, seed)
        maps = [[100 * rows[rule][k] for k in ("full", "rare", "non_rare")] for rule in RULES]
        lines.append(f"| {name} | " + " | ".join(" / ".join(f"{m:.2f}" for m in r) for r in maps))
        lines[-1] += " |"
    return "\n".join(lines)
