"""Is every reason for which a kernel refuses a call reached by a call?"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make test-gpu-interpret runs these", allow_module_level=True)
pytest.importorskip("triton")

from qpass.runtime.gpu import KERNELS
from qpass.runtime.target import TARGETS, target
from tests.kernels.gpu.calls import cases, refusals
from tests.kernels.gpu.planted import FOLDER


def reasons(path: Path) -> Iterator[int]:
    """The lines that return a reason, in functions that return one or None."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef) or function.returns is None:
            continue
        if ast.unparse(function.returns) != "str | None":
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Return):
                continue
            given = node.value
            text = isinstance(given, ast.Constant) and isinstance(given.value, str)
            if text or isinstance(given, ast.JoinedStr):
                yield node.lineno


def traced(run: Callable[[], object]) -> set[tuple[str, int]]:
    """The lines of kernel files that run."""
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        path = frame.f_code.co_filename
        if FOLDER.name not in path:
            return None
        if event == "line":
            seen.add((Path(path).name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return seen


def test_every_reason_is_reached() -> None:
    calls = [*cases(), *refusals()]

    def ask() -> None:
        for kernel in KERNELS:
            for case in calls:
                if case.operator == kernel.operator:
                    for on in TARGETS:
                        kernel.accepts(case.call(target(on.name)))

    seen = traced(ask)
    known = {(path.name, line) for path in FOLDER.glob("*.py") for line in reasons(path)}
    assert known
    assert sorted(known - seen) == []
