"""One page for one or several runs: a single HTML file that needs no network.

    report.write_page(["runs/sft", "runs/grpo", "runs/test"])    # runs/test/report.html

`records.read_run` reads the folders, `page` makes the text, and nothing else is written.
"""

import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from engine.files import naming
from engine.report import figures, health
from engine.report.figures import Column
from engine.report.health import number
from engine.report.records import Run, largest_rewards, read_run
from hicodet import HOI_CLASSES

TEMPLATES, FILES = Path(__file__).parent, ("html", "css", "js")
TONES = 6  # colours of runs in page.css
TEST_IMAGES = 9658
SUBSETS = ("full", "rare", "non_rare")
SETTINGS = {"default": "Default", "known_object": "Known Object"}
TABLE_1 = {  # method, training: mAP of Default Full, Rare, Non-Rare, then of Known Object
    "Traditional methods": (
        ("HO-RCNN", "150k", 7.81, 5.37, 8.54, 10.41, 8.94, 10.85),
        ("QPIC", "150 epochs", 29.07, 21.85, 31.23, 31.68, 24.14, 33.93),
    ),
    "Multimodal language models, as they are": (
        ("Qwen2.5-VL-3B", "baseline", 8.39, 9.60, 8.03, 8.96, 9.83, 8.70),
        ("Qwen2.5-VL-7B", "", 10.46, 14.30, 9.31, 11.01, 14.63, 9.93),
        ("Qwen2.5-VL-32B-AWQ", "", 18.12, 24.56, 16.20, 19.90, 25.77, 18.15),
        # Full is (138 * Rare + 462 * Non-Rare) / 600: that cell of the paper cannot be read
        ("Qwen2.5-VL-72B-AWQ", "", 20.71, 29.62, 18.05, 22.93, 31.87, 20.26),
    ),
    "SFT or RL": (
        ("Qwen2.5-VL-3B-SFT", "400 steps", 11.71, 10.52, 12.07, 12.60, 10.70, 13.17),
        ("Qwen2.5-VL-3B-SFT", "1000 steps", 15.23, 12.26, 16.11, 16.41, 12.60, 17.54),
        ("Qwen2.5-VL-3B-SFT", "1 epoch", 16.77, 14.20, 17.53, 18.05, 14.45, 19.13),
        ("Qwen2.5-VL-3B-GRPO", "400 steps", 12.22, 14.56, 11.52, 13.12, 14.84, 12.60),
        ("Qwen2.5-VL-3B-GRPO", "1000 steps", 13.25, 15.22, 12.66, 14.18, 15.60, 13.75),
        ("Qwen2.5-VL-3B-GRPO", "1 epoch", 14.65, 15.90, 14.28, 15.48, 16.14, 15.28),
    ),
    "SFT and RL": (
        ("HOI-R1", "1 epoch + 40 steps", 18.33, 16.03, 19.02, 19.83, 16.25, 20.90),
    ),
}
SECTIONS = (  # id, heading, what it shows
    ("health", "Is this run healthy?", "The last steps against the limits of a sound run."),
    ("table1", "Table 1", "mAP on HICO-DET's test set, in percent: the paper's figures and ours."),
    ("progress", "mAP and reward against steps", "As in Fig. 2: SFT, then RL."),
    ("rewards", "Rewards by part", "Means over sampled completions; the band is one standard "
     "deviation within a group, which Eq. 5 divides by. Shares are of each part in the advantages; "
     "below 0 the other parts outvote it."),
    ("training", "Training", "Dotted: the limit of the health check. Dashed: the ground truth."),
    ("seconds", "Seconds of a step", "Means over all steps but the first."),
    ("group", "A group", "Fig. 6: completions of one image, the best first. Boxes are drawn for "
     "pairs that count as predictions."),
    ("examples", "Examples", "Ground truth, then prediction. A predicted pair has the colour of "
     "the true pair that it finds; grey finds none. The dot marks the person."),
    ("classes", "AP of the 600 classes", "In percent. Press a heading to sort."),
    ("options", "Options", "What each run was told; what differs is shaded."),
)


