"""What is summed up of the inputs of products, batch after batch.

Shapes: m rows (tokens), k columns. Products are computed in float32, their sums kept in float64.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rounding import Statistic, Stats

# rows summed in float32 at once; the sums of these are added in float64
ROWS = 2048
# columns of a triangle whose products are computed together
BLOCK = 256
# rows that are kept as they are, of all data
SAMPLES = 512


@final
@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What one batch adds: rows as the product reads them, and as the float model has them.

    `held` are those of `seen` that are set apart to judge by, `rest` the others, `share` how much
    of all data it is.
    All but `plain`, the rows as they are, are scaled so that their products weigh what they should.
    """

    plain_mk: Tensor
    seen_mk: Tensor
    float_mk: Tensor
    held_mk: Tensor
    held_float_mk: Tensor
    rest_mk: Tensor
    share: float


class Accumulator(abc.ABC):
    """One statistic, summed up over batches."""

    @abc.abstractmethod
    def add(self, rows: Rows) -> None:
        """Count the rows of one batch."""

    @abc.abstractmethod
    def result(self) -> Tensor:
        """The statistic of all rows so far."""


class _Squares(Accumulator):
    """A sum of outer products of rows with themselves, of which one triangle is computed."""

    def __init__(self) -> None:
        self._sum_kk: Tensor | None = None

    def _add(self, rows_mk: Tensor) -> None:
        k = rows_mk.shape[1]
        if self._sum_kk is None:
            self._sum_kk = torch.zeros(k, k, dtype=torch.float64, device=rows_mk.device)
        for part in rows_mk.split(ROWS):
            some = part.float()
            for start in range(0, k, BLOCK):
                here = some[:, start : start + BLOCK]
                self._sum_kk[start : start + BLOCK, start:] += here.mT @ some[:, start:]

    def result(self) -> Tensor:
        """The whole of it."""
        assert self._sum_kk is not None
        upper_kk = self._sum_kk.triu()
        return upper_kk + upper_kk.triu(1).mT


@final
class HeldHessian(_Squares):
    """`x.T @ x` of the rows that are set apart."""

    def add(self, rows: Rows) -> None:
        self._add(rows.held_mk)


@final
class Hessian(_Squares):
    """`x.T @ x` of all rows, those that are `held` counted there."""

    def __init__(self, held: HeldHessian | None = None) -> None:
        super().__init__()
        self._held = held

    def add(self, rows: Rows) -> None:
        self._add(rows.seen_mk if self._held is None else rows.rest_mk)

    def result(self) -> Tensor:
        found = super().result()
        return found if self._held is None else found + self._held.result()


class _Products(Accumulator):
    """A sum of outer products of rows with others."""

    def __init__(self) -> None:
        self._sum_kk: Tensor | None = None

    def _add(self, left_mk: Tensor, right_mk: Tensor) -> None:
        k = right_mk.shape[1]
        if self._sum_kk is None:
            self._sum_kk = torch.zeros(k, k, dtype=torch.float64, device=right_mk.device)
        for left, right in zip(left_mk.split(ROWS), right_mk.split(ROWS), strict=True):
            self._sum_kk += left.float().mT @ right.float()

    def result(self) -> Tensor:
        assert self._sum_kk is not None
        return self._sum_kk


@final
class Cross(_Products):
    """`x_float.T @ x` of all rows."""

    def add(self, rows: Rows) -> None:
        self._add(rows.float_mk, rows.seen_mk)


@final
class HeldCross(_Products):
    """`x_float.T @ x` of the rows that are set apart."""

    def add(self, rows: Rows) -> None:
        self._add(rows.held_float_mk, rows.held_mk)


@final
class Samples(Accumulator):
    """Rows spread evenly over all data."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, rows: Rows) -> None:
        wanted = max(1, round(SAMPLES * rows.share))
        every = max(1, len(rows.plain_mk) // wanted)
        self._parts.append(rows.plain_mk[::every][:wanted].float())

    def result(self) -> Tensor:
        return torch.cat(self._parts)


ACCUMULATORS: Mapping[Statistic, Callable[[], Accumulator]] = {
    Statistic.HESSIAN: Hessian,
    Statistic.HELD_HESSIAN: HeldHessian,
    Statistic.CROSS: Cross,
    Statistic.HELD_CROSS: HeldCross,
    Statistic.SAMPLES: Samples,
}
# statistics that compare the quantized model with the float one
COMPARING = frozenset({Statistic.CROSS, Statistic.HELD_CROSS})


@final
class Statistics:
    """Several statistics of the input of one stage, or of one site that several stages share.

    Every second batch is set apart; where there is one batch only, the later half of its rows.
    """

    def __init__(self, wanted: Iterable[Statistic], batches: int) -> None:
        self._parts = {statistic: ACCUMULATORS[statistic]() for statistic in wanted}
        held = self._parts.get(Statistic.HELD_HESSIAN)
        if isinstance(held, HeldHessian) and Statistic.HESSIAN in self._parts:
            self._parts[Statistic.HESSIAN] = Hessian(held)
        self._batches = batches

    def add(
        self,
        batch: int,
        seen: Tensor,
        reference: Tensor,
        kept: Tensor | None,
        weight: Tensor | None = None,
    ) -> None:
        """The values `[..., k]` of one batch, of which rows that are not `kept` do not count.

        In products rows count as often as `weight` says, which has one number for each.
        """
        plain_mk = _rows(seen, kept)
        if weight is not None and weight.numel() == seen.shape[:-1].numel():
            root = weight.sqrt().reshape(*seen.shape[:-1], 1).to(seen)
            seen, reference = seen * root, reference * root
        seen_mk, float_mk = _rows(seen, kept), _rows(reference, kept)
        alone = self._batches == 1
        middle = len(seen_mk) // 2 if alone else (batch + 1) % 2 * len(seen_mk)
        rest_mk, held_mk = seen_mk[:middle], seen_mk[middle:]
        held = held_mk, float_mk[middle:]
        rows = Rows(plain_mk, seen_mk, float_mk, *held, rest_mk, 1 / self._batches)
        for part in self._parts.values():
            part.add(rows)

    def result(self) -> Stats:
        return {statistic: part.result() for statistic, part in self._parts.items()}


def _rows(value: Tensor, kept: Tensor | None) -> Tensor:
    # a mask of tokens says nothing about values that lie otherwise: patches, or tokens sorted
    if kept is not None and value.shape[:-1] == kept.shape:
        return value[kept.to(torch.bool)]
    return value.reshape(-1, value.shape[-1])


def kept_rows(
    value: Tensor, weight: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows `[m, k]` of a value that count, and the weight of each where there are such."""
    rows = value.shape[:-1]
    if weight is not None and weight.numel() != rows.numel():
        weight = None
    if weight is not None:
        weight = _rows(weight.reshape(*rows, 1), kept).reshape(-1)
    return _rows(value, kept), weight
