"""How are calls of operators drawn, and which operators can be?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.analyze.calls import Call, seeded

Draw = st.DrawFn
Drawer = Callable[[Draw, Any], Call]

DRAWS: dict[object, Drawer] = {}

SIZES = (1, 2, 3, 5, 6)  # few are powers of two, some divide others, some are 1


def draws(*targets: object) -> Callable[[Drawer], Drawer]:
    """Register how the calls of `targets` are drawn."""

    def register(function: Drawer) -> Drawer:
        DRAWS.update(dict.fromkeys(targets, function))
        return function

    return register


@st.composite
def calls(draw: Draw, target: object) -> Call:
    """A call of `target` with drawn arguments."""
    return DRAWS[target](draw, target)


def tensor(draw: Draw, shape: tuple[int, ...], *, positive: bool = False) -> Tensor:
    """Numbers of that shape; where `positive`, between 0.5 and 2."""
    made = seeded(shape, draw(st.integers(0, 2**16)))
    return 0.5 + 1.5 * torch.sigmoid(made) if positive else made


def shape(draw: Draw, least: int = 0, most: int = 3, sizes: tuple[int, ...] = SIZES) -> Any:
    return tuple(draw(st.lists(st.sampled_from(sizes), min_size=least, max_size=most)))


def axis(draw: Draw, rank: int) -> int:
    """An axis, from the front or the back."""
    return draw(st.integers(-rank, rank - 1))


def narrowed(draw: Draw, full: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to `full`."""
    some = tuple(1 if draw(st.booleans()) else n for n in full)
    return some[draw(st.integers(0, len(full))) :]
