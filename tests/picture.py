"""A picture of a run's page, by a headless Chromium; the README's is made with it.

    python -m tests.picture runs/demo/test_grpo/report.html assets/report.png health progress

Sections are the page's own names (engine/report/page.py: SECTIONS); without any it is the whole page.
"""

import argparse
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


def main(argv: list[str] | None = None) -> None:
    """Write the picture; --help lists the options."""
    parser = argparse.ArgumentParser(description="A picture of a run's page.")
    parser.add_argument("page", type=Path, help="report.html of a run")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("sections", nargs="*", help="of the page, as health or progress")
    args = parser.parse_args(argv)
    if chromium.PROGRAM is None:
        sys.exit(f"error: no browser is installed; looked for {', '.join(chromium.NAMES)}")
    take(args.page, args.sections).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
