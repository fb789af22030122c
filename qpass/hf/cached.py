"""How a decoder with a cache becomes a call whose cache is inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from qpass.capture.export import evaluating
from qpass.targets.onnx_qdq import Call

# sizes to trace with: distinct, and none is 1, which tracing takes as fixed
BATCH, LENGTH, PAST = 2, 3, 5
TAKEN = frozenset({"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict"})

Layers = list[tuple[Tensor, Tensor]]


@final
class Cached(nn.Module):
    """`model` with keys and values `[b, heads, past, width]` of each layer in and out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Tensor], past: Layers) -> tuple[Tensor, Layers]:
        cache = DynamicCache(list(past))  # pyright: ignore[reportArgumentType]
        result = self.model(**given, past_key_values=cache, use_cache=True, return_dict=True)
        layers = [(layer.keys, layer.values) for layer in result.past_key_values.layers]
        return result[0], layers


def cached_call(model: nn.Module, inputs: Mapping[str, object]) -> Call | str | None:
    """The call of a decoder on tokens after a past of any length.

    Why `model` has a past that cannot be one of its inputs, or None for a model without one.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    taken = inspect.signature(model.forward).parameters
    if "past_key_values" not in taken:
        return None
    if model.config.is_encoder_decoder:
        return "it has two, of its encoder and of its decoder"
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        return "its input is not a batch of tokens"
    if extra := sorted(set(inputs) - TAKEN):
        return f"the inputs {', '.join(extra)} have no place beside a cache"
    with evaluating(model):
        probe = model(input_ids=ids[:1, :1], use_cache=True, return_dict=True)
    cache = getattr(probe, "past_key_values", None)
    if cache is None:
        return None
    if not isinstance(cache, DynamicCache):
        return f"its cache is {type(cache).__name__}, not keys and values by layer"
    like = [(getattr(y, "keys", None), getattr(y, "values", None)) for y in cache.layers]
    if not like or any(not isinstance(t, Tensor) or t.dim() != 4 for pair in like for t in pair):
        return "some layers cache something else than keys and values"
    pairs = cast("Layers", like)
    names = [n for n in ("attention_mask", "position_ids") if n in taken]
    tokens = ids.reshape(-1)[: BATCH * LENGTH]
    tokens = tokens.repeat(-(-BATCH * LENGTH // len(tokens)))[: BATCH * LENGTH]
    traced = _given(tokens.reshape(BATCH, LENGTH), PAST, names, {})
    layers = range(len(pairs))
    open_ = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    past = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    return Call(
        module=Cached(model),
        traced={"given": traced, "past": _past(pairs, BATCH, PAST)},
        sample={
            "given": _given(ids, 0, names, inputs),
            "past": _past(pairs, len(ids), 0),
        },
        sizes={"given": dict.fromkeys(traced, open_), "past": [(past, past) for _ in layers]},
        inputs=(*traced, *(f"past_key_values.{i}.{k}" for i in layers for k in ("key", "value"))),
        outputs=("logits", *(f"present.{i}.{k}" for i in layers for k in ("key", "value"))),
    )


def _given(
    ids: Tensor, past: int, names: list[str], inputs: Mapping[str, object]
) -> dict[str, Tensor]:
    b, t = ids.shape
    made = {
        "attention_mask": torch.ones(b, past + t, dtype=torch.int64, device=ids.device),
        "position_ids": torch.arange(past, past + t, device=ids.device).repeat(b, 1),
    }
    found = {"input_ids": ids}
    for name in names:
        given = inputs.get(name)
        found[name] = given.long() if isinstance(given, Tensor) else made[name]
    return found


def _past(like: Layers, batch: int, length: int) -> Layers:
    """Keys and values of `length` positions that were never computed."""

    def filled(tensor: Tensor) -> Tensor:
        _, heads, _, width = tensor.shape
        steps = torch.arange(batch * heads * length * width, device=tensor.device)
        return steps.sin().reshape(batch, heads, length, width).to(tensor.dtype)

    return [(filled(keys), filled(values)) for keys, values in like]
