"""The house keeps its shape: which room may import from which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def module_of(path):
    """The name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "engine").rglob("*.py"), *(ROOT / "demo").glob("*.py")])
ENGINE = {module_of(path) for path in FILES if "engine" in path.parts}
METHOD = {"sft", "grpo", "rewards", "evaluate", "teacher", "hicodet"}
USES = {  # what each room may import of this project
    "hicodet": set(),
    "rewards": {"hicodet"},
    "evaluate": {"hicodet"} | ENGINE,
    "teacher": {"hicodet"} | ENGINE,
    "sft": {"hicodet"} | ENGINE,
    "grpo": {"hicodet", "rewards"} | ENGINE,
    "predict": {"hicodet", "rewards"} | ENGINE,
    "train": (METHOD - {"teacher"}) | ENGINE | {"predict"},
    "hoi_r1": {"hicodet", "rewards", "train", "predict", "demo.run"}
    | {"engine.options", "engine.report.page", "engine.report.pictures", "engine.data.image_check"}
    | {"engine.signals"},
    "engine": {"hicodet"} | ENGINE,
    "engine.options": set(),
    "demo.study": ENGINE | {"demo", "hoi_r1"},
    "demo": METHOD | ENGINE | {"train", "predict", "demo"},
}


def imports(tree):
    """The project's modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & ENGINE or {node.module}
    ours = {path.stem for path in ROOT.glob("*.py")} | {"engine", "demo", "tests"}
    return {name for name in names if name.split(".")[0] in ours}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    name = module_of(path)
    may = USES[name if name in USES else name.split(".")[0]]
    used = imports(ast.parse(path.read_text()))
    assert not {name for name in used if name not in may and name.split(".")[0] not in may}


def test_no_circle():
    graph = {}
    for path in FILES:
        graph[module_of(path)] = imports(ast.parse(path.read_text()))
    while leaves := {name for name, used in graph.items() if not used & graph.keys()}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph
