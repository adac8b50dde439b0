"""The page of a run in a real browser, from file://."""

import pytest

from engine.report.page import write_page
from tests import chromium
from tests.run_folders import EVIL, write_prediction, write_training

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium is installed")

# Contrast of the colours of an element's text and of the page, as WCAG defines it.
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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    parts = {str(i): {"title": f"Part {i}", "largest": 1.0} for i in range(8)}
    write_page([write_training(folder, parts=parts), write_prediction(folder, model="other")], path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def tab(browser, page):
    browser.screen(1280)
    browser.open(page)
    return browser


def test_console_has_no_error_and_nothing_is_fetched(tab, tmp_path):
    assert tab.complaints() == []
    path = tmp_path / "bad.html"  # a page that breaks both rules
    path.write_text("<script>nowhere()</script><img src='http://127.0.0.1:9/x.png'>")
    tab.open(path)
    assert len(tab.complaints()) >= 2


def test_curves_and_pictures_are_visible(tab):
    boxes = tab.value(
        "[...document.querySelectorAll('svg.chart')].map(svg => {"
        " const p = svg.querySelector('path.line'), box = p.getBoundingClientRect();"
        " return [box.width, svg.getBoundingClientRect().width, getComputedStyle(p).stroke,"
        " parseFloat(getComputedStyle(p).strokeWidth)] })"
    )
    assert len(boxes) >= 10
    for width, whole, stroke, thickness in boxes:
        assert width > whole / 2 and stroke.startswith("rgb") and thickness >= 1
    widths = tab.value("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert widths == [400] * 4  # 2 completions, the best and the worst prediction


def test_text_of_a_model_is_text(tab):
    assert tab.value("window.hacked") is None
    assert EVIL in tab.value("document.querySelector('.answer pre').textContent")


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_are_readable_in_both_themes(tab, dark):
    tab.screen(1280, dark=dark)
    paper = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(22, 24, 27)") == dark
    assert tab.value(f"{CONTRAST}('body, p, td, th, b, small, span, svg text')") >= 4.5
    assert tab.value(f"{CONTRAST}('svg .line')") >= 3


def test_narrow_screen_needs_no_sideways_scrolling(tab):
    tab.screen(400)
    assert tab.value("document.documentElement.scrollWidth") == 400
    assert tab.value("Math.min(...[...document.images].map(i => i.width))") > 300
    size = "parseFloat(getComputedStyle(t).fontSize) * t.closest('svg').clientWidth / 340"
    texts = f"[...document.querySelectorAll('svg.chart text')].map(t => {size})"
    assert tab.value(f"Math.min(...{texts})") >= 10
