"""How a batch is given to a model, which of it is text, and what it answers."""

# b windows, t positions, v vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from torch import Tensor, nn

from qpass.errors import BadInput, QpassError, own_failure

Batch = Tensor | Sequence[object] | Mapping[str, object]


@runtime_checkable
class HasLogits(Protocol):
    """What models return when they return more than their logits."""

    logits: object


# the arguments that hold the tokens a model continues and their padding; an encoder's come second
TEXT = (("decoder_input_ids", "decoder_attention_mask"), ("input_ids", "attention_mask"))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """The token ids `[b, t]` of a batch (None if it has none) and which are `real`, not padding."""

    ids: Tensor | None
    real: Tensor | None


def text(batch: Batch) -> Text:
    """Where a batch's tokens and its padding mask are."""
    if isinstance(batch, Tensor):
        return Text(_token_ids(batch), None)
    if isinstance(batch, list | tuple):
        return Text(_token_ids(batch[0]) if batch else None, None)
    if not isinstance(batch, Mapping):
        raise BadInput(
            f"a batch is a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {type(batch).__name__}; batches is an iterable of them"
        )
    for ids_key, mask_key in TEXT:
        if ids_key in batch:
            ids, mask = _token_ids(batch[ids_key]), batch.get(mask_key)
            return Text(ids, None if mask is None else _real(mask, ids, mask_key))
    return Text(None, None)


def _token_ids(value: object) -> Tensor | None:
    if not isinstance(value, Tensor) or value.is_floating_point():
        return None
    if value.dim() != 2:
        raise BadInput(f"token ids have shape {list(value.shape)}, expected [windows, tokens]")
    return value


def _real(mask: object, ids: Tensor | None, key: str) -> Tensor:
    if not isinstance(mask, Tensor) or ids is None or mask.shape != ids.shape:
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(
            f"{key} is {given}; evaluating needs one number for each token id, 0 for padding"
        )
    return mask != 0


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """`[b, t, v]` (or `[b, v]`) of a call of `model`, whatever it wraps them in."""
    args = (batch,) if isinstance(batch, Tensor) else () if isinstance(batch, Mapping) else batch
    kwargs = batch if isinstance(batch, Mapping) else {}
    try:
        output = model(*args, **kwargs)
    except QpassError:
        raise
    except Exception as error:
        raise own_failure(type(model).__name__, error) from error
    found: object = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, HasLogits):
        found = output.logits
    if isinstance(found, list | tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise BadInput(
            f"{type(model).__name__} returned {type(output).__name__} without logits; evaluate "
            "takes models that return a tensor [b, t, v] or [b, v], first or as `logits`"
        )
    return found
