"""What does the `qpass` command do with its arguments, and with what goes wrong?"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

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
        logging.getLogger("qpass").setLevel(logging.DEBUG)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 1 for a failed gate, 2 for bad input."""
    try:
        app(args=list(arguments), prog_name="qpass")
    except QpassError as error:
        sys.stderr.write(f"qpass: {error}\n")
        return BAD_INPUT
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else BAD_INPUT
    return 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))
