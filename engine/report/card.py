"""The model card of an exported folder: README.md, as model hubs show it."""

import json
from collections import Counter
from pathlib import Path

from engine.files import json_lines
from engine.report.records import RunRecord

METHODS = {
    "sft": "supervised fine-tuning (Eq. 1)",
    "grpo": "GRPO with rewards for human-object interactions (Eqs. 2-23)",
}
CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
{base_model}---
# {name}

A vision-language model that writes human-object interactions as text, trained with an open
implementation of HOI-R1 (arXiv 2510.05609).

- Started from: {model}
- Training: {method}, {steps} steps of {batch} images
- Data: {data}, training split
{traces}- Command: `{command}`

Not included: photographs and annotations of HICO-DET, traces, checkpoints, a test result
(`hoi_r1.py predict`, then `evaluate.py`), and a licence of its own (those of the model it started
from and of the data hold).
"""


def model_card(run: RunRecord) -> str:
    """Markdown that says what a run's model was trained on, and how.

    Raises InputError naming a damaged line of the traces.
    """
    start = run.config["model"]
    from_hub = start.count("/") == 1 and start[0] not in "/.~" and not Path(start).exists()
    return CARD.format(
        base_model=f"base_model: {json.dumps(start)}\n" if from_hub else "",
        name=run.folder.resolve().name,
        model=start,
        method=METHODS[run.stage],
        steps=run.metrics[-1]["step"] if run.metrics else 0,
        batch=run.config.get("batch_size", "unknown"),
        data=run.config.get("data", "unknown"),
        traces=_traces(run.config.get("traces", "")),
        command=run.command,
    )


def _traces(path: str) -> str:
    """A line with the number of traces of each teacher; "" without traces."""
    if not path or not Path(path).exists():
        return ""
    rows = json_lines(path, cut_last=True)
    counts = Counter(row.get("teacher", "an unknown teacher") for _, row in rows)
    sources = [f"{count:,} by {name}" for name, count in counts.items() if name != "template"]
    if templates := counts["template"]:
        sources.append(f"{templates:,} sentences from the ground truth, not a teacher's reasoning")
    return f"- Traces: {path}: {', '.join(sources)}\n"
