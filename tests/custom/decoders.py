"""Decoders with rotary positions and grouped queries, in the spellings that people use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.custom.base import HEADS, LENGTH, SENTENCES, VOCABULARY, WIDTH, custom

HEAD = WIDTH // HEADS


class Rms(nn.Module):
    """The norm, spelled in one of five ways."""

    def __init__(self, width: int = WIDTH, how: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if how == 1 else torch.ones(width))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == 0:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        if self.how == 1:
            return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * (1.0 + self.weight)
        if self.how == 2:
            scale = x.shape[-1] ** -0.5
            return x / (x.norm(dim=-1, keepdim=True) * scale + 1e-6) * self.weight
        if self.how == 3:
            return functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.weight
        variance = torch.sum(torch.square(x.float() if x.dtype == torch.half else x), -1) / x.size(
            -1
        )
        return self.weight * (x * (variance + 1e-6).pow(-0.5).unsqueeze(-1)).type_as(x)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class Rope(nn.Module):
    """Rotary positions by complex numbers, by stacking, by halves, of a part of the width."""

    def __init__(self, how: str, width: int = HEAD) -> None:
        super().__init__()
        self.how = how
        self.width = width // 2 if how == "partial" else width
        freqs = 1.0 / (100.0 ** (torch.arange(0, self.width, 2).double() / self.width))
        angles = torch.outer(torch.arange(LENGTH).double(), freqs)
        if how == "complex":
            self.cis = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # b h t d
        t = x.shape[-2]
        if self.how == "complex":
            z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(z * self.cis[:t]).flatten(-2).type_as(x)
        cos, sin = self.cos[:t], self.sin[:t]
        if self.how == "stack":
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        if self.how == "partial":
            turned, kept = x[..., : self.width], x[..., self.width :]
            return torch.cat((turned * cos + rotate_half(turned) * sin, kept), -1)
        return x * cos + rotate_half(x) * sin


class Gqa(nn.Module):
    """Grouped queries by expand or repeat_interleave, with rotary positions and norms of heads."""

    def __init__(
        self, rope: str = "half", kv: int = 1, how: str = "expand", norm: str = ""
    ) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, kv * HEAD, bias=False)
        self.v_proj = nn.Linear(WIDTH, kv * HEAD, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv, self.how, self.norm = kv, how, norm
        self.rope = Rope(rope)
        if norm == "rms":
            self.q_norm, self.k_norm = Rms(HEAD), Rms(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, HEADS, HEAD)
        k = self.k_proj(x).view(b, t, self.kv, HEAD)
        v = self.v_proj(x).view(b, t, self.kv, HEAD)
        if self.norm == "rms":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.norm == "l2":
            q, k = functional.normalize(q, dim=-1) * 3.0, functional.normalize(k, dim=-1)
        q, k = self.rope(q.transpose(1, 2)), self.rope(k.transpose(1, 2))
        v = v.transpose(1, 2)
        n = HEADS // self.kv
        if self.how == "expand":
            k = k[:, :, None].expand(-1, -1, n, -1, -1).reshape(b, HEADS, t, HEAD)
            v = v[:, :, None].expand(-1, -1, n, -1, -1).reshape(b, HEADS, t, HEAD)
        elif self.how == "interleave":
            k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, 1)
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.how == "sdpa"
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, WIDTH))


class SwiGlu(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.w12 = nn.Linear(WIDTH, 80, bias=False)
        else:
            self.w1, self.w3 = nn.Linear(WIDTH, 40, bias=False), nn.Linear(WIDTH, 40, bias=False)
        self.w2 = nn.Linear(40, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.w12(x).chunk(2, dim=-1)
            return self.w2(functional.silu(gate) * up)
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class LlamaLike(nn.Module):
    """A decoder that subclasses make a kind of."""

    rope, kv, how, norm, rms, fused, parallel = "half", 1, "expand", "", 0, False, False
    scale, cap = 1.0, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Module()
            layer.attention = Gqa(self.rope, self.kv, self.how, self.norm)
            layer.feed_forward = SwiGlu(self.fused)
            layer.attention_norm, layer.ffn_norm = Rms(how=self.rms), Rms(how=self.rms)
            self.layers.append(layer)
        self.norm_f = Rms(how=self.rms)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens) * self.scale
        for layer in self.layers:
            if self.parallel:
                y = layer.attention_norm(h)
                h = h + layer.attention(y) + layer.feed_forward(y)
            else:
                h = h + layer.attention(layer.attention_norm(h))
                h = h + layer.feed_forward(layer.ffn_norm(h))
        logits = self.output(self.norm_f(h))
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


@custom(*SENTENCES)
class ComplexRope(LlamaLike):
    rope, kv, how = "complex", 3, ""


@custom(*SENTENCES)
class StackedRope(LlamaLike):
    rope, rms, norm = "stack", 1, "rms"


@custom(*SENTENCES)
class PartialRopeParallel(LlamaLike):
    rope, rms, parallel, how = "partial", 2, True, "interleave"


@custom(*SENTENCES)
class NormalizedKeys(LlamaLike):
    norm, rms, fused, how = "l2", 3, True, "sdpa"


@custom(*SENTENCES)
class CappedScaled(LlamaLike):
    rms, scale, cap = 4, WIDTH**0.5, 20.0
