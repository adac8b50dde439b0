"""One page for one or several runs: a single HTML file that needs no network.

    write_page(["runs/sft", "runs/grpo", "runs/test"])  # writes runs/test/report.html
"""

import json
import string
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from engine.files import aside
from engine.report import figures, health
from engine.report.figures import STAGES, Column, key
from engine.report.records import RunRecord, read_run
from hicodet import HOI_CLASSES

TEMPLATES = Path(__file__).parent
TONES = 6  # colours of runs in page.css
WHOLE = (9658, "all")  # images of HICO-DET's test set, and classes, as in the paper's tables
SETTINGS = {"default": "Default", "known_object": "Known Object"}
SUBSETS = {"full": "Full", "rare": "Rare", "non_rare": "Non-Rare"}
TABLE_1 = (  # of the paper, for the 3B: Full, Rare, Non-Rare of Default, then of Known Object
    ("Qwen2.5-VL-3B", 8.39, 9.60, 8.03, 8.96, 9.83, 8.70),
    ("SFT, 1 epoch", 16.77, 14.20, 17.53, 18.05, 14.45, 19.13),
    ("GRPO, 1 epoch", 14.65, 15.90, 14.28, 15.48, 16.14, 15.28),
    ("HOI-R1, SFT and 40 steps", 18.33, 16.03, 19.02, 19.83, 16.25, 20.90),
)


def write_page(folders: Sequence[str | Path], path: str | Path = "") -> Path:
    """Read the runs, replace the file at `path` with their page, and return the path.

    path: "" is report.html in the last folder.
    Raises InputError for a folder that is not a run, OSError if the file cannot be written.
    """
    text = page([read_run(folder) for folder in folders])
    path = Path(path or Path(folders[-1]) / "report.html")
    with aside(path) as new:
        new.write_text(text, encoding="utf-8", errors="replace")  # for half a surrogate pair
    return path


def page(runs: Sequence[RunRecord]) -> str:
    """The HTML of one or several runs side by side."""
    names = [run.folder.resolve().name for run in runs]
    names = [n if names.count(n) == 1 else str(run.folder) for n, run in zip(names, runs)]
    tones = [f"var(--c{i % TONES})" for i in range(len(runs))]
    columns = [Column(*parts) for parts in zip(names, tones, runs)]
    sections = [(ident, *words, make(columns)) for ident, *words, make in SECTIONS]
    sections = [section for section in sections if section[-1]]
    return string.Template((TEMPLATES / "page.html").read_text()).substitute(
        title=escape(", ".join(names)),
        style=(TEMPLATES / "page.css").read_text(),
        facts="".join(map(_fact, columns)),
        links="".join(f'<a href="#{ident}">{heading}</a>' for ident, heading, *_ in sections),
        sections="\n".join(
            f'<section id="{ident}"><h2>{heading}</h2><p class="soft">{text}</p>{body}</section>'
            for ident, heading, text, body in sections
        ),
    )


def _fact(column: Column) -> str:
    """One line: the stage of a run, how far it is, and its mean reward."""
    run, words = column.run, [STAGES[column.run.config["stage"]]]
    if run.metrics:
        words.append(f"{run.metrics[-1]['step']} of {run.config['steps']} steps")
        if seconds := health.series(run.metrics, "seconds")[1:]:  # the first step compiles
            words.append(f"{fmean(seconds):.3g} s per step")
    if run.summary:
        words.append(f"{run.summary['images']:,} images")
        if "total" in run.summary["reward"]:
            words.append(f"mean reward {run.summary['reward']['total']:.3f}")
    return f"<div>{key(column)}<span>{' · '.join(words)}</span></div>"


def _health(column: Column) -> str:
    found = health.judge(column.run)
    rows = "".join(
        f'<li class="{verdict.status}"><b>{verdict.name}</b>'
        f'<span>{verdict.text}<span class="advice">{verdict.advice}</span></span></li>'
        for verdict in found
    )
    title = escape(f"{column.name}: {health.summary(found)}")
    return f'<h3>{title}</h3><ul class="verdicts">{rows}</ul>'


def _maps(columns: Sequence[Column]) -> str:
    """The mAP of each prediction, next to the paper's if all are of the whole test set."""
    rows, whole = [], True
    for column in (column for column in columns if column.run.result):
        config, result = column.run.config, column.run.result
        how = "/".join(Path(config["model"]).parts[-2:])
        if (result["num_images"], result["classes"]) != WHOLE:
            whole = False
            present = sum(count > 0 for count in result["true_pairs"])
            how += f"; {present} classes, {result['num_images']:,} images"
        how += f"; --scores {config['scores']}"
        values = [result[setting][subset] for setting in SETTINGS for subset in SUBSETS]
        rows.append(_row(column.name, how, map(_percent, values)))
    paper = [_row(name, "paper", [f"{v:.2f}" for v in values]) for name, *values in TABLE_1]
    heads = [f"{name} {subset}" for name in SETTINGS.values() for subset in SUBSETS.values()]
    return _table(heads, (paper if whole else []) + rows) if rows else ""


def _classes(columns: Sequence[Column]) -> str:
    """AP of every class that has true pairs."""
    results = {column.name: column.run.result for column in columns if column.run.result}
    rows = []
    for i, (verb, object_class) in enumerate(HOI_CLASSES):
        cells = []
        for result in results.values():
            count = result["true_pairs"][i]
            cells += [_percent(result["default"]["ap"][i] if count else None), str(count)]
        if any(count != "0" for count in cells[1::2]):
            rows.append(_row(f"{verb} {object_class}", f"{i + 1}", cells))
    heads = [f"{name} {what}" for name in results for what in ("AP", "true pairs")]
    return _table(heads, rows) if rows else ""


def _percent(share: float | None) -> str:
    """A fraction in percent, as the paper prints it."""
    return "–" if share is None else f"{100 * share:.2f}"


def _row(name: str, how: str, cells: Iterable[str]) -> str:
    first = f"<td>{escape(name)} <small>{escape(how)}</small></td>"
    return f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls in its own box, also by keyboard. The first column has no head."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *heads))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


def _options(column: Column) -> str:
    """The command of a run, and its config.json."""
    command = escape(column.run.command.replace(" --", " \\\n    --"))
    options = escape(json.dumps(column.run.config, indent=2))
    return (f'<h3>{escape(column.name)}</h3><pre class="box">{command}</pre>'
            f"<details><summary>config.json</summary><pre>{options}</pre></details>")  # fmt: skip


def _each(make):
    """A section that has a part for each run."""
    return lambda columns: "".join(map(make, columns))


SECTIONS = (  # id, heading, what it shows, its function
    ("health", "Is this run healthy?", "The last 10 steps compared with the limits of a sound run.",
     _each(_health)),
    ("map", "mAP", "In percent. The paper's Table 1 is for HICO-DET's whole test set and scores by "
     "rank; docs/results.md has its other rows.", _maps),
    ("curves", "Curves", "Dotted: the limit of the health check. Grey: the ground truth. A part's "
     "share in the advantages is below 0 where the others outvote it.", figures.curves),
    ("group", "A group", "Fig. 6: completions of one image, the best first. Boxes are drawn for "
     "pairs that count as predictions.", _each(figures.group)),
    ("examples", "Examples", "Ground truth, then prediction. A predicted pair has the colour of "
     "the true pair that it finds; grey finds none. The dot marks the person.",
     _each(figures.examples)),
    ("classes", "AP of each class", "Default, in percent, of classes with true pairs.", _classes),
    ("options", "Command and options", "The command line and config.json of each run.",
     _each(_options)),
)  # fmt: skip
