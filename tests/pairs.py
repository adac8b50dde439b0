"""Detections and true pairs, by hand and at random, and a slow evaluator as a reference."""

from pathlib import Path

import hicodet

MANY = [100] * 600  # training counts: no class is rare
RIDE_BICYCLE = hicodet.HOI_CLASSES.index(("ride", "bicycle"))
HOLD_BICYCLE = hicodet.HOI_CLASSES.index(("hold", "bicycle"))
RIDE_HORSE = hicodet.HOI_CLASSES.index(("ride", "horse"))
BOX = (0.0, 0.0, 9.0, 9.0)
FAR = (100.0, 100.0, 109.0, 109.0)


def make_sample(name, pairs=(), known=("bicycle",)):
    """A Sample with true pairs given as (human, object, hoi_id)."""
    return hicodet.Sample(
        file_name=name, path=Path(name), width=640, height=480, hois=(),
        pairs=tuple(hicodet.Pair(*pair) for pair in pairs), known_objects=frozenset(known),
    )


def make_line(name, detections=()):
    """A line of predictions.jsonl from detections (human, object, hoi_id, score)."""
    instances = []
    for human, object_, hoi_id, score in detections:
        verb, object_class = hicodet.HOI_CLASSES[hoi_id]
        instances.append(
            {"human": list(human), "object": list(object_), "object_class": object_class,
             "verbs": [verb], "scores": [score]}
        )
    return {"file_name": name, "instances": instances}


def reference_iou(a, b):
    """IoU as in VOCevaldet_bboxpair.m, in 1-based pixels."""
    a, b = [v + 1 for v in a], [v + 1 for v in b]
    iw = min(a[2], b[2]) - max(a[0], b[0]) + 1
    ih = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if iw <= 0 or ih <= 0:
        return 0.0
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return iw * ih / (area_a + area_b - iw * ih)


def reference_ap(detections, truth, seen):
    """AP of one class, one detection after the other.

    detections: (image, human, object, score) in the order of ties; truth: (image, human, object).
    `seen` counts how often each rule decided.
    """
    taken, right = [False] * len(truth), []
    for image, human, object_, _ in sorted(detections, key=lambda detection: -detection[3]):
        best, best_overlap = None, float("-inf")
        for j, (true_image, true_human, true_object) in enumerate(truth):
            if true_image == image:
                overlap = min(reference_iou(human, true_human), reference_iou(object_, true_object))
                seen["equal overlaps"] += overlap == best_overlap > 0
                if overlap > best_overlap:
                    best, best_overlap = j, overlap
        seen["no truth in image"] += best is None
        seen["exactly half"] += best_overlap == 0.5
        seen["already taken"] += best_overlap >= 0.5 and taken[best]
        right.append(best_overlap >= 0.5 and not taken[best])
        if right[-1]:
            taken[best] = True
    return eleven_points(right, len(truth))


def eleven_points(right, npos):
    """AP as in VOCevaldet_bboxpair.m. right: a bool for each detection, highest score first."""
    hits, points = 0, []
    for seen, is_right in enumerate(right, start=1):
        hits += is_right
        points.append((hits / npos if npos else float("nan"), hits / seen))
    return sum(max((p for r, p in points if r >= k * 0.1), default=0.0) / 11 for k in range(11))


def random_box(rng):
    """Boxes on a coarse grid, 10 or 20 pixels wide: equal and half overlaps are common."""
    x, y = rng.choice((0, 5, 10, 40)), rng.choice((0, 5))
    return (x, y, x + rng.choice((9, 9, 19)), y + 9)


def disturbed(box, rng):
    """The same box, half of it, the inverted box, or another one."""
    x1, y1, x2, y2 = box
    half = (x1, y1, x1 + (x2 - x1 + 1) / 2 - 1, y2)
    return rng.choice((box, box, box, half, (x2, y1, x1, y2), random_box(rng)))


def random_problem(rng):
    """Samples and lines with many ties. Image 0 and the last class have no true pair."""
    hoi_ids = [RIDE_BICYCLE, HOLD_BICYCLE, RIDE_HORSE, 599]
    samples, lines = [], []
    for image in range(rng.randint(2, 7)):
        pairs = [
            (random_box(rng), random_box(rng), rng.choice(hoi_ids[:3]))
            for _ in range(rng.randint(0, 6) if image else 0)
        ]
        pairs += [rng.choice(pairs)] if pairs else []  # annotated twice
        known = {hicodet.HOI_CLASSES[hoi_id][1] for *_, hoi_id in pairs}
        detections = [
            (disturbed(human, rng), disturbed(object_, rng), hoi_id, rng.choice((0.5, 0.5, 1.0)))
            for human, object_, hoi_id in rng.choices(pairs, k=12)
        ] if pairs else []
        detections += [
            (random_box(rng), random_box(rng), rng.choice(hoi_ids), rng.choice((0.5, 1.0)))
            for _ in range(rng.randint(0, 5))
        ]
        rng.shuffle(detections)
        samples.append(make_sample(f"{image}.jpg", pairs, known))
        lines.append(make_line(f"{image}.jpg", detections))
    return samples, lines


def reference_problem(samples, lines, hoi_id, known_object, seen):
    """reference_ap of one class."""
    verb, object_class = hicodet.HOI_CLASSES[hoi_id]
    detections, truth = [], []
    for image, (sample, line) in enumerate(zip(samples, lines)):
        truth += [(image, p.human, p.object) for p in sample.pairs if p.hoi_id == hoi_id]
        if known_object and object_class not in sample.known_objects:
            continue
        detections += [
            (image, i["human"], i["object"], i["scores"][0])
            for i in line["instances"]
            if (i["verbs"][0], i["object_class"]) == (verb, object_class)
        ]
    return reference_ap(detections, truth, seen)
