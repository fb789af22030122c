"""Named families of plug-ins: one package per family, one module per plug-in."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from qpass.errors import UnknownName


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UnknownName(f"no {kind} named {name!r}{hint} (known: {', '.join(names)})")


class Registry(Collection[T], Generic[T]):
    """Maps names to plug-ins; imports every module of `package` on first use."""

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._items: dict[str, T] = {}
        self._loaded = False

    def add(self, item: T) -> T:
        """Register `item` under its name and return it."""
        if item.name in self._items:
            raise ValueError(f"{self._kind} {item.name!r} is registered twice")
        self._items[item.name] = item
        return item

    def __getitem__(self, name: str) -> T:
        self._load()
        if (item := self._items.get(name)) is None:
            raise unknown(self._kind, name, self._items)
        return item

    def __iter__(self) -> Iterator[T]:
        self._load()
        return iter(self._items.values())

    def __len__(self) -> int:
        self._load()
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return any(item is known or item == known.name for known in self)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # set first: a plug-in may look up another while it loads
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
