"""A run's numbers as TensorBoard events, if its package is installed."""

import math
import sys
from pathlib import Path

FAMILIES = {"reward", "advantage", "seconds", "eval"}  # fields that TensorBoard shows together


class Events:
    """The event file of a run; without the package, and after a failure, it does nothing."""

    def __init__(self, folder: Path, first_step: int):
        """first_step: the next step of the run. TensorBoard drops later steps of earlier files,
        which a resumed run does again."""
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=first_step)
        except ImportError:
            pass
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the finite values of a step at once, as metrics.jsonl is written."""
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                family, _, rest = name.partition("_")
                if math.isfinite(value):
                    tag = f"{family}/{rest}" if family in FAMILIES else f"train/{name}"
                    self.writer.add_scalar(tag, value, step)
            self.writer.flush()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Warn and write no more: events are not worth a run."""
        print(f"warning: no TensorBoard events: {error!r}", file=sys.stderr, flush=True)
        self.writer = None
