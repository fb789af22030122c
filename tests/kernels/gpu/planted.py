"""Kernels with a defect put in, to show that the tests would find it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import qpass._kernels.gpu
from qpass.registry import Registry
from qpass.runtime import gpu
from qpass.runtime.gpu import KERNELS, Kernel

FOLDER = Path(next(iter(qpass._kernels.gpu.__path__)))


def planted(
    name: str, edits: dict[str, str], to: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """Load a copy of a kernel file in which each key of `edits` has become its value.

    Files that are loaded after it find it in the place of its original.
    """
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    for old, new in edits.items():
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    path = to / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"qpass._kernels.gpu.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Registry[Kernel]:
    """Where kernels register that are loaded in a test."""
    len(KERNELS)  # the real ones come first
    empty: Registry[Kernel] = Registry("planted kernel", "tests")
    monkeypatch.setattr(empty, "_loaded", True)
    monkeypatch.setattr(gpu, "KERNELS", empty)
    return empty
