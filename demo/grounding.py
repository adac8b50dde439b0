"""What the toy's base model is asked before it meets HOI: where every person and object is."""

from demo.scenes import Scene
from hicodet import Box

PROMPT = "Locate every person and object."


def things(scene: Scene) -> list[tuple[Box, str]]:
    """Box and label of all that is drawn, bystanders too, from left to right."""
    seen = [(box, "person") for box in scene.people]
    seen += [(hoi.object, hoi.object_class) for hoi in scene.hois]
    return sorted(seen)


def grounding_text(scene: Scene) -> str:
    """The answer to PROMPT: a JSON list of boxes and labels as Qwen2.5-VL writes it."""
    rows = [f'\t{{"bbox_2d": {[round(side) for side in box]}, "label": "{label}"}}'
            for box, label in things(scene)]
    return "[\n" + ",\n".join(rows) + "\n]"
