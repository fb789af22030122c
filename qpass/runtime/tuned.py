"""Configurations of GPU kernels: which one serves a call, and tables of those that were measured.

A kernel lists configurations for a call and has a model of their cost. A table says which was
fastest, by kernel and call, on one kind of GPU; it has the last word where it names one of those
that the kernel lists. `QPASS_GPU_TABLE` is the path of a table; `use` takes one from a program.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from qpass.errors import BadInput

if TYPE_CHECKING:
    from qpass.runtime.gpu import Call, Kernel

VARIABLE = "QPASS_GPU_TABLE"
VERSION = 1

Configuration = Any  # a frozen dataclass of numbers and truth values
Fields = Mapping[str, int | bool]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Tuning:
    """How a kernel is configured.

    `key` names what a choice may depend on; calls of one key are served alike. `candidates` are the
    configurations worth timing, all legal, and `choose` takes one of them by what it costs. `run`
    serves a call with any.
    """

    key: Callable[[Call], str]
    candidates: Callable[[Call], Sequence[Configuration]]
    choose: Callable[[Call], Configuration]
    run: Callable[[Call, Configuration], Any]


@final
@dataclass(frozen=True, slots=True)
class Table:
    """What was fastest on a kind of GPU: fields of configurations, by kernel and key."""

    target: str
    gpu: str
    fastest: Mapping[str, Mapping[str, Fields]] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the table: the same table is the same bytes."""
        held = {"version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps(held, indent=1, sort_keys=True) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Table:
        """Read a table; what is none is a `BadInput`."""
        hint = f'\n  write one with make gpu-check ARGS="--tune --table {path}"'
        try:
            held: object = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: no table of GPU configurations: {error}{hint}") from error
        if not isinstance(held, dict) or cast("Any", held).get("version") != VERSION:
            raise BadInput(f"{path}: no table of GPU configurations of version {VERSION}{hint}")
        found = cast("dict[str, Any]", held)
        names, fastest = (found.get("target"), found.get("gpu")), found.get("fastest")
        if not all(isinstance(name, str) for name in names) or not _is_nested(fastest):
            raise BadInput(f"{path}: a table has a target, a gpu and what was fastest{hint}")
        return Table(*cast("tuple[str, str]", names), fastest=cast("Any", fastest))

    def joined(self, other: Table) -> Table:
        """The entries of both tables, of which those of the other win."""
        kernels = {**self.fastest, **other.fastest}
        fastest = {
            name: {**self.fastest.get(name, {}), **other.fastest.get(name, {})} for name in kernels
        }
        return dataclasses.replace(other, fastest=fastest)


def _is_nested(value: object) -> bool:
    """Whether a value maps names to names to fields."""
    return isinstance(value, dict) and all(
        isinstance(keys, dict)
        and all(isinstance(fields, dict) for fields in cast("dict[str, object]", keys).values())
        for keys in cast("dict[str, object]", value).values()
    )


_USED: list[Table] = []
_CHOSEN: dict[tuple[str, str, int, str], Configuration] = {}


def use(table: Table | None) -> None:
    """Let a table choose from here on, or with None that of the environment."""
    _USED[:] = [] if table is None else [table]
    _CHOSEN.clear()


def configuration(name: str, tuning: Tuning, call: Call) -> Configuration:
    """How a kernel serves a call: as the table in use says, or as the kernel's model does."""
    key = tuning.key(call)
    at = (name, call.target.name, call.target.multiprocessors, key)
    if at not in _CHOSEN:
        _CHOSEN[at] = _measured(name, tuning, key, call) or tuning.choose(call)
    return _CHOSEN[at]


def launch(name: str, tuning: Tuning) -> Callable[[Call], Any]:
    """What serves the calls of the kernel of this name in the configurations chosen for them."""
    return lambda call: tuning.run(call, configuration(name, tuning, call))


def _measured(name: str, tuning: Tuning, key: str, call: Call) -> Configuration | None:
    """The candidate that the table in use names; tables of other GPUs and versions name none."""
    table = _USED[0] if _USED else _of_environment(os.environ.get(VARIABLE, ""))
    if table is None or table.target != call.target.name:
        return None
    fields = table.fastest.get(name, {}).get(key)
    if fields is None:
        return None
    return next((c for c in tuning.candidates(call) if _fields(c) == fields), None)


@functools.cache
def _of_environment(path: str) -> Table | None:
    return Table.load(path) if path else None


def _fields(configuration: Configuration) -> Fields:
    """What identifies a configuration."""
    compared = (f.name for f in dataclasses.fields(configuration) if f.compare)
    return {name: getattr(configuration, name) for name in compared}


def tune(
    gpu: str,
    calls: Iterable[tuple[Kernel, Call]],
    seconds: Callable[[Kernel, Call, Configuration], float | None],
) -> Table:
    """The fastest candidate for each call and kernel, by a clock; None: it does not run."""
    fastest: dict[str, dict[str, Fields]] = {}
    target = ""
    for kernel, call in calls:
        tuning, target = cast("Tuning", kernel.tuning), call.target.name
        timed = [(seconds(kernel, call, c), c) for c in tuning.candidates(call)]
        ran = [(took, i, c) for i, (took, c) in enumerate(timed) if took is not None]
        if ran:
            best = min(ran, key=lambda one: one[:2])[2]
            fastest.setdefault(kernel.name, {})[tuning.key(call)] = _fields(best)
    return Table(target, gpu, fastest)


def bucket(rows: int) -> int:
    """Row counts that are served alike: the next power of two."""
    return 1 << max(0, rows - 1).bit_length()
