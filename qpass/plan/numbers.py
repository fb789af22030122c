"""The numbers of a saved plan: one safetensors file beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpass.errors import BadInput
from qpass.rotations import Element, Kronecker


def numbers_path(plan: Path) -> Path:
    """Where the numbers of the plan at a path are."""
    return plan.with_name(f"{plan.name}.safetensors")


def save_numbers(plan: Path, elements: Iterable[Element | Kronecker]) -> None:
    """Write the numbers of a plan's elements by digest, whole or not at all; none, no file."""
    tensors = {element.digest: element.given() for element in elements}
    target = numbers_path(plan)
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    if not tensors:
        return
    try:
        save_file(tensors, part)
        part.replace(target)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"plan {plan}: its numbers cannot be written ({error})") from error


def load_numbers(plan: Path, elements: Iterable[Element | Kronecker]) -> dict[str, Tensor]:
    """The numbers of every element of a plan, by digest.

    Raises BadInput where the file is missing, damaged, or holds other numbers.
    """
    path = numbers_path(plan)
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise BadInput(
            f"plan {plan}: its numbers are not beside it\n  copy {path.name} to where it is"
        ) from error
    except (OSError, SafetensorError) as error:
        raise BadInput(f"plan {plan}: {path.name} is damaged ({error})") from error
    found: dict[str, Tensor] = {}
    for element in elements:
        if element.digest not in tensors:
            raise BadInput(f"plan {plan}: {path.name} has no element {element.digest[:12]}")
        try:
            found[element.digest] = element.filled(tensors[element.digest]).given()
        except BadInput as error:
            raise BadInput(f"plan {plan}: {path.name}: {error}") from error
    return found
