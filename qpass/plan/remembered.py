"""Which plan earlier graphs with the same parameters were given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qpass.plan.plan import Plan
from qpass.plan.recipe import Recipe

_LOCK = threading.RLock()
_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remembered(tensors: Iterable[Tensor], recipe: Recipe, make: Callable[[], Plan]) -> Plan:
    """The plan of the first graph that had all of `tensors`; `make` chooses one where none had.

    The graphs of one model, such as those for a prompt and for a token, thus agree on what they
    do to its weights. Plans are forgotten with the tensors.
    """
    with _LOCK:
        known = [cast("dict[Recipe, Plan]", _PLANS.setdefault(t, {})) for t in tensors]
        found = [plans.get(recipe) for plans in known]
        if found and found[0] is not None and all(plan is found[0] for plan in found):
            return found[0]
        plan = make()
        for plans in known:
            plans[recipe] = plan
        return plan
