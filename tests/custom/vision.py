"""Vision models in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.custom.base import FEATURES, HEADS, IMAGES, WIDTH, custom, values

HEAD = WIDTH // HEADS


class TimmAttention(nn.Module):
    def __init__(self, qk_norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.scale = HEAD**-0.5
        self.qkv = nn.Linear(WIDTH, WIDTH * 3, bias=bias)
        self.q_norm = nn.LayerNorm(HEAD) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(HEAD) if qk_norm else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.0)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        attn = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH) * 1e-1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = (
            nn.LayerNorm(WIDTH, eps=1e-6),
            TimmAttention(qk_norm),
            LayerScale(),
        )
        self.norm2, self.ls2 = nn.LayerNorm(WIDTH, eps=1e-6), LayerScale()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 60), nn.Linear(60, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))


class TimmVit(nn.Module):
    """A class token, register tokens, LayerScale, fused qkv, pooling."""

    pool, qk_norm = "token", False

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(TimmBlock(self.qk_norm) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        tokens = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token)]
        x = self.blocks(torch.cat([*tokens, x], dim=1))
        if self.pool == "token":
            return self.head(self.norm(x)[:, 0])
        return self.head(self.norm(x[:, 5:].mean(dim=1)))


@custom(*IMAGES)
class VitToken(TimmVit):
    pass


@custom(*IMAGES)
class VitPooled(TimmVit):
    pool, qk_norm = "mean", True


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = TimmAttention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 50), nn.GELU(approximate="tanh"), nn.Linear(50, WIDTH)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


@custom(
    lambda: (IMAGES[0](), torch.tensor([3, 50]), torch.tensor([1, 2])),
    lambda: (IMAGES[1](), torch.tensor([3, 50, 8]), torch.tensor([0, 1, 2])),
)
class Dit(nn.Module):
    """A diffusion transformer: steps and classes modulate norms, the result is an image again."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.y_embedder = nn.Embedding(4, WIDTH)
        self.register_buffer("pos_embed", torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList(DitBlock() for _ in range(2))
        self.final_norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.final_mod = nn.Linear(WIDTH, 2 * WIDTH)
        self.final = nn.Linear(WIDTH, 2 * 2 * 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        freqs = torch.exp(-torch.arange(8, dtype=torch.float64) / 8).to(x.dtype)
        angles = t[:, None].to(x.dtype) * freqs[None]
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], -1)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_mod(functional.silu(c)).chunk(2, dim=1)
        x = self.final(modulate(self.final_norm(x), shift, scale))
        x = x.reshape(-1, 4, 4, 2, 2, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 3, 8, 8)


@dataclass
class UnetOutput:
    sample: Tensor
    middle: Tensor


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(functional.silu(self.norm2(y)))


@custom(*IMAGES)
class Unet(nn.Module):
    """Skips joined by cat, norms of groups and batches, attention at the bottom, a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.down, self.pool = ResBlock(12, WIDTH), nn.Conv2d(WIDTH, WIDTH, 2, stride=2)
        self.norm, self.attn = nn.LayerNorm(WIDTH), TimmAttention(bias=False)
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)
        self.merge, self.out = ResBlock(2 * WIDTH, 12), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        down = self.down(self.stem(x))
        y = self.pool(down)
        b, c, h, w = y.shape
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(self.norm(tokens))
        y = tokens.transpose(1, 2).reshape(b, c, h, w)
        y = self.merge(torch.cat([self.up(y), down], dim=1))
        return self.out(y), tokens


class ConvNextBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.pwconv1, self.pwconv2 = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


@custom(*IMAGES)
class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 2, 2)
        self.blocks = nn.Sequential(ConvNextBlock(), ConvNextBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(self.norm(functional.adaptive_avg_pool2d(x, 1).flatten(1)))


@custom(*IMAGES)
class Mixer(nn.Module):
    """Linear layers over places, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(16, 10), nn.GELU(), nn.Linear(10, 16))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = x.reshape(b, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, 16, 12)
        x = self.stem(x)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


@custom(*IMAGES)
class Swin(nn.Module):
    """Shifted windows with relative biases, and patches that are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, WIDTH, 1), nn.LayerNorm(WIDTH)
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.table = nn.Parameter(torch.zeros(49, HEADS))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        gap = (at[:, :, None] - at[:, None]).permute(1, 2, 0) + 3
        self.register_buffer("index", gap[..., 0] * 7 + gap[..., 1])
        self.merge_norm, self.merge = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, 30, bias=False)
        self.head = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x).permute(0, 2, 3, 1))
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(b, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).view(-1, 16, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        y = ((q @ k.mT) * HEAD**-0.5 + bias.unsqueeze(0)).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, 2, 2, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(self.merge_norm(x)).mean((1, 2)))


@custom(
    lambda: {"x": FEATURES[0](), "context": values(2, 9, 16)()},
    lambda: {"x": FEATURES[1](), "context": values(3, 4, 16)()},
)
class Perceiver(nn.Module):
    """Cross-attention of learned queries, arguments by name only, a result in a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.norm_x, self.norm_c = nn.LayerNorm(WIDTH), nn.LayerNorm(16)
        self.to_q, self.to_kv = nn.Linear(WIDTH, 20, bias=False), nn.Linear(16, 40, bias=False)
        self.to_out = nn.Linear(20, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 30), nn.GELU(), nn.Linear(30, WIDTH)
        )

    def forward(self, *, x: Tensor, context: Tensor) -> Tensor:
        x = x.mean(1, keepdim=True) + self.latents
        c = self.norm_c(context)
        q, (k, v) = self.to_q(self.norm_x(x)), self.to_kv(c).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (4, 5)).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.to_out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)
