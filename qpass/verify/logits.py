"""How the predictions of two models differ on one batch."""

# b windows, t positions, v vocabulary, p positions that are compared

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.verify.scores import Score

Batch = Tensor | Sequence[object] | Mapping[str, object]


@runtime_checkable
class HasLogits(Protocol):
    """What models return when they return more than their logits."""

    logits: object


# the arguments that hold the tokens a model continues and their padding; an encoder's come second
TEXT = (("decoder_input_ids", "decoder_attention_mask"), ("input_ids", "attention_mask"))
# distributions compared at once: their temporaries then stay in the cache
CHUNK = 64


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
    if isinstance(batch, Tensor):
        output = model(batch)
    elif isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch)
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


def compare(model_btv: Tensor, reference_btv: Tensor, words: Text) -> list[Score]:
    """One score for each window; `reference_btv` must be finite where positions count."""
    if model_btv.shape != reference_btv.shape:
        raise BadInput(
            f"the model's logits have shape {list(model_btv.shape)}, "
            f"the reference's {list(reference_btv.shape)}; they must be the same model"
        )
    if reference_btv.dim() == 2:
        # one distribution for each input, none of them a next token
        words = Text(None, None)
        model_btv, reference_btv = model_btv.unsqueeze(1), reference_btv.unsqueeze(1)
    b, t, _ = reference_btv.shape
    if words.ids is not None and words.ids.shape != (b, t):
        raise BadInput(f"logits {[b, t]} for token ids {list(words.ids.shape)}")
    real_bt = torch.ones(b, t, dtype=torch.bool) if words.real is None else words.real.cpu()
    return [
        _window(
            model_btv[row], reference_btv[row], real_bt[row],
            None if words.ids is None else words.ids[row].cpu(),
        )
        for row in range(b)
    ]  # fmt: skip


def _window(model_tv: Tensor, reference_tv: Tensor, real_t: Tensor, ids_t: Tensor | None) -> Score:
    losses: list[Tensor] = []
    reference_losses: list[Tensor] = []
    divergences: list[Tensor] = []
    agreements = broken = 0
    for at_p in _chunks(real_t):
        reference_pv = _log_probabilities(reference_tv[at_p])
        model_pv = _log_probabilities(model_tv[at_p])
        # one NaN or positive infinity makes every logarithm of its distribution NaN
        if bool(reference_pv[:, 0].isnan().any()):
            raise BadInput("the reference's logits are not finite; there is nothing to compare to")
        whole_p = ~model_pv[:, 0].isnan()
        broken += int((~whole_p).sum())
        agreements += int(((model_pv.argmax(-1) == reference_pv.argmax(-1)) & whole_p).sum())
        divergences.append(_infinite(_divergence(reference_pv, model_pv), whole_p))
        if ids_t is None:
            continue
        followed_p = _followed(real_t)[at_p]
        next_p1 = _checked(ids_t[at_p[followed_p] + 1], model_pv.shape[-1]).unsqueeze(-1)
        picked = model_pv[followed_p].gather(-1, next_p1).squeeze(-1)
        losses.append(_infinite(-picked, whole_p[followed_p]))
        reference_losses.append(-reference_pv[followed_p].gather(-1, next_p1).squeeze(-1))
    return Score(
        tokens=sum(part.numel() for part in losses),
        loss=_total(losses),
        reference_loss=_total(reference_losses),
        positions=int(real_t.sum()),
        divergence=_total(divergences),
        agreements=agreements,
        broken=broken,
    )


def _checked(ids_p: Tensor, v: int) -> Tensor:
    if bool(((ids_p < 0) | (ids_p >= v)).any()):
        raise BadInput(
            f"token ids from {int(ids_p.min())} to {int(ids_p.max())}, but the model predicts "
            f"{v} tokens; mask out what is padding"
        )
    return ids_p.long()


def _chunks(real_t: Tensor) -> Iterator[Tensor]:
    at_p = real_t.nonzero().squeeze(-1)
    # a split of nothing is one empty part
    return iter(at_p.split(CHUNK) if len(at_p) else ())


def _followed(real_t: Tensor) -> Tensor:
    """Which positions are real and followed by a real one, whose token they predict."""
    return real_t & torch.cat([real_t[1:], real_t.new_zeros(1)])


def _log_probabilities(logits_pv: Tensor) -> Tensor:
    # the difference of two logarithms must not drown in the rounding of half precision
    wide = torch.float64 if logits_pv.dtype is torch.float64 else torch.float32
    return logits_pv.to("cpu", wide).log_softmax(-1)


def _divergence(reference_pv: Tensor, model_pv: Tensor) -> Tensor:
    """KL(reference || model); words that the reference rules out add nothing."""
    p_pv = reference_pv.exp()
    return torch.where(p_pv > 0, p_pv * (reference_pv - model_pv), 0.0).sum(-1)


def _infinite(value_p: Tensor, whole_p: Tensor) -> Tensor:
    return torch.where(whole_p, value_p, torch.inf)


def _total(parts: list[Tensor]) -> float:
    return sum(float(part.double().sum()) for part in parts)
