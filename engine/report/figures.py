"""The figures of a run's page: curves, rewards, a group (Fig. 6), examples.

Each function takes the page's columns, one per run, and returns HTML: "" if no run has what it
shows. What a model or a file wrote is escaped.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from engine.report import drawing
from engine.report.charts import Line, line_chart, short
from engine.report.health import CHECKS
from engine.report.records import RunRecord, ground_truth, stored_image
from engine.scoring.predictions import line_hois
from hicodet import HOI

STAGES = {"sft": "SFT", "grpo": "GRPO", "predict": "Prediction"}
GROUP_PICTURES = 8  # most of a group
EXAMPLES = 4  # most of the best answers, and of the worst
PICTURE_WIDTH, JPEG_QUALITY = 400, 78  # about 30 KB each
PART_COLOURS = 8  # of reward parts in page.css
TRAINING = (  # field, title, unit, factor
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
LIMITS = {check.field: check.limit for check in CHECKS}


@dataclass(frozen=True)
class Column:
    """A run on the page."""

    name: str
    tone: str  # its colour in CSS
    run: RunRecord


@dataclass(frozen=True)
class Chart:
    """Lines under a title. It is left out if it has no lines."""

    title: str
    lines: list[Line]
    unit: str = ""
    limit: float | None = None
    y_range: tuple[float, float] | None = None
    legend: str = ""  # its own; "" for the one above all charts


def keys(items: Sequence[tuple[str, str]]) -> str:
    """A legend of (name, colour); "" for fewer than two."""
    if len(items) < 2:
        return ""
    spans = "".join(
        f'<span class="key" style="--tone:{tone}">{escape(name)}</span>' for name, tone in items
    )
    return f'<div class="keys">{spans}</div>'


def progress(columns: Sequence[Column]) -> str:
    """mAP and reward against the steps of each training (Fig. 2)."""
    return _by_stage(columns, lambda some: [
        Chart("mAP of predictions", _map_lines(some, columns), "%"),
        _chart(some, "eval_map", "mAP of greedy answers, first test images", "%"),
        _chart(some, "eval_reward", "Reward of greedy answers, first test images"),
        _chart(some, "reward_total", "Reward of samples, training images"),
    ])  # fmt: skip


def _map_lines(trainings: Sequence[Column], columns: Sequence[Column]) -> list[Line]:
    """The mAP of each training's first, exported and final models, as far as it is on the page."""
    maps = [
        (column.run.config["model"], 100 * column.run.result["default"]["full"])
        for column in columns
        if column.run.result and column.run.result["default"]["full"] is not None
    ]
    lines = []
    for column in trainings:
        steps = [(_step_of(model, column.run), value) for model, value in maps]
        if points := sorted((step, value) for step, value in steps if step is not None):
            lines.append(Line(column.name, *zip(*points), column.tone))
    return lines


def _step_of(model: str, run: RunRecord) -> int | None:
    """The step after which a training had this model; None if it never had."""
    path, folder = Path(model).resolve(), run.folder.resolve()
    if path == Path(run.config["model"]).resolve():
        return 0
    if path == folder / "model" and run.metrics:
        return run.metrics[-1]["step"]
    exported = re.fullmatch(r"model-(\d+)", path.name)
    return int(exported[1]) if exported and path.parent == folder else None


