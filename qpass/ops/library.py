"""How a qpass operator comes into being: schema, specification, shape function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("qpass", "DEF")
_SPECIFICATIONS: dict[str, Callable[..., Any]] = {}


def define(schema: str, specification: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Create the operator `qpass::<schema>`.

    `specification` is its meaning in plain PyTorch, and what runs wherever no kernel was
    registered for the device. `shapes` builds the empty result from fake arguments.
    """
    name = schema.partition("(")[0]
    _SPECIFICATIONS[name] = specification
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # composite *explicit*: a kernel for a device wins over it, and tracing keeps the call whole
    _LIBRARY.impl(name, specification, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpass::{name}", shapes, lib=_LIBRARY)


def specification(name: str) -> Callable[..., Any]:
    """The plain PyTorch meaning of `qpass::<name>`, whatever kernels are loaded."""
    return _SPECIFICATIONS[name]
