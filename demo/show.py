"""The end of the demo: a table of its models, and pictures of their answers."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import hicodet
from engine.data import annotations
from engine.data.images import open_image
from engine.files import aside
from engine.report import drawing
from engine.scoring.predictions import line_hois, stored_rows

MAPS = ("full", "rare", "non_rare")
PAIRS = ("precision", "recall", "f1")
WIDTH = 480  # pixels of a panel


def results_table(out: Path, names) -> str:
    """A row per model: mAP, mean reward and pairs of its answers for held-out drawings."""
    lines = [
        "\n                mAP (Default)    mean           pairs",
        "      images  Full  Rare Non-R  reward   prec.  rec.    F1",
    ]
    for name in names:
        row = figures(out / f"test_{name}")
        maps, pairs = percentages(row["default"], MAPS), percentages(row["pairs"], PAIRS)
        lines.append(f"{name:5s} {row['images']:6d} {maps}  {row['reward']:6.3f}   {pairs}")
    return "\n".join(lines)


def figures(folder: Path) -> dict:
    """The scores of the greedy answers in `folder`; shares are from 0 to 1.

    Returns {"images": their number, "default", "known_object": {"full", "rare", "non_rare"},
    "reward": mean total, "pairs": {"precision", "recall", "f1"}, "right_verb": share of the pairs
    with the right boxes and object class that have the right verb}.
    """
    result = json.loads((folder / "map.json").read_text())
    row = {s: {name: result[s][name] for name in MAPS} for s in ("default", "known_object")}
    row["images"] = result["num_images"]
    row["pairs"] = {name: result["pair_scores"]["micro"][name] for name in PAIRS}
    row["reward"] = json.loads((folder / "summary.json").read_text())["reward"]["total"]
    found = len(result["breakdown"]["why"]) - result["breakdown"]["missed"]
    wrong = result["breakdown"]["kinds"]["wrong verb"]["pairs"]
    return row | {"right_verb": found / max(found + wrong, 1)}


def percentages(shares: dict, names) -> str:
    """The shares of these names in percent; "-" for None."""
    values = [shares[name] for name in names]
    return " ".join("    -" if value is None else f"{100 * value:5.1f}" for value in values)


def draw_answers(out: Path, count: int) -> None:
    """Pictures of held-out drawings: the ground truth, then the answers after SFT and GRPO.

    They show the first `count` drawings. best_and_worst.png shows the drawing whose reward GRPO
    raised most, above the one whose reward it lowered most.
    """
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    samples = annotations.load_split(out / "data", "test")
    rows = {name: stored_rows(out / f"test_{name}")[0] for name in ("sft", "grpo")}

    def panels(index: int) -> Image.Image:
        return answers(samples[index], {name: rows[name][index] for name in rows})

    for index, sample in enumerate(samples[:count]):
        save(panels(index), folder / f"{Path(sample.file_name).stem}.png")
    rows_of_panels = [np.asarray(panels(index)) for index in extremes(rows)]  # of equal width
    save(Image.fromarray(np.concatenate(rows_of_panels)), folder / "best_and_worst.png")


def extremes(rows: dict[str, dict[int, dict]]) -> list[int]:
    """The drawing whose reward GRPO raised most, and the one it lowered most, if there is one.

    rows: for "sft" and "grpo" the rows of `stored_rows`. Ties go to the first drawing.
    """
    sft, grpo = rows["sft"], rows["grpo"]
    gains = {i: grpo[i]["reward"]["total"] - sft[i]["reward"]["total"] for i in sorted(sft)}
    best, worst = max(gains, key=gains.get), min(gains, key=gains.get)
    return [best, worst] if gains[worst] < 0 else [best]


def answers(sample: hicodet.Sample, rows: dict[str, dict]) -> Image.Image:
    """One drawing in a row of panels: its ground truth, then each model's answer and reward."""
    image, truth = open_image(sample.path), sample.hois
    own = range(len(truth))
    panels = [drawing.draw_pairs(image, truth, own, caption="ground truth", width=WIDTH)]
    for name, row in rows.items():
        hois = line_hois(row["line"])
        caption = f"{name.upper()}, reward {row['reward']['total']:.2f}"
        colours = drawing.match_pairs(truth, hois)
        panels.append(drawing.draw_pairs(image, hois, colours, caption=caption, width=WIDTH))
    return drawing.side_by_side(panels)


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG of 256 colours: a third of the size, and as easy to read."""
    with aside(path) as new:
        picture.quantize(256).save(new, format="PNG", optimize=True)