def write_page(folders: Sequence[str | Path], path: str | Path = "") -> Path:
    """Reads the runs, replaces the file at `path` with their page at one stroke, returns the path.

    path: "" is report.html in the last folder.
    Raises FileNotFoundError if a folder is missing, OSError if the file cannot be written.
    """
    text = page([read_run(folder) for folder in folders])
    path = Path(path or Path(folders[-1]) / "report.html")
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a run may write it at the same time
    try:
        with naming(aside):
            aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def page(runs: Sequence[Run]) -> str:
    """The HTML of one or several runs side by side. Raises ValueError without a run."""
    if not runs:
        raise ValueError("a page needs at least one run")
    columns = [
        Column(name, f"var(--c{i % TONES})", run)
        for i, (name, run) in enumerate(zip(unique_names(runs), runs))
    ]
    makers = {
        "health": _health,
        "table1": _table1,
        "progress": figures.progress,
        "rewards": figures.reward_parts,
        "training": figures.training,
        "seconds": figures.phases,
        "group": figures.groups,
        "examples": figures.examples,
        "classes": _classes,
        "options": _options,
    }
    parts = [(ident, *words, makers[ident](columns)) for ident, *words in SECTIONS]
    parts = [part for part in parts if part[-1]]
    html, style, script = ((TEMPLATES / f"page.{kind}").read_text() for kind in FILES)
    return string.Template(html).substitute(
        title=escape(", ".join(column.name for column in columns)),
        style=style,
        script=script,
        facts=_facts(columns),
        links="".join(f'<a href="#{ident}">{heading}</a>' for ident, heading, *_ in parts),
        sections="\n".join(
            f'<section id="{ident}"><h2>{heading}</h2><p class="soft">{text}</p>{body}</section>'
            for ident, heading, text, body in parts
        ),
    )


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Each run's folder, with as much of its path as tells it from the others."""
    paths = [run.folder.resolve() for run in runs]
    names = [path.name for path in paths]
    for length in range(2, max(len(path.parts) for path in paths) + 1):
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else "/".join(path.parts[-length:])
            for name, path in zip(names, paths)
        ]
    return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _facts(columns: Sequence[Column]) -> str:
    """A line for each run: how far it is and what it has reached."""
    rows = (
        f'<div><span class="key" style="--tone:{column.tone}"><b>{escape(column.name)}</b></span>'
        f"<span>{escape(_fact(column.run))}</span></div>"
        for column in columns
    )
    return f'<div class="runs">{"".join(rows)}</div>'


def _fact(run: Run) -> str:
    titles = {"sft": "SFT", "grpo": "GRPO", "predict": "Prediction"}
    words = [titles.get(run.stage, "Run")]
    if run.metrics:
        planned, done = run.config.get("steps"), run.metrics[-1]["step"]
        words.append(f"{done} of {planned} steps" if planned else f"{done} steps")
        words.append(f"{sum(figures.phase_seconds(run).values()):.3g} s a step")
    for field, text in (
        ("reward_total", "reward {:.3f}"),
        ("eval_map", "mAP {:.2f} on {eval_images} test images"),
    ):
        values = health.series(run.metrics, field)
        if values:
            images = run.config.get("eval_images", "some")
            words.append(text.format(values[-1], eval_images=images))
    if run.summary:
        reward = run.summary.get("reward")
        total = number(reward.get("total")) if isinstance(reward, dict) else math.nan
        words.append(f"{run.summary.get('images')} images")
        words += [f"mean reward {total:.3f}"] if math.isfinite(total) else []
    if run.result:
        words.append(f"mAP {_percent(run.result['default'].get('full'))}")
    return " · ".join(words)


def _percent(value: object) -> str:
    """A fraction as the paper prints it."""
    return f"{100 * number(value):.2f}" if math.isfinite(number(value)) else "–"


def _health(columns: Sequence[Column]) -> str:
    parts = []
    for column in columns:
        run, most = column.run, sum(largest_rewards(column.run.config).values())
        found = health.verdicts(run.metrics or [run.summary or {}], most)
        title = f"{column.name}: " if len(columns) > 1 else ""
        parts.append(f"<h3>{escape(title)}{health.summary(found)}</h3>")
        rows = "".join(_verdict(verdict) for verdict in found)
        parts.append(f'<ul class="verdicts">{rows}</ul>' if rows else "")
    return "".join(parts)


def _verdict(verdict: health.Verdict) -> str:
    advice = re.sub(r"--[a-z-]+", r"<code>\g<0></code>", verdict.advice)
    advice = f'<span class="advice">{advice}</span>' if verdict.status == "look" else ""
    figure = f'{verdict.figure} <span class="soft">({verdict.limit})</span>{advice}'
    return f'<li class="{verdict.status}"><b>{verdict.name}</b><span>{figure}</span></li>'


def _table1(columns: Sequence[Column]) -> str:
    """The paper's rows and one for each evaluated prediction."""
    evaluated = [column for column in columns if column.run.result]
    if not evaluated:
        return ""
    subsets = ("Full", "Rare", "Non-Rare")
    heads = "".join(f'<th class="over" colspan="3">{setting}</th>' for setting in SETTINGS.values())
    names = "".join(f'<th class="n">{name}</th>' for name in subsets * 2)
    rows = []
    for title, methods in TABLE_1.items():
        rows.append(f'<tr class="group"><td colspan="7">{title}</td></tr>')
        rows += [_row(name, how, [f"{v:.2f}" for v in values]) for name, how, *values in methods]
    rows.append('<tr class="group"><td colspan="7">These runs</td></tr>')
    for column in evaluated:
        result = column.run.result
        cells = [_percent(result[setting].get(s)) for setting in SETTINGS for s in SUBSETS]
        rows.append(_row(column.name, _model(column.run), cells, "ours"))
    notes = "".join(f'<p class="note">{escape(n)}</p>' for c in evaluated if (n := _scope(c)))
    head = f'<thead><tr><th rowspan="2">Method</th>{heads}</tr><tr>{names}</tr></thead>'
    table = f'<table class="held">{head}<tbody>{"".join(rows)}</tbody></table>'
    return _scroll("Table 1 and these runs", table) + notes


