"""Mixtures of experts in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.custom.base import SENTENCES, VOCABULARY, WIDTH, custom
from tests.custom.decoders import Rms, SwiGlu

EXPERTS, TOP, INNER = 4, 2, 20


class Dense(nn.Module):
    """All experts of every token by einsum, weighed by the router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.1)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.1)
        self.bias = nn.Parameter(torch.zeros(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.router(x).softmax(-1)
        h = functional.gelu(torch.einsum("btd,edi->btei", x, self.w_in))
        y = torch.einsum("btei,eid->bted", h, self.w_out) + self.bias
        return torch.einsum("bted,bte->btd", y, weight)


class Indexed(nn.Module):
    """The matrices of the chosen experts, looked up for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.1)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        scores, chosen = torch.topk(self.gate(flat), TOP, dim=-1)
        scores = functional.softmax(scores, dim=-1)
        h = functional.silu(torch.einsum("nkid,nd->nki", self.up[chosen], flat))
        y = torch.einsum("nkdi,nki->nkd", self.down[chosen], h)
        return (y * scores.unsqueeze(-1)).sum(1).view_as(x)


class Batched(nn.Module):
    """Tokens repeated for every expert, by bmm and baddbmm."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER) * 0.1)
        self.bias = nn.Parameter(torch.zeros(EXPERTS, 1, 2 * INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        probs = functional.softmax(self.gate(flat), dim=-1)
        top, at = probs.topk(TOP, -1)
        mask = torch.zeros_like(probs).scatter(1, at, top / top.sum(-1, keepdim=True))
        many = flat.unsqueeze(0).expand(EXPERTS, -1, -1)
        gate, up = torch.baddbmm(self.bias, many, self.gate_up).chunk(2, -1)
        y = torch.bmm(functional.silu(gate) * up, self.down)
        return (y * mask.t().unsqueeze(-1)).sum(0).view(x.shape)


class Masked(nn.Module):
    """Every expert runs on every token in a loop; a mask says what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(SwiGlu() for _ in range(EXPERTS))
        self.shared = SwiGlu(fused=True)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = torch.topk(self.gate(x).sigmoid(), TOP, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weight * (chosen == i)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out + self.shared(x)


class Routed(Masked):
    """Each expert runs on the tokens that were sent to it: sizes depend on data."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weight, chosen = torch.topk(self.gate(flat).sigmoid(), TOP, dim=-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out.index_add_(0, token, expert(flat[token]) * weight[token, place, None])
        return out.view_as(x) + self.shared(x)


class Moe(nn.Module):
    kind: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2, self.last = Rms(), Rms(), Rms()
        self.moe = self.kind()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        x = x + self.mix(self.norm1(x).cumsum(1))
        x = x + self.moe(self.norm2(x))
        return self.head(self.last(x))


@custom(*SENTENCES)
class DenseMoe(Moe):
    kind = Dense


@custom(*SENTENCES)
class IndexedMoe(Moe):
    kind = Indexed


@custom(*SENTENCES)
class BatchedMoe(Moe):
    kind = Batched


@custom(*SENTENCES)
class MaskedMoe(Moe):
    kind = Masked


@custom(*SENTENCES)
class RoutedMoe(Moe):
    kind = Routed


@custom(*SENTENCES)
class Depths(Moe):
    """Some tokens pass a layer, the others go round it."""

    kind = SwiGlu

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        at = self.mix(x).mean(-1).topk(2, dim=1).indices[..., None].expand(-1, -1, WIDTH)
        picked = torch.gather(x, 1, at)
        x = x.scatter_add(1, at, self.moe(self.norm1(picked)))
        return self.head(self.last(x))
