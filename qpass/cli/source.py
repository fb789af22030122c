"""What does the MODEL of a command line stand for?"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, final

import typer

from qpass.errors import BadInput, QpassError, first_line

if TYPE_CHECKING:
    from torch import nn

    from qpass.capture.call import Inputs

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a GGUF file, a hub id, or package.module:factory.",
        show_default=False,
    ),
]


@final
@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and sample inputs, None where transformers can make them up."""

    model: nn.Module
    inputs: Inputs | None


def load(what: str) -> Loaded:
    """The model that `what` names; a factory returns one, or a pair of one and its inputs."""
    path = Path(what)
    if not what:
        raise BadInput("MODEL is empty")
    if path.exists() or path.suffix == ".gguf" or _is_hub_id(what):
        from qpass.hf import pretrained

        if not sys.stderr.isatty():
            pretrained.hide_progress()
        return Loaded(pretrained.load_model(what), None)
    module, colon, name = what.partition(":")
    if colon:
        return _from_factory(what, module, name)
    raise BadInput(
        f"no model at {what}: there is no such file or directory, and it is neither a hub id "
        "(owner/name) nor a factory (package.module:factory)"
    )


def _from_factory(what: str, module: str, name: str) -> Loaded:
    from torch import Tensor, nn

    # as `python -m` does: a factory usually lies beside the command
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"{what}: cannot import the factory: {error}") from error
    except (Exception, SystemExit) as error:
        raise _failure(what, "the module cannot be imported", error) from error
    if not callable(factory):
        raise BadInput(f"{what} is of type {type(factory).__name__}; expected a function")
    try:
        made = factory()
    except QpassError:
        raise
    except (Exception, SystemExit) as error:
        raise _failure(what, "the factory raised", error) from error
    if isinstance(made, nn.Module):
        return Loaded(made, None)
    if isinstance(made, tuple):
        pair = cast("Sequence[object]", made)
        model, inputs = pair if len(pair) == 2 else (None, None)
        if isinstance(model, nn.Module) and isinstance(inputs, Tensor | tuple | dict):
            return Loaded(model, cast("Inputs", inputs))
    raise BadInput(
        f"{what} returned {type(made).__name__}; expected a torch.nn.Module, or a pair of one "
        "and its sample inputs (a tensor, a tuple of arguments or a dict of keyword arguments)"
    )


def _failure(what: str, how: str, error: BaseException) -> BadInput:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_file()]
    here = not own or Path(own[-1].filename) == Path(__file__)
    where = "" if here else f" ({own[-1].filename}:{own[-1].lineno})"
    return BadInput(f"{what}: {how}: {type(error).__name__}: {first_line(error)}{where}")


def _is_hub_id(what: str) -> bool:
    owner, slash, name = what.partition("/")
    # `folder/name` with a folder that exists is a path with a slip in it
    return (
        bool(slash and owner.strip(".~") and name) and "/" not in name and not Path(owner).exists()
    )
