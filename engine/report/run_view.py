"""What a run writes for people: page, health, model card and TensorBoard events.

A failure here is one line of warning. It does not stop a training.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from engine.report import card, health
from engine.report.page import write_page
from engine.report.records import read_run


def update_page(folder: Path) -> None:
    """Write report.html into the folder of a run."""
    attempt(lambda: write_page([folder]), "report.html", None)


def verdicts(folder: Path) -> str:
    """The health of a training, one line per verdict; "" after a failure."""
    return attempt(lambda: health.as_text(health.judge(read_run(folder))), "the health check", "")


def model_card(folder: Path) -> str:
    """The card of the model that a run trains; "" after a failure."""
    return attempt(lambda: card.model_card(read_run(folder)), "the model card", "")


def attempt(make: Callable[[], object], what: str, otherwise: object):
    """What `make` returns. After any exception, print a warning and return `otherwise`."""
    try:
        return make()
    except Exception as error:
        print(f"warning: {what} could not be made: {error!r}", file=sys.stderr, flush=True)
        return otherwise


class Events:
    """A run's TensorBoard file. It does nothing without TensorBoard, and after a failure."""

    def __init__(self, folder: Path, first_step: int):
        """first_step: the next step of the run. TensorBoard drops later steps of older files."""
        self.writer = attempt(lambda: _writer(folder, first_step), "the TensorBoard file", None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the finite values of a step."""
        if self.writer and not attempt(lambda: self._write(step, values), "an event", False):
            self.writer = None

    def _write(self, step: int, values: dict[str, float]) -> bool:
        for name, value in values.items():
            if math.isfinite(value):
                self.writer.add_scalar(f"train/{name}", value, step)
        self.writer.flush()
        return True


def _writer(folder: Path, first_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=first_step)
