"""What happens when someone differentiates through a quantized graph: a clear refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor

from qpass.errors import Unsupported


def without_backward(
    compiled: Callable[..., Sequence[object]], needing: Sequence[bool]
) -> Callable[..., tuple[object, ...]]:
    """`compiled`, with outputs that require gradients where `needing` says so, but refuse them."""
    places = [i for i, needs in enumerate(needing) if needs]

    def call(*arguments: object) -> tuple[object, ...]:
        outputs = list(compiled(*arguments))
        anchor = torch.empty(0, requires_grad=True, device="cpu")
        attached = _NoBackward.apply(anchor, *(outputs[i] for i in places))
        for i, output in zip(places, attached, strict=True):
            outputs[i] = output
        return tuple(outputs)

    return call


def refusing_backward(output: Tensor) -> Tensor:
    """`output`, which requires gradients now, but refuses them."""
    anchor = torch.empty(0, requires_grad=True, device="cpu")
    return cast("tuple[Tensor]", _NoBackward.apply(anchor, output))[0]


@final
class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ANN401
        raise Unsupported(
            "a quantized model has no backward: its weights are integers\n"
            "  run it under torch.no_grad(), or train the float model; "
            "one that was only compiled trains after model.train()"
        )
