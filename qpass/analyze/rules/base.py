"""How an operator's rule is registered and found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from torch import fx
from torch._ops import OpOverload

from qpass.analyze.constraints import Constraints

Rule = Callable[[fx.Node, Constraints], None]

_RULES: dict[object, Rule] = {}
_loaded: list[bool] = []


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a function as the rule of `targets`; one rule per operator."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"{target} has two rules")
            _RULES[target] = function
        return function

    return register


def find_rule(target: object) -> Rule | None:
    """The rule of an operator, or None, which pins everything it touches."""
    _load()
    return _RULES.get(target)


def ruled_operators() -> tuple[OpOverload, ...]:
    """Every operator that has a rule."""
    _load()
    return tuple(target for target in _RULES if isinstance(target, OpOverload))


def _load() -> None:
    if _loaded:
        return
    _loaded.append(True)
    package = importlib.import_module("qpass.analyze.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"qpass.analyze.rules.{module.name}")
