"""How far outputs are from the float ones, when only their likeliest choices are kept.

Of a distribution over a vocabulary the `CHOICES` likeliest choices are told apart and all others
count as one, which bounds the divergence from below and is exact for few choices (Hu et al.,
OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations
for Better Distribution Fitting, 2025, drops the others). So what a text needs is small.
"""

# r rows, v choices, k choices that are kept

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.calibrate.outputs import Outputs
from qpass.ir import Program, fresh

CHOICES = 512
# probabilities below count as this
_LEAST = 1e-8


@final
@dataclass(frozen=True, slots=True, eq=False)
class Likeliest:
    """Which choices are the likeliest in each row, their logarithms, and that of all others."""

    at_rk: Tensor
    log_rk: Tensor
    rest_r: Tensor

    @staticmethod
    def of(scores: Tensor) -> Likeliest:
        rows_rv = _rows(scores)
        count = min(CHOICES, rows_rv.shape[1])
        top_rk, at_rk = rows_rv.topk(count, dim=-1)
        log_rk = top_rk - rows_rv.logsumexp(-1, keepdim=True)
        return Likeliest(at_rk.to(torch.int32), log_rk, _rest(log_rk))

    def divergence(self, scores: Tensor) -> Tensor:
        """The mean over rows of the divergence of what `scores` say from this."""
        rows_rv = _rows(scores)
        got_rk = rows_rv.gather(-1, self.at_rk.long()) - rows_rv.logsumexp(-1, keepdim=True)
        parts_r = (self.log_rk.exp() * (self.log_rk - got_rk)).sum(-1)
        if self.at_rk.shape[1] < rows_rv.shape[1]:
            parts_r = parts_r + self.rest_r.exp() * (self.rest_r - _rest(got_rk))
        return parts_r.mean()


@final
class Wanted:
    """What the float program returns on some batches."""

    def __init__(self, program: Program, batches: Sequence[Sequence[object]]) -> None:
        self._distributions = Outputs(program).distributions
        self._kept = [self._keep(program.run(*fresh(inputs))) for inputs in batches]

    def loss(self, batch: int, got: Sequence[object]) -> Tensor:
        """The mean over outputs: divergence of distributions, else the relative squared error."""
        parts: list[Tensor] = []
        for value, kept in zip(got, self._kept[batch], strict=True):
            if isinstance(kept, Likeliest):
                assert isinstance(value, Tensor)
                parts.append(kept.divergence(value))
            elif kept is not None:
                assert isinstance(value, Tensor)
                want = kept.float()
                size = want.square().sum().clamp_min(1e-20)
                parts.append((value.float() - want).square().sum() / size)
        if not parts:
            return torch.zeros((), device="cpu", dtype=torch.float32)
        return torch.stack(parts).mean()

    def _keep(self, outputs: Sequence[object]) -> list[Likeliest | Tensor | None]:
        found: list[Likeliest | Tensor | None] = []
        for value, logits in zip(outputs, self._distributions, strict=True):
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                found.append(None)
            else:
                found.append(Likeliest.of(value) if logits else value)
        return found


def _rest(log_rk: Tensor) -> Tensor:
    """The logarithm of what is left of one."""
    return (1 - log_rk.exp().sum(-1)).clamp_min(_LEAST).log()


def _rows(value: Tensor) -> Tensor:
    return value.float().reshape(-1, value.shape[-1] if value.dim() else 1)
