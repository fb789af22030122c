"""In which ways do the blocks of random models send tokens to experts?"""

from __future__ import annotations

import random

import torch
import transformers.integrations.moe
from torch import Tensor, nn

from tests.analyze.layers import ACTIVATIONS, WIDTH, block, linear, norm

# its import defines an operator that one of the blocks calls
__all__ = ["transformers"]

EXPERTS, CHOSEN, INNER = 3, 2, 5


class Experts(nn.Module):
    """What blocks with experts share: a router, and matrices `[e, i, o]` or `[e, o, i]`."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm, self.act = norm(choice), choice.choice(ACTIVATIONS)
        self.router = linear(choice, WIDTH, EXPERTS)
        self.turned, self.gated = choice.random() < 0.5, choice.random() < 0.5
        inner = 2 * INNER if self.gated else INNER
        self.up = nn.Parameter(torch.zeros(EXPERTS, *self._axes(WIDTH, inner)))
        self.down = nn.Parameter(torch.zeros(EXPERTS, *self._axes(INNER, WIDTH)))
        self.bias = nn.Parameter(torch.zeros(EXPERTS, WIDTH)) if choice.random() < 0.5 else None

    def _axes(self, taken: int, made: int) -> tuple[int, int]:
        return (made, taken) if self.turned else (taken, made)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The matrices as `[e, i, o]`."""
        return (self.up.mT, self.down.mT) if self.turned else (self.up, self.down)

    def inner(self, y: Tensor) -> Tensor:
        if not self.gated:
            return self.act(y)
        gate, up = y.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(CHOSEN, -1)
        return x + self.mixed(flat, weights / weights.sum(-1, keepdim=True), chosen).view_as(x)

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


@block
class GatheredExperts(Experts):
    """The matrices of each token's experts are gathered."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows, ids = x.repeat_interleave(CHOSEN, dim=0), chosen.reshape(-1)
        up, down = (matrix[ids] for matrix in self.matrices())
        y = self.inner(torch.bmm(rows.unsqueeze(1), up)).bmm(down).squeeze(1)
        y = y if self.bias is None else y + self.bias[ids]
        return (y * weights.reshape(-1, 1)).view(x.shape[0], CHOSEN, WIDTH).sum(1)


@block
class GroupedExperts(Experts):
    """Tokens are sorted by expert, multiplied in groups, and put back."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = chosen.reshape(-1).sort()
        ends = torch.nn.functional.one_hot(ids, EXPERTS).sum(0).cumsum(0).int()
        product = torch.ops.transformers.grouped_mm_fallback
        up, down = self.matrices()
        y = product(self.inner(product(x[order // CHOSEN], up, ends)), down, ends)
        y = y if self.bias is None else y + self.bias[ids]
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // CHOSEN, y)


@block
class EveryExpert(Experts):
    """All experts see all tokens, one after another."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        share = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, chosen, weights)
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(*self.matrices(), strict=True)):
            y = self.inner(x @ up) @ down
            y = y if self.bias is None else y + self.bias[e]
            out = out + share[:, e, None] * y
        return out


@block
class BatchedExperts(Experts):
    """All experts see all tokens, in one product."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        share = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, chosen, weights)
        up, down = self.matrices()
        y = self.inner(x.expand(EXPERTS, -1, -1) @ up) @ down
        y = y if self.bias is None else y + self.bias[:, None]
        return torch.einsum("ecd,ce->cd", y, share)
