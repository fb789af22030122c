"""How an operator's rule is registered and found."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable

import torch
from torch import fx
from torch._ops import OpOverload

from qpass.analyze.constraints import Constraints

Rule = Callable[[fx.Node, Constraints], None]

# says whether it applies; where it does not, it has said nothing
NumberRule = Callable[[fx.Node, Constraints], bool]

_RULES: dict[object, Rule] = {}
_NUMBER_RULES: dict[object, list[NumberRule]] = {}
_loaded: list[bool] = []


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a function as the rule of `targets`; one rule per operator.

    An operator that another package defines is given by its name, `package::operator`.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"{target} has two rules")
            _RULES[target] = function
        return function

    return register


def number_rule(*targets: object) -> Callable[[NumberRule], NumberRule]:
    """Register what is tried first where permutations are solved for."""

    def register(function: NumberRule) -> NumberRule:
        for target in targets:
            _NUMBER_RULES.setdefault(target, []).append(function)
        return function

    return register


def find_number_rules(target: object) -> tuple[NumberRule, ...]:
    """What is tried first for an operator where permutations are solved for."""
    _load()
    name = target._schema.name if isinstance(target, OpOverload) else None
    return (*_NUMBER_RULES.get(target, ()), *_NUMBER_RULES.get(name, ()))


def find_rule(target: object) -> Rule | None:
    """The rule of an operator, or None, which pins everything it touches."""
    _load()
    found = _RULES.get(target)
    if found is None and isinstance(target, OpOverload):
        return _RULES.get(target._schema.name)
    return found


def is_new(weight: fx.Node, neutral: type, c: Constraints) -> bool:
    """Whether a fold has made a weight all ones, or all zeros."""
    known = c.program.weight(weight)
    return known is not None and bool(known.steps) and isinstance(known.steps[-1], neutral)


def ruled_operators() -> tuple[OpOverload, ...]:
    """Every operator that has a rule and is defined by what has been imported."""
    _load()
    named = [_overloads(target) for target in _RULES if isinstance(target, str)]
    return (*(t for t in _RULES if isinstance(t, OpOverload)), *itertools.chain(*named))


def _overloads(name: str) -> tuple[OpOverload, ...]:
    """The overloads of an operator that another package defines, none where it is not there."""
    package, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, package), operator, None)
    return () if packet is None else tuple(getattr(packet, o) for o in packet.overloads())


def _load() -> None:
    if _loaded:
        return
    _loaded.append(True)
    package = importlib.import_module("qpass.analyze.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"qpass.analyze.rules.{module.name}")
