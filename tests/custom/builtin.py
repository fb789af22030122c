"""Models around PyTorch's own attention, tables, parametrisations and hooks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.custom.base import FEATURES, HEADS, SENTENCES, VOCABULARY, WIDTH, custom, tokens, values
from tests.custom.decoders import Rms
from tests.custom.language import GptBlock


@custom(*SENTENCES)
class Encoder(nn.Module):
    """nn.TransformerEncoder, which has a path of its own for evaluation."""

    first = False

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 40, batch_first=True, norm_first=self.first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(idx)))


@custom(*SENTENCES)
class EncoderFirst(Encoder):
    first = True


@custom(*SENTENCES)
class EncoderMasked(Encoder):
    first = True

    def forward(self, idx: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1], dtype=torch.float64)
        return self.head(self.encoder(self.embed(idx), mask=mask, src_key_padding_mask=idx == 0))


@custom(
    lambda: (tokens(2, 7)(), tokens(2, 4)()),
    lambda: (tokens(3, 5)(), tokens(3, 6)()),
)
class Seq2Seq(nn.Module):
    """nn.Transformer, with positions along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 40, norm_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        x, y = self.embed(src).transpose(0, 1), self.embed(tgt).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(y), dtype=torch.float64)
        return self.head(self.transformer(x, y, tgt_mask=mask).transpose(0, 1))


@custom(*SENTENCES)
class SelfAttention(nn.Module):
    """nn.MultiheadAttention, whose weights are returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm, self.attention = Rms(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=10, batch_first=True)
        self.memory = nn.Parameter(torch.randn(1, 6, 10))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, idx: Tensor) -> dict[str, Tensor]:
        x = self.embed(idx)
        y = self.norm(x)
        out, weights = self.attention(y, y, y, need_weights=True)
        x = x + out
        memory = self.memory.expand(len(x), -1, -1)
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        return {"logits": self.head(x), "weights": weights}


class Tower(nn.Module):
    """Two layers after a norm, between tables: what is special about a model is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm, self.up, self.down = Rms(), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.last, self.head = Rms(), nn.Linear(WIDTH, VOCABULARY)

    def body(self, x: Tensor) -> Tensor:
        x = x + self.down(functional.silu(self.up(self.norm(x))))
        return self.head(self.last(x))

    def forward(self, idx: Tensor) -> Tensor:
        return self.body(self.embed(idx))


@custom(*SENTENCES)
class WeightNorm(Tower):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.up)
        parametrizations.weight_norm(self.down)


@custom(*SENTENCES)
class OldWeightNorm(Tower):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.weight_norm(self.up)


@custom(*SENTENCES)
class SpectralNorm(Tower):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.up)


@custom(*SENTENCES)
class Orthogonal(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.square = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, idx: Tensor) -> Tensor:
        return self.body(self.square(self.embed(idx)))


@custom(*SENTENCES)
class LowRank(Tower):
    """A matrix that is a product, and one that is scaled before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, 4)), nn.Parameter(torch.randn(4, WIDTH))
        self.s = nn.Parameter(torch.ones(WIDTH, 1))
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        x = x + functional.linear(x, self.a @ self.b)
        x = x + functional.linear(x, self.w * self.s)
        return self.body(x)


@custom(*SENTENCES)
class Lora(Tower):
    """An adapter beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, 40, bias=False)

    def body(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.down(functional.silu(self.up(y) + 0.5 * self.lora_b(self.lora_a(y))))
        return self.head(self.last(x))


@custom(*SENTENCES)
class Checkpointed(Tower):
    """A layer whose values are made again for a backward pass."""

    def body(self, x: Tensor) -> Tensor:
        x = checkpoint(self.layer, x, use_reentrant=False)
        return self.head(self.last(x))

    def layer(self, x: Tensor) -> Tensor:
        return x + self.down(functional.silu(self.up(self.norm(x))))


@custom(*SENTENCES)
class MaxNorm(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0)


@custom(
    lambda: (tokens(2, 7)(), tokens(2, 6)()),
    lambda: (tokens(3, 5)(), tokens(3, 4)()),
)
class Bag(Tower):
    """A bag of tokens added to each."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean")

    def forward(self, idx: Tensor, words: Tensor) -> Tensor:
        return self.body(self.embed(idx) + self.bag(words)[:, None])


@custom(*SENTENCES)
class Hooked(Tower):
    """Hooks that change what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_hook(lambda module, args, out: out * 2)
        self.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


@custom(*SENTENCES)
class Buffers(Tower):
    """A frozen projection and a frozen table that are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.randn(WIDTH, WIDTH) * 0.3)
        self.register_buffer("table", torch.randn(VOCABULARY, WIDTH))

    def forward(self, idx: Tensor) -> Tensor:
        x = functional.embedding(idx, self.table) + self.embed(idx)
        return self.body(x + self.norm(x) @ self.frozen)


@custom(*SENTENCES)
class FewBiases(Tower):
    """Norms with biases before layers without."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 40, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)


@custom(*SENTENCES)
class Branching(Tower):
    """Which layer runs depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = GptBlock()
        self.other = GptBlock()

    def forward(self, idx: Tensor) -> Tensor:
        x = self.block(self.embed(idx))
        return self.body(self.other(x if x.mean() > 0 else -x))


@custom(*SENTENCES)
class EarlyExit(Branching):
    """A number from a tensor leaves the graph."""

    def forward(self, idx: Tensor) -> Tensor:
        x = self.block(self.embed(idx))
        scale = x.abs().max().item()
        return self.body(self.other(x / scale))


@dataclass
class Result:
    logits: Tensor
    parts: dict[str, list[Tensor]]


@custom(
    lambda: {"batch": {"ids": tokens(2, 7)(), "extra": [values(2, 7, WIDTH)(), values(WIDTH)()]}},
    lambda: {"batch": {"ids": tokens(3, 5)(), "extra": [values(3, 5, WIDTH)(), values(WIDTH)()]}},
)
class Nested(Tower):
    """Arguments and results in dictionaries of lists."""

    def forward(self, *, batch: dict[str, object], flag: bool = True) -> dict[str, object]:
        x = self.embed(batch["ids"])
        a, b = batch["extra"]
        x = x + a + b if flag else x
        return {"logits": self.body(x), "parts": [x, (a, {"b": b})]}


@custom(*SENTENCES)
class Returned(Tower):
    """A result in a dataclass."""

    def forward(self, idx: Tensor) -> Result:
        x = self.embed(idx)
        return Result(self.body(x), {"states": [x, self.norm(x)]})


@custom(*FEATURES)
class Plain(nn.Module):
    """Nothing but a sequence of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 30), nn.ReLU(), nn.Linear(30, 30), nn.LayerNorm(30), nn.Linear(30, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@custom(values(5, WIDTH), values(3, WIDTH))
class Autoencoder(nn.Module):
    """A decoder that uses the encoder's weight transposed; a 1-D batch norm; scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(WIDTH, 10)
        self.mid = nn.Linear(10, 10)
        self.bn = nn.BatchNorm1d(10)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(self.mid(self.encode(x))) * self.temperature
        return functional.linear(z, self.encode.weight.t()) + self.temperature


@custom(*(lambda f=f: f().half() for f in FEATURES), dtype=torch.float16)
class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = Rms(how=4), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.last = Rms()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x[..., :1].expand(-1, -1, 40)) + x
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.up(self.last(x))
