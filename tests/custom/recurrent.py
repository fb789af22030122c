"""State spaces, time mixing and recurrent layers in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.custom.base import SENTENCES, VOCABULARY, WIDTH, custom, tokens
from tests.custom.decoders import Rms

STATE = 4
INNER = 30


class MambaBlock(nn.Module):
    """A selective scan, written as a loop over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, 4, groups=INNER, padding=3)
        self.x_proj = nn.Linear(INNER, 3 + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(3, INNER)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, STATE + 1).double()).repeat(INNER, 1))
        self.D = nn.Parameter(torch.ones(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = functional.silu(self.conv1d(x.transpose(1, 2))[..., :t].transpose(1, 2))
        delta, B, C = self.x_proj(x).split([3, STATE, STATE], dim=-1)
        delta = functional.softplus(self.dt_proj(delta))
        A = -torch.exp(self.A_log)
        decay = torch.exp(torch.einsum("btd,dn->btdn", delta, A))
        update = torch.einsum("btd,btn,btd->btdn", delta, B, x)
        state = torch.zeros(b, INNER, STATE, dtype=x.dtype)
        out = []
        for i in range(t):
            state = decay[:, i] * state + update[:, i]
            out.append(torch.einsum("bdn,bn->bd", state, C[:, i]))
        y = torch.stack(out, dim=1) + x * self.D
        return self.out_proj(y * functional.silu(gate))


class Stack(nn.Module):
    """Tables and a head around layers of a kind."""

    kind: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(self.norm() for _ in range(2))
        self.layers = nn.ModuleList(self.kind() for _ in range(2))
        self.last, self.head = self.norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def norm(self) -> nn.Module:
        return Rms()

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.last(x))


@custom(tokens(2, 7), tokens(3, 7))
class Mamba(Stack):
    kind = MambaBlock


class TimeMix(nn.Module):
    """Tokens mixed with their predecessors, and a decaying sum of keys times values."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_k, self.mix_v, self.mix_r = (
            nn.Parameter(torch.rand(1, 1, WIDTH)) for _ in range(3)
        )
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.value, self.receptance = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)
        )
        self.decay = nn.Parameter(torch.rand(WIDTH))
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before = self.shift(x)
        k = self.key(x * self.mix_k + before * (1 - self.mix_k))
        v = self.value(x * self.mix_v + before * (1 - self.mix_v))
        r = torch.sigmoid(self.receptance(torch.lerp(before, x, self.mix_r)))
        t = x.shape[1]
        gap = (torch.arange(t)[:, None] - torch.arange(t)[None]).clamp(min=0)
        weight = torch.exp(-torch.exp(self.decay) * gap[..., None])
        weight = weight * torch.ones(t, t, dtype=x.dtype).tril()[..., None]
        e = torch.exp(k)
        num = torch.einsum("ijc,bjc->bic", weight, e * v)
        return self.output(r * num / torch.einsum("ijc,bjc->bic", weight, e))


@custom(*SENTENCES)
class Rwkv(Stack):
    kind = TimeMix

    def norm(self) -> nn.Module:
        return nn.LayerNorm(WIDTH)


class Retention(nn.Module):
    """Linear attention with a state of outer products, per head, and a norm of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm = nn.GroupNorm(3, WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 3, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        kv = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
        y = torch.einsum("bhtd,bhtde->bhte", q, kv) / (q * k.cumsum(2)).sum(-1, keepdim=True)
        y = self.norm(y.transpose(1, 2).reshape(b * t, WIDTH)).view(b, t, WIDTH)
        return self.o(y * functional.silu(self.g(x)))


@custom(*SENTENCES)
class LinearAttention(Stack):
    kind = Retention


@custom(*SENTENCES)
class Lstm(nn.Module):
    """Recurrent layers between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.pre = nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 20, num_layers=2, batch_first=True, bidirectional=True)
        self.post, self.norm = nn.Linear(40, WIDTH), nn.LayerNorm(WIDTH)
        self.mlp, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.pre(self.embed(idx))
        y, (h, _) = self.lstm(x)
        x = self.post(y)
        return self.head(x + self.mlp(self.norm(x))) + h[-1].sum()


@custom(*SENTENCES)
class GruCell(nn.Module):
    """A cell called for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.gru, self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.GRUCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, idx: Tensor) -> Tensor:
        x, _ = self.gru(self.embed(idx))
        h = torch.zeros_like(x[:, 0])
        for i in range(3):
            h = self.cell(x[:, i], h)
        return self.head(h)
