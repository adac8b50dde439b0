"""The figures of a run's page: curves, rewards, seconds, a group (Fig. 6), examples.

Each function takes the page's columns, one for each run, and returns HTML: "" where no run has
what it shows. What a model or a file wrote is escaped.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from engine.report import drawing, health
from engine.report.charts import Line, line_chart, short
from engine.report.health import number
from engine.report.records import REWARDS, Answer, Example, Group, Run, largest_rewards

PICTURES = 72  # of a page; with several runs each has its share
GROUP_PICTURES = 8
PICTURE_WIDTH, JPEG_QUALITY = 400, 78  # about 30 KB each
MAX_TEXT = 6000  # characters of a completion that are shown
REWARD_TITLES = {"format": "Format", "object": "Object label", "verb": "Verb label", "iou": "IoU"}
PHASES = ("sample", "reward", "update", "waiting")  # of a step; what is left is the rest
TRAINING = (  # field, title, unit, factor, limit
    ("loss", "Loss", "", 1, None),
    ("grad_norm", "Gradient norm before clipping", "", 1, None),
    ("learning_rate", "Learning rate", "", 1, None),
    ("kl", "KL from pi_ref", "nats a token", 1, health.MAX_KL),
    ("entropy", "Entropy", "nats a token", 1, None),
    ("clip_fraction", "Clipped tokens", "%", 100, None),
    ("completion_length", "Completion length", "tokens", 1, None),
    ("truncated", "Truncated completions", "%", 100, 100 * health.MAX_TRUNCATED),
    ("zero_variance_groups", "Groups of equal rewards", "%", 100, 100 * health.MAX_ZERO_VARIANCE),
    ("distinct_completions", "Distinct completions", "%", 100, None),
    ("logprob_gap", "Log-prob gap", "nats", 1, health.MAX_LOGPROB_GAP),
)
WRITTEN = {  # fields that are logged of the ground truth, too
    "instances": "Instances of an answer",
    "verbs_per_instance": "Verbs of an instance",
}


@dataclass(frozen=True)
class Column:
    """A run on the page."""

    name: str  # no two columns have the same
    tone: str  # its colour in CSS
    run: Run


def keys(items: Sequence[tuple[str, str]]) -> str:
    """A legend of (name, colour); "" for a single one."""
    if len(items) < 2:
        return ""
    spans = "".join(
        f'<span class="key" style="--tone:{tone}">{escape(name)}</span>' for name, tone in items
    )
    return f'<div class="keys">{spans}</div>'


def _charts(charts: Sequence[str], columns: Sequence[Column], fields: Sequence[str]) -> str:
    """A grid of charts under the legend of the runs that logged their fields; "" without any."""
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    shown = (c for c in columns if any(logged(c.run, field)[0] for field in fields))
    legend = keys([(column.name, column.tone) for column in shown])
    return f'{legend}<div class="grid">{"".join(charts)}</div>'


def progress(columns: Sequence[Column]) -> str:
    """mAP and reward against steps, SFT, then RL, as in Fig. 2."""
    charts = [
        _progress_chart(columns, "eval_map", "mAP of greedy answers, test images", "%"),
        _progress_chart(columns, "eval_reward", "Reward of greedy answers, test images", ""),
        _progress_chart(columns, "reward_total", "Reward of samples, training images", ""),
    ]
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    kind = "grid" if len(charts) > 2 else "grid wide"
    shown = {column.run.folder.resolve() for column in columns}
    items = [(column.name, column.tone) for column in columns if column.run.metrics]
    for run in (run for column in columns for run, _ in chain(column.run)):
        if run.folder.resolve() not in shown:
            shown.add(run.folder.resolve())
            items.append((f"before: {run.folder.name}", "var(--soft)"))
    return f'{keys(items)}<div class="{kind}">{"".join(charts)}</div>'


def chain(run: Run) -> list[tuple[Run, int]]:
    """The trainings up to this one, each with the number of steps that came before it."""
    before = chain(run.before) if run.before else []
    done = sum(r.metrics[-1]["step"] for r, _ in before if r.metrics)
    return [*before, (run, done)]


def _progress_chart(columns: Sequence[Column], field: str, title: str, unit: str) -> str:
    names = {column.run.folder.resolve(): column for column in columns}
    drawn, lines, marks = set(), [], {}
    for run, done in (part for column in columns for part in chain(column.run)):
        x, y = logged(run, field)
        if run.folder.resolve() in drawn or not x:
            continue
        drawn.add(run.folder.resolve())
        column = names.get(run.folder.resolve())
        name, tone = (column.name, column.tone) if column else (run.folder.name, "var(--soft)")
        lines.append(Line(name, [done + step for step in x], y, tone))
        if done and run.stage == "grpo":
            marks[done] = "RL"
    label = "step, SFT then RL" if marks else "step"
    return _figure(lines, title, unit, marks=tuple(marks.items()), x_label=label)


def logged(run: Run, field: str, factor: float = 1) -> tuple[list[int], list[float]]:
    """Steps and values of a field, NaN where it was null; both empty if it was never logged."""
    rows = [row for row in run.metrics if field in row]
    values = [factor * number(row[field]) for row in rows]
    if not np.isfinite(values).any():
        return [], []
    return [row["step"] for row in rows], values


def _figure(
    lines: Sequence[Line], title: str, unit: str, *, legend: str = "", **options
) -> str:
    """A chart under its title and unit, with the latest value where there is one line.

    legend: HTML above the chart. options: of `line_chart`.
    """
    if not lines:
        return ""
    last = [next((v for v in reversed(line.y) if math.isfinite(v)), math.nan) for line in lines]
    label = "; ".join(f"{line.name} ends at {v:.4g}" for line, v in zip(lines, last))
    chart = line_chart(lines, f"{title}: {label}", **options)
    values = f'<span class="figure">{_short(last[0])}</span>' if len(lines) == 1 else ""
    unit = f" <small>{unit}</small>" if unit else ""
    caption = f"<figcaption><span>{title}{unit}</span>{values}</figcaption>"
    return f"<figure>{caption}{legend}{chart}</figure>"


def _short(value: float) -> str:
    return short(float(f"{value:.4g}"))


def reward_parts(columns: Sequence[Column]) -> str:
    """The rewards of sampled completions by part, with the spread within a group; their shares."""
    charts = []
    for part, title in {"total": "Total", **REWARD_TITLES}.items():
        lines, bounds = [], set()
        for column in columns:
            x, y = logged(column.run, f"reward_{part}")
            spread = logged(column.run, f"reward_{part}_std")[1]
            largest = largest_rewards(column.run.config)
            bound = largest.get(part, sum(largest.values()))
            if x and bound:  # no line of a part that is left out
                band = spread if len(spread) == len(y) else None
                lines.append(Line(column.name, x, y, column.tone, band))
                bounds.add(bound)
        at_most = " or ".join(f"{bound:g}" for bound in sorted(bounds))
        y_range = 0.0, max(bounds, default=0.0)
        charts.append(_figure(lines, title, f"at most {at_most}", y_range=y_range))
    told = [column for column in columns if logged(column.run, "advantage_format")[0]]
    charts += [_shares(column, named=len(told) > 1) for column in told]
    return _charts(charts, columns, ["reward_total"])


def _shares(column: Column, named: bool) -> str:
    """The share of each part of the reward in the advantages of a run, a line a part."""
    parts = [(part, f"var(--p{i})") for i, part in enumerate(REWARDS)]
    lines = [
        Line(REWARD_TITLES[part], *logged(column.run, f"advantage_{part}"), tone)
        for part, tone in parts
    ]
    legend = keys([(REWARD_TITLES[part], tone) for part, tone in parts])
    name = f", {escape(column.name)}" if named else ""
    title = f"Share in the advantages{name}"
    return _figure([line for line in lines if line.x], title, "sum 1", legend=legend)


def training(columns: Sequence[Column]) -> str:
    """Loss, KL, entropy, lengths and the like, with the limits of the health checks."""
    charts = []
    for field, title, unit, factor, limit in TRAINING:
        found = [(column, *logged(column.run, field, factor)) for column in columns]
        lines = [Line(column.name, x, y, column.tone) for column, x, y in found if x]
        charts.append(_figure(lines, title, unit, limit=limit))
    charts += [_beside_truth(columns, field, title) for field, title in WRITTEN.items()]
    return _charts(charts, columns, [field for field, *_ in TRAINING])


def _beside_truth(columns: Sequence[Column], field: str, title: str) -> str:
    """What completions have of something, and dashed what the ground truth has of it."""
    lines = []
    for column in columns:
        x, y = logged(column.run, field)
        true_x, true = logged(column.run, f"{field}_true")
        lines += [Line(column.name, x, y, column.tone)] if x else []
        name = f"{column.name}, ground truth"
        lines += [Line(name, true_x, true, column.tone, dashed=True)] if true_x else []
    return _figure(lines, title, "")


def phase_seconds(run: Run) -> dict[str, float]:
    """Mean seconds of each phase of a step; the first step, which compiles, only if alone."""
    rows = run.metrics[1:] or run.metrics
    rows = [row for row in rows if math.isfinite(number(row.get("seconds")))]
    if not rows:
        return {}
    found = {}
    for phase in PHASES:
        values = [number(row.get(f"seconds_{phase}")) for row in rows]
        if np.isfinite(values).any():
            found[phase] = float(np.nanmean(values))
    whole = float(np.mean([row["seconds"] for row in rows]))
    return found | {"rest": max(whole - sum(found.values()), 0.0)}


def phases(columns: Sequence[Column]) -> str:
    """Where the time of a step went, a stacked bar a run, all on one scale."""
    found = [(column, phase_seconds(column.run)) for column in columns]
    found = [(column, seconds) for column, seconds in found if sum(seconds.values())]
    if not found:
        return ""
    longest = max(sum(seconds.values()) for _, seconds in found)
    tones = {name: f"var(--p{i})" for i, name in enumerate((*PHASES, "rest"))}
    bars = []
    for column, seconds in found:
        whole = sum(seconds.values())
        figures = " · ".join(f"{name} {s:.3g} s ({s / whole:.0%})" for name, s in seconds.items())
        parts = [(tones[name], s / longest, f"{name} {s:.3g} s") for name, s in seconds.items()]
        title = f"<b>{escape(column.name)}</b> {whole:.3g} s a step"
        numbers = f'<div class="numbers soft">{figures}</div>'
        bars.append(f"<div>{title}{_bar(parts)}{numbers}</div>")
    used = {name: tone for name, tone in tones.items() if any(name in s for _, s in found)}
    return f'{keys(list(used.items()))}<div class="phases">{"".join(bars)}</div>'


def _bar(parts: Sequence[tuple[str, float, str]], kind: str = "bar") -> str:
    """A stacked bar of (colour, share of the width, title)."""
    cells = (
        f'<i style="--tone:{tone};width:{max(share, 0):.2%}" title="{escape(title)}"></i>'
        for tone, share, title in parts
    )
    return f'<div class="{kind}">{"".join(cells)}</div>'


def advantages(rewards: Sequence[float]) -> list[float]:
    """Eq. 5 for one group, as grpo.group_advantages has it: sample std, plus 1e-4."""
    values = np.asarray(rewards, dtype=float)
    if len(values) < 2:
        return [0.0] * len(values)
    return ((values - values.mean()) / (values.std(ddof=1) + 1e-4)).tolist()


def groups(columns: Sequence[Column]) -> str:
    """A group of completions with their rewards and advantages for each run, as in Fig. 6."""
    found, share = [column for column in columns if column.run.group], _share(columns)
    return "".join(_group(column, column.run.group, share) for column in found)


def _group(column: Column, group: Group, share: int) -> str:
    ranked = sorted(group.answers, key=lambda answer: -answer.rewards.get("total", -math.inf))
    scored = all("total" in answer.rewards for answer in ranked)
    gains = advantages([answer.rewards["total"] for answer in ranked]) if scored else []
    shown, most = min(GROUP_PICTURES, share), sum(largest_rewards(column.run.config).values())
    rows = [
        _answer(answer, gains[i] if scored else None, group.image, f"Completion {i + 1}", most)
        for i, answer in enumerate(ranked[:shown])
    ]
    more = f", the best {shown} of {len(ranked)}" if len(ranked) > shown else ""
    lost = "" if group.image else "; the image is not in the data folder of the run"
    title = f"{column.name}, step {group.step}, {group.file_name}{more}{lost}"
    parts = [(REWARD_TITLES[name], f"var(--p{i})") for i, name in enumerate(REWARDS)]
    return f'<h3>{escape(title)}</h3>{keys(parts)}<div class="answers">{"".join(rows)}</div>'


def _answer(
    answer: Answer, gain: float | None, image: Image.Image | None, title: str, most: float
) -> str:
    picture = "<div></div>"
    if image:
        drawn = drawing.draw_pairs(image, answer.hois, range(len(answer.hois)), width=PICTURE_WIDTH)
        picture = f"<div>{_img(drawn, _labels(answer.hois))}</div>"
    gained = "" if gain is None else f", advantage {_signed(gain)}"
    text = f"<pre>{escape(_cut(answer.text))}</pre>"
    about = f"<h3>{title}{gained}</h3>{_reward_bar(answer.rewards, most)}"
    return f'<div class="answer">{picture}<div>{about}{text}</div></div>'


def _reward_bar(rewards: dict[str, float], most: float) -> str:
    """The rewards of one answer, of the most that it can earn, stacked by part, and in numbers."""
    if not rewards:
        return '<p class="note">No rewards were logged.</p>'
    parts = [(name, rewards[name]) for name in REWARDS if name in rewards]
    cells = [
        (f"var(--p{REWARDS.index(name)})", value / most, f"{REWARD_TITLES[name]} {value:.2f}")
        for name, value in parts
    ]
    numbers = " · ".join(f"{REWARD_TITLES[name]} {value:.2f}" for name, value in parts)
    total = f"<b>{rewards['total']:.2f}</b> of {most:g}"
    line = f'<div class="numbers">{total} <span class="soft">{numbers}</span></div>'
    return _bar(cells, "bar small") + line


def examples(columns: Sequence[Column]) -> str:
    """Predicted images, the best and the worst, beside their ground truth."""
    found, count = [c for c in columns if c.run.examples], max(2, _share(columns) // 2)
    return "".join(_examples(column, min(count, len(column.run.examples))) for column in found)


def _share(columns: Sequence[Column]) -> int:
    """How many pictures each run with pictures may have."""
    users = sum(bool(column.run.group) + bool(column.run.examples) for column in columns)
    return max(1, PICTURES // max(users, 1))


def _examples(column: Column, count: int) -> str:
    run, half = column.run, count // 2
    if run.examples_by == "file":
        halves = {"first in the file; their rewards are not known": run.examples[:count]}
    else:
        halves = {f"best by {run.examples_by}": run.examples[: count - half]}
        if half:
            halves[f"worst by {run.examples_by}"] = run.examples[len(run.examples) - half :]
    parts = []
    for which, found in halves.items():
        cards = "".join(_example(example) for example in found)
        title = escape(f"{column.name}: the {len(found)} {which}")
        parts.append(f'<h3>{title}</h3><div class="examples">{cards}</div>')
    return "".join(parts)


def _example(example: Example) -> str:
    hois, truth = example.answer.hois, example.truth
    if example.image and truth is not None:
        left, right = drawing.compare(example.image, truth, hois, width=PICTURE_WIDTH)
        pictures = _img(left, f"ground truth: {_labels(truth)}")
        pictures += _img(right, f"prediction: {_labels(hois)}")
    elif example.image:
        drawn = drawing.draw_pairs(example.image, hois, range(len(hois)), width=PICTURE_WIDTH)
        pictures = _img(drawn, f"prediction: {_labels(hois)}")
    else:
        pictures = f"<p>Predicted: {escape(_labels(hois))}.</p>"
    reward = example.answer.rewards.get("total")
    figure = "" if reward is None else f'<span class="figure">reward {reward:.2f}</span>'
    caption = f"<figcaption><span>{escape(example.file_name)}</span>{figure}</figcaption>"
    text = f"<pre>{escape(_cut(example.answer.text))}</pre>" if example.answer.text else ""
    details = f"<details><summary>What it wrote</summary>{text}</details>" if text else ""
    return f'<figure>{caption}<div class="pairs">{pictures}</div>{details}</figure>'


def _labels(hois: Sequence) -> str:
    return "; ".join(f"{', '.join(h.verbs)} {h.object_class}" for h in hois) or "no pair"


def _img(picture: Image.Image, alt: str) -> str:
    """The picture within the page itself, as a JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'


def _cut(text: str) -> str:
    more = len(text) - MAX_TEXT
    return text if more <= 0 else f"{text[:MAX_TEXT]} … and {more:,} more characters"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
