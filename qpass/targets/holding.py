"""How a module holds a transform of what meets one of its weights inside a forward.

Code that reads the weight gets what stands for it; the module's own tables hold the changed one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from qpass.analyze import Meeting, find_inputs, find_matmuls
from qpass.errors import Unsupported
from qpass.ir import Owner, Permute, Program, Reshape
from qpass.rotations import Transform
from qpass.targets.fixed import Fixed
from qpass.targets.layers import OnlineTransform
from qpass.targets.numbers import by_name
from qpass.targets.standin import StandIn, Watch
from qpass.transform.turn import turn_of

# the attribute of a class that reads weights by stand-ins: the axis of each by its name
_AXES = "_qpass_axes"
_WATCHES = "_qpass_watches"


@final
@dataclass(frozen=True, slots=True)
class Holding:
    """The weight `name` of the module at `path`, turned along `axis` as stored."""

    path: str
    name: str
    axis: int
    transform: Transform

    @property
    def site(self) -> str:
        """What plans call the weight."""
        return f"{self.path}.{self.name}" if self.path else self.name


def find_holdings(model: nn.Module, after: Program, layers: Iterable[str]) -> tuple[Holding, ...]:
    """The transforms in front of products that no layer in the place of a module has."""
    found: dict[tuple[str, str], set[Holding | None]] = {}
    replaced = set(layers)
    for use, meetings in find_inputs(after).items():
        owner = after.owners.get(use)
        if owner is None or owner.module in replaced:
            continue
        transforms = {_transform(after, meeting) for meeting in meetings}
        for transform in transforms:
            axis = _stored(after, meetings[0])
            holding = None
            if transform is not None and axis is not None:
                holding = Holding(owner.module, owner.attribute, axis, transform)
            elif transform is not None:
                raise _unholdable(owner)
            found.setdefault((owner.module, owner.attribute), set()).add(holding)
    every = {key: held for key, held in found.items() if held != {None}}
    for (path, name), held in every.items():
        module = model.get_submodule(path)
        if len(held) > 1 or module._parameters.get(name) is None or name in axes_of(module):
            raise _unholdable(Owner(path, name))
    return tuple(h for held in every.values() for h in held if h is not None)


def _unholdable(owner: Owner) -> Unsupported:
    return Unsupported(
        f"{owner.path}: what it is multiplied by cannot be transformed\n"
        "  leave the input of its products unrotated"
    )


def _transform(after: Program, meeting: Meeting) -> Transform | None:
    """The transform that was put in front of a product."""
    turn = turn_of(after.node(meeting.value))
    if turn is None or turn.inverse or turn.made:
        return None
    return by_name(turn.transform, meeting.value)


def let_hold(model: nn.Module, holding: Holding) -> None:
    """Let a module of `model`, whose weight has absorbed the transform, run it."""
    module = model.get_submodule(holding.path)
    weight = module._parameters[holding.name]
    assert weight is not None
    online = OnlineTransform(holding.transform, weight.dtype)
    online.train(module.training)
    module._modules[_child(holding.name)] = online
    module.__class__ = _kind(type(module), {**axes_of(module), holding.name: holding.axis})


def axes_of(module: nn.Module) -> dict[str, int]:
    """The weights of a module that are read by stand-ins, and the axis of each."""
    return dict(getattr(type(module), _AXES, ()))


def holdings(model: nn.Module) -> Iterator[Holding]:
    """All that the modules of a model hold."""
    for path, module in model.named_modules():
        for name, axis in axes_of(module).items():
            yield Holding(path, name, axis, by_name(_online(module, name).transform, path))


def _online(module: nn.Module, name: str) -> OnlineTransform:
    return cast("OnlineTransform", module._modules[_child(name)])


def _child(name: str) -> str:
    return f"qpass_{name}"


def _kind(kind: type[nn.Module], axes: Mapping[str, int]) -> type[nn.Module]:
    """A class like `kind` that reads weights by stand-ins."""
    base = kind.__mro__[1] if hasattr(kind, _AXES) else kind
    return _made(cast("type[nn.Module]", base), tuple(sorted(axes.items())))


@functools.cache
def _made(base: type[nn.Module], axes: tuple[tuple[str, int], ...]) -> type[nn.Module]:
    fields: dict[str, Any] = {name: property(_reader(name, axis)) for name, axis in axes}
    fields |= {
        _AXES: axes,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": functools.partialmethod(_reduced, base, axes),
    }
    return type(base.__name__, (base,), fields)


def _reader(name: str, axis: int) -> Callable[[nn.Module], object]:
    child = _child(name)

    def read_weight(self: nn.Module) -> object:
        weight, online = self._parameters[name], self._modules[child]
        return StandIn(cast("Tensor", weight), axis, cast("OnlineTransform", online))

    return read_weight


def _reduced(
    self: nn.Module, base: type[nn.Module], axes: tuple[tuple[str, int], ...], protocol: object
) -> tuple[object, ...]:
    # the class is made anew, as pickle cannot find it by its name
    return _empty, (base, axes), self.__getstate__()


def _empty(base: type[nn.Module], axes: tuple[tuple[str, int], ...]) -> nn.Module:
    made = _made(base, axes)
    return made.__new__(made)


# -- what can be held


def find_holdable(
    model: nn.Module,
    program: Program,
    refused: Mapping[str, str],
    run: Callable[[], Sequence[Tensor]] | None,
) -> frozenset[str]:
    """The uses of weights whose modules can hold a transform of what meets them.

    Those of plain products are among them where no layer can take the place of a module, as
    `refused` says. `run` calls the model on a sample (None: it holds no values): what is read
    otherwise than the graph says, or computes something else by a stand-in, is not held.
    """
    inputs = find_inputs(program)
    plain = {matmul.use for matmul in find_matmuls(program)}
    uses: dict[str, list[str]] = {}
    for use, owner in program.owners.items():
        uses.setdefault(owner.path, []).append(use)
    found: dict[str, int] = {}
    for path, names in uses.items():
        if not all(name in inputs and (name not in plain or name in refused) for name in names):
            continue
        axes = {_stored(program, inputs[name][0]) for name in names}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is not None and _holds(model, program, program.owners[names[0]], path):
            found[path] = axis
    if found and run is not None:
        found = _tried(model, found, run(), run)
    return frozenset(name for path in found for name in uses[path])


def _stored(program: Program, meeting: Meeting) -> int | None:
    """The axis of the stored tensor which a product sums over; None where there is no such axis."""
    owner, source = program.owners[meeting.use], program.weights[meeting.use].source
    if source is None:
        return None
    shapes = [tuple(program.sources[source].shape)]
    for step in owner.prefix:
        if isinstance(step, Permute):
            shapes.append(tuple(shapes[-1][i] for i in step.order))
        elif isinstance(step, Reshape):
            shapes.append(step.shape)
        else:
            return None
    axis: int | None = meeting.reads
    for step, old, new in zip(owner.prefix[::-1], shapes[-2::-1], shapes[:0:-1], strict=True):
        if axis is not None:
            axis = step.order[axis] if isinstance(step, Permute) else _regrouped(old, new, axis)
    return axis


def _regrouped(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int | None:
    """Which axis of a shape is an axis of the shape that it was viewed as."""
    ahead = math.prod(new[:axis])
    same = (i for i, n in enumerate(old) if n == new[axis] and math.prod(old[:i]) == ahead)
    return next(same, None)


def _holds(model: nn.Module, program: Program, owner: Owner, path: str) -> bool:
    module = model.get_submodule(owner.module)
    weight = module._parameters.get(owner.attribute)
    if weight is None or isinstance(module, Fixed) or owner.attribute in axes_of(module):
        return False
    if type(module).__module__.startswith("qpass.") or isinstance(module, torch.jit.ScriptModule):
        return False
    others = {
        other.path
        for use, other in program.owners.items()
        if program.weights[use].source == program.weights[_first(program, path)].source
    }
    return len(others) == 1 and not hasattr(type(module), owner.attribute)


def _first(program: Program, path: str) -> str:
    return next(use for use, owner in program.owners.items() if owner.path == path)


def _tried(
    model: nn.Module,
    found: Mapping[str, int],
    want: Sequence[Tensor],
    run: Callable[[], Sequence[Tensor]],
) -> dict[str, int]:
    """Those of `found` that a run meets in products only, and computes what is wanted with."""
    with _watching(model, found) as watches:
        try:
            got = run()
        except Exception:  # noqa: BLE001  the model's own code may take nothing but tensors
            got = None
    left = {path: axis for path, axis in found.items() if not watches[path].others}
    same = got is not None and len(got) == len(want) and all(map(_same, got, want))
    if left == found and same:
        return left
    if left == found:
        paths = tuple(found)
        halves = (paths[: len(paths) // 2], paths[len(paths) // 2 :])
        parts = [{path: found[path] for path in half} for half in halves] if paths[1:] else []
    else:
        parts = [left]
    kept = [_tried(model, part, want, run) for part in parts if part]
    return {path: axis for part in kept for path, axis in part.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextmanager
def _watching(model: nn.Module, found: Mapping[str, int]) -> Generator[dict[str, Watch]]:
    """Let code read stand-ins that change nothing, and note what they meet."""
    watches = {path: Watch() for path in found}
    kinds: dict[nn.Module, type[nn.Module]] = {}
    names: dict[nn.Module, dict[str, tuple[int, Watch]]] = {}
    for path, axis in found.items():
        owner, _, name = path.rpartition(".")
        names.setdefault(model.get_submodule(owner), {})[name] = (axis, watches[path])
    try:
        for module, watched in names.items():
            kinds[module] = type(module)
            fields = {name: property(_watcher(name, *how)) for name, how in watched.items()}
            module.__class__ = type(type(module).__name__, (type(module),), fields)
        yield watches
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


def _watcher(name: str, axis: int, watch: Watch) -> Callable[[nn.Module], object]:
    def read_weight(self: nn.Module) -> object:
        weight = self._parameters[name]
        assert weight is not None
        return StandIn(weight, axis, None, watch)

    return read_weight
