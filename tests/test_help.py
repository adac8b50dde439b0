"""What --help prints of every command, and engine/options.py, which makes the pages."""

import importlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import hoi_r1
import teacher
from engine import configs
from engine.options import Config, option, parse_config, required

PROGRAMS = {  # command: module
    **{"evaluate.py": "evaluate", "teacher.py": "teacher"},
    **{name: name for name in ("demo.toy", "demo.base", "demo.blind", "demo.study", "tests.bench")},
}
STAGES = [f"hoi_r1.py {stage}" for stage in configs.STAGES]


@pytest.fixture
def page_of(capsys, monkeypatch):
    """What --help of a command prints on a terminal of 80 columns."""
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
    """The words of each command line on a page, from the program's name on."""
    lines = page.replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line.startswith(("    python ", "    torchrun "))]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[3 if line[0] == "torchrun" else 1 :] for line in words]


def parsed(words):
    """The config of a command line; nothing is run."""
    program, *rest = words[1:] if words[0] == "-m" else words
    if program == "hoi_r1.py":
        return hoi_r1.parse_config(rest)
    module = importlib.import_module(PROGRAMS[program])
    classes = (value for value in vars(module).values() if isinstance(value, type))
    (found,) = [c for c in classes if issubclass(c, Config) and c.__module__ == module.__name__]
    return parse_config(found, "", rest)


@pytest.mark.parametrize("command", ["hoi_r1.py", *STAGES, *PROGRAMS])
def test_page_fits_and_its_examples_can_be_parsed(command, page_of, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a bench asks for one
    page = page_of(command)
    examples = examples_in(page)
    assert any(command in " ".join(words) for words in examples)
    for words in examples:
        assert isinstance(parsed(words), Config)
    assert max(map(len, page.splitlines())) <= 80
    assert not {"more options:", "positional arguments:"} & set(page.splitlines())


def test_first_example_is_the_demo(page_of):
    assert examples_in(page_of("hoi_r1.py"))[0] == ["hoi_r1.py", "demo"]


# ---- engine/options.py, with a config of its own


@dataclass(frozen=True, kw_only=True)
class Small(Config):
    """A small config."""

    GROUPS = ("first", "second")
    FREE = ("second",)
    where: Path = required("a folder", positional=True, metavar="DIR", group="first")
    names: tuple[int, ...] = required("some numbers", group="later", on_resume="allow")
    most: float | None = option(None, "a bound that may be absent", least=1, group="later")
    kind: Literal["a", "b"] = option("a", "one of two", group="second", on_resume="note")
    quiet: bool = option(False, "say nothing", group="second", per_host=True)
    colour: bool | None = option(None, "print in colour", group="second")
    rate: float = option(2e-5, "above 5 % of it", least=0, below=1, paper="Sec. 4.2", group="first")


PAGE = """\
usage: small DIR --names N ... [options]

A page of a paragraph.

    small here --names 1

options:
  -h, --help            show this help message and exit

first:
  DIR                   a folder
  --rate X              above 5 % of it (default: 2e-5, Sec. 4.2)

second:
  --kind {a,b}          one of two (default: a)
  --quiet               say nothing
  --colour, --no-colour
                        print in colour

later:
  --names N [N ...]     some numbers
  --most X              a bound that may be absent
"""


def small(line):
    page = "\nA page of\na paragraph.\n\n    small here --names 1\n"
    return parse_config(Small, page, line.split(), prog="small")


def test_page_of_a_config(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        small("-h")
    assert capsys.readouterr().out == PAGE


def test_values_have_the_types_of_the_fields():
    config = small("x --names 1 2 --most 4 --quiet --no-colour")
    assert config == Small(where=Path("x"), names=(1, 2), most=4.0, quiet=True, colour=False)
    config = small("x --names 1")
    assert config.most is None and config.colour is None and not config.quiet
    assert small("x --names 1 --colour").colour


def test_options_know_their_group_and_what_resume_does():
    config = small("x --names 1 --rate 0.5")
    assert config.group("first") == {"where": Path("x"), "rate": 0.5}
    assert Small.on_resume("refuse") == {"most", "where", "rate"}
    assert Small.on_resume("allow") == {"names", "quiet", "colour"}
    assert Small.on_resume("note") == {"kind"} and Small.per_host() == {"quiet"}


@pytest.mark.parametrize("flag, said", [
    ("--rate -1", "--rate -1.0: must be at least 0"), ("--rate 1", "--rate 1.0: must be below 1"),
    ("--rate nan", "--rate nan: must be at least"), ("--most 0.5", "--most 0.5: must be at least"),
    ("--most inf", "--most inf: must be below inf"), ("--kind c", "--kind: invalid choice"),
    ("--quite", "unrecognized arguments: --quite"), ("--names", "expected at least one argument"),
    ("--no-quiet", "unrecognized arguments: --no-quiet"),
])  # fmt: skip
def test_values_out_of_bounds_are_refused_with_the_flag(flag, said, capsys):
    with pytest.raises(SystemExit):
        small(f"x --names 1 {flag}")
    error = capsys.readouterr().err
    assert error.startswith("usage: small") and said in error


def test_default_may_lie_on_the_bound():
    """An amount without a limit is infinite, which lies below no bound."""
    assert teacher.TeacherConfig(data=Path("d"), out=Path("t")).max_cost == float("inf")
