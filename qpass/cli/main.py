"""What does the `qpass` command do with its arguments, and with what goes wrong?"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer

from qpass.cli.bench import bench
from qpass.cli.doctor import doctor
from qpass.cli.evaluate import evaluate
from qpass.cli.export import export
from qpass.cli.inspect import inspect
from qpass.cli.quantize import quantize
from qpass.cli.recipes import recipes
from qpass.errors import QpassError

BAD_INPUT = 2
INTERRUPTED = 130
# what typer raises for arguments it cannot read; the class has no fixed place of its own
_UNREADABLE = cast("type[Exception]", typer.BadParameter.__base__)

log = logging.getLogger("qpass")

app = typer.Typer(
    help="Make transformers smaller and faster: rotate, quantize, compile, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(inspect)
app.command()(quantize)
app.command()(export)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(recipes)
app.command()(doctor)


@app.callback()
def settings(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every step.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        log.setLevel(logging.DEBUG)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 1 for a failed gate, 2 for bad input."""
    try:
        code = app(args=list(arguments), prog_name="qpass", standalone_mode=False)
    except QpassError as error:
        sys.stderr.write(f"qpass: {error}\n")
        log.debug("where it was raised", exc_info=error)
        return BAD_INPUT
    except _UNREADABLE as error:
        # without a message it has shown the help
        if said := cast("Any", error).format_message():
            sys.stderr.write(f"qpass: {said}\n")
        return BAD_INPUT
    except typer.Abort:
        sys.stderr.write("qpass: interrupted\n")
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))
