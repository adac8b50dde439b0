"""Write docs/options.md from the configs.

python -m tests.write_docs
"""

from dataclasses import MISSING, fields
from pathlib import Path

from engine.configs import STAGES
from engine.options import flag_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """\
# Options

`python -m tests.write_docs` writes this page from `engine/configs.py`, which defines each option
once. `python hoi_r1.py STAGE --help` has the same texts. "resume" is what `--resume` does if the
value differs from the run's: refuse to continue, allow it, or note the change in `config.json`.
"""
TRAINED = ("sft", "grpo", "predict")
OTHERS = tuple(name for name in STAGES if name not in TRAINED)


def default_of(field) -> str:
    """The default as typed on a command line; "" if it is missing or the text has it."""
    if field.default is MISSING:
        return "required"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "" if field.default in (None, "", ()) else f"{field.default}".replace("e-0", "e-")


def rows_of(names: tuple[str, ...], heading: str) -> list[str]:
    """A row for each option under a heading, with the stages that share it."""
    rows: dict[tuple, list[str]] = {}
    for stage in names:
        config = STAGES[stage]
        for field in fields(config):
            if field.metadata["group"] == heading:
                actions = ("refuse", "allow", "note")
                resume = next(a for a in actions if field.name in config.on_resume(a))
                paper = field.metadata["paper"]
                default = default_of(field) + (f", {paper}" if paper else "")
                text = field.metadata["text"].replace("|", r"\|")
                key = (flag_of(field.name), default, text, resume)
                rows.setdefault(key, []).append(stage)
    return [
        f"| `{flag}` | {', '.join(stages)} | {default} | {text} | {resume} |"
        for (flag, default, text, resume), stages in rows.items()
    ]


def tables(names: tuple[str, ...]) -> str:
    """A table for each heading of these stages."""
    found = dict.fromkeys(f.metadata["group"] for n in names for f in fields(STAGES[n]))
    order = [h for h in STAGES[names[0]].GROUPS if h in found]
    parts = []
    for heading in [*order, *(h for h in found if h not in order)]:
        head = "| option | stages | default | meaning | resume |\n|---|---|---|---|---|"
        parts.append(
            f"## {heading[0].upper()}{heading[1:]}\n\n"
            + "\n".join([head, *rows_of(names, heading)])
        )
    return "\n\n".join(parts)


def page() -> str:
    """The text of docs/options.md."""
    others = tables(OTHERS).replace("## ", "### ")
    return f"{HEAD}\n{tables(TRAINED)}\n\n## Other stages\n\n{others}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
