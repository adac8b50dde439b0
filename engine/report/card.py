"""The model card of an exported folder: README.md, as model hubs show it."""

from collections import Counter
from pathlib import Path

from engine.files import json_lines
from engine.report.records import RunRecord

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A vision-language model that writes human-object interactions as text, trained with an open
implementation of HOI-R1 (arXiv 2510.05609).

- Started from: {model}
- Training: {method}, {steps} steps of {batch} images of {data}
- Traces: {traces}
- Command: `{command}`
"""


def model_card(run: RunRecord) -> str:
    """The card of a run's model: how it was trained, and on what.

    Raises InputError naming a damaged line of the traces.
    """
    traces, path = "none", run.config.get("traces", "")
    if path and Path(path).exists():
        rows = json_lines(path, cut_last=True)
        counts = Counter(row.get("teacher", "unknown") for _, row in rows)
        traces = ", ".join(f"{count:,} by {name}" for name, count in counts.items())
    return CARD.format(
        name=run.folder.resolve().name,
        model=run.config["model"],
        method=run.config["stage"].upper(),
        steps=run.metrics[-1]["step"] if run.metrics else 0,
        batch=run.config["batch_size"],
        data=run.config["data"],
        traces=traces,  # those by "template" are written from the ground truth
        command=run.command,
    )
