"""A picture of a run's page, taken with a headless Chromium.

    python -m tests.picture runs/demo/test_grpo/report.html assets/report.png health progress

The last words are sections by their names in engine/report/page.py; without any, the whole page.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests import chromium

WIDTH = 1120  # pixels
COLOURS = 256  # of a palette: a third of the bytes


def take(page: Path, sections: list[str]) -> Image.Image:
    """The page in its light theme, with these sections alone, in a palette of COLOURS."""
    others = f"s => !{json.dumps(sections)}.includes(s.id)" if sections else "() => false"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.png"
        with chromium.Chromium(Path(folder) / "profile") as browser:
            browser.screen(WIDTH)
            browser.open(page)
            found = f"[...document.querySelectorAll('section')].filter({others})"
            browser.value(f"{found}.forEach(s => s.remove())")
            browser.screenshot(path)
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            rare = Image.Quantize.MAXCOVERAGE  # or two runs may get one colour
            return image.convert("RGB").quantize(COLOURS, rare, dither=Image.Dither.NONE)


if __name__ == "__main__":
    if chromium.PROGRAM is None or len(sys.argv) < 3:
        sys.exit(f"{__doc__}It needs one of: {', '.join(chromium.NAMES)}")
    take(Path(sys.argv[1]), sys.argv[3:]).save(sys.argv[2], optimize=True)
