"""The model card of an exported folder: README.md, as model hubs show it.

    (folder / "README.md").write_text(card.model_card(read_run(run_folder)))
"""

import json
from pathlib import Path

from engine.report import health
from engine.report.records import Run

METHODS = {
    "sft": "supervised fine-tuning on reasoning and ground truth (Eq. 1)",
    "grpo": "GRPO with rewards for human-object interactions (Eqs. 2-23)",
}
NOT_INCLUDED = """\
- The photographs and annotations of HICO-DET, and the teacher's traces.
- The optimizer's state and the checkpoints: training cannot be resumed from this folder.
- The official mAP: `hoi_r1.py predict`, then `evaluate.py` give it.
- A licence of its own: that of the model it started from holds, and that of the data.
"""


def model_card(run: Run) -> str:
    """Markdown that says what a run's model was trained on, how, and what it reached.

    Metrics are means over the last health.RECENT steps, those of an evaluation the last ones.
    """
    method = METHODS.get(run.stage, "training")
    about = (
        f"A vision-language model that writes human-object interactions as text, after {method}. "
        "Trained with an open implementation of HOI-R1 (arXiv 2510.05609)."
    )
    parts = [
        _front_matter(run),
        f"# {run.folder.resolve().name}\n\n{about}\n",
        f"## Trained on\n\n{_trained_on(run)}\n",
        f"## Command\n\n```\n{run.command}\n```\n",
        f"## Options\n\n{_table(('option', 'value'), run.options.items())}",
        f"## Metrics\n\n{_metrics(run)}",
        f"## Not included\n\n{NOT_INCLUDED}",
    ]
    return "\n".join(parts)


def _front_matter(run: Run) -> str:
    """What a hub reads; the first model of all is named where it comes from a hub."""
    lines = ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    start = _first_model(run)
    if start.count("/") == 1 and not start.startswith(("/", ".", "~")) and not Path(start).exists():
        lines.append(f"base_model: {json.dumps(start)}")
    return "\n".join(["---", *lines, "---", ""])


def _first_model(run: Run) -> str:
    return _first_model(run.before) if run.before else str(run.config.get("model", ""))


def _trained_on(run: Run) -> str:
    steps = run.metrics[-1]["step"] if run.metrics else 0
    lines = [f"- Started from: {run.config.get('model', 'unknown')}"]
    if run.before:
        earlier = f"{run.before.metrics[-1]['step']} steps of {run.before.stage}"
        lines.append(f"- That one was trained before, from {_first_model(run)}: {earlier}")
    lines.append(f"- Data: {run.config.get('data', 'unknown')}, training split")
    if run.config.get("traces"):
        lines.append(f"- Reasoning of a teacher: {run.config['traces']}")
    if run.config.get("examples"):
        hashed = "with a hash of names, ground truth and traces"
        lines.append(f"- Examples, {hashed}: {run.config['examples']}")
    batch = run.config.get("batch_size", "unknown")
    lines.append(f"- {steps} steps, {batch} images a step")
    return "\n".join(lines)


def _metrics(run: Run) -> str:
    names = dict.fromkeys(name for row in run.metrics for name in row if name != "step")
    rows = []
    for name in names:
        recent = health.series(run.metrics, name)
        recent = recent[-1:] if name.startswith("eval_") else recent[-health.RECENT :]
        if recent:
            rows.append((name, f"{sum(recent) / len(recent):.4g}"))
    if not rows:
        return "None were logged.\n"
    text = (
        f"Means over the last {health.RECENT} steps; the code's README says what each one is. "
        "Those of `eval_` are from the last evaluation in training, on the first test images: they "
        "served to watch the training and are no test result.\n\n"
    )
    return text + _table(("metric", "value"), rows)


def _table(head: tuple[str, str], rows) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    for name, value in rows:
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"| `{name}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"
