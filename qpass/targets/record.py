"""What has been done to a module: a mark that travels with its copies and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

from torch import nn

from qpass.errors import StateError
from qpass.plan import Plan
from qpass.targets.changes import Door

# 1: codes row by row; 2: those that kernels read as they are, in lines
FORMAT_VERSION = 2
# an entry of the module's own dict: copied and pickled with it, no parameter and no submodule
_KEY = "_qpass_record"


@final
@dataclass(frozen=True, slots=True)
class Record:
    """The plans that were carried out, in order, and the tensors that they added to the model.

    `folded` are buffers with the gains and biases that norms had, `biases` are parameters that
    layers had not. `doors` say how each plan changed what the modules show, `touched` are the paths
    of the modules whose weights changed.
    """

    plans: tuple[Plan, ...] = ()
    quantized: bool = False
    untied: bool = False
    folded: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    doors: tuple[tuple[Door, ...], ...] = ()
    touched: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION


def record_of(model: nn.Module) -> Record:
    """What has been done to `model`; an empty record for a model that is as it was."""
    return cast("Record", vars(model).get(_KEY, Record()))


def check_float(model: nn.Module) -> None:
    """Raise StateError for a model that is quantized already, or that holds one that is."""
    if any(record_of(module).quantized for module in model.modules()):
        raise StateError(
            "the model is quantized already; load the float model again and start from that"
        )


def set_record(model: nn.Module, record: Record) -> None:
    """Mark `model`."""
    vars(model)[_KEY] = record
