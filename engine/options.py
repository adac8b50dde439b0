"""Command-line options: the fields of a dataclass become flags, their texts the --help page.

Only the standard library is imported, so that --help is fast.
"""

import argparse
import inspect
import math
import sys
import textwrap
import typing
from dataclasses import MISSING, Field, dataclass, field, fields

WIDTH = 79  # characters of text; argparse fits the options to the terminal
METAVARS = {int: "N", float: "X"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command."""

    text: str  # its line of --help
    group: str  # its heading
    least: float | None = None
    below: float = math.inf
    paper: str = ""  # section that gives the default
    metavar: str = ""  # placeholder of the value, such as FILE in --json FILE
    positional: bool = False
    # if --resume finds another value: "refuse", "allow" or "note" the change; "": as its group
    on_resume: str = ""
    per_host: bool = False  # ranks may have different values


def option(default, text: str, **more):
    """A field of a Config, which defines one option. more: fields of Option."""
    return field(default=default, metadata=vars(Option(text=text, **more)))


def required(text: str, **more):
    """A field of a Config that must be given. more: fields of Option."""
    return option(MISSING, text, **more)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of a command's options; checks their bounds."""

    GROUPS = ()  # headings of --help, in order; other headings follow
    FREE = ()  # headings whose options --resume may change

    def __post_init__(self):
        for f in fields(self):
            least, below, value = f.metadata["least"], f.metadata["below"], getattr(self, f.name)
            if least is None or value in (None, f.default):
                continue
            if not value >= least:
                raise ValueError(f"{flag_of(f.name)} {value}: must be at least {least}")
            if not value < below:
                raise ValueError(f"{flag_of(f.name)} {value}: must be below {below}")

    def group(self, heading: str) -> dict:
        """The options under a heading, by name."""
        named = (f.name for f in fields(self) if f.metadata["group"] == heading)
        return {name: getattr(self, name) for name in named}

    @classmethod
    def per_host(cls) -> set[str]:
        """The options in which ranks may differ."""
        return {f.name for f in fields(cls) if f.metadata["per_host"]}

    @classmethod
    def on_resume(cls, action: str) -> set[str]:
        """The options whose change --resume refuses, allows or notes."""
        by_group = dict.fromkeys(cls.FREE, "allow")
        return {
            f.name
            for f in fields(cls)
            if action == (f.metadata["on_resume"] or by_group.get(f.metadata["group"], "refuse"))
        }


def flag_of(name: str) -> str:
    """The flag of an option: --max-steps of max_steps."""
    return f"--{name.replace('_', '-')}"


def parse_config(
    config_class: type, page: str, argv: list[str] | None = None, *, prog: str | None = None
):
    """The config from the command line. Exits on --help and on errors.

    page: text that --help prints above the options.
    """
    common = {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=prog, **common, **_layout(page))
    add_options(parser, config_class)
    values = vars(parser.parse_args(argv)).items()
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})
    except ValueError as error:
        parser.error(str(error))


def parse_stage(stages: dict[str, type], page: str, argv: list[str] | None = None):
    """The config of the stage named by the first word; its docstring is its help page."""
    argv = sys.argv[1:] if argv is None else argv
    epilog = "The options of a stage, with an example: %(prog)s STAGE --help"
    layout = _layout(page) | {"usage": "%(prog)s STAGE [options]", "epilog": epilog}
    parser = argparse.ArgumentParser(**layout)
    words = parser.add_subparsers(title="stages", metavar="STAGE", required=True)
    for name, config_class in stages.items():
        text = inspect.getdoc(config_class)
        if argv[:1] == [name]:
            return parse_config(config_class, text, argv[1:], prog=f"{parser.prog} {name}")
        words.add_parser(name, help=text.splitlines()[0])
    parser.parse_args(argv)  # exits, as the first word is no stage


def _layout(page: str) -> dict:
    """Parser arguments to print a page: paragraphs are wrapped, indented ones stay as written."""
    parts = [
        part if part.startswith(" ") else textwrap.fill(part, WIDTH, break_on_hyphens=False)
        for part in page.strip("\n").split("\n\n")
    ]
    formatter = argparse.RawDescriptionHelpFormatter
    return {"description": "\n\n".join(parts), "formatter_class": formatter}


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add an argument for each field, under its heading. The usage lists the required ones."""
    kinds, usage = typing.get_type_hints(config_class), ["%(prog)s"]
    headings = [*config_class.GROUPS, *(f.metadata["group"] for f in fields(config_class))]
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(headings)}
    for f in fields(config_class):
        flag = f.name if f.metadata["positional"] else flag_of(f.name)
        action = groups[f.metadata["group"]].add_argument(flag, **_argument(f, kinds[f.name]))
        action.required = f.default is MISSING
        if action.required:
            usage += [*action.option_strings, action.metavar + (" ..." if action.nargs else "")]
    parser.usage = " ".join([*usage, "[options]"])


def _argument(f: Field, kind) -> dict:
    """The arguments of add_argument for a field: its help with its default, and its values."""
    text, paper, metavar = (f.metadata[name] for name in ("text", "paper", "metavar"))
    default = f.default
    if type(default) in (int, float, str) and default not in ("", math.inf):
        shown = f"{default:g}".replace("e-0", "e-") if type(default) is float else default
        text += f" (default: {shown}, {paper})" if paper else f" (default: {shown})"
    argument = {"help": text.replace("%", "%%")}
    if type(None) in typing.get_args(kind):  # optional
        kind = typing.get_args(kind)[0]
    if kind is bool:  # also gets a --no-... form, unless the default is off
        twin = default is not False
        return argument | {"action": argparse.BooleanOptionalAction if twin else "store_true"}
    if typing.get_origin(kind) is tuple:
        kind, argument["nargs"] = typing.get_args(kind)[0], "+"
    if typing.get_origin(kind) is typing.Literal:
        return argument | {"metavar": metavar or None, "choices": typing.get_args(kind)}
    return argument | {"metavar": metavar or METAVARS.get(kind, f.name.upper()), "type": kind}
