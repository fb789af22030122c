"""Out of which constructs are random models built? Every one that the zoo has, and traps."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from tests.analyze import attention_blocks, expert_blocks
from tests.analyze.layers import ACTIVATIONS, BLOCKS, HEADS, LENGTH, WIDTH, block, linear, norm
from tests.zoo import randomise

# its blocks count too
__all__ = ["BLOCKS", "attention_blocks", "expert_blocks", "net", "tokens"]

VOCABULARY = 11


@block
class Plain(nn.Module):
    """An MLP, its result scaled by a number or by a learned gain."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm, self.act = norm(choice), choice.choice(ACTIVATIONS)
        self.up, self.down = linear(choice, WIDTH, 10), linear(choice, 10, WIDTH)
        self.gain = nn.Parameter(torch.ones(choice.choice((1, WIDTH))))
        self.scale = choice.choice((1.0, 0.5))
        self.symbolic = choice.choice(("", "factor", "term"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(self.norm(x) * self.scale)))
        # a size that is only known at run time, as a number
        if self.symbolic == "factor":
            y = y / x.shape[0]
        elif self.symbolic == "term":
            y = y + x.shape[0]
        return x + self.gain * y


@block
class Gated(nn.Module):
    """A gated MLP, gate and up in one matrix or in two, and maybe a norm after it."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm, self.act = norm(choice), choice.choice(ACTIVATIONS)
        self.fused = choice.random() < 0.5
        self.both = linear(choice, WIDTH, 20)
        self.gate, self.up = linear(choice, WIDTH, 10), linear(choice, WIDTH, 10)
        self.down = linear(choice, 10, WIDTH)
        self.after = norm(choice) if choice.random() < 0.5 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        gate, up = self.both(y).chunk(2, -1) if self.fused else (self.gate(y), self.up(y))
        return x + self.after(self.down(self.act(gate) * up))


@block
class PostNorm(nn.Module):
    """The norm stands on the stream itself."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.first, self.after = linear(choice, WIDTH, WIDTH), norm(choice)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.first(x))


@block
class AcrossHeads(nn.Module):
    """Something orders or weighs heads, and is perhaps added back to what it came from."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.up, self.down = linear(choice, WIDTH, 12), linear(choice, 12, WIDTH)
        self.how = choice.choice(("softmax", "cumsum", "flip", "norm", "mean"))
        self.added = choice.random() < 0.7
        self.norm = norm(choice, HEADS)

    def across(self, y: Tensor) -> Tensor:
        if self.how == "norm":
            return self.norm(y)
        if self.how == "mean":
            return y.mean(-1, keepdim=True).expand_as(y)
        return y.flip(-1) if self.how == "flip" else getattr(y, self.how)(-1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).unflatten(-1, (HEADS, 4)).transpose(-1, -2)
        y = y + self.across(y) if self.added else self.across(y)
        return x + self.down(y.transpose(-1, -2).flatten(-2))


@block
class MixedHeads(AcrossHeads):
    """A linear layer over the head axis: each head's own basis would be mixed with the others'."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__(choice)
        self.mix = nn.Linear(HEADS, HEADS, bias=choice.random() < 0.3)

    def across(self, y: Tensor) -> Tensor:
        return self.mix(y)


@block
class SharedTwice(nn.Module):
    """A square weight that is used twice in a row."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm, self.inner = norm(choice), linear(choice, WIDTH, WIDTH)
        self.added = choice.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.inner(self.norm(x)))
        return x + y if self.added else y


@block
class Mixer(nn.Module):
    """A linear layer over positions."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm, self.act = norm(choice), choice.choice(ACTIVATIONS)
        self.first, self.second = linear(choice, LENGTH, 7), linear(choice, 7, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).transpose(1, 2)
        return x + self.second(self.act(self.first(y))).transpose(1, 2)


@block
class Joined(nn.Module):
    """Values are sliced, joined in another order and sliced across the joint."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.up, self.down = linear(choice, WIDTH, 9), linear(choice, 12, WIDTH)
        self.at = choice.choice((1, 2, 4))
        self.act = choice.choice(ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.cat((y[..., self.at :], y[..., : self.at], x[..., :3]), -1)
        return x + self.down(torch.cat((self.act(y[..., :5]), y[..., 5:]), -1))


@block
class NormsJoined(nn.Module):
    """A layer reads two normalised values, one after the other or one above the other."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.first, self.second = norm(choice), norm(choice)
        self.stacked = choice.random() < 0.5
        self.mix = linear(choice, WIDTH if self.stacked else 2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.first(x), self.second(x.flip(1)))
        if self.stacked:
            return x + self.mix(torch.stack(y, 1)).sum(1)
        return x + self.mix(torch.cat(y, -1))


@block
class Pooled(nn.Module):
    """The mean over positions, and a token of its own in front."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.norm, self.mix = norm(choice), linear(choice, WIDTH, WIDTH)
        self.first = choice.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1)
        pooled = y[:, 0] if self.first else y.mean(1)
        return x + self.mix(self.norm(pooled)).unsqueeze(1)


@block
class SlicedWeight(nn.Module):
    """Two slices of one matrix, one of which overlaps the other."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm, self.act = norm(choice), choice.choice(ACTIVATIONS)
        self.matrix = nn.Parameter(torch.zeros(17, WIDTH))
        self.at = choice.choice((0, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        up = self.act(nn.functional.linear(y, self.matrix[self.at : self.at + WIDTH]))
        return x + up @ self.matrix[5:]


@block
class NormOverPlaces(nn.Module):
    """A norm over positions and channels at once."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        affine = choice.random() < 0.5
        self.norm = nn.LayerNorm((LENGTH, WIDTH), elementwise_affine=affine)
        self.mix = linear(choice, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class Net(nn.Module):
    """Token and position tables, blocks, and perhaps a last norm and a tied head."""

    def __init__(self, names: tuple[str, ...], choice: random.Random) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.scale = choice.choice((1.0, 3.5))
        self.blocks = nn.ModuleList(BLOCKS[name](choice) for name in names)
        self.last = norm(choice)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if choice.random() < 0.5:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) * self.scale + self.places
        for inner in self.blocks:
            x = inner(x)
        return self.head(self.last(x))


def net(names: tuple[str, ...], seed: int) -> Net:
    """A random model in float64 whose every parameter is random."""
    made = Net(names, random.Random(seed)).double()
    randomise(made, seed)
    return made.eval()


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
