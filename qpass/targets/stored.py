"""Which stored tensor gives a use its value: what a module's own code does to it, undone."""

from __future__ import annotations

from torch import Tensor

from qpass.errors import Unsupported
from qpass.ir import Affine, Owner, Permute, Reshape, Step


def to_stored(value: Tensor, owner: Owner, shape: tuple[int, ...]) -> Tensor:
    """The float64 tensor of `shape` that the code of `owner` turns into `value`."""
    shapes = [shape]
    for step in owner.prefix:
        shapes.append(_shape_after(shapes[-1], step, owner))
    for step, before in zip(reversed(owner.prefix), reversed(shapes[:-1]), strict=True):
        value = _undone(value, step, before, owner)
    return value


def stored_axis(owner: Owner, axis: int) -> int | None:
    """Which axis of the stored tensor is `axis` of its use, or None where that has no answer."""
    for step in reversed(owner.prefix):
        if isinstance(step, Reshape):
            return None
        if isinstance(step, Permute):
            axis = step.order[axis]
    return axis


def _shape_after(shape: tuple[int, ...], step: Step, owner: Owner) -> tuple[int, ...]:
    if isinstance(step, Permute):
        return tuple(shape[i] for i in step.order)
    if isinstance(step, Reshape):
        return step.shape
    if isinstance(step, Affine):
        return shape
    raise _unknown(step, owner)


def _undone(value: Tensor, step: Step, before: tuple[int, ...], owner: Owner) -> Tensor:
    if isinstance(step, Permute):
        inverse = [step.order.index(i) for i in range(len(step.order))]
        return value.permute(inverse)
    if isinstance(step, Reshape):
        return value.reshape(before)
    if isinstance(step, Affine) and step.scale != 0:
        return (value - step.shift) / step.scale
    raise _unknown(step, owner)


def _unknown(step: Step, owner: Owner) -> Unsupported:
    return Unsupported(
        f"{owner.path}: the module turns it into the weight by {step}, which has no inverse\n"
        "  the weight cannot be written back; please report the model"
    )
