"""What the gates of a changed model know: what passes at a module, and what it was before."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import cast, final

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from qpass.errors import StateError, Unsupported
from qpass.targets.changes import SAME, Change, Door, merged
from qpass.targets.conventions import asks_for_more, entrances, switches
from qpass.targets.fixed import Fixed
from qpass.targets.trees import floats, mapped

# an attribute of layers that have parts, and yet treat each row by itself
ROW_BY_ROW = "row_by_row"

_NUMBERS = itertools.count(1)

# what happened to a tensor, oldest first, or why that is not known
History = tuple[Change, ...] | str
# tensors by place in memory, which stay alive, and their histories
Seen = dict[tuple[int, int], tuple[Tensor, History]]

_NEW = "it was not there when the model was traced, and may be in another basis"
_MORE = "there were fewer of its shape when the model was traced"
_TORN = "its memory holds several values"


@final
class Gate:
    """The doors of the module at `path`, one for each time the model was changed, oldest first.

    A `simple` module treats all rows of what it is given alike, whatever their arrangement.
    """

    def __init__(
        self, family: Family, path: str, doors: Sequence[Door | None], *, simple: bool
    ) -> None:
        self.family = family
        self.path = path
        self.root = path == ""
        self.changed = any(door is not None and door.changed for door in doors)
        self.known = all(door is not None for door in doors)
        self._doors = tuple(doors)
        self._simple = simple

    def __deepcopy__(self, memo: dict[int, object]) -> Gate:
        family = copy.deepcopy(self.family, memo)
        return self if family is self.family else self._of(family)

    def _of(self, family: Family) -> Gate:
        return Gate(family, self.path, self._doors, simple=self._simple)

    def history(self, tensor: Tensor, *, leaving: bool) -> History:
        """What happened to a tensor that enters or leaves the module."""
        found: list[Change] = []
        for door in self._doors:
            change = None
            if door is not None:
                change = door.find(tensor, leaving=leaving, any_rank=self._simple)
            if change is None:
                if self.family.suspects(tensor) or (door and door.wide(tensor, leaving=leaving)):
                    return _NEW
            elif change.unclear is not None:
                return change.unclear
            elif change != SAME:
                found.append(change)
        return tuple(found)

    def original(self, tensor: Tensor, *, leaving: bool) -> Tensor:
        """What a tensor that passes here was before all changes."""
        return self._undone(tensor, self.history(tensor, leaving=leaving), leaving=leaving)

    def present(self, tensor: Tensor, *, leaving: bool) -> Tensor:
        """What a tensor of the model as it was has become."""
        history = self.history(tensor, leaving=leaving)
        for change in self._clear(history, tensor, leaving=leaving):
            tensor = change.redo(tensor, self.family.root.get_buffer)
        return tensor

    def enter(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Arguments of a call from outside, as the changed module takes them."""
        made: dict[str, object] = {}
        for name, value in kwargs.items():
            # some stand for what another module returns
            way = self.family.entrances.get(name)
            gate = self if way is None else way
            made[name] = mapped(value, functools.partial(gate.present, leaving=gate is way))
        taken = mapped(args, functools.partial(self.present, leaving=False))
        return cast("tuple[object, ...]", taken), made

    def leave(self, result: object, seen: Seen | None) -> object:
        """What the changed module returned, as the module returned it before the changes.

        `seen` holds what passed at all modules, for a call that returns values of parts, too.
        """
        surplus = self._surplus(floats(result))

        def shown(tensor: Tensor) -> Tensor:
            history = None if seen is None else seen.get(place(tensor), (tensor, None))[1]
            if history is None:
                new = _kind(tensor) in surplus
                history = _MORE if new else self.history(tensor, leaving=True)
            return self._undone(tensor, history, leaving=True)

        return mapped(result, shown)

    def remember(self, seen: Seen, value: object, *, leaving: bool) -> None:
        """Add what passes here to `seen`."""
        tensors = floats(value)
        if leaving and not self._simple:
            # what returns from parts knows better than what passes it on, perhaps with more of it
            surplus = self._surplus(tensors)
            tensors = [t for t in tensors if place(t) not in seen and _kind(t) not in surplus]
        for tensor in tensors:
            history = self.history(tensor, leaving=leaving)
            if not isinstance(history, str):
                note(seen, tensor, history)

    def _surplus(self, tensors: Sequence[Tensor]) -> set[tuple[int, int]]:
        """The shapes of which there are more tensors than the graph returned."""
        kinds: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for tensor in tensors:
            if self.family.suspects(tensor) and tensor.numel():
                kinds.setdefault(_kind(tensor), set()).add(place(tensor))
        found = set[tuple[int, int]]()
        for door in self._doors:
            for kind, places in kinds.items():
                if door is not None and 0 < door.count(*kind) < len(places):
                    found.add(kind)
        return found

    def _undone(self, tensor: Tensor, history: History, *, leaving: bool) -> Tensor:
        for change in reversed(self._clear(history, tensor, leaving=leaving)):
            tensor = change.undo(tensor, self.family.root.get_buffer)
        return tensor

    def _clear(self, history: History, tensor: Tensor, *, leaving: bool) -> tuple[Change, ...]:
        if not isinstance(history, str):
            if history and is_traced(tensor):
                raise Unsupported(
                    f"{self.path or 'the model'}: this call takes or returns values whose basis "
                    "qpass changed, and a traced graph cannot convert them\n"
                    "  trace the whole model, or call it without tracing"
                )
            return history
        raise Unsupported(
            f"{self.path or 'the model'}: a tensor of shape {list(tensor.shape)} "
            f"{'leaves' if leaving else 'enters'} here whose original value is not known: "
            f"{history}\n  look at it in a model that qpass did not change"
        )


