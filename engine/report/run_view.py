"""What a run writes for people: its page, its health and its model's card.

A failure here is one line of warning. It does not stop a training.
"""

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