def _chart(
    columns: Sequence[Column],
    field: str,
    title: str,
    unit: str = "",
    factor: float = 1,
    *,
    band: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Chart:
    """A chart of a logged field, its limit, and dashed the ground truth's value.

    band: whether to draw the standard deviation, which is logged as FIELD_std.
    """
    lines = []
    for column in columns:
        for end, name, dashed in (("", column.name, False), ("_true", "ground truth", True)):
            x, y = logged(column.run, field + end, factor)
            spread = (logged(column.run, f"{field}_std")[1] or None) if band else None
            lines += [Line(name, x, y, column.tone, spread, dashed)] if x else []
    limit = factor * LIMITS[field] if field in LIMITS else None
    return Chart(title, lines, unit, limit, y_range)


def logged(run: RunRecord, field: str, factor: float = 1) -> tuple[list[int], list[float]]:
    """Steps and values of a field, NaN where it was null; both empty if it was never logged."""
    rows = [row for row in run.metrics if field in row]
    values = [math.nan if row[field] is None else factor * row[field] for row in rows]
    known = any(map(math.isfinite, values))
    return ([row["step"] for row in rows], values) if known else ([], [])


def training(columns: Sequence[Column]) -> str:
    """Loss, KL, entropy, lengths and the like, with the limits of the health checks."""
    return _by_stage(columns, lambda some: [_chart(some, *words) for words in TRAINING])


def reward_parts(columns: Sequence[Column]) -> str:
    """The rewards of sampled completions by part, with the spread within a group; their shares."""
    titles = {"total": "Total"}
    titles |= {n: part["title"] for c in columns for n, part in c.run.reward_parts.items()}
    charts = [_part_chart(columns, name, title) for name, title in titles.items()]
    return _grid([*charts, *(_shares(column, part_tones(columns)) for column in columns)])


def _part_chart(columns: Sequence[Column], name: str, title: str) -> Chart:
    """The reward of one part, or the total, up to the most that it can be."""
    known = [c for c in columns if name == "total" or name in c.run.reward_parts]
    parts = [c.run.reward_parts.get(name, {"largest": c.run.largest_reward}) for c in known]
    bounds = sorted({part["largest"] for part in parts} - {0})  # 0: an older run
    unit = f"at most {' or '.join(f'{bound:g}' for bound in bounds)}" if bounds else ""
    y_range = (0.0, bounds[-1]) if bounds else None
    return _chart(known, f"reward_{name}", title, unit, band=True, y_range=y_range)


def part_tones(columns: Sequence[Column]) -> dict[str, str]:
    """The colour of each reward part, the same for all runs."""
    names = dict.fromkeys(name for column in columns for name in column.run.reward_parts)
    return {name: f"var(--p{i % PART_COLOURS})" for i, name in enumerate(names)}


def _shares(column: Column, tones: dict[str, str]) -> Chart:
    """The share of each reward part in the advantages of a run, one line per part."""
    lines = [
        Line(part["title"], *logged(column.run, f"advantage_{name}"), tones[name])
        for name, part in column.run.reward_parts.items()
    ]
    lines = [line for line in lines if line.x]
    legend = keys([(line.name, line.colour) for line in lines])
    return Chart(f"Share in the advantages, {column.name}", lines, "sum 1", legend=legend)


def _by_stage(columns: Sequence[Column], make: Callable[[list[Column]], list[Chart]]) -> str:
    """The charts of each stage's trainings: SFT takes many times the steps of RL."""
    grids = {}
    for stage in ("sft", "grpo"):
        grid = _grid(make([column for column in columns if column.run.stage == stage]))
        grids |= {STAGES[stage]: grid} if grid else {}
    if len(grids) == 1:
        return "".join(grids.values())
    return "".join(f"<h3>{title}</h3>{grid}" for title, grid in grids.items())


def _grid(charts: Sequence[Chart]) -> str:
    """The charts that have lines, under a legend of their runs."""
    charts = [chart for chart in charts if chart.lines]
    runs = dict.fromkeys(
        (line.name, line.colour)
        for chart in charts
        for line in chart.lines
        if not line.dashed and not chart.legend
    )
    figures = "".join(_figure(chart) for chart in charts)
    return f'{keys(list(runs))}<div class="grid">{figures}</div>' if charts else ""


def _figure(chart: Chart) -> str:
    """A chart under its title and unit, with the latest value if it has one line."""
    last = [next(v for v in reversed(line.y) if math.isfinite(v)) for line in chart.lines]
    ends = (f"{line.name} ends at {v:.4g}" for line, v in zip(chart.lines, last))
    label = f"{chart.title}: {'; '.join(ends)}"
    svg = line_chart(chart.lines, label, limit=chart.limit, y_range=chart.y_range)
    value = short(float(f"{last[0]:.4g}")) if len(last) == 1 else ""
    caption = f"<span>{escape(chart.title)} <small>{chart.unit}</small></span><span>{value}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{chart.legend}{svg}</figure>"


def groups(columns: Sequence[Column]) -> str:
    """A group of completions with rewards and advantages for each run, as in Fig. 6."""
    tones = part_tones(columns)
    return "".join(_group(column, tones) for column in columns if column.run.group)


def _group(column: Column, tones: dict[str, str]) -> str:
    run, row = column.run, column.run.group
    ranked = sorted(row["completions"], key=lambda completion: -completion["rewards"]["total"])
    shown, image = ranked[:GROUP_PICTURES], stored_image(run, "train", row["file_name"])
    more = f", the best {len(shown)} of {len(ranked)}" if len(ranked) > len(shown) else ""
    title = f"{column.name}, step {row['step']}, {row['file_name']}{more}"
    legend = keys([(part["title"], tones[name]) for name, part in run.reward_parts.items()])
    cards = []
    for number, completion in enumerate(shown, start=1):
        advantage = f"{completion['advantage']:+.2f}".replace("-", "−")
        about = f"<h3>Completion {number}, advantage {advantage}</h3>"
        about += _reward_bar(completion["rewards"], run, tones)
        text = f"<pre>{escape(completion['text'])}</pre>"
        picture = _drawn(image, line_hois(completion))
        cards.append(f'<div class="answer"><div>{picture}</div><div>{about}{text}</div></div>')
    return f'<h3>{escape(title)}</h3>{legend}<div class="answers">{"".join(cards)}</div>'


def _reward_bar(rewards: dict[str, float], run: RunRecord, tones: dict[str, str]) -> str:
    """The rewards of one answer out of the most that it can earn: a bar of parts, and numbers."""
    cells, numbers = [], []
    for name, part in run.reward_parts.items():
        width = max(rewards[name] / run.largest_reward, 0)
        numbers.append(f"{escape(part['title'])} {rewards[name]:.2f}")
        style = f"--tone:{tones[name]};width:{width:.2%}"
        cells.append(f'<i style="{style}" title="{numbers[-1]}"></i>')
    total = f"<b>{rewards['total']:.2f}</b> of {run.largest_reward:g}"
    line = f'{total} <span class="soft">{" · ".join(numbers)}</span>'
    return f'<div class="bar">{"".join(cells)}</div><div class="numbers">{line}</div>'


def examples(columns: Sequence[Column]) -> str:
    """Predicted images next to their ground truth, for each prediction."""
    return "".join(_examples(column) for column in columns if column.run.predictions)


def _examples(column: Column) -> str:
    """The best and the worst by reward; the first if all rewards are equal or unknown."""
    rows = column.run.predictions
    rewarded = [row for row in rows if row["reward"]]
    groups = {"first images": rows[: 2 * EXAMPLES]}
    if len({row["reward"]["total"] for row in rewarded}) > 1:
        ranked = sorted(rewarded, key=lambda row: -row["reward"]["total"])
        half = min(EXAMPLES, len(ranked) // 2)
        groups = {"best by reward": ranked[:half], "worst by reward": ranked[-half:]}
    parts = []
    for which, some in groups.items():
        cards = "".join(_example(row, column.run) for row in some)
        title = escape(f"{column.name}: the {len(some)} {which}")
        parts.append(f'<h3>{title}</h3><div class="examples">{cards}</div>')
    return "".join(parts)


def _example(row: dict, run: RunRecord) -> str:
    name, hois = row["line"]["file_name"], line_hois(row["line"])
    split = run.config["split"]
    image, truth = stored_image(run, split, name), ground_truth(run.config["data"], split).get(name)
    pictures = _drawn(image, hois)
    if image and truth is not None:
        left, right = drawing.compare(image, truth, hois, width=PICTURE_WIDTH)
        pictures = _img(left, f"ground truth: {_labels(truth)}") + _img(right, _labels(hois))
    reward = f"reward {row['reward']['total']:.2f}" if row["reward"] else ""
    caption = f"<span>{escape(name)}</span><span>{reward}</span>"
    text = f"<pre>{escape(row['line']['text'])}</pre>"
    details = f"<details><summary>What it wrote</summary>{text}</details>"
    shown = f'<div class="pairs">{pictures}</div>{details}'
    return f"<figure><figcaption>{caption}</figcaption>{shown}</figure>"


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
