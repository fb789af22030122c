"""Which models stand for all models: tiny, random, and chosen for their structure."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 64
POSITIONS = 32
PAD = 0

# what every language model here shares; widths and head counts differ, none a power of two
_SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_GATED = _SHARED | {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Specimen:
    """One model of the zoo; `adds` says what it has that the others lack."""

    name: str
    adds: str
    build: Callable[[int], nn.Module]  # seed -> model: float64, eval, nothing neutral
    inputs: Callable[[], Mapping[str, Tensor]]  # keyword arguments of `forward`


def randomise(module: nn.Module, seed: int) -> None:
    """Leave no parameter and no stored buffer at the value it was initialised with.

    A fresh norm has gain 1 and bias 0, so a fold that forgets either changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # gains stay near 1, so that depth does not shrink or blow up the signal
            gain = parameter.dim() == 1 and name.endswith("weight")
            std = 0.3 if parameter.dim() <= 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.normal_(mean=1.0 if gain else 0.0, std=std, generator=generator)
        stored = module.state_dict()
        for name, buffer in module.named_buffers():
            # buffers that are not stored (rotary frequencies) are constants of the architecture
            if name in stored and buffer.is_floating_point():
                # positive: the ones that exist are variances, means and scales
                buffer.uniform_(0.5, 1.5, generator=generator)


def tiny(
    config: hf.PretrainedConfig,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    kind: type = hf.AutoModelForCausalLM,
    attention: str = "sdpa",
) -> hf.PreTrainedModel:
    """A random model of `config`, with nothing left at a neutral value."""
    torch.manual_seed(seed)
    # a model keeps the config it is built from, and what unties it says so there
    model = kind.from_config(copy.deepcopy(config), attn_implementation=attention).double()
    randomise(model, seed)
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Random token ids without padding, `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def _language_inputs() -> Mapping[str, Tensor]:
    return {"input_ids": tokens()}


class NanoBlock(nn.Module):
    """Pre-norm attention and MLP with one projection for q, k and v, split by slicing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first = nn.LayerNorm(width, bias=False)
        self.fused = nn.Linear(width, 3 * width)
        self.back = nn.Linear(width, width)
        self.second = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.fused(self.first(x)).split(d, dim=2)
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.back(y.transpose(1, 2).contiguous().view(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class NanoGPT(nn.Module):
    """A decoder written by hand, its head tied to its embedding."""

    def __init__(self, width: int = 36, heads: int = 3, layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads) for _ in range(layers))
        self.last = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


class VisionBlock(nn.Module):
    """Attention over all patches, written as two matrix products and a softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.back = nn.Linear(width, width)
        self.second = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.first(x)
        q, k, v = (
            layer(y).reshape(b, t, self.heads, -1).permute(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-2, -1)) / (d // self.heads) ** 0.5
        y = (scores.softmax(dim=-1) @ v).permute(0, 2, 1, 3).reshape(b, t, d)
        x = x + self.back(y)
        return x + self.mlp(self.second(x))


class VisionTower(nn.Module):
    """Patches by convolution, a class token, a position table, a classifier."""

    def __init__(self, width: int = 30, heads: int = 5, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 10, width))
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(layers))
        self.last = nn.LayerNorm(width)
        self.classes = nn.Linear(width, 11)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.classes(self.last(x)[:, 0])


def _pixels() -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixels": torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator)}


def _plain(kind: type[nn.Module], seed: int) -> nn.Module:
    model = kind().double()
    randomise(model, seed)
    return model.eval()


def _language(name: str, adds: str, config: hf.PretrainedConfig, **options: object) -> Specimen:
    return Specimen(name, adds, lambda seed: tiny(config, seed, **options), _language_inputs)


_LLAMA = functools.partial(hf.LlamaConfig, **_GATED)

ZOO: tuple[Specimen, ...] = (
    _language("llama", "RMSNorm, rotary positions, gated MLP, grouped queries", _LLAMA()),
    _language("llama_tied", "head and embedding are one tensor", _LLAMA(tie_word_embeddings=True)),
    _language(
        "llama_biased_eager",
        "a bias on every linear; attention as matmul, softmax, matmul",
        _LLAMA(attention_bias=True, mlp_bias=True, num_key_value_heads=3),
        attention="eager",
    ),
    _language("qwen2", "biases on q, k and v only", hf.Qwen2Config(**_GATED)),
    _language(
        "qwen3",
        "a norm on q and on k; heads wider in all than the stream",
        hf.Qwen3Config(**_GATED | {"hidden_size": 40, "num_attention_heads": 4, "head_dim": 12}),
    ),
    _language(
        "mistral",
        "a sliding window shorter than the text",
        hf.MistralConfig(**_GATED, sliding_window=4),
    ),
    _language(
        "phi3",
        "q, k, v in one matrix, gate and up in another",
        hf.Phi3Config(**_GATED, sliding_window=None),
    ),
    _language(
        "gemma3",
        "gains stored as w and used as 1 + w; norms before and after each half; scaled embeddings",
        hf.Gemma3TextConfig(
            **_GATED | {"tie_word_embeddings": True},
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    _language(
        "gpt2",
        "LayerNorm, learned positions, weights stored [in, out], tied head",
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_embd=36,
            n_head=3,
            n_layer=2,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        ),
    ),
    _language(
        "opt",
        "LayerNorm, ReLU, positions with an offset that depend on the mask",
        hf.OPTConfig(
            **_SHARED,
            hidden_size=36,
            word_embed_proj_dim=36,
            ffn_dim=52,
            num_attention_heads=3,
            num_hidden_layers=2,
            dropout=0.0,
        ),
    ),
    _language(
        "gpt_neox",
        "attention and MLP in parallel, q, k and v interleaved by head, partly rotary",
        hf.GPTNeoXConfig(
            **_SHARED,
            hidden_size=48,
            intermediate_size=80,
            num_attention_heads=6,
            num_hidden_layers=2,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
            tie_word_embeddings=False,
        ),
    ),
    _language(
        "bert",
        "post-norm: every LayerNorm stands on the stream itself; no causal mask",
        hf.BertConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            hidden_size=36,
            intermediate_size=52,
            num_attention_heads=3,
            num_hidden_layers=2,
        ),
        kind=hf.AutoModelForMaskedLM,
    ),
    Specimen(
        "nano_gpt",
        "no transformers class: functional code, LayerNorm without bias, tied head",
        functools.partial(_plain, NanoGPT),
        _language_inputs,
    ),
    Specimen(
        "vision",
        "a convolution, a class token, a position parameter, attention written out",
        functools.partial(_plain, VisionTower),
        _pixels,
    ),
)


def specimen(name: str) -> Specimen:
    """The entry called `name`."""
    return next(found for found in ZOO if found.name == name)
