"""README.md and docs/: links, tests, files and flags exist, and the options are up to date."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from engine.configs import STAGES
from engine.options import flag_of
from tests import write_docs
from tests.test_help import PROGRAMS, config_class

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("demo/**/*.md")])
FOREIGN = {"--help", "--nproc_per_node", "--shm-size", "--reasoning-parser"}
TESTS = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_a_target(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_and_files_exist(page):
    text = page.read_text()
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in TESTS, name
    for name in re.findall(r"`((?:engine|demo|tests|docs|assets)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    """A flag in code belongs to one of our commands, or to torchrun, docker or vLLM."""
    configs = [*STAGES.values(), *map(config_class, PROGRAMS.values())]
    known = {flag_of(field.name) for config in configs for field in fields(config)} | FOREIGN
    for code in re.findall(r"```.*?```|`[^`]+`", page.read_text(), re.DOTALL):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert flag.replace("--no-", "--") in known, flag


def test_options_page_equals_the_code():
    """`python -m tests.write_docs` writes it."""
    assert write_docs.PAGE.read_text() == write_docs.page()


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170 and len(text) <= 14_000
