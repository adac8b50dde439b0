"""SIGTERM and Ctrl-C: a training finishes its step and saves; a second one ends it at once.

Everything else ends at Ctrl-C in one line. Without torch, which some of the programs do not need.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hicodet import InputError

SAME = 1.0  # seconds; a batch system and torchrun send the same signal one after the other
RESUME = "to continue, add --resume to the same command"


class StopSignal:
    """Whether a signal has asked to stop, inside a `with`.

    A signal that is ignored stays so: a shell script ignores Ctrl-C for what it starts with `&`.
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
            # image workers get it too and end soon: after this step nothing is asked of them
            self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        elif time.monotonic() - self.since > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_any(self, ranks) -> int:
        """The signal that a rank got, on every rank; 0 if none did. ranks: engine.ranks.Ranks."""
        return int(max(ranks.numbers(self.signal)))


def exit_code(number: int) -> int:
    """0 for SIGTERM, with which a batch system takes back the machine; else as a shell has it."""
    return 0 if number == signal.SIGTERM else 128 + number


@contextmanager
def one_line(name: str = "", go_on: str = "") -> Iterator[None]:
    """End the program in one line for what the user must fix, and for Ctrl-C.

    name: of the program, "" or with a colon. go_on: how to continue after Ctrl-C. All else keeps
    its traceback. Ranks after the first say which one speaks.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except (InputError, OSError) as error:
        where = f"rank {rank}: " if rank else ""
        start = "\n" if "tqdm" in sys.modules else ""  # a progress bar may be on the line
        print(f"{start}{name}{where}error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it at once
        if not rank:
            said = f"\n{name}interrupted{go_on and f'; {go_on}'}"
            print(said, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
