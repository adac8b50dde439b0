"""SIGTERM and Ctrl-C: a training finishes its step; a second one ends it at once.

Everything else ends at Ctrl-C in one line. Without torch, which some of the programs do not need.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from hicodet import InputError

if TYPE_CHECKING:
    from engine.model.policy import Ranks

SAME = 1.0  # seconds; a batch system and torchrun send the same signal, one after the other


class Stop:
    """Whether a signal has asked to stop, inside a `with`."""

    def __enter__(self) -> "Stop":
        self.signal, self.since = 0, 0.0
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            # image workers that get it too end soon: after this step nothing is asked of them
            self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        elif time.monotonic() - self.since > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_any(self, ranks: "Ranks") -> int:
        """The signal that a rank got, on every rank; 0 if none did."""
        return int(max(ranks.numbers(self.signal)))


def exit_code(number: int) -> int:
    """0 for SIGTERM, by which a batch system takes the machine for others; as a shell has it."""
    return 0 if number == signal.SIGTERM else 128 + number


def resume_command() -> str:
    """The command line of this process with --resume, as torchrun or python takes it."""
    start, program = ["python"], sys.argv[:1]
    if module := sys.modules["__main__"].__spec__:  # started with -m
        program = ["-m", module.name]
    if local := os.environ.get("LOCAL_WORLD_SIZE"):
        hosts = os.environ["GROUP_WORLD_SIZE"]
        start = ["torchrun", *([] if hosts == "1" else ["--nnodes", hosts])]
        start += ["--nproc_per_node", local]
    words = [*start, *program, *sys.argv[1:]]
    return shlex.join([*words, *([] if "--resume" in sys.argv else ["--resume"])])


def end_interrupted(name: str = "", go_on: str = "") -> NoReturn:
    """End the program after Ctrl-C, in one line of the first rank. A second one ends it at once.

    name: of the program. go_on: how to go on.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("RANK", "0") == "0":  # a progress bar may stand before it
        said = f"\n{name}interrupted{go_on and f'; {go_on}'}"
        print(said, file=sys.stderr, flush=True)
    sys.exit(128 + signal.SIGINT)


@contextmanager
def one_line(name: str = "", go_on: str = "") -> Iterator[None]:
    """End the program in one line for what the user must mend, and for Ctrl-C.

    name, go_on: as in `end_interrupted`. All else keeps its traceback.
    """
    try:
        yield
    except (InputError, OSError) as error:
        sys.exit(f"{name}error: {error}")
    except KeyboardInterrupt:
        end_interrupted(name, go_on)
