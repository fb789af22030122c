"""A weight some rows at a time, where all of it in float64 would take more than the model does."""

# n rows (entries of the first axis)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, fx

from qpass.ir.weights import Affine, ChangeBasis, ScaleAxis, Step, Weight

# numbers of a weight that are evaluated together
PIECE = 2**24

aten = torch.ops.aten


def pieces(weight: Weight, sources: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The float64 value in pieces along its first axis, all of it where it is small.

    So is one whose rows do not change each on its own.
    """
    if not _cut(weight, sources):
        yield weight.evaluate(sources)
        return
    source = weight.stored(sources)
    for part in source.split(max(1, PIECE // source[0].numel())):
        yield weight.changed(part, sources)


def along_outputs(weight: Weight, sources: Mapping[str, Tensor], reads: int) -> Iterator[Tensor]:
    """The pieces `[n, k]` of a product's weight, which sums over its axis `reads`."""
    if reads == 1:
        yield from pieces(weight, sources)
    else:
        yield weight.evaluate(sources).mT.contiguous()


def as_type(weight: Weight, sources: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The value, if floating evaluated in float64 and rounded once; it may alias the source."""
    if not weight.steps and weight.source is not None:
        # what is read as it is stored is not widened in between
        value = weight.stored(sources)
        return value.to(dtype) if value.is_floating_point() else value
    if not _cut(weight, sources):
        value = weight.evaluate(sources)
        return value.to(dtype) if value.is_floating_point() else value
    made = torch.empty(weight.stored(sources).shape, dtype=dtype, device="cpu")
    start = 0
    for part in pieces(weight, sources):
        made[start : start + len(part)] = part
        start += len(part)
    return made


def product(
    node: fx.Node,
    weight_of: Callable[[object], Weight | None],
    sources: Mapping[str, Tensor],
    load: Callable[[fx.Node], object],
) -> Tensor | None:
    """What a linear or a table makes in float64 of a weight that is too large to be held so.

    None where the node is neither, or its weight is not too large.
    """
    if node.target not in (aten.linear.default, aten.embedding.default):
        return None
    table = node.target is aten.embedding.default
    at = node.args[0 if table else 1]
    if (weight := weight_of(at)) is None or not _cut(weight, sources):
        return None
    x = node.args[1 if table else 0]
    read = load(x) if isinstance(x, fx.Node) else None
    if not isinstance(read, Tensor):
        return None
    if table:
        rows, places = read.unique(return_inverse=True)
        source = weight.stored(sources)
        if bool((rows < 0).any()) or bool((rows >= len(source)).any()):
            return None
        return weight.changed(source[rows.cpu()], sources).to(read.device)[places]
    parts = [read @ part.to(read.device).mT for part in pieces(weight, sources)]
    made = torch.cat(parts, -1)
    bias = node.args[2] if len(node.args) > 2 else None
    return made + cast("Tensor", load(bias)) if isinstance(bias, fx.Node) else made


def _cut(weight: Weight, sources: Mapping[str, Tensor]) -> bool:
    """Whether a weight is large and its rows are those of its source, each changed on its own."""
    if weight.source is None:
        return False
    source = sources[weight.source]
    large = source.dim() > 1 and source.is_floating_point() and source.numel() > PIECE
    return large and all(_by_rows(step, source.dim()) for step in weight.steps)


def _by_rows(step: Step, axes: int) -> bool:
    if isinstance(step, ScaleAxis | ChangeBasis):
        return step.axis % axes != 0
    return isinstance(step, Affine)
