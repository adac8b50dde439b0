"""What --help prints of every command, and engine/options.py, which makes the pages."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import evaluate
import hoi_r1
import teacher
from demo import base, blind, study, toy
from engine.options import Config, option, parse_config, required
from tests import bench

PROGRAMS = {
    "evaluate.py": (evaluate.main, evaluate.EvaluateConfig),
    "teacher.py": (teacher.main, teacher.TeacherConfig),
    "demo.toy": (toy.main, toy.ToyConfig),
    "demo.base": (base.main, base.BaseConfig),
    "demo.blind": (blind.main, blind.BlindConfig),
    "demo.study": (study.main, study.StudyConfig),
    "tests.bench": (bench.main, bench.BenchConfig),
}
STAGES = [f"hoi_r1.py {stage}" for stage in hoi_r1.STAGES]


@pytest.fixture
def page_of(capsys, monkeypatch):
    """What --help of a command prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def show(command):
        program, *stage = command.split()
        main = hoi_r1.parse_config if program == "hoi_r1.py" else PROGRAMS[program][0]
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
    return parse_config(PROGRAMS[program][1], "", rest)


@pytest.mark.parametrize("command", ["hoi_r1.py", *STAGES, *PROGRAMS])
def test_help_has_an_example_that_can_be_parsed(command, page_of, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a bench asks for one
    examples = examples_in(page_of(command))
    assert any(command in " ".join(words) for words in examples)
    for words in examples:
        assert isinstance(parsed(words), Config)


@pytest.mark.parametrize("command", ["hoi_r1.py", *STAGES, *PROGRAMS])
def test_help_fits_80_columns_and_every_option_has_a_heading(command, page_of):
    page = page_of(command)
    assert max(map(len, page.splitlines())) <= 80
    assert not {"options:", "more options:", "positional arguments:"} & set(page.splitlines())


def test_the_first_example_is_the_demo(page_of):
    assert examples_in(page_of("hoi_r1.py"))[0] == ["hoi_r1.py", "demo"]


@pytest.mark.parametrize("stage, flags", [
    ("grpo", "--no-resume"), ("grpo", "--no-dry-run"), ("demo", "--no-complete"),
])  # fmt: skip
def test_a_plain_switch_has_no_twin(stage, flags, page_of, capsys):
    needed = "" if stage == "demo" else "--model m --data d --out o"
    with pytest.raises(SystemExit):
        hoi_r1.parse_config([stage, *needed.split(), flags])
    assert flags in capsys.readouterr().err and flags not in page_of(f"hoi_r1.py {stage}")


def test_what_is_on_by_default_is_shown_as_it_is_typed(page_of):
    page = page_of("hoi_r1.py grpo")
    for name in ("thinking", "task-description", "gradient-checkpointing"):
        assert f"--no-{name}" in page and f" --{name}" not in page
    line = ["grpo", "--model", "m", "--data", "d", "--out", "o"]
    assert hoi_r1.parse_config(line).thinking
    assert not hoi_r1.parse_config([*line, "--no-thinking"]).thinking
    assert hoi_r1.parse_config([*line, "--no-thinking", "--thinking"]).thinking


def test_predict_does_not_list_a_seed_which_it_takes(page_of):
    line = ["predict", "--model", "m", "--data", "d", "--out", "o", "--seed", "3"]
    assert hoi_r1.parse_config(line).seed == 3 and "--seed" not in page_of("hoi_r1.py predict")


# ---- engine/options.py, with a config of its own


@dataclass(frozen=True, kw_only=True)
class Small(Config):
    """A small config."""

    where: Path = required("a folder", positional=True, metavar="DIR", group="first")
    names: tuple[int, ...] = required("some numbers", group="more options")
    rate: float = option(2e-5, "above 5 % of it", least=0, below=1, paper="Sec. 4.2", group="first")
    most: float | None = option(None, "a bound that may be absent", least=1, group="more options")
    kind: Literal["a", "b"] = option("a", "one of two", group="second")
    quiet: bool = option(False, "say nothing", group="second")
    colour: bool = option(True, "black and white", group="second")
    hidden: int = option(3, "", group="more options")


PAGE = """\
usage: small DIR --names N [N ...] [options]

A page of a paragraph.

    small here --names 1

first:
  DIR                a folder
  --rate X           above 5 % of it (default: 2e-5, Sec. 4.2)

second:
  --kind {a,b}       one of two (default: a)
  --quiet            say nothing
  --no-colour        black and white

more options:
  --names N [N ...]  some numbers
  --most X           a bound that may be absent
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
    config = small("x --names 1 2 --most 4 --quiet --no-colour --hidden 5")
    assert config == Small(
        where=Path("x"), names=(1, 2), most=4.0, quiet=True, colour=False, hidden=5
    )
    assert small("x --names 1").most is None


@pytest.mark.parametrize("flag, said", [
    ("--rate -1", "--rate -1.0: must be at least 0"), ("--rate 1", "--rate 1.0: must be below 1"),
    ("--rate nan", "--rate nan: must be at least"), ("--most 0.5", "--most 0.5: must be at least"),
    ("--most inf", "--most inf: must be below inf"), ("--kind c", "--kind: invalid choice"),
    ("--quite", "unrecognized arguments: --quite"), ("--names", "expected at least one argument"),
])  # fmt: skip
def test_values_out_of_bounds_are_refused_with_the_flag(flag, said, capsys):
    with pytest.raises(SystemExit):
        small(f"x --names 1 {flag}")
    error = capsys.readouterr().err
    assert error.startswith("usage: small") and said in error


def test_a_default_may_lie_on_the_bound():
    """An amount without a limit is infinite, which lies below no bound."""
    assert teacher.TeacherConfig(data=Path("d"), out=Path("t")).max_cost == float("inf")
