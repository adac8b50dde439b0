"""A headless Chromium: what an expression finds in a page, and pictures of pages."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
SCRIPT = "<script>onload = () => {{ document.title = JSON.stringify({}) }}</script>"


def browse(text, width, height, *flags):
    """What Chromium prints for the HTML of a page, in a window of this size in pixels."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(text)
        window = (f"--user-data-dir={folder}/profile", f"--window-size={width},{height}")
        command = [PROGRAM, *FLAGS, *window, *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def value(text, expression, width=1280, *flags):
    """What a JavaScript expression gives when the page is loaded."""
    dom = browse(text + SCRIPT.format(expression), width, 900, "--dump-dom", *flags)
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]))


def screenshot(text, path, width):
    """Write the whole page as a PNG."""
    height = value(text, "document.documentElement.scrollHeight", width)
    browse(text, width, height, f"--screenshot={path}")
