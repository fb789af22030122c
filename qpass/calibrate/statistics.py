"""What is summed up of the inputs of products, batch after batch.

Shapes: m rows (tokens), k columns. Products are computed in float32, their sums kept in float64.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from qpass.rounding import Statistic, Stats

# rows summed in float32 at once; the sums of these are added in float64
ROWS = 2048


class Accumulator(abc.ABC):
    """One statistic, summed up over batches."""

    @abc.abstractmethod
    def add(self, seen_mk: Tensor, float_mk: Tensor) -> None:
        """Rows as the quantized product reads them, and the same rows of the float model."""

    @abc.abstractmethod
    def result(self) -> Tensor:
        """The statistic of all rows so far."""


@final
class Hessian(Accumulator):
    """`x.T @ x`, float64 `[k, k]`."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, seen_mk: Tensor, float_mk: Tensor) -> None:
        for rows_mk in seen_mk.float().split(ROWS):
            part_kk = (rows_mk.mT @ rows_mk).double()
            self._sum = part_kk if self._sum is None else self._sum.add_(part_kk)

    def result(self) -> Tensor:
        assert self._sum is not None
        return self._sum


ACCUMULATORS: Mapping[Statistic, Callable[[], Accumulator]] = {Statistic.HESSIAN: Hessian}
# statistics that compare the quantized model with the float one
COMPARING: frozenset[Statistic] = frozenset()


@final
class Statistics:
    """Several statistics of the input of one stage, or of one site that several stages share."""

    def __init__(self, wanted: Iterable[Statistic]) -> None:
        self._parts = {statistic: ACCUMULATORS[statistic]() for statistic in wanted}

    def add(self, seen: Tensor, reference: Tensor, kept: Tensor | None) -> None:
        """The values `[..., k]` of one batch, of which rows that are not `kept` do not count."""
        seen_mk, float_mk = _rows(seen, kept), _rows(reference, kept)
        for part in self._parts.values():
            part.add(seen_mk, float_mk)

    def result(self) -> Stats:
        return {statistic: part.result() for statistic, part in self._parts.items()}


def _rows(value: Tensor, kept: Tensor | None) -> Tensor:
    # a mask of tokens says nothing about values that lie otherwise: patches, or tokens sorted
    if kept is not None and value.shape[:-1] == kept.shape:
        return value[kept.to(torch.bool)]
    return value.reshape(-1, value.shape[-1])
