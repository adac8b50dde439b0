"""The figures of a run's page: curves, a group (Fig. 6), examples.

Each function returns HTML, or "" if a run lacks the files. Texts from files are escaped.
"""

import base64
import io
import math
from collections.abc import Iterator, Sequence
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
GROUP_PICTURES = 8  # most completions shown of a group
EXAMPLES = 4  # most answers shown of the best, and of the worst
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


def key(column: Column) -> str:
    """The name of a run next to its colour."""
    return f'<span class="key" style="--tone:{column.tone}">{escape(column.name)}</span>'


def curves(columns: Sequence[Column]) -> str:
    """What the trainings logged. SFT and GRPO are apart, as their numbers of steps differ much."""
    parts = []
    for stage in ("sft", "grpo"):
        some = [c for c in columns if c.run.config["stage"] == stage and c.run.metrics]
        charts = "".join(_chart(some, *row) for row in (*CURVES, *_part_curves(some)))
        if charts:
            names = "".join(map(key, some)) if len(some) > 1 else ""
            parts.append(f'<h3>{STAGES[stage]} {names}</h3><div class="grid">{charts}</div>')
    return "".join(parts)


def _part_curves(columns: Sequence[Column]) -> Iterator[tuple[str, str, str, float]]:
    """Rows as in CURVES for each part of the rewards, and for its share in the advantages."""
    parts = {n: part for c in columns for n, part in c.run.config.get("reward_parts", {}).items()}
    for name, part in parts.items():
        yield f"reward_{name}", f"Reward: {part['title']}", f"at most {part['largest']:g}", 1
    for name, part in parts.items():
        yield f"advantage_{name}", f"Share in advantages: {part['title']}", "%", 100


def _chart(columns: Sequence[Column], field: str, title: str, unit: str, factor: float) -> str:
    """The runs' values of a field, the ground truth's, and the limit; "" without values."""
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


def group(column: Column) -> str:
    """A group of completions, the best first, with rewards and advantages, as in Fig. 6."""
    run, row = column.run, column.run.group
    if not row:
        return ""
    shown = sorted(row["completions"], key=lambda c: -c["rewards"]["total"])[:GROUP_PICTURES]
    image = stored_image(run, "train", row["file_name"])
    parts = run.config["reward_parts"]
    cards = "".join(_completion(completion, image, parts) for completion in shown)
    title = f"{column.name}, step {row['step']}, {row['file_name']}, "
    title += f"the best {len(shown)} of {len(row['completions'])}"
    return f'<h3>{escape(title)}</h3><div class="answers">{cards}</div>'


def _completion(completion: dict, image: Image.Image | None, parts: dict[str, dict]) -> str:
    """The picture and the text of a completion. parts: of the reward, by name."""
    rewards, most = completion["rewards"], sum(part["largest"] for part in parts.values())
    earned = " · ".join(f"{part['title']} {rewards[name]:.2f}" for name, part in parts.items())
    head = f"Advantage {completion['advantage']:+.2f}, reward {rewards['total']:.2f} of {most:g}"
    about = f'<h3>{head}</h3><p class="soft">{escape(earned)}</p>'
    about += f"<pre>{escape(completion['text'])}</pre>"
    picture = _drawn(image, line_hois(completion))
    return f'<div class="answer"><div>{picture}</div><div>{about}</div></div>'


def examples(column: Column) -> str:
    """Predicted images: the best and the worst by reward, or the first if no reward differs."""
    rows = column.run.predictions
    ranked = sorted((r for r in rows if r["reward"]), key=lambda r: -r["reward"]["total"])
    chosen = {"first images": rows[: 2 * EXAMPLES]}
    if ranked and ranked[0]["reward"]["total"] > ranked[-1]["reward"]["total"]:
        half = min(EXAMPLES, len(ranked) // 2)
        chosen = {"best by reward": ranked[:half], "worst by reward": ranked[-half:]}
    parts = []
    for which, some in chosen.items() if rows else ():
        cards = "".join(_example(row, column.run) for row in some)
        title = escape(f"{column.name}: the {len(some)} {which}")
        parts.append(f'<h3>{title}</h3><div class="examples">{cards}</div>')
    return "".join(parts)


def _example(row: dict, run: RunRecord) -> str:
    """An image with its prediction, next to its ground truth if that can be read."""
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
    """The image with its predicted pairs, or their names if it cannot be read."""
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
