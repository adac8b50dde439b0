"""The layout: which folder may import from which, and no folder is too large."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # a folder imports from itself and from earlier layers
    {"hicodet"},
    {"engine.options", "engine.files", "engine.checks", "engine.signals", "rewards"},
    {"engine.configs", "engine.ranks"},
    {"engine.model"},
    {"engine.sampling", "engine.data"},
    {"engine.runs", "engine.traces", "engine.scoring"},
    {"engine.report"},
    {"sft", "grpo", "evaluate", "teacher"},
    {"predict"},
    {"train"},
    {"demo"},
    {"hoi_r1"},
]
FILES = sorted(path for pattern in ("*.py", "engine/**/*.py", "demo/*.py")
               for path in ROOT.glob(pattern))  # fmt: skip
LARGEST = 0.25  # share of the code in one folder


def module_of(path):
    """The module name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports(path):
    """The project's modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & MODULES or {node.module}
    return {name for name in names if name in MODULES or name.startswith("tests")}


def folder_of(module):
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if first == "engine" and rest else first


def layer_of(module):
    (layer,) = [i for i, folders in enumerate(LAYERS) if folder_of(module) in folders]
    return layer


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    mine = module_of(path)
    for name in imports(path):
        assert folder_of(name) == folder_of(mine) or layer_of(name) < layer_of(mine), name


def test_no_import_cycle():
    graph = {module_of(path): imports(path) for path in FILES}
    while leaves := {name for name, used in graph.items() if not used & graph.keys()}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph


def test_no_folder_holds_most_of_the_code():
    lines = Counter()
    for path in FILES:
        lines[path.parent] += len(path.read_text().splitlines())
    total = lines.total()
    del lines[ROOT]  # the method itself
    assert max(lines.values()) <= LARGEST * total, lines