def _row(name: str, how: str, cells: Sequence[str], kind: str = "") -> str:
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f'<tr class="{kind}"><td>{escape(name)} <small>{escape(how)}</small></td>{numbers}</tr>'


def _scroll(label: str, table: str, kind: str = "scroll") -> str:
    """A box in which a table wider than the screen scrolls, also by keyboard."""
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _model(run: Run) -> str:
    """The model of a prediction, in short."""
    parts = Path(str(run.config.get("model", "–"))).parts
    return "/".join(parts[-2:]) if parts else "–"


def _scope(column: Column) -> str:
    """What keeps a result from being compared with the paper's; "" if nothing does."""
    result, notes = column.run.result, []
    images, classes = result.get("num_images"), result.get("classes")
    if images != TEST_IMAGES or classes != "all":
        pairs = result.get("true_pairs")
        present = sum(count != 0 for count in pairs) if isinstance(pairs, list) else "some"
        over = "all 600 classes" if classes == "all" else f"the {present} classes with true pairs"
        notes.append(f"over {over} in {images} images, not to be compared with the paper's")
    if (scores := column.run.config.get("scores", "rank")) != "rank":
        notes.append(f"scored by --scores {scores}; the paper's by rank")
    return f"{column.name}: {'; '.join(notes)}." if notes else ""


def _classes(columns: Sequence[Column]) -> str:
    """AP of every class, sortable."""
    evaluated = [column for column in columns if column.run.result]
    if not evaluated:
        return ""
    results = [column.run.result for column in evaluated]
    pairs = [result.get("true_pairs") for result in results]
    differ = any(counts != pairs[0] for counts in pairs)  # of other images: a column each
    heads = [("HOI", "n"), ("Verb", ""), ("Object", "")] + [("True pairs", "n")] * (not differ)
    for column in evaluated:
        prefix = f"{column.name}: " if len(evaluated) > 1 else ""
        names = ["True pairs"] * differ + [*SETTINGS.values(), "Best recall"]
        heads += [(f"{prefix}{name}", "n") for name in names]
    head = "".join(
        f'<th class="{kind}"><button type="button">{escape(name)}</button></th>'
        for name, kind in heads
    )
    absent = [all(_at(counts, i) == 0 for counts in pairs) for i in range(len(HOI_CLASSES))]
    order = sorted(range(len(HOI_CLASSES)), key=absent.__getitem__)  # stable
    rows = "".join(_class_row(hoi_id, results, differ) for hoi_id in order)
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return _scroll("AP of each class", table, "scroll high")


def _class_row(hoi_id: int, results: Sequence[dict], differ: bool) -> str:
    """A class in each result. differ: the results' true pairs do, and each shows its own."""
    verb, object_class = HOI_CLASSES[hoi_id]
    pairs = [number(_at(result.get("true_pairs"), hoi_id)) for result in results]
    counts = [f"{count:.0f}" if math.isfinite(count) else "–" for count in pairs]
    cells = [] if differ else counts[:1]
    for result, count, shown in zip(results, pairs, counts):
        values = [result[setting]["ap"][hoi_id] for setting in SETTINGS]
        values.append(_at(result.get("max_recall"), hoi_id))
        cells += [shown] * differ + [_percent(value if count else None) for value in values]
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    kind = "" if any(pairs) else ' class="none"'
    names = f'<td class="n">{hoi_id + 1}</td><td>{verb}</td><td>{object_class}</td>'
    return f"<tr{kind}>{names}{numbers}</tr>"


def _at(values: object, index: int) -> object:
    return values[index] if isinstance(values, list) and index < len(values) else None


def _options(columns: Sequence[Column]) -> str:
    """The command of each run, and the options of all in one table."""
    told = [column for column in columns if column.run.config]
    if not told:
        return ""
    commands = "".join(
        f'<h3>{escape(column.name)}</h3><pre class="box">{_command(column.run)}</pre>'
        for column in told
    )
    names = dict.fromkeys(name for column in told for name in column.run.config)
    names.pop("command", None)  # it stands above
    rows = []
    for name in names:
        values = [column.run.config.get(name, "") for column in told]
        values = [v if isinstance(v, str) else json.dumps(v) for v in values]
        kind = ' class="differs"' if len(set(values) - {""}) > 1 else ""
        cells = "".join(f"<td{kind}><code>{escape(value)}</code></td>" for value in values)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(column.name)}</th>" for column in told)
    head = f"<thead><tr><th>Option</th>{heads}</tr></thead>"
    table = f'<table class="held">{head}<tbody>{"".join(rows)}</tbody></table>'
    return commands + "<h3>All options</h3>" + _scroll("Options", table)


def _command(run: Run) -> str:
    """The command line, which breaks between its options and not within them."""
    first, *options = re.split(r" (?=--)", run.command)
    return escape(first) + "".join(f" <span>{escape(option)}</span>" for option in options)
