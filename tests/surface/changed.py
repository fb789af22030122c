"""Models before and after qpass changed them, made once and copied for each test."""

from __future__ import annotations

import copy
import functools

import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from tests.zoo import PAD, specimen, tiny, tokens

# what is left of two float64 models whose norms cast to float32 on the way
CLOSE = 1e-5
# eight bits on both sides; another basis or a missing gain is above 0.3
EIGHT_BITS = 0.15

KINDS = {"rotated": CLOSE, "quantized": EIGHT_BITS}

INPUTS = {"input_ids": tokens()}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}


@functools.cache
def _made(name: str, kind: str) -> tuple[nn.Module, nn.Module]:
    entry = specimen(name)
    model = entry.build(0)
    changed = copy.deepcopy(model)
    if kind == "rotated":
        qpass.rotate(changed, entry.inputs())
    else:
        recipe = {"recipe": "w8a8", "rotation": "on"}
        qpass.quantize(changed, recipe, inputs=entry.inputs())
    return model, changed


def pair(name: str, kind: str = "rotated") -> tuple[nn.Module, nn.Module]:
    """A model of the zoo, and the same one changed."""
    model, changed = _made(name, kind)
    return copy.deepcopy(model), copy.deepcopy(changed)


def relative(want: Tensor, got: Tensor) -> float:
    """How far a tensor is from another, as a share of it."""
    assert want.shape == got.shape
    assert want.dtype == got.dtype
    want, got = want.detach().double(), got.detach().double()
    return float((want - got).norm() / want.norm().clamp(min=1e-300))


def first(output: object) -> Tensor:
    """The logits, or whatever else a model returns first."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def linear_paths(model: nn.Module) -> list[str]:
    """The parts that hold a matrix and no other parts."""
    return [
        path
        for path, module in model.named_modules()
        if next(module.children(), None) is None and any(p.dim() == 2 for p in module.parameters())
    ]


def llama(seed: int = 0, **changes: object) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=64,
        max_position_embeddings=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        **{"tie_word_embeddings": True} | changes,
    )
    return tiny(config, seed, dtype=torch.float32)


def rotated(seed: int = 0, **changes: object) -> nn.Module:
    model = llama(seed, **changes)
    qpass.rotate(model, INPUTS)
    return model


def output(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return first(model(**(inputs or INPUTS)))


def shown(model: nn.Module, path: str) -> Tensor:
    """What a hook on a part of a model is shown."""
    seen: list[Tensor] = []
    part = model.base_model if path == "base_model" else model.get_submodule(path)
    with part.register_forward_hook(lambda m, args, out: seen.append(first(out))):
        output(model)
    return seen[0]