@final
class Family:
    """What the gates of one model share.

    `modules` has a gate for each of them. `number` is for code that is being traced and
    cannot hold the family itself.
    """

    def __init__(self, root: nn.Module, generations: Sequence[Sequence[Door]]) -> None:
        self.root = root
        carried = [c for doors in generations for d in doors for c in (*d.ins, *d.outs)]
        changed = [c for c in carried if c.change != SAME]
        # a value may be shown head by head
        blocks = {s.block.width for c in changed for s in c.change.bases if s.axis == -1}
        self._widths = frozenset({c.size for c in changed if not c.change.inner} | blocks)
        self._rank = max((c.dims for c in changed if not c.change.inner), default=0)
        self._inner = frozenset((c.dims, *at) for c in changed for at in c.change.inner)
        tables = [{door.module: door for door in doors} for doors in generations]
        paths: dict[nn.Module, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
        # a module that has several names is known by the one it was called by
        self.modules = {
            module: Gate(
                self,
                names[0],
                [merged([t[name] for name in names if name in t]) for t in tables],
                simple=_is_simple(module),
            )
            for module, names in paths.items()
        }
        ways = entrances(root)
        self.entrances = {name: self.modules[module] for name, module in ways.items()}
        self._switches = switches(root)
        self._places: list[tuple[nn.Module, str, nn.Module, str]] = []
        self._enrol()

    def _enrol(self) -> None:
        # the count of hooks in the process when this model's were last looked at
        self.hooks_seen = -1
        self.hooked: list[nn.Module] = []
        self.number = next(_NUMBERS)
        _FAMILIES[self.number] = self

    @staticmethod
    def find(number: int) -> Family:
        """The family of that number."""
        return _FAMILIES[number]

    def __deepcopy__(self, memo: dict[int, object]) -> Family:
        # a part that is copied alone stays a part of this model; a copy of the model has its own
        if id(self.root) not in memo:
            return self
        made = Family.__new__(Family)
        memo[id(self)] = made
        vars(made).update({name: copy.deepcopy(v, memo) for name, v in vars(self).items()})
        made._enrol()
        return made

    def __reduce__(self) -> str:
        raise StateError(
            "a model that qpass changed cannot be pickled\n  use qpass.save and qpass.load"
        )

    @property
    def changes(self) -> bool:
        """Whether anything that modules show has changed."""
        return self._rank > 0 or bool(self._inner)

    def suspects(self, tensor: Tensor) -> bool:
        """Whether a tensor has a shape in which some changed value exists."""
        dims, shape = tensor.dim(), tensor.shape
        if 0 < dims <= self._rank and shape[-1] in self._widths:
            return True
        return any(dims == rank and shape[axis] == n for rank, axis, n in self._inner)

    def asks_for_more(self, kwargs: Mapping[str, object]) -> bool:
        """Whether a call wants values of parts of the model returned, too."""
        return asks_for_more(kwargs, self._switches)

    def keep(self, module: nn.Module) -> None:
        """Remember where in the model `module` is."""
        for parent in self.modules:
            for name, child in parent._modules.items():
                if child is not None and child is module:
                    self._places.append((parent, name, child, self.modules[module].path))

    def replaced(self) -> str | None:
        """The path of a module that is not the one that was changed, if there is one."""
        for parent, name, child, path in self._places:
            found = parent._modules.get(name)
            # a compiled module is a wrapper that holds the original one
            if found is not child and (
                found is None or vars(found).get("_modules", {}).get("_orig_mod") is not child
            ):
                return path
        return None


_FAMILIES: weakref.WeakValueDictionary[int, Family] = weakref.WeakValueDictionary()


def note(seen: Seen, tensor: Tensor, history: History) -> None:
    """Add a tensor to `seen`."""
    if tensor.numel() == 0:
        return
    _, known = seen.get(place(tensor), (None, history))
    seen[place(tensor)] = (tensor, history if known == history else _TORN)


def place(tensor: Tensor) -> tuple[int, int]:
    """Where in memory a tensor lies and how wide its rows are: the same for rows of it."""
    width = tensor.shape[-1] if tensor.dim() else 1
    try:
        where = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        # what stands for a tensor while something is traced has no memory
        return id(tensor), width
    return where, width if tensor.stride()[-1:] in ((1,), ()) else -1


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for one that a traced graph will compute."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def _kind(tensor: Tensor) -> tuple[int, int]:
    return tensor.dim(), tensor.shape[-1] if tensor.dim() else 1


def _is_simple(module: nn.Module) -> bool:
    # a transform treats rows alike, too
    parts = (child for child in module.children() if not isinstance(child, Fixed))
    return next(parts, None) is None or getattr(module, ROW_BY_ROW, False)
