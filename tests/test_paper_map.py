"""Every equation has a function that cites it, a test, and a row in docs/paper.md."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EQUATIONS = range(1, 24)


def functions(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


@cache
def cited():
    """{equation: [module.function]} from the first lines of the docstrings."""
    found = {}
    for path in ROOT.glob("*.py"):
        for node in functions(path):
            first = (ast.get_docstring(node) or "").split("\n")[0]
            for number in re.findall(r"Eq\. (\d+)\b", first):
                found.setdefault(int(number), []).append(f"{path.stem}.{node.name}")
    return found


@cache
def named_tests():
    """{equation: [test]} from the names of the tests."""
    found = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in functions(path):
            if match := re.match(r"test_eq(\d+)_", node.name):
                found.setdefault(int(match[1]), []).append(node.name)
    return found


@pytest.mark.parametrize("number", EQUATIONS)
def test_equation_has_function_test_and_row(number):
    assert number in cited(), f"no function cites Eq. {number} in the first line of its docstring"
    assert number in named_tests(), f"no test is named test_eq{number}_..."
    names = {name.split(".")[1] for name in cited()[number]}
    assert any(test.removeprefix(f"test_eq{number}_") in names for test in named_tests()[number])
    lines = (ROOT / "docs/paper.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| Eq. {number} | `")]
    assert len(rows) == 1, f"docs/paper.md: one row for Eq. {number}"
    assert any(name in rows[0] for name in cited()[number]), rows[0]
    assert any(test in rows[0] for test in named_tests()[number]), rows[0]
