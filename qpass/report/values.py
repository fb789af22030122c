"""How does a result become JSON?"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import cast

from qpass.report.table import Table


def plain(value: object) -> object:
    """Numbers, strings, lists and dicts for `value`; what is not finite becomes None."""
    if value is None or isinstance(value, str | bool | int):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Table):
        return [plain(record) for record in value.records()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # shallow: a nested table or enumeration keeps its own way
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(key): plain(item) for key, item in items}
    if isinstance(value, frozenset | set):
        return sorted(map(str, cast("Collection[object]", value)))
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("Collection[object]", value)]
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def json_text(value: object) -> str:
    """One JSON document, indented, with a final newline."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
