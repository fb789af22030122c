"""What a module's gate knows: which tensors pass through it, and what they were before."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast, final

from torch import Tensor, nn

from qpass.errors import StateError, Unsupported
from qpass.targets.doors import SAME, Change, Door
from qpass.targets.trees import each, mapped

_NUMBERS = itertools.count(1)


@final
@dataclass(eq=False)
class Family:
    """What the gates of one model share.

    `suspects` are the shapes, as (dimensions, last size), that changed values have anywhere;
    `entrances` say for a keyword of the model from which gate such a value would come. `number` is
    for code that is being traced and cannot hold the family itself.
    """

    root: nn.Module
    suspects: frozenset[tuple[int, int | None]]
    gates: dict[str, Gate] = field(default_factory=dict)
    entrances: dict[str, Gate] = field(default_factory=dict)
    places: list[tuple[nn.Module, str, nn.Module, str]] = field(default_factory=list)
    number: int = 0

    @staticmethod
    def of(root: nn.Module, generations: Sequence[Sequence[Door]]) -> Family:
        carried = [c for doors in generations for door in doors for c in (*door.ins, *door.outs)]
        family = Family(root, frozenset((c.dims, c.size) for c in carried if c.change != SAME))
        family._enrol()
        return family

    @staticmethod
    def find(number: int) -> Family:
        return _FAMILIES[number]

    def _enrol(self) -> None:
        self.number = next(_NUMBERS)
        _FAMILIES[self.number] = self

    def __setstate__(self, state: dict[str, object]) -> None:
        # a copy is a family of its own
        vars(self).update(state)
        self._enrol()

    def tensor(self, path: str) -> Tensor:
        """A buffer of the model, by path."""
        return self.root.get_buffer(path)

    def keep(self, path: str) -> None:
        """Remember which module is at `path`."""
        if path:
            owner, _, name = path.rpartition(".")
            parent = self.root.get_submodule(owner)
            child = parent._modules[name]
            assert child is not None
            self.places.append((parent, name, child, path))

    def replaced(self) -> str | None:
        """The path of a module that is not the one that was changed, if there is one."""
        for parent, name, child, path in self.places:
            found = parent._modules.get(name)
            # a compiled module is a wrapper that holds the original one
            if found is not child and (
                found is None or vars(found).get("_modules", {}).get("_orig_mod") is not child
            ):
                return path
        return None

    def check(self) -> None:
        """Raise unless all changed modules are where they were."""
        if (path := self.replaced()) is not None:
            raise self.broken(path)

    @staticmethod
    def broken(path: str) -> StateError:
        return StateError(
            f"{path} was replaced after qpass changed the basis of its values\n"
            "  put adapters and resized embeddings in first, merged, and then call qpass"
        )


_FAMILIES: weakref.WeakValueDictionary[int, Family] = weakref.WeakValueDictionary()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """The doors of the module at `path`, one for each time the model was changed, oldest first."""

    family: Family
    path: str
    doors: tuple[Door | None, ...]

    @property
    def root(self) -> bool:
        return self.path == ""

    @property
    def changed(self) -> bool:
        return any(door is not None and door.changed for door in self.doors)

    def original(self, tensor: Tensor, *, leaving: bool) -> Tensor:
        """What a tensor that passes here was before all changes."""
        for door in reversed(self.doors):
            change = self._change(door, tensor, leaving=leaving)
            tensor = tensor if change == SAME else change.undo(tensor, self.family.tensor)
        return tensor

    def present(self, tensor: Tensor, *, leaving: bool) -> Tensor:
        """What a tensor of the model as it was has become."""
        for door in self.doors:
            change = self._change(door, tensor, leaving=leaving)
            tensor = tensor if change == SAME else change.redo(tensor, self.family.tensor)
        return tensor

    def enter(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Arguments of a call from outside, as the changed module takes them."""

        def present(tensor: Tensor) -> Tensor:
            return self.present(tensor, leaving=False)

        entered: dict[str, object] = {}
        for name, value in kwargs.items():
            gate = self.family.entrances.get(name)
            if gate is None:
                entered[name] = mapped(value, present)
            else:
                entered[name] = mapped(value, lambda t, gate=gate: gate.present(t, leaving=True))
        return cast("tuple[object, ...]", mapped(args, present)), entered

    def strange(self, value: object) -> bool:
        """Whether a value of a call from outside would have to be converted."""
        return any(
            self._change(door, tensor, leaving=False, refuse=False) != SAME
            for tensor in each(value)
            for door in self.doors
        )

    def _change(
        self, door: Door | None, tensor: Tensor, *, leaving: bool, refuse: bool = True
    ) -> Change:
        carried = () if door is None else (door.outs if leaving else door.ins)
        found = {c.change for c in carried if c.fits(tensor)}
        if not found and not self._suspect(tensor):
            return SAME
        [change] = found if len(found) == 1 else [_UNKNOWN]
        if change.unclear is not None and refuse:
            raise Unsupported(
                f"{self.path or 'the model'}: a tensor of shape {list(tensor.shape)} "
                f"{'leaves' if leaving else 'enters'} here whose original value is not known: "
                f"{change.unclear}\n  look at it in a model that qpass did not change"
            )
        return change

    def _suspect(self, tensor: Tensor) -> bool:
        kinds = ((tensor.dim(), tensor.shape[-1] if tensor.dim() else 1), (tensor.dim(), None))
        return any(kind in self.family.suspects for kind in kinds)


_UNKNOWN = Change(unclear="it was not there when the model was traced, and may be in another basis")
