"""Whether a value has a given form, and if not, where it differs."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast, final

from torch import fx
from torch._ops import OpOverload

from qpass.ir import read


@final
@dataclass(frozen=True, slots=True)
class Match:
    """What the names of a pattern stand for, and the calls it went through, root first."""

    bound: Mapping[str, object] = field(default_factory=dict[str, object])
    nodes: tuple[fx.Node, ...] = ()

    def node(self, name: str) -> fx.Node:
        """The graph value bound to `name`."""
        return cast("fx.Node", self.bound[name])

    def number(self, name: str) -> float:
        """The number bound to `name`."""
        return cast("float", self.bound[name])

    def __contains__(self, name: str) -> bool:
        return name in self.bound


@final
@dataclass(frozen=True, slots=True)
class Miss:
    """Why a value does not have the form; `depth` calls had matched before."""

    why: str
    depth: int = 0


class Pattern(abc.ABC):
    """A form of values; casts between floating types do nothing over the reals: looked through."""

    @abc.abstractmethod
    def match(self, value: object, so_far: Match) -> Match | Miss:
        """Extend `so_far` by what `value` binds, or say why it does not fit."""


def match(pattern: Pattern, value: object) -> Match | Miss:
    """What `pattern` binds on `value`, or why it does not fit."""
    return pattern.match(value, Match())


@final
@dataclass(frozen=True, slots=True)
class Var(Pattern):
    """Any graph value, without its casts unless `seen`; a second one must be the same."""

    name: str
    seen: bool = False

    def match(self, value: object, so_far: Match) -> Match | Miss:
        if not isinstance(value, fx.Node):
            return Miss(f"{value!r} is not a graph value", len(so_far.nodes))
        return _bind(self.name, value if self.seen else read.uncast(value), so_far)


@final
@dataclass(frozen=True, slots=True)
class Same(Pattern):
    """One given graph value."""

    node: fx.Node

    def match(self, value: object, so_far: Match) -> Match | Miss:
        if isinstance(value, fx.Node) and read.uncast(value) is read.uncast(self.node):
            return so_far
        return Miss(f"{value} is not {self.node}", len(so_far.nodes))


@final
@dataclass(frozen=True, slots=True)
class Num(Pattern):
    """A constant number; of a given value, if there is one."""

    name: str | None = None
    value: float | None = None

    def match(self, value: object, so_far: Match) -> Match | Miss:
        depth = len(so_far.nodes)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Miss(f"{value} is not a number known at capture", depth)
        if self.value is not None and value != self.value:
            return Miss(f"{value} is not {self.value}", depth)
        return so_far if self.name is None else _bind(self.name, float(value), so_far)


@final
@dataclass(frozen=True, slots=True)
class Call(Pattern):
    """A call of `target` whose named arguments fit; with `swap`, in either order."""

    target: OpOverload
    arguments: tuple[tuple[str, Pattern], ...]
    swap: bool = False

    def match(self, value: object, so_far: Match) -> Match | Miss:
        depth = len(so_far.nodes)
        if not isinstance(value, fx.Node):
            return Miss(f"{value!r} is not a graph value", depth)
        node = read.uncast(value)
        if not read.calls(node, self.target):
            return Miss(f"{read.target_name(node)} is not a call of {self.target}", depth)
        entered = replace(so_far, nodes=(*so_far.nodes, node))
        found = _match_all(node, self.arguments, entered)
        if isinstance(found, Match) or not self.swap:
            return found
        (first, a), (second, b) = self.arguments
        swapped = _match_all(node, ((first, b), (second, a)), entered)
        return swapped if isinstance(swapped, Match) else _deeper(found, swapped)


@final
@dataclass(frozen=True, slots=True)
class Either(Pattern):
    """The first of several forms that fits."""

    forms: tuple[Pattern, ...]

    def match(self, value: object, so_far: Match) -> Match | Miss:
        best: Miss | None = None
        for form in self.forms:
            found = form.match(value, so_far)
            if isinstance(found, Match):
                return found
            best = found if best is None else _deeper(best, found)
        return best or Miss("no form is allowed", len(so_far.nodes))


@final
@dataclass(frozen=True, slots=True)
class Where(Pattern):
    """A form with a condition on the value; `refuse` says why it does not hold, or None."""

    form: Pattern
    refuse: Callable[[fx.Node], str | None]

    def match(self, value: object, so_far: Match) -> Match | Miss:
        found = self.form.match(value, so_far)
        if isinstance(found, Miss):
            return found
        why = self.refuse(read.uncast(cast("fx.Node", value)))
        return found if why is None else Miss(why, len(found.nodes))


def call(target: OpOverload, **arguments: Pattern) -> Pattern:
    """A call of `target` whose arguments, by schema name, have these forms."""
    return Call(target, tuple(arguments.items()))


def commutative(target: OpOverload, a: Pattern, b: Pattern) -> Pattern:
    """A call of a binary `target` on `a` and `b` in either order."""
    return Call(target, (("self", a), ("other", b)), swap=True)


def unscaled(node: fx.Node) -> str | None:
    """The condition on a sum or difference that its second operand has no factor."""
    return None if read.number(node, "alpha") == 1 else "the second operand has a factor"


def either(*forms: Pattern) -> Pattern:
    """The first of `forms` that fits."""
    return Either(forms)


def _match_all(
    node: fx.Node, arguments: tuple[tuple[str, Pattern], ...], so_far: Match
) -> Match | Miss:
    found: Match | Miss = so_far
    for name, pattern in arguments:
        found = pattern.match(read.argument(node, name), found)
        if isinstance(found, Miss):
            return found
    return found


def _bind(name: str, value: object, so_far: Match) -> Match | Miss:
    if name in so_far.bound and so_far.bound[name] != value:
        return Miss(f"{name} would be two different values", len(so_far.nodes))
    return replace(so_far, bound={**so_far.bound, name: value})


def _deeper(a: Miss, b: Miss) -> Miss:
    return b if b.depth > a.depth else a
