"""Command-line options: the fields of a dataclass become flags, their texts the --help page.

Only the standard library is imported, so that --help is fast.
"""

import argparse
import inspect
import math
import textwrap
import typing
from dataclasses import MISSING, Field, dataclass, field, fields

WIDTH = 79  # characters of text; argparse fits the options to the terminal
METAVARS = {int: "N", float: "X"}


def option(
    default,
    text: str,
    *,
    group: str,
    least: float | None = None,
    below: float = math.inf,
    paper: str = "",
    metavar: str = "",
    positional: bool = False,
    on_resume: str = "",
    per_host: bool = False,
):
    """A field of a Config, which defines one option.

    text: its line of --help. group: its heading. least, below: its bounds. paper: the section that
    gives the default. metavar: placeholder of the value, such as FILE in --json FILE. on_resume:
    what --resume does if the value differs from the run's: "refuse", "allow" or "note" it in
    config.json; "": as its group. per_host: ranks may have different values.
    """
    names = ("text", "group", "least", "below", "paper", "metavar", "positional", "on_resume")
    given = locals()
    return field(default=default, metadata={name: given[name] for name in (*names, "per_host")})


def required(text: str, *, group: str, **more):
    """A field of a Config that must be given. more: of `option`."""
    return option(MISSING, text, group=group, **more)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of a command's options; checks their bounds."""

    GROUPS = ()  # headings in the order of the page; others follow
    FREE = ()  # headings whose options --resume may change

    def __post_init__(self):
        for f in fields(self):
            least, below, value = f.metadata["least"], f.metadata["below"], getattr(self, f.name)
            if least is None or value is None or value == f.default:
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
        found = set()
        for f in fields(cls):
            by_group = "allow" if f.metadata["group"] in cls.FREE else "refuse"
            found |= {f.name} if (f.metadata["on_resume"] or by_group) == action else set()
        return found


def flag_of(name: str) -> str:
    """The flag of an option: --max-steps of max_steps."""
    return f"--{name.replace('_', '-')}"


def parse_config(
    config_class: type, page: str, argv: list[str] | None = None, *, prog: str | None = None
):
    """The config from the command line. Exits on --help and on errors.

    page: text that --help prints above the options.
    """
    parser = argparse.ArgumentParser(prog=prog, **_layout(page))
    add_options(parser, config_class)
    return _make(config_class, parser, vars(parser.parse_args(argv)))


def parse_stage(
    stages: dict[str, type], page: str, argv: list[str] | None = None, *, prog: str | None = None
):
    """The config of the stage named by the first word; its docstring is its help page."""
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s STAGE [options]", **_layout(page),
        epilog="The options of a stage, with an example: %(prog)s STAGE --help",
    )  # fmt: skip
    words = parser.add_subparsers(title="stages", dest="stage", metavar="STAGE", required=True,
                                  prog=parser.prog)  # fmt: skip
    parsers = {}
    for name, config_class in stages.items():
        text = inspect.getdoc(config_class)
        parsers[name] = words.add_parser(name, help=text.splitlines()[0], **_layout(text))
        add_options(parsers[name], config_class)
    values = vars(parser.parse_args(argv))
    stage = values.pop("stage")
    return _make(stages[stage], parsers[stage], values)


def _make(config_class: type, parser: argparse.ArgumentParser, values: dict):
    """The config with the given values. Its ValueError becomes the parser's error."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))


def _layout(page: str) -> dict:
    """Parser arguments to print a page: paragraphs are filled, indented ones stay as written."""
    parts = [
        part if part.startswith(" ") else textwrap.fill(part, WIDTH, break_on_hyphens=False)
        for part in page.strip("\n").split("\n\n")
    ]
    formatter = argparse.RawDescriptionHelpFormatter
    return {"description": "\n\n".join(parts), "formatter_class": formatter}


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add an argument for each field, under its heading."""
    kinds, usage = typing.get_type_hints(config_class), ["%(prog)s"]
    used = dict.fromkeys(f.metadata["group"] for f in fields(config_class))
    order = [name for name in config_class.GROUPS if name in used]
    order += [name for name in used if name not in order]
    groups = {name: parser.add_argument_group(name) for name in order}
    for f in fields(config_class):
        word, options = _argument(f, kinds[f.name])
        action = groups[f.metadata["group"]].add_argument(word, help=_help(f), **options)
        if f.default is MISSING:
            place = action.metavar + (" ..." if "nargs" in options else "")
            usage += [*action.option_strings, place]
    parser.usage = " ".join([*usage, "[options]"])


def _argument(f: Field, kind) -> tuple[str, dict]:
    """The name and the options of add_argument for a field; no value if it is not given."""
    options = {"default": argparse.SUPPRESS}
    if type(None) in typing.get_args(kind):  # optional
        kind = typing.get_args(kind)[0]
    if kind is bool:
        twin = f.default is not False  # with a --no-... form, if it is on or undecided
        action = argparse.BooleanOptionalAction if twin else "store_true"
        return flag_of(f.name), options | {"action": action}
    if typing.get_origin(kind) is tuple:
        kind, options["nargs"] = typing.get_args(kind)[0], "+"
    metavar = f.metadata["metavar"] or METAVARS.get(kind) or f.name.upper()
    if typing.get_origin(kind) is typing.Literal:
        options["choices"] = choices = typing.get_args(kind)
        options["metavar"] = f.metadata["metavar"] or f"{{{','.join(map(str, choices))}}}"
    else:
        options |= {"type": kind, "metavar": metavar}
    if f.metadata["positional"]:
        return f.name, options
    return flag_of(f.name), options | {"required": f.default is MISSING}


def _help(f: Field) -> str:
    """The help line of an option: its text, its default, and the section that gives it."""
    text, default, paper = f.metadata["text"], f.default, f.metadata["paper"]
    if type(default) in (int, float, str) and default not in ("", math.inf):
        shown = f"{default:g}".replace("e-0", "e-") if type(default) is float else default
        text += f" (default: {shown}, {paper})" if paper else f" (default: {shown})"
    return text.replace("%", "%%")
