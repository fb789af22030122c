"""In which ways do the attention blocks of random models split, repeat and merge heads?"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.analyze.layers import HEADS, LENGTH, WIDTH, block, linear, norm


class Attention(nn.Module):
    """What attention blocks share; queries, keys and values are `[b, h, t, e]`."""

    groups = 1

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm = norm(choice)
        width = 4
        self.shape = (HEADS, width)
        self.query = linear(choice, WIDTH, HEADS * self.groups * width)
        self.key, self.value = linear(choice, WIDTH, 12), linear(choice, WIDTH, 12)
        self.back = linear(choice, HEADS * self.groups * width, WIDTH)
        self.between = norm(choice, width) if choice.random() < 0.3 else nn.Identity()
        self.causal = choice.random() < 0.5

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, -1).transpose(1, 2)

    def merged(self, y: Tensor) -> Tensor:
        return self.back(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(x)
        q, k, v = self.query(y), self.key(y), self.value(y)
        q = self.heads(q, HEADS * self.groups)
        return self.between(q), self.heads(k, HEADS), self.heads(v, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.merged(y)


block(Attention)


@block
class GroupedExpand(Attention):
    """Grouped queries, keys and values repeated by `expand`."""

    groups = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        k, v = (
            y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(y.shape[0], -1, *y.shape[2:])
            for y in (k, v)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.merged(y)


@block
class GroupedFlag(Attention):
    """Grouped queries by `enable_gqa`."""

    groups = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return x + self.merged(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@block
class GroupedInterleave(Attention):
    """Grouped queries, keys and values repeated by `repeat_interleave`, written out."""

    groups = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return x + self.merged((q @ k.mT * 0.5).softmax(-1) @ v)


@block
class FusedContiguous(Attention):
    """One matrix for q, k and v, one after another."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__(choice)
        self.all = linear(choice, WIDTH, 36)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.all(self.norm(x)).split(12, dim=2)
        return self.heads(q, HEADS), self.heads(k, HEADS), self.heads(v, HEADS)


@block
class FusedInterleaved(Attention):
    """One matrix for q, k and v, interleaved head by head."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__(choice)
        self.all = linear(choice, WIDTH, 36)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.all(self.norm(x)).view(*x.shape[:2], HEADS, 12).transpose(1, 2)
        return y[..., :4], y[..., 4:8], y[..., 8:]


@block
class Rotary(Attention):
    """Rotary positions on queries and keys, perhaps on a part of each head."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__(choice)
        self.turned = choice.choice((2, 4))
        self.interleaved = choice.random() < 0.5
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3])[: self.turned // 2])

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2]).double()[:, None] * self.frequencies
        y, rest = x[..., : self.turned], x[..., self.turned :]
        if self.interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
            z = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
        else:
            angles = torch.cat((angles, angles), -1)
            half = self.turned // 2
            z = torch.cat((-y[..., half:], y[..., :half]), -1)
        return torch.cat((y * angles.cos() + z * angles.sin(), rest), -1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split(x)
        return self.turn(q), self.turn(k), v


@block
class TalkingHeads(Attention):
    """Scores are mixed across heads."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__(choice)
        self.mix = linear(choice, HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.merged(scores.softmax(-1) @ v)


@block
class WithoutSoftmax(Attention):
    """Keys meet values first: a product of values, summed over positions."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return x + self.merged(q @ (k.mT @ v) / LENGTH)
