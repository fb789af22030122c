"""Language models in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.custom.base import HEADS, LENGTH, SENTENCES, VOCABULARY, WIDTH, custom
from tests.custom.decoders import Rms

HEAD = WIDTH // HEADS


class CausalSelfAttention(nn.Module):
    def __init__(self, flash: bool = True) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.resid_dropout = nn.Dropout(0.1)
        self.flash = flash
        self.register_buffer(
            "bias", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        if self.flash:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = functional.softmax(att, dim=-1)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GptMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class GptBlock(nn.Module):
    def __init__(self, flash: bool = True) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), CausalSelfAttention(flash)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), GptMlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@custom(*SENTENCES)
class NanoGpt(nn.Module):
    flash = True

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(LENGTH, WIDTH),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(GptBlock(self.flash) for _ in range(2)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x), None
        logits = self.lm_head(x)
        return logits, functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


@custom(*SENTENCES)
class NanoGptSlow(NanoGpt):
    flash = False


@custom(*SENTENCES)
class NanoGptLastOnly(NanoGpt):
    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x[:, [-1], :]))


@custom(*SENTENCES)
class FunctionalGpt(nn.Module):
    """No modules at all: parameters, functional.linear, matmul, @ and einsum."""

    def __init__(self) -> None:
        super().__init__()
        new = lambda *shape: nn.Parameter(torch.randn(*shape) * 0.1)  # noqa: E731
        self.wte, self.wpe = new(VOCABULARY, WIDTH), new(LENGTH, WIDTH)
        self.g1, self.g2, self.g3 = new(WIDTH), new(WIDTH), new(WIDTH)
        self.wq, self.wk, self.wv = new(WIDTH, WIDTH), new(WIDTH, WIDTH), new(WIDTH, HEADS, HEAD)
        self.wo = new(HEADS, HEAD, WIDTH)
        self.w_in, self.b_in, self.w_out, self.b_out = (
            new(WIDTH, 50),
            new(50),
            new(50, WIDTH),
            new(WIDTH),
        )

    def forward(self, idx: Tensor) -> Tensor:
        b, t = idx.shape
        x = self.wte[idx] + self.wpe[:t]
        y = functional.rms_norm(x, (WIDTH,), self.g1)
        q = functional.linear(y, self.wq).view(b, t, HEADS, HEAD)
        k = torch.matmul(y, self.wk).view(b, t, HEADS, HEAD)
        v = torch.einsum("btd,dhe->bthe", y, self.wv)
        a = torch.einsum("bqhe,bkhe->bhqk", q, k) / HEAD**0.5
        a = a + torch.full((t, t), float("-inf")).triu(1)
        z = torch.einsum("bhqk,bkhe->bqhe", a.softmax(-1), v)
        x = x + torch.einsum("bqhe,hed->bqd", z, self.wo)
        y = functional.layer_norm(x, (WIDTH,), self.g2)
        x = x + (functional.gelu(y @ self.w_in + self.b_in) @ self.w_out + self.b_out)
        return functional.rms_norm(x, (WIDTH,), self.g3) @ self.wte.T


@custom(*SENTENCES)
class Looped(nn.Module):
    """One block called in a loop, with a learned scale for each turn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.block = GptBlock()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(3))
        self.alpha = nn.Parameter(torch.zeros(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.project(self.embed(idx))
        for i, scale in enumerate(self.scales):
            x = x + torch.sigmoid(self.alpha[i]) * self.block(x * scale)
        return self.head(self.norm(x))


@custom(*SENTENCES)
class UsedTwice(nn.Module):
    """A weight used plainly and transposed, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.norm2 = Rms(), Rms(how=3)
        self.w = nn.Parameter(torch.randn(WIDTH, 40) * 0.1)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        x = x + torch.relu(self.norm1(x) @ self.w) @ self.w.t()
        x = x + self.second(torch.tanh(self.first(self.norm2(x))))
        return functional.linear(x, self.embed.weight)


@custom(*SENTENCES)
class AlibiWindow(nn.Module):
    """ALiBi, a sliding window, parameters in a dictionary, learned gains on the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.p = nn.ParameterDict(
            {
                "qkv": nn.Parameter(torch.randn(3, HEADS, HEAD, WIDTH) * 0.1),
                "out": nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1),
                "gate": nn.Parameter(torch.ones(1)),
                "gamma": nn.Parameter(torch.ones(WIDTH)),
            }
        )
        self.register_buffer("slopes", torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)]))
        self.norm, self.last = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        t = x.shape[1]
        q, k, v = torch.einsum("btd,nhed->nbhte", self.norm(x), self.p["qkv"]).unbind(0)
        gap = torch.arange(t)[None, :] - torch.arange(t)[:, None]
        bias = self.slopes[:, None, None] * gap
        bias = bias.masked_fill((gap > 0) | (gap < -3), float("-inf"))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y = y.transpose(1, 2).flatten(2) @ self.p["out"].mT
        x = x + self.p["gate"].tanh() * y
        x = x * self.p["gamma"]
        return self.head(self.last(x))


@custom(*SENTENCES)
class RelativeBias(nn.Module):
    """Relative positions from a table, einsum attention, post-norm and a pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.table = nn.Embedding(2 * LENGTH, HEADS)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 30), nn.ReLU(), nn.Linear(30, WIDTH))
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.classify = nn.Linear(WIDTH, 5)

    def forward(self, idx: Tensor) -> dict[str, Tensor]:
        x = self.embed(idx)
        b, t, _ = x.shape
        q, k, v = (f(x).reshape(b, t, HEADS, HEAD) for f in (self.q, self.k, self.v))
        gap = torch.arange(t)[:, None] - torch.arange(t)[None] + LENGTH
        scores = torch.einsum("bihd,bjhd->bhij", q, k) + self.table(gap).permute(2, 0, 1)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        x = self.norm1(x + self.o(y.reshape(b, t, WIDTH)))
        x = self.norm2(x + self.mlp(x))
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return {"hidden": x, "pooled": pooled, "logits": self.classify(pooled)}


class TransposedLinear(nn.Module):
    """The layer of GPT-2: weights `[in, out]`, by addmm."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(nx, nf) * 0.1),
            nn.Parameter(torch.zeros(nf)),
        )

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


@custom(*SENTENCES)
class Conv1dGpt(nn.Module):
    """Heads packed as `[heads, 3, width]` in a transposed layer; sinusoidal positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.proj = TransposedLinear(3 * WIDTH, WIDTH), TransposedLinear(WIDTH, WIDTH)
        self.fc, self.out = TransposedLinear(44, WIDTH), TransposedLinear(WIDTH, 44)
        place = torch.arange(LENGTH)[:, None] / 10 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        self.register_buffer("pe", torch.cat((place.sin(), place.cos()), 1))

    def forward(self, idx: Tensor) -> Tensor:
        b, t = idx.shape
        x = self.embed(idx) + self.pe[:t]
        qkv = self.attn(self.ln1(x)).view(b, t, HEADS, 3 * HEAD)
        q, k, v = qkv.permute(0, 2, 1, 3).chunk(3, -1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.permute(0, 2, 1, 3).reshape(b, t, WIDTH))
        x = x + self.out(functional.gelu(self.fc(self.ln2(x)), approximate="tanh"))
        return x @ self.embed.weight.t()
