"""How the predictions of two models differ on one batch."""

# b windows, t positions, v vocabulary, n positions of all windows that are no padding

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import wide
from qpass.verify.calls import Text
from qpass.verify.scores import Score

# distributions compared at once, so that their temporaries stay small
CHUNK = 64


@final
@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What the reference predicts at each position, and what models are asked there.

    `next_n` is the token that follows, -1 where none does; `row_n` the window of a position.
    """

    shape: tuple[int, ...]
    real_bt: Tensor | None
    row_n: Tensor
    next_n: Tensor
    log_p_nv: Tensor
    p_nv: Tensor
    top_n: Tensor

    @staticmethod
    def of(reference: Tensor, words: Text) -> Expected:
        """Prepare `[b, t, v]` or `[b, v]` logits, finite wherever positions count."""
        shape = tuple(reference.shape)
        if reference.dim() == 2:
            # one distribution for each input, none of them of a next token
            words, shape = Text(None, None), (shape[0], 1, shape[1])
        b, t, v = shape
        if words.ids is not None and words.ids.shape != (b, t):
            raise BadInput(f"logits {[b, t]} for token ids {list(words.ids.shape)}")
        real_bt = None if words.real is None else words.real.cpu()
        log_p_nv = _wide(_counted(reference, real_bt)).log_softmax(-1)
        # one NaN or positive infinity makes every logarithm of its distribution NaN
        if bool(log_p_nv[:, :1].isnan().any()):
            raise BadInput("the reference's logits are not finite; there is nothing to compare to")
        row_bt = torch.arange(b).unsqueeze(1).expand(b, t)
        next_bt = _next_tokens(words, b, t, v)
        return Expected(
            shape=tuple(reference.shape),
            real_bt=real_bt,
            row_n=row_bt.reshape(-1) if real_bt is None else row_bt[real_bt],
            next_n=next_bt.reshape(-1) if real_bt is None else next_bt[real_bt],
            log_p_nv=log_p_nv,
            p_nv=log_p_nv.exp(),
            top_n=log_p_nv.argmax(-1),
        )


def _next_tokens(words: Text, b: int, t: int, v: int) -> Tensor:
    """`[b, t]`: the token that a position predicts, -1 where it is padding or there is none."""
    next_bt = torch.full((b, t), -1, dtype=torch.int64)
    if words.ids is None or t == 0:
        return next_bt
    # a position that is padding itself is not counted, one that padding follows predicts nothing
    asked_bt = torch.ones(b, t - 1, dtype=torch.bool)
    if words.real is not None:
        real_bt = words.real.cpu()
        asked_bt = real_bt[:, :-1] & real_bt[:, 1:]
    asked_n = words.ids[:, 1:].cpu()[asked_bt].long()
    if bool(((asked_n < 0) | (asked_n >= v)).any()):
        raise BadInput(
            f"token ids from {int(asked_n.min())} to {int(asked_n.max())}, but the model predicts "
            f"{v} tokens; mask out what is padding"
        )
    next_bt[:, :-1][asked_bt] = asked_n
    return next_bt


def _counted(logits: Tensor, real_bt: Tensor | None) -> Tensor:
    """`[n, v]`: the positions that are no padding."""
    return logits.cpu().flatten(0, -2) if real_bt is None else logits.cpu()[real_bt]


def _wide(logits_nv: Tensor) -> Tensor:
    # the difference of two logarithms must not drown in the rounding of half precision
    return logits_nv.to(wide(logits_nv.dtype))


def compare(model: Tensor, expected: Expected) -> list[Score]:
    """The scores of a model's logits, one for each window."""
    if tuple(model.shape) != expected.shape:
        raise BadInput(
            f"the model's logits have shape {list(model.shape)}, the reference's "
            f"{list(expected.shape)}; they must be the same model"
        )
    model_nv = _counted(model, expected.real_bt)
    parts = [_chunk(model_nv, expected, at) for at in range(0, len(model_nv), CHUNK)]
    counts_nk = torch.cat(parts) if parts else torch.zeros(0, len(fields(Score)))
    sums_bk = torch.zeros(expected.shape[0], counts_nk.shape[1], dtype=torch.float64)
    sums_bk.index_add_(0, expected.row_n, counts_nk.double())
    return [
        Score(
            tokens=int(tokens),
            loss=loss,
            reference_loss=reference_loss,
            positions=int(positions),
            divergence=divergence,
            agreements=int(agreements),
            broken=int(broken),
        )
        for tokens, loss, reference_loss, positions, divergence, agreements, broken in (
            sums_bk.tolist()
        )
    ]


def _chunk(model_nv: Tensor, expected: Expected, start: int) -> Tensor:
    """What `Score` sums up, one row for each position and one column for each field."""
    at = slice(start, start + CHUNK)
    log_p_nv, next_n = expected.log_p_nv[at], expected.next_n[at]
    log_q_nv = _wide(model_nv[at]).log_softmax(-1)
    broken_n = log_q_nv[:, 0].isnan()
    predicts_n = next_n >= 0
    next_n1 = next_n.clamp(min=0).unsqueeze(-1)
    same_n = (log_q_nv.argmax(-1) == expected.top_n[at]) & ~broken_n
    loss_n = _infinite(-log_q_nv.gather(-1, next_n1).squeeze(-1), broken_n)
    reference_loss_n = -log_p_nv.gather(-1, next_n1).squeeze(-1)
    columns = (
        predicts_n,
        torch.where(predicts_n, loss_n, 0.0),
        torch.where(predicts_n, reference_loss_n, 0.0),
        torch.ones_like(broken_n),
        _infinite(_divergence(expected.p_nv[at], log_p_nv, log_q_nv), broken_n),
        same_n,
        broken_n,
    )
    return torch.stack([column.to(log_q_nv.dtype) for column in columns], dim=-1)


def _divergence(p_nv: Tensor, log_p_nv: Tensor, log_q_nv: Tensor) -> Tensor:
    """KL(p || q); what p rules out adds nothing."""
    gap_nv = log_p_nv - log_q_nv
    divergence_n = torch.linalg.vecdot(p_nv, gap_nv)
    if bool(divergence_n.isnan().any()):
        divergence_n = torch.where(p_nv > 0, p_nv * gap_nv, 0.0).sum(-1)
    return divergence_n


def _infinite(value_n: Tensor, broken_n: Tensor) -> Tensor:
    return torch.where(broken_n, torch.inf, value_n)
