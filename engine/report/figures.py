"""The figures of a run's page: curves, a group (Fig. 6), examples.

Each function takes the page's columns, one per run, and returns HTML: "" if no run has what it
shows. What a model or a file wrote is escaped.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from engine.report import drawing
from engine.report.charts import Line, line_chart
from engine.report.health import CHECKS, recent_mean
from engine.report.records import RunRecord, ground_truth, stored_image
from engine.scoring.predictions import line_hois
from hicodet import HOI

STAGES = {"sft": "SFT", "grpo": "GRPO", "predict": "Prediction"}
GROUP_PICTURES = 8  # most of a group
EXAMPLES = 4  # most of the best answers, and of the worst
PICTURE_WIDTH, JPEG_QUALITY = 400, 78  # about 30 KB each
CURVES = (  # field, title, unit, factor
    ("eval_map", "mAP of greedy answers, first test images", "%", 1),
    ("eval_reward", "Reward of greedy answers, first test images", "", 1),
    ("reward_total", "Reward of samples, training images", "", 1),
    ("reward_total_std", "Standard deviation of rewards in a group", "", 1),
    ("loss", "Loss", "", 1),
    ("grad_norm", "Gradient norm before clipping", "", 1),
    ("learning_rate", "Learning rate", "", 1),
    ("kl", "KL from pi_ref", "nats per token", 1),
    ("entropy", "Entropy", "nats per token", 1),
    ("clip_fraction", "Clipped tokens", "%", 100),
    ("completion_length", "Completion length", "tokens", 1),
    ("truncated", "Truncated completions", "%", 100),
    ("zero_variance_groups", "Groups of equal rewards", "%", 100),
    ("distinct_completions", "Distinct completions", "%", 100),
    ("logprob_gap", "Log-prob gap", "nats", 1),
    ("instances", "Instances per answer", "", 1),
    ("verbs_per_instance", "Verbs per instance", "", 1),
)
LIMITS = {check.field: check.high for check in CHECKS if check.of is recent_mean}


@dataclass(frozen=True)
class Column:
    """A run on the page."""

    name: str
    tone: str  # its colour in CSS
    run: RunRecord


def curves(columns: Sequence[Column]) -> str:
    """What the trainings logged, stage by stage: SFT takes many times the steps of RL."""
    parts = []
    for stage in ("sft", "grpo"):
        some = [column for column in columns if column.run.stage == stage and column.run.metrics]
        if some:
            charts = "".join(_chart(some, *row) for row in (*CURVES, *_part_curves(some)))
            names = "".join(map(key, some)) if len(some) > 1 else ""
            parts.append(f'<h3>{STAGES[stage]} {names}</h3><div class="grid">{charts}</div>')
    return "".join(parts)


def key(column: Column) -> str:
    """The name of a run next to its colour."""
    return f'<span class="key" style="--tone:{column.tone}">{escape(column.name)}</span>'


def _part_curves(columns: Sequence[Column]) -> list[tuple[str, str, str, float]]:
    """Rows as in CURVES for each part of the rewards, and for its share in the advantages."""
    parts = {name: part for c in columns for name, part in c.run.reward_parts.items()}
    rows = [
        (f"reward_{name}", f"Reward: {part['title']}", f"at most {part['largest']:g}", 1)
        for name, part in parts.items()
    ]
    shares = [
        (f"advantage_{name}", f"Share in advantages: {part['title']}", "%", 100)
        for name, part in parts.items()
    ]
    return rows + shares


def _chart(columns: Sequence[Column], field: str, title: str, unit: str, factor: float) -> str:
    """The runs' values of a logged field, the ground truth's, and the limit; "" without values."""
    lines = []
    for column in columns:
        for name, tone, end in ((column.name, column.tone, ""), ("truth", "var(--soft)", "_true")):
            rows = [row for row in column.run.metrics if field + end in row]
            values = [math.nan if (v := row[field + end]) is None else factor * v for row in rows]
            if any(map(math.isfinite, values)):
                lines.append(Line(name, tone, [row["step"] for row in rows], values))
    if not lines:
        return ""
    limit = factor * LIMITS[field] if field in LIMITS else None
    last = f"{[v for v in lines[0].y if math.isfinite(v)][-1]:.4g}" if len(lines) == 1 else ""
    caption = f"<span>{escape(title)} <small>{unit}</small></span><span>{last}</span>"
    svg = line_chart(lines, title, limit)
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def groups(columns: Sequence[Column]) -> str:
    """A group of completions with rewards and advantages for each run, as in Fig. 6."""
    return "".join(_group(column) for column in columns if column.run.group)


def _group(column: Column) -> str:
    run, row = column.run, column.run.group
    ranked = sorted(row["completions"], key=lambda completion: -completion["rewards"]["total"])
    shown, image = ranked[:GROUP_PICTURES], stored_image(run, "train", row["file_name"])
    title = f"{column.name}, step {row['step']}, {row['file_name']}, "
    title += f"the best {len(shown)} of {len(ranked)}"
    titles = {name: part["title"] for name, part in run.reward_parts.items()}
    most = sum(part["largest"] for part in run.reward_parts.values())
    cards = []
    for completion in shown:
        rewards = completion["rewards"]
        parts = " · ".join(f"{titles[name]} {rewards[name]:.2f}" for name in titles)
        about = f"<h3>Advantage {completion['advantage']:+.2f}, "
        about += f"reward {rewards['total']:.2f} of {most:g}</h3>"
        about += f'<p class="soft">{escape(parts)}</p><pre>{escape(completion["text"])}</pre>'
        picture = _drawn(image, line_hois(completion))
        cards.append(f'<div class="answer"><div>{picture}</div><div>{about}</div></div>')
    return f'<h3>{escape(title)}</h3><div class="answers">{"".join(cards)}</div>'


def examples(columns: Sequence[Column]) -> str:
    """Predicted images next to their ground truth, for each prediction."""
    return "".join(_examples(column) for column in columns if column.run.predictions)


def _examples(column: Column) -> str:
    """The best and the worst by reward; the first if all rewards are equal or unknown."""
    rows = column.run.predictions
    rewarded = [row for row in rows if row["reward"]]
    chosen = {"first images": rows[: 2 * EXAMPLES]}
    if len({row["reward"]["total"] for row in rewarded}) > 1:
        ranked = sorted(rewarded, key=lambda row: -row["reward"]["total"])
        half = min(EXAMPLES, len(ranked) // 2)
        chosen = {"best by reward": ranked[:half], "worst by reward": ranked[-half:]}
    parts = []
    for which, some in chosen.items():
        cards = "".join(_example(row, column.run) for row in some)
        title = escape(f"{column.name}: the {len(some)} {which}")
        parts.append(f'<h3>{title}</h3><div class="examples">{cards}</div>')
    return "".join(parts)


def _example(row: dict, run: RunRecord) -> str:
    line, split = row["line"], run.config["split"]
    hois, name = line_hois(line), line["file_name"]
    image, truth = stored_image(run, split, name), ground_truth(run.config["data"], split).get(name)
    pictures = _drawn(image, hois)
    if image and truth is not None:
        left, right = drawing.compare(image, truth, hois, width=PICTURE_WIDTH)
        pictures = _img(left, f"ground truth: {_labels(truth)}") + _img(right, _labels(hois))
    reward = f"reward {row['reward']['total']:.2f}" if row["reward"] else ""
    caption = f"<figcaption><span>{escape(name)}</span><span>{reward}</span></figcaption>"
    text = f"<details><summary>What it wrote</summary><pre>{escape(line['text'])}</pre></details>"
    return f'<figure>{caption}<div class="pairs">{pictures}</div>{text}</figure>'


def _drawn(image: Image.Image | None, hois: Sequence[HOI]) -> str:
    """The image with its predicted pairs; their names alone if it cannot be read."""
    if image is None:
        return f"<p>{escape(_labels(hois))}</p>"
    drawn = drawing.draw_pairs(image, hois, range(len(hois)), width=PICTURE_WIDTH)
    return _img(drawn, _labels(hois))


def _labels(hois: Sequence[HOI]) -> str:
    return "; ".join(f"{', '.join(h.verbs)} {h.object_class}" for h in hois) or "no pair"


def _img(picture: Image.Image, alt: str) -> str:
    """The picture within the page itself, as a JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'
