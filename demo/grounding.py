"""The format of the toy's base model: all boxes with labels, then the pairs.

It is not the JSON of the task's answers.
"""

from demo.scenes import Scene
from hicodet import HOI, Box

PROMPT = "Locate every person and object."
PAIRS_PROMPT = PROMPT + " Who does what?"


def box_text(box: Box) -> str:
    """A box as text: "[14, 28, 42, 84]"."""
    return str([round(side) for side in box])


def grounding_text(scene: Scene) -> str:
    """The answer to PROMPT: boxes and labels from left to right, as Qwen2.5-VL writes them."""
    things = [(box, "person") for box in scene.people]
    things += [(hoi.object, hoi.object_class) for hoi in scene.hois]
    rows = [f'{{"bbox_2d": {box_text(box)}, "label": "{label}"}}' for box, label in sorted(things)]
    return "[\n\t" + ",\n\t".join(rows) + "\n]"


def pair_lines(hois: tuple[HOI, ...]) -> str:
    """The answer to PAIRS_PROMPT after the list: a line per pair, from left to right.

    A line is "person [14, 28, 42, 84]: ride, sit on bicycle [0, 56, 42, 84]".
    """
    pairs = sorted(hois, key=lambda hoi: (hoi.human, hoi.object))
    return "\n".join(f"person {box_text(hoi.human)}: {', '.join(hoi.verbs)} {hoi.object_class} "
                     f"{box_text(hoi.object)}" for hoi in pairs)  # fmt: skip
