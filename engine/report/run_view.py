"""What a run leaves to be looked at: its page while it goes on, its verdicts, its model's card,
and events for TensorBoard where that is installed.

None of it may end a run: what fails here is one line of warning.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.report import health
from engine.report.card import model_card
from engine.report.page import write_page
from engine.report.records import largest_rewards, read_config, read_lines, read_run

EVERY = 10.0  # seconds between two pages, at least
LARGEST_SHARE = 0.05  # of a run's time that its pages may take
FAMILIES = {"reward", "advantage", "seconds", "eval"}  # fields that TensorBoard shows together


class LiveView:
    """The folder of a run under way, for people to look at."""

    def __init__(self, folder: Path, *, active: bool):
        """active: only one rank of a run writes; on the others nothing is done."""
        self.folder, self.active, self.due = folder, active, 0.0
        self.events, self.has_events = None, True  # opened by the first step

    def refresh(self) -> None:
        """Write report.html, unless it is too early. After a failure only `write` tries again."""
        if time.monotonic() >= self.due:
            self.write()

    def write(self) -> None:
        """Write report.html."""
        started = time.monotonic()
        path = self._try(lambda: write_page([self.folder]), "report.html")
        seconds = time.monotonic() - started
        self.due = started + max(EVERY, seconds / LARGEST_SHARE) if path else math.inf

    def log(self, step: int, values: dict[str, float]) -> None:
        """A step's numbers as TensorBoard events, where its package is installed.

        After a failure none are written any more.
        """
        if self.has_events:
            self.has_events = self._try(lambda: self._log(step, values), "TensorBoard events")

    def _log(self, step: int, values: dict[str, float]) -> bool:
        """Write a step's numbers. Returns whether there is anything to write them with."""
        self.events = self.events or open_events(self.folder, step)
        if self.events:
            add_step(self.events, step, values)
        return self.events is not None

    def card(self) -> str:
        """The model card; "" on the other ranks, and if it cannot be made."""
        return self._try(lambda: model_card(read_run(self.folder)), "the model card") or ""

    def verdicts(self) -> str:
        """The health of the run, a line for each verdict; "" as above."""
        return self._try(lambda: _verdicts(self.folder), "the health of the run") or ""

    def _try(self, make: Callable[[], object], what: str):
        """What `make` returns; None where nothing is to be done, and after a failure."""
        if not self.active:
            return None
        try:
            return make()
        except Exception as error:  # of any kind: no mistake in a page is worth days of training
            print(f"warning: {what} could not be made: {error!r}", file=sys.stderr, flush=True)
            return None


def _verdicts(folder: Path) -> str:
    most = sum(largest_rewards(read_config(folder)).values())
    return health.as_text(health.verdicts(read_lines(folder / "metrics.jsonl"), most))


def open_events(folder: Path, step: int):
    """A writer of TensorBoard events into the folder; None if the package is not installed.

    step: the first to be written. TensorBoard leaves out what an earlier file has from there on:
    steps that a resumed run does again.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step)


def add_step(writer, step: int, values: dict[str, float]) -> None:
    """Write the finite values of a step, at once, as metrics.jsonl is."""
    for name, value in values.items():
        family, _, rest = name.partition("_")
        if math.isfinite(value):
            tag = f"{family}/{rest}" if family in FAMILIES else f"train/{name}"
            writer.add_scalar(tag, value, step)
    writer.flush()
