"""Does the README say what the registries hold, and where each format runs?"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qpass
import qpass.backend
import qpass.targets.inductor
from qpass.errors import BadInput, Unsupported
from qpass.formats import FORMATS, QuantSpec
from qpass.plan import Recipe
from qpass.rounding import ROUNDINGS
from qpass.targets.layers import QuantizedLinear
from tests.rounding.layers import statistics

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- support -->\n", "<!-- /support -->\n"
WIDTH = 64
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, WIDTH)).eval()


def specs() -> list[QuantSpec]:
    """Every weight format, with and without offsets; a block that every target knows."""
    signed = [f for f in FORMATS if f.low < 0]
    ordered = sorted(signed, key=lambda f: (f.bits, f.name))
    found: list[QuantSpec] = []
    for f in ordered:
        plain = QuantSpec(f.name, 16, -1, "float16")
        found.append(plain)
        with contextlib.suppress(BadInput):
            found.append(dataclasses.replace(plain, symmetric=False))
    return found


def roundings(spec: QuantSpec) -> str:
    """The methods that give codes of a format."""
    stats = statistics(X.double(), 48)
    found: list[str] = []
    for rounding in ROUNDINGS:
        try:
            rounding.round(torch.randn(48, WIDTH), spec, stats)
        except (BadInput, Unsupported):
            continue
        found.append(rounding.name)
    return "all" if len(found) == len(ROUNDINGS) else ", ".join(sorted(found))


def in_module(recipe: Recipe) -> nn.Module | None:
    try:
        small = qpass.quantize(model(), recipe, inputs=X)
    except Unsupported:
        return None
    return small if any(isinstance(m, QuantizedLinear) for m in small.modules()) else None


def in_graph(recipe: Recipe) -> bool:
    options = {"recipe": recipe, "strict": True}
    torch._dynamo.reset()
    compiled = torch.compile(model(), backend=lambda *g: qpass.backend.backend(*g, options=options))
    try:
        with torch.no_grad():
            compiled(X)
    except Unsupported:
        return False
    return True


def in_onnx(small: nn.Module | None, file: Path) -> str:
    if small is None:
        return "no"
    report = qpass.export_onnx(small, X, file)
    return "yes" if report.linears == report.fusible > 0 else "decoded at each call"


def matrix(folder: Path) -> str:
    head = "| weights | bits | roundings | `nn.Module`, checkpoint | `torch.compile` | ONNX |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for spec in specs():
        recipe = Recipe("one", spec, rotation="off", head="float", embedding="float")
        small = in_module(recipe)
        cells = [
            f"{spec.format}{'' if spec.symmetric else ', with offsets'}",
            str(spec.codes.bits),
            roundings(spec),
            "no" if small is None else "yes",
            "yes" if in_graph(recipe) else "no",
            in_onnx(small, folder / "model.onnx"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for key, kind in (("without data", False), ("with calibration data", True)):
        names = sorted(f"`{r.name}`" for r in ROUNDINGS if bool(r.needs) == kind)
        lines += ["", f"Roundings {key}: {', '.join(names)}."]
    return "\n".join(lines) + "\n"


def test_the_support_matrix(tmp_path: Path, monkeypatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", lambda graph, *_, **__: graph)
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    said, _, after = rest.partition(END)
    found = matrix(tmp_path)
    if request.config.getoption("--update-golden"):
        README.write_text(before + BEGIN + found + END + after, encoding="utf-8")
        return
    assert said == found, "run pytest --update-golden and read what it writes"


def test_every_path_that_the_readme_names_exists() -> None:
    named = re.findall(r"`((?:qpass|kernels|tests)/[\w/.]+)", README.read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_command_is_in_the_readme() -> None:
    from qpass.cli.main import app

    text = README.read_text(encoding="utf-8")
    names = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    assert [name for name in names if f"qpass {name}" not in text] == []
