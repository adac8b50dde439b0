"""Ranks that agree on what they run, or all end: one folder, examples, weights and options."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

from engine.model.policy import Ranks
from hicodet import InputError

# options in which ranks may differ: paths of one host, whose contents are compared
FREE_ON_A_RANK = {"model", "data", "traces", "out", "workers", "host", "command"}
CONTENTS = {"lock file": ("out",), "examples": ("data", "traces"), "weights": ("model",)}


def on_first(ranks: Ranks, where: str, act: Callable, group=None):
    """act() on the first rank, whose refusal ends all ranks; None on the others.

    group: in which the others wait, within its timeout.
    """
    result, refusal = None, ""
    if ranks.rank == 0:
        try:
            result = act()
        except (InputError, OSError) as error:
            refusal = f"{where}{error}"
    if refusal := ranks.gather([refusal], group)[0]:
        if ranks.rank:
            sys.exit(1)  # the first rank says why
        raise InputError(refusal)
    return result


def agree(folder: Path, settings: dict, ranks: Ranks) -> None:
    """Raise InputError, on every rank, unless all have this folder, these options and contents."""
    path = folder / "run.lock"
    word = path.read_text() if path.exists() else "none"
    found = ranks.gather([{"lock file": word} | settings | {"host": socket.gethostname()}])
    on_first(ranks, "", lambda: compare_ranks(found))


def compare_ranks(found: list[dict]) -> None:
    """Raise InputError naming the first difference. found: the settings of each rank, "host" and
    "lock file", whose text all read if they have one folder."""
    first = found[0]
    for rank, other in enumerate(found):
        for name in [name for name in first if name not in FREE_ON_A_RANK]:
            if other.get(name) != first[name]:
                raise InputError(
                    f"ranks must agree: {_setting(first, name)} on rank 0 ({first['host']}), "
                    f"{_setting(other, name)} on rank {rank} ({other['host']})"
                )


def _setting(of: dict, name: str) -> str:
    """An option as a flag; a content as the flags that name it."""
    names = CONTENTS.get(name, (name,))
    flags = " ".join(f"--{n.replace('_', '-')} {of.get(n)}" for n in names if of.get(n) != "")
    return f"{flags} ({name}: {of.get(name)})" if name in CONTENTS else flags
