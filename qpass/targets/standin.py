"""What stands for a weight that has absorbed a transform, wherever code reads that weight.

It is no tensor, yet takes part in torch's functions as one: in a product the other operand is
transformed first, a view or a look-up of whole rows gives another stand-in, and all else meets the
weight as it was. So code computes the same function, whatever it does with the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor

from qpass.errors import Unsupported
from qpass.targets.layers import OnlineTransform
from qpass.targets.products import find_product, place_behind


@final
class Watch:
    """Counts how often a stand-in met a value in a product, and what else it met."""

    def __init__(self) -> None:
        self.met = 0
        self.others: list[str] = []


@final
class StandIn:
    """A weight before it absorbed `online` along `axis`; `held` is what the module holds.

    Without a transform it only tells `watch` what becomes of it.
    """

    def __init__(
        self, held: Tensor, axis: int, online: OnlineTransform | None, watch: Watch | None = None
    ) -> None:
        self._held = held
        self._axis = axis
        self._online = online
        self._watch = watch

    @classmethod
    def __torch_function__(
        cls,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = {} if kwargs is None else dict(kwargs)
        product = find_product(func, args, kwargs, StandIn)
        if product is not None and product.reads == product.given[product.mine]._axis:
            weight = product.given[product.mine]
            return product.run(
                weight._held, weight.turn(product.given[product.theirs], product.axis)
            )
        if func in _VIEWS and isinstance(args[0], StandIn):
            return getattr(args[0], _VIEWS[func])(*args[1:], **kwargs)
        name = getattr(func, "__name__", "an operator")
        _expect_reads(name)
        plain = [_plain(arg, name) for arg in args]
        return func(*plain, **{key: _plain(arg, name) for key, arg in kwargs.items()})

    def plain(self, why: str = "") -> Tensor:
        """A copy of the weight as it was."""
        if self._watch is not None:
            self._watch.others.append(why)
        if self._online is None:
            return self._held
        moved = self._held.movedim(self._axis, -1)
        return self._online.undo(moved).movedim(-1, self._axis)

    def turn(self, x: Tensor, axis: int) -> Tensor:
        """What meets the held tensor in a product, transformed along one of its axes."""
        if self._watch is not None:
            self._watch.met += 1
        if self._online is None:
            return x
        if axis == x.dim() - 1:
            return cast("Tensor", self._online(x))
        return cast("Tensor", self._online(x.movedim(axis, -1))).movedim(-1, axis)

    def _with(self, held: Tensor, axis: int) -> StandIn:
        return StandIn(held, axis, self._online, self._watch)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  all that a tensor has
        if name.startswith("__"):
            raise AttributeError(name)
        _expect_reads(name)
        return getattr(self.plain(name), name)

    # what tensors of one shape and type share

    @property
    def shape(self) -> torch.Size:
        return self._held.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._held.dtype

    @property
    def device(self) -> torch.device:
        return self._held.device

    @property
    def ndim(self) -> int:
        return self._held.dim()

    @property
    def requires_grad(self) -> bool:
        return self._held.requires_grad

    @property
    def is_cuda(self) -> bool:
        return self._held.is_cuda

    @property
    def is_meta(self) -> bool:
        return self._held.is_meta

    def dim(self) -> int:
        return self._held.dim()

    def size(self, *axis: int) -> Any:  # noqa: ANN401  as a tensor's
        return self._held.size(*axis)

    def numel(self) -> int:
        return self._held.numel()

    def stride(self, *axis: int) -> Any:  # noqa: ANN401
        return self._held.stride(*axis)

    def is_contiguous(self) -> bool:
        return self._held.is_contiguous()

    def is_floating_point(self) -> bool:
        return self._held.is_floating_point()

    def data_ptr(self) -> int:
        return self._held.data_ptr()

    def __len__(self) -> int:
        return len(self._held)

    # products

    def __matmul__(self, other: Tensor) -> object:
        return torch.matmul(cast("Tensor", self), other)

    def __rmatmul__(self, other: Tensor) -> object:
        return torch.matmul(other, cast("Tensor", self))

    def matmul(self, other: Tensor) -> object:
        return torch.matmul(cast("Tensor", self), other)

    def mm(self, other: Tensor) -> object:
        return torch.mm(cast("Tensor", self), other)

    def bmm(self, other: Tensor) -> object:
        return torch.bmm(cast("Tensor", self), other)

    # the same entries elsewhere

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401  as a tensor's
        axis = place_behind(index, self._axis, self._held.dim())
        if axis is None:
            return self.plain("an index")[index]
        return self._with(self._held[index], axis)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(self._held.shape[0])])

    def select(self, dim: int, index: Any) -> Any:  # noqa: ANN401
        dim = dim % self._held.dim()
        if dim == self._axis:
            return self.plain("select").select(dim, index)
        return self._with(self._held.select(dim, index), self._axis - (dim < self._axis))

    def index_select(self, dim: int, index: Tensor) -> Any:  # noqa: ANN401
        if dim % self._held.dim() == self._axis:
            return self.plain("index_select").index_select(dim, index)
        return self._with(self._held.index_select(dim, index), self._axis)

    def unbind(self, dim: int = 0) -> Any:  # noqa: ANN401
        dim = dim % self._held.dim()
        if dim == self._axis:
            return self.plain("unbind").unbind(dim)
        at = self._axis - (dim < self._axis)
        return tuple(self._with(part, at) for part in self._held.unbind(dim))

    def chunk(self, chunks: int, dim: int = 0) -> Any:  # noqa: ANN401
        if dim % self._held.dim() == self._axis:
            return self.plain("chunk").chunk(chunks, dim)
        return tuple(self._with(part, self._axis) for part in self._held.chunk(chunks, dim))

    def split(self, split_size: Any, dim: int = 0) -> Any:  # noqa: ANN401
        if dim % self._held.dim() == self._axis:
            return self.plain("split").split(split_size, dim)
        return tuple(self._with(part, self._axis) for part in self._held.split(split_size, dim))

    def transpose(self, dim0: int, dim1: int) -> StandIn:
        a, b = dim0 % self._held.dim(), dim1 % self._held.dim()
        axis = b if self._axis == a else a if self._axis == b else self._axis
        return self._with(self._held.transpose(a, b), axis)

    def swapaxes(self, axis0: int, axis1: int) -> StandIn:
        return self.transpose(axis0, axis1)

    def t(self) -> StandIn:
        return self.transpose(0, 1) if self._held.dim() == 2 else self

    @property
    def T(self) -> Any:  # noqa: ANN401, N802
        return self.t() if self._held.dim() <= 2 else self.plain("T").T

    @property
    def mT(self) -> StandIn:  # noqa: N802
        return self.transpose(-2, -1)

    def permute(self, *dims: Any) -> StandIn:  # noqa: ANN401
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        order = [int(dim) % self._held.dim() for dim in order]
        return self._with(self._held.permute(order), order.index(self._axis))

    def unsqueeze(self, dim: int) -> StandIn:
        new = dim % (self._held.dim() + 1)
        return self._with(self._held.unsqueeze(new), self._axis + (new <= self._axis))

    def squeeze(self, dim: Any = None) -> Any:  # noqa: ANN401
        if not isinstance(dim, int) or dim % self._held.dim() == self._axis:
            plain = self.plain("squeeze")
            return plain.squeeze() if dim is None else plain.squeeze(dim)
        dim = dim % self._held.dim()
        fewer = self._held.shape[dim] == 1 and dim < self._axis
        return self._with(self._held.squeeze(dim), self._axis - fewer)

    def expand(self, *sizes: Any) -> StandIn:  # noqa: ANN401
        wanted = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        return self._with(self._held.expand(*wanted), self._axis + len(wanted) - self._held.dim())

    def contiguous(self) -> StandIn:
        return self._with(self._held.contiguous(), self._axis)

    def clone(self) -> StandIn:
        return self._with(self._held.clone(), self._axis)

    def detach(self) -> StandIn:
        return self._with(self._held.detach(), self._axis)

    def to(self, *args: Any, **kwargs: Any) -> StandIn:  # noqa: ANN401
        args = tuple(arg._held if isinstance(arg, StandIn) else arg for arg in args)
        return self._with(self._held.to(*args, **kwargs), self._axis)

    def type_as(self, other: Tensor) -> StandIn:
        return self._with(self._held.type_as(other), self._axis)

    def type(self, dtype: Any = None) -> Any:  # noqa: ANN401  as a tensor's
        changed = self._held.type(dtype)
        return changed if isinstance(changed, str) else self._with(changed, self._axis)

    def half(self) -> StandIn:
        return self._with(self._held.half(), self._axis)

    def bfloat16(self) -> StandIn:
        return self._with(self._held.bfloat16(), self._axis)

    def float(self) -> StandIn:
        return self._with(self._held.float(), self._axis)

    def double(self) -> StandIn:
        return self._with(self._held.double(), self._axis)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self._held.shape)}, axis={self._axis})"


def _apart(name: str) -> Callable[..., object]:
    """A special method that acts on the weight as it was: these are looked up in classes alone."""

    def method(self: StandIn, *args: object) -> object:
        return getattr(self.plain(name), name)(*args)

    return method


_SPECIAL = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod"),
    *("pow", "rpow", "neg", "pos", "abs", "lt", "le", "gt", "ge", "ne", "eq", "bool", "float"),
    *("array", "contains"),
)
for _name in _SPECIAL:
    setattr(StandIn, f"__{_name}__", _apart(f"__{_name}__"))
# identity, as of any tensor
StandIn.__hash__ = object.__hash__

_NAMES = (
    "__getitem__",
    "chunk",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "index_select",
    "permute",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "t",
    "to",
    "transpose",
    "type",
    "type_as",
    "unbind",
    "unsqueeze",
)
# functions on tensors, of which a stand-in has its own
_VIEWS: dict[object, str] = {
    getattr(space, name): name
    for space in (torch, Tensor)
    for name in _NAMES
    if hasattr(space, name)
}


def _expect_reads(name: str) -> None:
    """Raise for what writes to a weight: nobody would see what happens to a copy."""
    if name.endswith("_") and not name.endswith("__"):
        raise Unsupported(
            f"{name}: this weight has absorbed a transform, and is not written to by its name\n"
            "  load what it should be into the model before qpass changes it"
        )


def _plain(found: Any, why: str) -> Any:  # noqa: ANN401  arguments of any kind
    if isinstance(found, StandIn):
        return found.plain(why)
    if isinstance(found, list | tuple) and any(isinstance(item, StandIn) for item in found):
        return type(found)([_plain(item, why) for item in found])
    return found
