"""Does what stands for a weight show that weight, whatever is done with it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qpass.rotations import Transform
from qpass.targets.layers import OnlineTransform
from qpass.targets.standin import StandIn

SHAPE = (4, 6, 8)
EXACT = 1e-12

picked = torch.tensor([2, 0, 2, 3])
INDICES: list[Any] = [
    0,
    -1,
    (slice(None), 2),
    (Ellipsis, 1),
    (None, slice(1, 3)),
    (slice(None), None, 3),
    (Ellipsis, None),
    (1, Ellipsis, None, slice(0, 2)),
    picked,
    picked.reshape(2, 2),
    torch.tensor(1),
    (slice(None), picked),
    (Ellipsis, picked),
    (picked, slice(None), slice(1, 4)),
    (None, picked, None),
    (picked, 1),
    (1, picked),
    (picked, picked),
    [1, 2],
    torch.tensor([True, False, True, True]),
    (slice(None), torch.tensor([True, False] * 3)),
    torch.ones(4, 6, dtype=torch.bool),
    (slice(None, None, 2), Ellipsis),
]
VIEWS: list[Callable[[Any], Any]] = [
    lambda w: w.transpose(0, 2),
    lambda w: w.transpose(-1, 1),
    lambda w: torch.transpose(w, 0, 1),
    lambda w: w.swapaxes(0, 2),
    lambda w: w.mT,
    lambda w: w.T if w.dim() == 2 else w.mT,
    lambda w: w[1].T,
    lambda w: w[1].t(),
    lambda w: w.permute(2, 0, 1),
    lambda w: w.permute((1, 2, 0)),
    lambda w: w.unsqueeze(0),
    lambda w: w.unsqueeze(-1),
    lambda w: w.unsqueeze(2).squeeze(2),
    lambda w: w.squeeze(1),
    lambda w: w.squeeze(),
    lambda w: w.expand(3, *SHAPE),
    lambda w: w.expand((2, -1, -1, -1)),
    lambda w: w.select(1, 2),
    lambda w: w.select(-1, 0),
    lambda w: w.index_select(0, picked),
    lambda w: torch.index_select(w, 2, picked),
    lambda w: w.chunk(2, dim=1),
    lambda w: torch.chunk(w, 2, dim=-1),
    lambda w: w.split(2),
    lambda w: w.split([1, 5], dim=1),
    lambda w: w.unbind(),
    lambda w: torch.unbind(w, 1),
    lambda w: tuple(w),
    lambda w: w.contiguous().clone().detach(),
    lambda w: w.to(torch.float64).type(torch.float64).double(),
    lambda w: w.reshape(24, 8),
    lambda w: w.view(4, 3, 2, 8),
    lambda w: w.flatten(1),
    lambda w: torch.stack([w, w]),
    lambda w: 1 - w,
    lambda w: -w,
    lambda w: abs(w),
    lambda w: w.amax(),
]
x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
y = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
z = torch.randn(4, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
PRODUCTS: list[Callable[[Any], Any]] = [
    lambda w: functional.linear(x, w[1]),
    lambda w: functional.linear(input=x, weight=w[1], bias=x[0, :6]),
    lambda w: functional.linear(y[0], w[2].T, x[1]),
    lambda w: x @ w.mT,
    lambda w: y @ w,
    lambda w: w @ z,
    lambda w: w[0] @ z,
    lambda w: w @ z[0, :, 0],
    lambda w: y[0, 0] @ w,
    lambda w: w.matmul(z),
    lambda w: torch.matmul(y, other=w),
    lambda w: torch.bmm(y, w),
    lambda w: w.bmm(z),
    lambda w: torch.mm(x, w[1].t()),
    lambda w: torch.mm(x, mat2=w[1].t()),
    lambda w: torch.addmm(x[:, :6], x, w[1].T),
    lambda w: torch.baddbmm(z.mT, y, w, beta=0.5, alpha=2),
    lambda w: torch.einsum("bti,bio->bto", y, w),
    lambda w: torch.einsum("eio,to->eti", w, x),
    lambda w: torch.einsum("eio,to->t", w, x),
    lambda w: torch.einsum("eio,eto->ti", w, z.mT),
    lambda w: torch.einsum("eio", w),
    lambda w: torch.tensordot(y, w, dims=([2], [1])),
    lambda w: torch.ops.aten.mm(x, w[0].T),
    lambda w: functional.embedding(torch.tensor([1, 3]), w[0]),
    lambda w: functional.conv1d(z.mT, w[:, :5, :2].contiguous()),
    lambda w: w @ w.mT,
    lambda w: w * y[:, :1].mT,
]


def stand_in(axis: int) -> tuple[StandIn, Tensor]:
    weight = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transform = Transform("hadamard", SHAPE[axis], seed=3)
    online = OnlineTransform(transform, torch.float64)
    return StandIn(online(weight.movedim(axis, -1)).movedim(-1, axis), axis, online), weight


def expect_same(got: Any, want: Any) -> None:
    if isinstance(want, Sequence):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            expect_same(one, other)
        return
    shown = got.plain() if isinstance(got, StandIn) else got
    assert got.shape == want.shape
    assert (shown - want).abs().max() <= EXACT * max(1, want.abs().max())


@pytest.mark.parametrize("axis", range(3))
def test_what_is_looked_up(axis: int) -> None:
    held, weight = stand_in(axis)
    for index in INDICES:
        expect_same(held[index], weight[index])


@pytest.mark.parametrize("axis", range(3))
def test_the_same_entries_elsewhere_and_what_is_computed(axis: int) -> None:
    held, weight = stand_in(axis)
    for view in VIEWS:
        expect_same(view(held), view(weight))


@pytest.mark.parametrize("axis", range(3))
def test_products_sum_over_whatever_they_sum_over(axis: int) -> None:
    held, weight = stand_in(axis)
    for product in PRODUCTS:
        expect_same(product(held), product(weight))


def test_the_other_operand_is_transformed() -> None:
    seen: list[tuple[int, ...]] = []
    held, weight = stand_in(2)
    online = held._online
    assert online is not None
    online.register_forward_hook(lambda _, args, result: seen.append(tuple(args[0].shape)))
    online.undo = None  # type: ignore[assignment]  nothing asks for the weight as it was
    for product in PRODUCTS[:2] + PRODUCTS[3:4] + PRODUCTS[5:8]:
        expect_same(product(held), product(weight))
    assert seen == [(5, 8), (5, 8), (5, 8), (4, 5, 8), (4, 5, 8), (8,)]


def test_what_looks_at_no_entry_is_that_of_a_tensor() -> None:
    held, weight = stand_in(1)
    for ask in (
        lambda w: w.shape,
        lambda w: w.size(),
        lambda w: w.size(1),
        lambda w: w.dtype,
        lambda w: w.device,
        lambda w: w.ndim,
        lambda w: w.dim(),
        lambda w: w.numel(),
        lambda w: len(w),
        lambda w: w.is_floating_point(),
        lambda w: w.requires_grad,
        lambda w: w.type(),
    ):
        assert ask(held) == ask(weight)
