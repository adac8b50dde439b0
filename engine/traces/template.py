"""Traces without a teacher: sentences written from the ground truth, as in the demo."""

from collections.abc import Iterable, Sequence

from hicodet import HOI, MERGE_IOU, Box, iou


def gerund(verb: str) -> str:
    """The -ing form of one of the 117 verbs: "hop on" -> "hopping on"."""
    head, _, rest = verb.partition(" ")
    if head == "no":
        return "not interacting with"
    if head.endswith("ie"):
        head = head[:-2] + "y"
    elif head.endswith("e"):
        head = head[:-1]
    elif head[-1] not in "aeiouwxy" and head[-2] in "aeiou" and head[-3:-2] not in "aeiou":
        # Double the last letter after a single vowel: hop -> hopping, but lift -> lifting.
        head = head if head in ("open", "exit") else head + head[-1]
    return f"{head}ing {rest}".rstrip()


def join_words(words: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count_people(hois: Iterable[HOI]) -> int:
    """Distinct people among humans and objects. As in merging, IoU > 0.5 means the same person."""
    people: list[Box] = []
    for hoi in hois:
        for box in (hoi.human, hoi.object) if hoi.object_class == "person" else (hoi.human,):
            if all(iou(box, seen) <= MERGE_IOU for seen in people):
                people.append(box)
    return len(people)


def template_trace(hois: Sequence[HOI]) -> str:
    """A trace written from the ground truth: one sentence for each question of Fig. 4.

    hois: the merged instances of one image, boxes in any frame. Returns the text inside <think>,
    without tags. Object classes and verbs are in order of first appearance. Each verb appears once
    per class, so a crowd does not make a long trace.
    """
    if not hois:
        return "There is no person who interacts with an object."
    verbs_of: dict[str, list[str]] = {}
    for hoi in hois:
        known = verbs_of.setdefault(hoi.object_class, [])
        known += [verb for verb in dict.fromkeys(hoi.verbs) if verb not in known]
    number = count_people(hois)
    who = ("There is 1 person. The person is" if number == 1
           else f"There are {number} people. They are")
    doing = [f"{join_words([gerund(verb) for verb in verbs])} the {name}"
             for name, verbs in verbs_of.items()]
    plural = "es are" if len(verbs_of) > 1 else " is"
    pairs = [f"for {name}: {', '.join(verbs)}" for name, verbs in verbs_of.items()]
    return (f"{who} {join_words(doing)}. The object class{plural} {join_words(list(verbs_of))}. "
            f"The verb classes are, {'; '.join(pairs)}.")
