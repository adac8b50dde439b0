"""SIGTERM and Ctrl-C: a training finishes its step and saves; a second signal ends it at once.

All other programs end at Ctrl-C, with one line. This module does not import torch, which some
programs do not need.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hicodet import InputError

SAME = 1.0  # seconds; a batch system and torchrun may both send the same signal
RESUME = "to continue, add --resume to the same command"


class StopSignal:
    """Whether a signal has asked the program to stop, inside a `with`.

    An ignored signal stays ignored: a shell script ignores Ctrl-C for what it starts with `&`.
    """

    def __enter__(self) -> "StopSignal":
        self.signal, self.since, self.before = 0, 0.0, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            # image workers get the signal too and end soon; after this step they are not needed
            self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        elif time.monotonic() - self.since > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_any(self, ranks) -> int:
        """The signal that any rank got, on every rank; 0 without one. ranks: engine.ranks.Ranks."""
        return int(max(ranks.numbers(self.signal)))


@contextmanager
def one_line(name: str = "", go_on: str = "") -> Iterator[None]:
    """End the program with one line for what the user must fix, and for Ctrl-C.

    name: of the program, "" or with a colon. go_on: how to continue after Ctrl-C. Other exceptions
    keep their traceback. Ranks after the first print their number.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except (InputError, OSError) as error:
        where = f"rank {rank}: " if rank else ""
        start = "\n" if "tqdm" in sys.modules else ""  # after a progress bar
        print(f"{start}{name}{where}error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        if "by peer" not in str(error):  # gloo's words for a rank that is gone
            raise
        print(f"{name}rank {rank}: error: another rank has ended", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it at once
        if not rank:
            said = f"\n{name}interrupted{go_on and f'; {go_on}'}"
            print(said, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
