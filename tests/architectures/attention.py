"""Where V and O could turn together, found by trying it on the module itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qpass.report.inspection import Inspection
from qpass.verify.exact import largest_error
from tests.architectures.models import Subject, outputs

# float32 rounding inside of the model, and what a turn that matters moves at the least
SAME, MOVED = 2e-5, 1e-3


def unfolded_values(tiny: Subject, found: Inspection) -> list[str]:
    """Output projections that may turn with a value projection, and whose input is not folded."""
    folded = {p.site for p in found.products if p.input == "folded"}
    names = {m: path for path, m in tiny.model.named_modules()}
    return [
        site
        for _, o in turning_pairs(tiny)
        if (site := f"{names[o]}.weight") not in folded
        and any(p.site == site for p in found.products)
    ]


def turning_pairs(tiny: Subject, most: int = 6) -> Iterator[tuple[nn.Linear, nn.Linear]]:
    """Two linear layers of one attention with a random rotation of each head between them."""
    attentions = [
        m for m in tiny.model.modules() if "attention" in type(m).__name__.lower() and _linears(m)
    ]
    for attention in attentions[:most]:
        layers = _linears(attention)
        for o in layers:
            for v in layers:
                if v is not o and any(_turns(tiny, v, o, d) for d in _head_widths(v, o)):
                    yield v, o


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.children() if type(m) is nn.Linear]


def _head_widths(v: nn.Linear, o: nn.Linear) -> list[int]:
    """Widths of at least four that divide both: one of them is a head's, if there are heads."""
    return [
        d
        for d in (16, 12, 8)
        if v.out_features % d == 0 and o.in_features % d == 0 and v.out_features <= o.in_features
    ]


def _turns(tiny: Subject, v: nn.Linear, o: nn.Linear, width: int) -> bool:
    generator = torch.Generator().manual_seed(width)
    noise = torch.randn(width, width, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(noise)[0].to(v.weight.dtype)
    with _turned(v.weight, turn, 0), _turned_bias(v, turn):
        half = outputs(tiny.model, tiny.first)
        with _turned(o.weight, turn, 1):
            both = outputs(tiny.model, tiny.first)
    moved = largest_error(half, tiny.outputs[0])
    return moved > MOVED and largest_error(both, tiny.outputs[0]) < SAME


@contextmanager
def _turned(weight: Tensor, turn: Tensor, axis: int) -> Iterator[None]:
    kept, width = weight.data, turn.shape[0]
    rows = kept.movedim(axis, -1)
    weight.data = (
        (rows.unflatten(-1, (-1, width)) @ turn).flatten(-2).movedim(-1, axis).contiguous()
    )
    try:
        yield
    finally:
        weight.data = kept


@contextmanager
def _turned_bias(layer: nn.Linear, turn: Tensor) -> Iterator[None]:
    if layer.bias is None:
        yield
        return
    with _turned(layer.bias, turn, 0):
        yield
