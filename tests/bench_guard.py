"""Whether ratios and memory are still those of tests/BENCH.json, as `guard --write` left them.

Ratios are to a named baseline in the same run; memory is compared on a GPU alone, since on a CPU it
is that of the whole process. Seconds are not compared.
"""

import json
from pathlib import Path

from tests.bench_measure import Result

FILE = Path(__file__).with_name("BENCH.json")
LIMITS = {"ratio": 0.15, "peak_memory": 0.01}  # relative


def figures(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """What is compared of each bench."""
    return {
        name: {
            figure: getattr(one, figure)
            for figure in LIMITS
            if figure == "ratio" or one.device != "CPU"
        }
        for name, one in results.items()
    }


def moved(committed: dict, found: dict) -> list[str]:
    """A line for each figure that moved by more than its limit, or stands on one side alone."""
    lines = []
    for name in committed | found:
        before, now = committed.get(name, {}), found.get(name, {})
        for figure in before | now:
            if figure not in before or figure not in now:
                side = "BENCH.json" if figure in before else "this run"
                lines.append(f"{name}: {figure} only in {side}")
            elif abs(change := now[figure] / before[figure] - 1) > LIMITS[figure]:
                values = f"{before[figure]:.4g} -> {now[figure]:.4g}"
                lines.append(f"{name}: {figure} {values} ({change:+.0%})")
    return lines


def guard(results: dict[str, Result], write: bool, file: Path = FILE) -> list[str]:
    """Compare with the figures of this kind of machine, or write them. Returns what moved."""
    (machine,) = {one.device for one in results.values()}
    kinds, found = json.loads(file.read_text()) if file.exists() else {}, figures(results)
    if write:
        file.write_text(json.dumps(kinds | {machine: found}, indent=2) + "\n")
        return []
    if machine not in kinds:
        return [f"{file.name} has no figures of {machine}: guard --write makes them"]
    return moved(kinds[machine], found)
