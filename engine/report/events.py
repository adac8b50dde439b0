"""A run's numbers as TensorBoard events, if its package is installed."""

import math
from pathlib import Path

from engine.report.run_view import attempt


class Events:
    """The event file of a run. It does nothing without the package, and after a failure."""

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
