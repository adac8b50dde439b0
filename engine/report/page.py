"""One page for one or several runs: a single HTML file that needs no network.

    write_page(["runs/sft", "runs/grpo", "runs/test"])  # writes runs/test/report.html

`records.read_run` reads the folders and `page` makes the text.
"""

import json
import re
import string
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from engine.files import aside
from engine.report import figures, health
from engine.report.figures import Column
from engine.report.records import RunRecord, read_run
from hicodet import HOI_CLASSES

TEMPLATES = Path(__file__).parent
TONES = 6  # colours of runs in page.css
TEST_IMAGES = 9658  # of HICO-DET
SUBSETS = {"full": "Full", "rare": "Rare", "non_rare": "Non-Rare"}
SETTINGS = {"default": "Default", "known_object": "Known Object"}
MAP_HEADS = ("Method", *(f"{one} {of}" for one in SETTINGS.values() for of in SUBSETS.values()))
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


def write_page(folders: Sequence[str | Path], path: str | Path = "") -> Path:
    """Read the runs, replace the file at `path` with their page, and return the path.

    path: "" is report.html in the last folder.
    Raises InputError for a folder that is not a run, OSError if the file cannot be written.
    """
    text = page([read_run(folder) for folder in folders])
    path = Path(path or Path(folders[-1]) / "report.html")
    with aside(path) as new:
        new.write_text(text, encoding="utf-8", errors="replace")  # a text may hold half a character
    return path


def page(runs: Sequence[RunRecord]) -> str:
    """The HTML of one or several runs side by side."""
    columns = [
        Column(name, f"var(--c{i % TONES})", run)
        for i, (name, run) in enumerate(zip(unique_names(runs), runs))
    ]
    parts = [(ident, *words, make(columns)) for ident, *words, make in SECTIONS]
    parts = [part for part in parts if part[-1]]
    return string.Template((TEMPLATES / "page.html").read_text()).substitute(
        title=escape(", ".join(column.name for column in columns)),
        style=(TEMPLATES / "page.css").read_text(),
        facts="".join(map(_fact, columns)),
        links="".join(f'<a href="#{ident}">{heading}</a>' for ident, heading, *_ in parts),
        sections="\n".join(
            f'<section id="{ident}"><h2>{heading}</h2><p class="soft">{text}</p>{body}</section>'
            for ident, heading, text, body in parts
        ),
    )


def unique_names(runs: Sequence[RunRecord]) -> list[str]:
    """The name of each run's folder, or its path if two have the same name."""
    names = [run.folder.resolve().name for run in runs]
    return [n if names.count(n) == 1 else str(run.folder) for n, run in zip(names, runs)]


def _fact(column: Column) -> str:
    """How far a run is, in one line."""
    run, words = column.run, [figures.STAGES[column.run.stage]]
    if run.metrics:
        words.append(f"{run.metrics[-1]['step']} of {run.config['steps']} steps")
        # the first step compiles
        seconds = health.series(run.metrics[1:] or run.metrics, "seconds")
        words += [f"{fmean(seconds):.3g} s per step"] if seconds else []
    if run.summary:
        words.append(f"{run.summary['images']:,} images")
        reward = run.summary["reward"].get("total")
        words += [] if reward is None else [f"mean reward {reward:.3f}"]
    key = f'<span class="key" style="--tone:{column.tone}"><b>{escape(column.name)}</b></span>'
    return f"<div>{key}<span>{' · '.join(words)}</span></div>"


def _percent(share: float | None) -> str:
    """A share of 1 as the paper prints it."""
    return "–" if share is None else f"{100 * share:.2f}"


def _health(columns: Sequence[Column]) -> str:
    parts = []
    for column in columns:
        found = health.judge(column.run)
        title = f"{column.name}: " if len(columns) > 1 else ""
        parts.append(f"<h3>{escape(title)}{health.summary(found)}</h3>")
        parts.append(f'<ul class="verdicts">{"".join(map(_verdict, found))}</ul>')
    return "".join(parts)


def _verdict(verdict: health.Verdict) -> str:
    advice = re.sub(r"--[a-z-]+", r"<code>\g<0></code>", verdict.advice)
    advice = f'<span class="advice">{advice}</span>' if advice else ""
    figure = f'{verdict.figure} <span class="soft">({verdict.limit})</span>{advice}'
    return f'<li class="{verdict.status}"><b>{verdict.name}</b><span>{figure}</span></li>'


def _is_whole(result: dict) -> bool:
    """Whether it is of the whole test set of HICO-DET, as the paper's are."""
    return (result["num_images"], result["classes"]) == (TEST_IMAGES, "all")


