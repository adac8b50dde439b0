"""A picture of a run's page, taken with a headless Chromium.

    python -m tests.picture runs/demo/test_grpo/report.html assets/report.png health curves

The last words name sections of engine/report/page.py. Without them it shows the whole page.
"""

import re
import sys
from pathlib import Path

from PIL import Image

from tests import chromium

WIDTH = 1120  # pixels
COLOURS = 256  # of a palette: a third of the bytes


def take(page: Path, path: Path, sections: list[str]) -> None:
    """Write a PNG of the page with only these sections."""
    text = page.read_text()
    for name in re.findall(r'<section id="(\w+)">', text) if sections else ():
        if name not in sections:
            text = re.sub(f'<section id="{name}">.*?</section>', "", text, flags=re.DOTALL)
    chromium.screenshot(text, path, WIDTH)
    with Image.open(path) as image:
        rare = Image.Quantize.MAXCOVERAGE  # or two runs may get one colour
        small = image.convert("RGB").quantize(COLOURS, rare, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    if chromium.PROGRAM is None or len(sys.argv) < 3:
        sys.exit(f"{__doc__}It needs one of: {', '.join(chromium.NAMES)}")
    take(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
