"""Random answers, and the mAP of random detections in ours and in the obvious way."""

from pathlib import Path

import numpy as np

import evaluate
import hicodet
from tests.pairs import reference_ap

IMAGES = 9658  # of the test split
SIZE = 640


def random_box(rng: np.random.Generator) -> tuple:
    x, y, width, height = rng.integers(1, SIZE // 2, 4).tolist()
    return (x, y, x + width, y + height)


def random_hois(rng: np.random.Generator, count: int) -> tuple[hicodet.HOI, ...]:
    """HOIs with random boxes and classes."""
    pairs = [hicodet.HOI_CLASSES[i] for i in rng.integers(len(hicodet.HOI_CLASSES), size=count)]
    boxes = [(random_box(rng), random_box(rng)) for _ in pairs]
    return tuple(hicodet.HOI(*b, name, (verb,)) for b, (verb, name) in zip(boxes, pairs))


HOIS = random_hois(np.random.default_rng(0), 3)
ANSWERS = [hicodet.format_completion(HOIS[:n], "A person stands there.") for n in (1, 2, 3)]


def mean_average_precision() -> dict:
    """Two functions, `ours` and `baseline`, a loop over detections. Both settings of the mAP."""
    rng = np.random.default_rng(0)
    samples, lines = [], []
    for number in range(IMAGES):
        hois = random_hois(rng, 3)
        pairs = tuple(
            hicodet.Pair(h.human, h.object, hicodet.HOI_CLASSES.index((h.verbs[0], h.object_class)))
            for h in hois)
        known = frozenset(h.object_class for h in hois)
        name = f"{number}.jpg"
        samples.append(hicodet.Sample(name, Path(name), 2 * SIZE, 2 * SIZE, hois, pairs, known))
        instances = [
            {"human": list(h.human), "object": list(h.object), "object_class": h.object_class,
             "verbs": list(h.verbs), "scores": [float(rng.random())]}
            for h in hois + random_hois(rng, 4)]
        lines.append({"file_name": name, "instances": instances})
    counts = [20] * len(hicodet.HOI_CLASSES)
    found = {}

    def ours():
        result = evaluate.evaluate(lines, samples, counts)
        found["ours"] = [result[name]["full"] for name in ("default", "known_object")]

    def baseline():
        found["baseline"] = [looped_map(lines, samples, known) for known in (False, True)]
        if "ours" in found:
            np.testing.assert_allclose(found["ours"], found["baseline"], atol=1e-9)

    return {"ours": ours, "baseline": baseline}


def looped_map(lines: list[dict], samples: list[hicodet.Sample], known_object: bool) -> float:
    """Mean AP over the 600 classes, one detection at a time."""
    detections, truth = ([[] for _ in hicodet.HOI_CLASSES] for _ in range(2))
    place = {pair: number for number, pair in enumerate(hicodet.HOI_CLASSES)}
    for image, (line, sample) in enumerate(zip(lines, samples)):
        for pair in sample.pairs:
            truth[pair.hoi_id].append((image, pair.human, pair.object))
        for one in line["instances"]:
            if not known_object or one["object_class"] in sample.known_objects:
                for verb, score in zip(one["verbs"], one["scores"]):
                    row = (image, one["human"], one["object"], score)
                    detections[place[verb, one["object_class"]]].append(row)
    rules = ("equal overlaps", "no truth in image", "exactly half", "already taken")
    seen = dict.fromkeys(rules, 0)
    return float(np.mean([reference_ap(*rows, seen) for rows in zip(detections, truth)]))
