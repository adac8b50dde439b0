"""Options of a command: fields of a dataclass, each with its line of --help and its bounds.

The parser and the page that --help prints are made from the class. Standard library only, so that
--help and a typo are answered at once.
"""

import argparse
import inspect
import math
import textwrap
import typing
from dataclasses import MISSING, Field, dataclass, field, fields

WIDTH = 79  # of the text on a page; argparse fits the options to the terminal
METAVARS = {int: "N", float: "X"}


def option(
    default, text: str, least: float | None = None, below: float = math.inf,
    *, paper: str = "", metavar: str = "",
):  # fmt: skip
    """A field of a Config, which checks the bounds; `add_options` turns it into a flag.

    text: what --help says of it, and "" keeps it off the page; of a switch that is on by default,
    what its --no-... does. paper: the section that gives the default. metavar: what stands for
    the value, as FILE does in --json FILE.
    """
    shown = {"help": text, "paper": paper, "metavar": metavar}
    return field(default=default, metadata=shown | {"least": least, "below": below})


def required(text: str, *, metavar: str = "", positional: bool = False):
    """A field of a Config that must be given: a flag, or a word without one."""
    shown = {"help": text, "paper": "", "metavar": metavar}
    return field(metadata=shown | {"positional": positional})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a command, each within its bounds or None."""

    GROUPS = {}  # heading -> names of options, in the order of the page

    def __post_init__(self):
        for f in fields(self):
            least, value = f.metadata.get("least"), getattr(self, f.name)
            if least is None or value is None:
                continue
            given, below = f"{flag_of(f.name)} {value}", f.metadata["below"]
            if not value >= least:
                raise ValueError(f"{given}: must be at least {least}")
            if not value < below and value != f.default:
                raise ValueError(f"{given}: must be below {below}")


def flag_of(name: str) -> str:
    """The flag of an option: --max-steps of max_steps."""
    return f"--{name.replace('_', '-')}"


def parse_config(
    config_class: type, page: str, argv: list[str] | None = None, *, prog: str | None = None
):
    """The config that the command line gives. Exits on --help and on a mistake.

    page: what --help prints above the options. Its paragraphs are filled anew, but for those that
    are indented.
    """
    parser = argparse.ArgumentParser(prog=prog, **_layout(page))
    add_options(parser, config_class)
    return _make(config_class, parser, vars(parser.parse_args(argv)))


def parse_stage(
    stages: dict[str, type], page: str, argv: list[str] | None = None, *, prog: str | None = None
):
    """The config of the stage that the first word names. The page of a stage is its docstring."""
    pages = {name: inspect.getdoc(config_class) for name, config_class in stages.items()}
    listed = "\n".join(f"    {name:<8} {text.splitlines()[0]}" for name, text in pages.items())
    more = "The options of a stage, with an example: %(prog)s STAGE --help"
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s STAGE [options]", epilog=f"stages:\n{listed}\n\n{more}",
        **_layout(page),
    )  # fmt: skip
    _add_help(parser)
    words = parser.add_subparsers(
        dest="stage", metavar="STAGE", required=True, prog=parser.prog, help=argparse.SUPPRESS
    )
    parsers = {name: words.add_parser(name, **_layout(pages[name])) for name in stages}
    for name, config_class in stages.items():
        add_options(parsers[name], config_class)
    values = vars(parser.parse_args(argv))
    stage = values.pop("stage")
    return _make(stages[stage], parsers[stage], values)


def _make(config_class: type, parser: argparse.ArgumentParser, values: dict):
    """The config of the values that were read; its refusal is the parser's."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))


def _layout(page: str) -> dict:
    """How a parser prints a page of this text."""
    parts = [
        part if part.startswith(" ") else textwrap.fill(part, WIDTH, break_on_hyphens=False)
        for part in page.strip("\n").split("\n\n")
    ]
    return {
        "description": "\n\n".join(parts),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "add_help": False,
    }


def _add_help(parser: argparse.ArgumentParser) -> None:
    """--help, which is not listed on the page that it prints."""
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add a flag for each field, a word without one if it is positional, under its heading."""
    _add_help(parser)
    of_name, kinds = {f.name: f for f in fields(config_class)}, typing.get_type_hints(config_class)
    groups = {heading: names.split() for heading, names in config_class.GROUPS.items()}
    others = of_name.keys() - sum(groups.values(), [])
    groups["more options"] = [name for name in of_name if name in others]
    usage = ["%(prog)s"]
    for heading, names in groups.items():
        group = parser.add_argument_group(heading)
        for name in names:
            if name not in of_name:  # of another stage
                continue
            if kinds[name] is bool:
                _add_switch(group, of_name[name])
            else:
                usage += _add_option(group, of_name[name], kinds[name])
    parser.usage = " ".join([*usage, "[options]"])


def _add_switch(group, f: Field) -> None:
    """A flag without a value. On by default it is shown as --no-..., which is what one types."""
    flag = flag_of(f.name)
    if not f.default:
        group.add_argument(flag, action="store_true", help=_help(f))
        return
    group.add_argument(f"--no-{flag[2:]}", dest=f.name, action="store_false", help=_help(f))
    group.add_argument(flag, action="store_true", help=argparse.SUPPRESS)


def _add_option(group, f: Field, kind) -> list[str]:
    """A flag with a value, or a positional one. Returns its words of the usage if it is needed."""
    options, needed = {"help": _help(f)}, f.default is MISSING
    if type(None) in typing.get_args(kind):  # None: not given
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        kind, options["nargs"] = typing.get_args(kind)[0], "+"
    if typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
        if f.metadata["metavar"]:
            options["metavar"] = f.metadata["metavar"]
    else:
        metavar = f.metadata["metavar"] or METAVARS.get(kind) or f.name.upper()
        options |= {"type": kind, "metavar": metavar}
    if f.metadata.get("positional"):
        action = group.add_argument(f.name, **options)
    else:
        given = {"required": True} if needed else {"default": f.default}
        action = group.add_argument(flag_of(f.name), **options, **given)
    place = action.metavar or f.name.upper()
    place += f" [{place} ...]" if "nargs" in options else ""
    return [*action.option_strings, place] if needed else []


def _help(f: Field) -> str:
    """The line of an option: its text, and its default with the section that gives it."""
    text, default, paper = f.metadata["help"], f.default, f.metadata["paper"]
    if not text:
        return argparse.SUPPRESS
    plain = isinstance(default, bool) or default in ("", (), None, MISSING, math.inf)
    if not plain and "default" not in text:
        shown = f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else default
        text += f" (default: {shown}, {paper})" if paper else f" (default: {shown})"
    return text.replace("%", "%%")
