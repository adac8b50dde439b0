"""Runs programs of the project in this process."""

import contextlib
import io
import sys


def end_of(main, *arguments):
    """Run a program's main(argv). Returns its exit status, or its error line."""
    stderr, status = io.StringIO(), None
    with contextlib.redirect_stderr(stderr):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
    said = stderr.getvalue()
    print(said, end="", file=sys.stderr)
    errors = [line for line in said.splitlines() if ": error: " in line or line[:7] == "error: "]
    return errors[-1] if errors and status == 1 else status