def _table1(columns: Sequence[Column]) -> str:
    """The paper's rows, then the predictions that can be compared with them."""
    ours = [_run_row(c, "ours") for c in columns if c.run.result and _is_whole(c.run.result)]
    rows = []
    for title, methods in TABLE_1.items():
        rows.append(f'<tr class="group"><td colspan="7">{title}</td></tr>')
        rows += [_row(name, how, [f"{v:.2f}" for v in values]) for name, how, *values in methods]
    rows.append('<tr class="group"><td colspan="7">These runs</td></tr>')
    return _table(MAP_HEADS, [*rows, *ours]) if ours else ""


def _other_maps(columns: Sequence[Column]) -> str:
    """The predictions that cannot be compared with Table 1."""
    rows = [_run_row(c) for c in columns if c.run.result and not _is_whole(c.run.result)]
    return _table(MAP_HEADS, rows) if rows else ""


def _run_row(column: Column, kind: str = "") -> str:
    """A run's mAP; its model, scores and test data in small."""
    config, result = column.run.config, column.run.result
    how = ["/".join(Path(config["model"]).parts[-2:])]
    if (scores := config.get("scores", "rank")) != "rank":
        how.append(f"--scores {scores}, while the paper's are by rank")
    if not _is_whole(result):
        present = sum(count > 0 for count in result["true_pairs"])
        classes = "all 600 classes" if result["classes"] == "all" else f"{present} classes"
        how.append(f"{classes}, {result['num_images']:,} images")
    cells = [_percent(result[setting][subset]) for setting in SETTINGS for subset in SUBSETS]
    return _row(column.name, "; ".join(how), cells, kind)


def _row(name: str, how: str, cells: Sequence[str], kind: str = "") -> str:
    first = f"<td>{escape(name)} <small>{escape(how)}</small></td>"
    return f'<tr class="{kind}">{first}{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls in its own box, also by keyboard."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


def _classes(columns: Sequence[Column]) -> str:
    """AP of every class that has true pairs."""
    evaluated = [column for column in columns if column.run.result]
    results = [column.run.result for column in evaluated]
    heads = ["Class", "True pairs"]
    for column in evaluated:
        prefix = f"{column.name}: " if len(evaluated) > 1 else ""
        heads += [f"{prefix}{name}" for name in (*SETTINGS.values(), "Best recall")]
    rows = [
        _class_row(hoi_id, results)
        for hoi_id in range(len(HOI_CLASSES))
        if any(result["true_pairs"][hoi_id] for result in results)
    ]
    return _table(heads, rows) if results else ""


def _class_row(hoi_id: int, results: Sequence[dict]) -> str:
    """A class in each result. Counts of true pairs that differ are given in the results' order."""
    counts = [result["true_pairs"][hoi_id] for result in results]
    shown = counts if len(set(counts)) > 1 else counts[:1]
    cells = [" / ".join(map(str, shown))]
    for result, count in zip(results, counts):
        values = [result[setting]["ap"][hoi_id] for setting in SETTINGS]
        values.append(result["max_recall"][hoi_id])
        cells += [_percent(value if count else None) for value in values]
    return _row(" ".join(HOI_CLASSES[hoi_id]), f"{hoi_id + 1}", cells)


def _options(columns: Sequence[Column]) -> str:
    """The command of each run, and its config.json."""
    parts = []
    for column in columns:
        command = escape(column.run.command.replace(" --", " \\\n    --"))
        options = escape(json.dumps(column.run.config, indent=2))
        parts.append(f'<h3>{escape(column.name)}</h3><pre class="box">{command}</pre>')
        parts.append(f"<details><summary>config.json</summary><pre>{options}</pre></details>")
    return "".join(parts)


SECTIONS = (  # id, heading, what it shows, its function
    ("health", "Is this run healthy?", "The last steps against the limits of a sound run.",
     _health),
    ("table1", "Table 1", "mAP on HICO-DET's test set, in percent: the paper's figures and ours.",
     _table1),
    ("map", "mAP", "In percent. Not on the whole test set of HICO-DET, so not comparable with "
     "the paper's Table 1.", _other_maps),
    ("progress", "mAP and reward against steps", "As in Fig. 2, each run from its own first step. "
     "Step 0 is the model that it starts from.", figures.progress),
    ("rewards", "Rewards by part", "Means over sampled completions; the band is one standard "
     "deviation within a group, which Eq. 5 divides by. Shares are of each part in the advantages; "
     "below 0 the other parts outvote it.", figures.reward_parts),
    ("training", "Training", "Dotted: the limit of the health check. Dashed: the ground truth.",
     figures.training),
    ("group", "A group", "Fig. 6: completions of one image, the best first. Boxes are drawn for "
     "pairs that count as predictions.", figures.groups),
    ("examples", "Examples", "Ground truth, then prediction. A predicted pair has the colour of "
     "the true pair that it finds; grey finds none. The dot marks the person.", figures.examples),
    ("classes", "AP of each class", "In percent, for classes with true pairs in the images.",
     _classes),
    ("options", "Command and options", "As they were given to each run.", _options),
)  # fmt: skip
