"""Out of which constructs are random models built? Every one that the zoo has, and traps."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.zoo import randomise

WIDTH = 12
HEADS = 3
VOCABULARY = 11
LENGTH = 5

BLOCKS: dict[str, Callable[[random.Random], nn.Module]] = {}


def block(kind: type[nn.Module]) -> type[nn.Module]:
    """Register a map of the residual stream to itself, or to what is added to it."""
    BLOCKS[kind.__name__] = lambda choice: kind(choice)
    return kind


class Rms(nn.Module):
    """A norm written out, as most models write it."""

    def __init__(self, width: int, *, shifted: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() if x.dtype is torch.bfloat16 else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)
        return y * (1 + self.weight if self.shifted else self.weight)


def norm(choice: random.Random, width: int = WIDTH) -> nn.Module:
    return choice.choice(
        (
            lambda: nn.RMSNorm(width),
            lambda: nn.RMSNorm(width, elementwise_affine=False, eps=1e-3),
            lambda: Rms(width),
            lambda: Rms(width, shifted=True),
            lambda: nn.LayerNorm(width),
            lambda: nn.LayerNorm(width, bias=False),
            lambda: nn.LayerNorm(width, elementwise_affine=False),
        )
    )()


class Transposed(nn.Module):
    """A linear layer that stores its weight [in, out]."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.matrix)
        return flat.reshape(*x.shape[:-1], -1)


class Functional(nn.Module):
    """A weight that is used transposed, without a module of its own."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(fan_in, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.matrix.t())


def linear(choice: random.Random, fan_in: int, fan_out: int) -> nn.Module:
    return choice.choice(
        (
            lambda: nn.Linear(fan_in, fan_out),
            lambda: nn.Linear(fan_in, fan_out, bias=False),
            lambda: Transposed(fan_in, fan_out),
            lambda: Functional(fan_in, fan_out),
        )
    )()


ACTIVATIONS = (
    functional.relu,
    functional.gelu,
    functional.silu,
    torch.tanh,
    torch.sigmoid,
    functional.leaky_relu,
    lambda x: x,
)


@block
class Plain(nn.Module):
    """An MLP, its result scaled by a number or by a learned gain."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        self.norm, self.act = norm(choice), choice.choice(ACTIVATIONS)
        self.up, self.down = linear(choice, WIDTH, 10), linear(choice, 10, WIDTH)
        self.gain = nn.Parameter(torch.ones(choice.choice((1, WIDTH))))
        self.scale = choice.choice((1.0, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(self.act(self.up(self.norm(x) * self.scale)))


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
