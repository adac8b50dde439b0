"""The page of a run in a real browser, from file://."""

import pytest

from engine.report.page import write_page
from tests import chromium
from tests.run_folders import EVIL, write_prediction, write_training

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium is installed")

# The lowest contrast of elements' colours with the page's, as WCAG defines it.
CONTRAST = """(selector => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = element => getComputedStyle(element);
  const paper = light(style(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll(selector)].map(element => {
    const fill = element.closest("svg") ? style(element).fill : style(element).color;
    const ink = light(fill === "none" ? style(element).stroke : fill);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  }));
})"""
CURVES = """[...document.querySelectorAll('svg.chart')].map(svg => {
  const box = svg.querySelector('path.line').getBoundingClientRect();
  return box.width / svg.getBoundingClientRect().width;
})"""
TEXTS = """[...document.querySelectorAll('svg.chart text')].map(text =>
  parseFloat(getComputedStyle(text).fontSize) * text.closest('svg').clientWidth / 340)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page([write_training(folder), write_prediction(folder)]).read_text()


def test_curves_and_pictures_are_visible_and_texts_are_text(page):
    images = "[...document.images].map(i => i.complete && i.naturalWidth)"
    answer = "document.querySelector('.answer pre').textContent"
    found = chromium.value(page, f"[{CURVES}, {images}, {answer}, window.hacked || 0]")
    widths, images, answer, hacked = found
    assert len(widths) >= 10 and min(widths) > 0.5
    assert images == [400] * 4  # 2 completions, the best and the worst prediction
    assert EVIL in answer and not hacked


@pytest.mark.parametrize("flags, paper", [((), 251), (("--force-dark-mode",), 22)])
def test_text_and_lines_are_readable_in_both_themes(page, flags, paper):
    background = "parseFloat(getComputedStyle(document.body).backgroundColor.slice(4))"
    words, lines = "'body, p, td, th, b, small, span, svg text'", "'svg .line'"
    values = f"[{background}, {CONTRAST}({words}), {CONTRAST}({lines})]"
    found = chromium.value(page, values, 1280, *flags)
    assert found[0] == paper and found[1] >= 4.5 and found[2] >= 3


def test_narrow_screen_needs_no_sideways_scrolling(page):
    images = "[...document.images].map(i => i.width)"
    sizes = f"[innerWidth, document.documentElement.scrollWidth, {images}, {TEXTS}]"
    window, content, images, texts = chromium.value(page, sizes, 500)
    assert window == content == 500 and min(images) > 300 and min(texts) >= 10
