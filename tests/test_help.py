"""The --help of every command."""

import importlib
import shlex

import pytest

import hoi_r1
from engine import configs
from engine.options import Config, parse_config

PROGRAMS = {  # command: module
    **{"evaluate.py": "evaluate", "teacher.py": "teacher"},
    **{name: name for name in ("demo.toy", "demo.base", "demo.blind", "demo.study", "tests.bench")},
}
STAGES = [f"hoi_r1.py {stage}" for stage in configs.STAGES]


@pytest.fixture
def page_of(capsys, monkeypatch):
    """The --help of a command on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def show(command):
        program, *stage = command.split()
        module = PROGRAMS.get(program)
        main = importlib.import_module(module).main if module else hoi_r1.parse_config
        with pytest.raises(SystemExit) as ended:
            main([*stage, "--help"])
        assert not ended.value.code
        return capsys.readouterr().out

    return show


def examples_in(page):
    """The words of each command line on a page, after python or torchrun."""
    lines = page.replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line.startswith(("    python ", "    torchrun "))]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[3 if line[0] == "torchrun" else 1 :] for line in words]


def config_class(module):
    """The Config that a program defines."""
    values = vars(importlib.import_module(module)).values()
    classes = [value for value in values if isinstance(value, type) and issubclass(value, Config)]
    (found,) = [value for value in classes if value.__module__ == module]
    return found


def parsed(words):
    """The config of a command line; nothing runs."""
    program, *rest = words[1:] if words[0] == "-m" else words
    if program == "hoi_r1.py":
        return hoi_r1.parse_config(rest)
    return parse_config(config_class(PROGRAMS[program]), "", rest)


@pytest.mark.parametrize("command", ["hoi_r1.py", *STAGES, *PROGRAMS])
def test_page_fits_and_its_examples_can_be_parsed(command, page_of, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a bench needs one
    page = page_of(command)
    examples = examples_in(page)
    assert any(command in " ".join(words) for words in examples)
    for words in examples:
        assert isinstance(parsed(words), Config)
    assert max(map(len, page.splitlines())) <= 80


def test_line_of_an_option_has_its_default_and_section(page_of):
    page = " ".join(page_of("hoi_r1.py grpo").split())
    for line in ("--group-size N completions per image, G (default: 4, Sec. 4.2)",
                 "or of the whole output as printed (default: token)",
                 "--without {label,iou} [{label,iou} ...] rewards to leave out (Table 3) --"):
        assert line in page
